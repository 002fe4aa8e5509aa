"""Multiboot kernels: what they find in memory, and which ones are refused."""

from __future__ import annotations

import gzip
import lzma
import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from boot.kernels import BASE, MIB, elf32, multiboot_elf, multiboot_flat, multiboot_header
from ringfence.boot.layout import BootState
from ringfence.boot.loader import load_guest, recognize
from ringfence.boot.multiboot import LOADED_MAGIC, find_header
from ringfence.errors import ImageError, UsageError
from ringfence.memory.ram import GuestMemory


@pytest.fixture(name="memory")
def memory_fixture() -> Iterator[GuestMemory]:
    """8 MiB of guest RAM."""
    memory = GuestMemory(8 * MIB)
    yield memory
    memory.close()


def text_at(memory: GuestMemory, address: int) -> str:
    """A NUL-terminated string."""
    return memory.read(address, 4096).split(b"\0", 1)[0].decode()


def words(memory: GuestMemory, address: int, count: int) -> tuple[int, ...]:
    """32-bit words."""
    return struct.unpack(f"<{count}I", memory.read(address, 4 * count))


def check_state(state: BootState) -> None:
    assert state.rax == LOADED_MAGIC
    assert (state.cr0 & 1, state.cr0 >> 31, state.efer, state.cr4) == (1, 0, 0, 0)


def test_information(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1" * 5000)
    (tmp_path / "two").write_bytes(b"22")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(multiboot_elf("hlt"))
    state = load_guest(
        memory,
        kernel=kernel,
        initrd=tmp_path / "one",
        modules=[f"{tmp_path / 'two'} a=b c"],
        cmdline="x y",
    )
    check_state(state)
    assert memory.read(state.rip, 1) == b"\xf4"
    info = words(memory, state.rbx, 17)
    assert info[0] == 0x24D
    assert info[1:3] == (639, 7 * 1024)
    assert text_at(memory, info[4]) == f"{kernel} x y"
    assert text_at(memory, info[16]) == "Ringfence"
    assert info[5] == 2
    first, second = struct.iter_unpack("<IIII", memory.read(info[6], 32))
    assert memory.read(first[0], first[1] - first[0]) == b"1" * 5000
    assert memory.read(second[0], second[1] - second[0]) == b"22"
    assert not (first[0] | second[0]) & 0xFFF
    assert text_at(memory, first[2]) == str(tmp_path / "one")
    assert text_at(memory, second[2]) == f"{tmp_path / 'two'} a=b c"
    assert info[11] % 24 == 0
    ranges = list(struct.iter_unpack("<IQQI", memory.read(info[12], info[11])))
    assert all(size == 20 for size, *_ in ranges)
    assert (0x100000, 7 * MIB, 1) in [row[1:] for row in ranges]
    assert all(a.end <= b.base for a, b in pairwise(state.placements))


def test_kludge(memory: GuestMemory) -> None:
    kernel = multiboot_flat("nop\nhlt")
    memory.write(BASE, b"\xaa" * 0x1000)
    state = load_guest(memory, kernel=kernel)
    check_state(state)
    assert memory.read(state.rip, 3) == b"\x90\xf4\0"
    assert b"not loaded" not in memory.read(BASE, 0x1000)
    assert memory.read(state.rip + 2, 0x100) == bytes(0x100)  # .bss


def test_64_bit_elf_is_entered_in_32_bit_mode(memory: GuestMemory, elf: object) -> None:
    assert callable(elf)
    text = multiboot_header() + b"\xf4"
    state = load_guest(memory, kernel=elf(((BASE, text, 0x100),), entry=BASE + 12))
    check_state(state)
    assert state.rip == BASE + 12


def test_packed(memory: GuestMemory) -> None:
    for pack in (gzip.compress, lzma.compress):
        state = load_guest(memory, kernel=pack(multiboot_elf("hlt")))
        check_state(state)
        assert memory.read(state.rip, 1) == b"\xf4"


def test_recognized() -> None:
    assert recognize(multiboot_elf("hlt")) == "multiboot"
    assert recognize(multiboot_flat("hlt")) == "multiboot"
    late = bytes(8184) + multiboot_header()
    assert find_header(late) is None  # it ends beyond the first 8192 bytes
    assert find_header(bytes(8180) + multiboot_header()) is not None
    assert find_header(b"\0" + multiboot_header()) is None  # not aligned
    spoilt = bytearray(multiboot_header())
    spoilt[8] ^= 1
    assert find_header(bytes(spoilt)) is None
    # Something that only looks like a header doesn't hide one behind it.
    assert find_header(bytes(spoilt) + multiboot_header()) is not None


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (elf32(((BASE, multiboot_header(1 << 4) + b"\xf4", 13),), BASE), "features"),
        (bytes(40) + multiboot_header(1 << 16, 1, 2, 3, 4, 5), "damaged"),
        (multiboot_header(1 << 16, BASE, BASE, BASE + 1 * MIB, 0, BASE), "damaged"),
        (multiboot_header(1 << 16, BASE, BASE, BASE - 8, 0, BASE), "damaged"),
        (multiboot_header(1 << 16, BASE, BASE, 0, 0, BASE + 1000), "outside"),
        (multiboot_header(1 << 16, 0x8000, 0x8000, 0, 0, 0x8000), "1 MiB or above"),
        (multiboot_header(1 << 16, BASE, BASE, 0, 0xFFFF_FFF0, BASE), "memory"),
        (multiboot_header(), "no ELF file"),
        (elf32(((0x1000, multiboot_header(), 32),), 0x1000), "or above"),
        (elf32(((MIB * 7, multiboot_header(), 2 * MIB),), MIB * 7), "memory"),
    ],
)
def test_refused(kernel: bytes, says: str, memory: GuestMemory) -> None:
    with pytest.raises(ImageError, match=says):
        load_guest(memory, kernel=kernel, boot="multiboot")
    assert not any(memory.read(0, 1 << 20))


