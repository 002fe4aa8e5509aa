"""Guest-linear memory as a debugger reads and writes it: page by page, as a vCPU maps it.

Permissions don't count, so that breakpoints can be set in read-only code, and devices are not
touched: a page that is not RAM can't be written and reads as ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ringfence.memory.ram import PAGE, GuestMemory

Translate = Callable[[int], "int | None"]
"""Guest-physical address of a linear one; None where nothing is mapped."""
MASK64 = (1 << 64) - 1


def _pieces(translate: Translate, address: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Offset, guest-physical address and length of each page's part; IndexError if unmapped."""
    done = 0
    while done < length:
        at = (address + done) & MASK64
        size = min(PAGE - at % PAGE, length - done)
        physical = translate(at)
        if physical is None:
            raise IndexError(f"guest-virtual {at:#x} is not mapped")
        yield done, physical, size
        done += size


def read_linear(memory: GuestMemory, translate: Translate, address: int, length: int) -> bytes:
    """Bytes at a linear address.

    Raises
    ------
    IndexError
        A page of them is not mapped.
    """
    found = bytearray()
    for _, physical, size in _pieces(translate, address, length):
        try:
            found += memory.read(physical, size)
        except IndexError:
            found += b"\xff" * size
    return bytes(found)


def write_linear(memory: GuestMemory, translate: Translate, address: int, data: bytes) -> None:
    """Change bytes at a linear address, all or none.

    Raises
    ------
    IndexError
        A page of them is not mapped, or not RAM.
    """
    pieces = list(_pieces(translate, address, len(data)))
    for _, physical, size in pieces:
        memory.offset(physical, size)
    for done, physical, size in pieces:
        memory.dma_write(physical, data[done : done + size])