def test_bad_modules(memory: GuestMemory, tmp_path: Path) -> None:
    kernel = multiboot_elf("hlt")
    with pytest.raises(ImageError, match="does not exist"):
        load_guest(memory, kernel=kernel, modules=["/none such"])
    with pytest.raises(UsageError, match="names no file"):
        load_guest(memory, kernel=kernel, modules=[" x"])
    (tmp_path / "m").write_bytes(b"m")
    with pytest.raises(UsageError, match="at most 256"):
        load_guest(memory, kernel=kernel, modules=[str(tmp_path / "m")] * 257)
    with pytest.raises(UsageError, match="shorten"):
        load_guest(memory, kernel=kernel, modules=[f"{tmp_path / 'm'} {'x' * 65536}"])
    (tmp_path / "m").write_bytes(bytes(6 * MIB))
    with pytest.raises(ImageError, match="at least 9 MiB"):
        load_guest(memory, kernel=kernel, modules=[str(tmp_path / "m")])
    with pytest.raises(ImageError, match="no multiboot header"):
        load_guest(memory, kernel=b"\x7fELF", boot="multiboot")
    with pytest.raises(UsageError, match="unknown"):
        load_guest(memory, kernel=kernel, boot="floppy")


def test_mangled_files_never_surprise(memory: GuestMemory) -> None:
    source = random.Random(7)
    for whole in (multiboot_elf("hlt"), multiboot_flat("hlt")):
        for _ in range(500):
            mangled = bytearray(whole[: source.choice([len(whole), source.randrange(len(whole))])])
            for _ in range(source.randrange(4)):
                if mangled:
                    mangled[source.randrange(len(mangled))] = source.randrange(256)
            try:
                load_guest(memory, kernel=bytes(mangled), boot="multiboot")
            except ImageError as error:
                assert "\n" not in str(error)
