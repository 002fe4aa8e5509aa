"""ELF kernels are checked before anything is stored."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ringfence.boot.elf import load_segments, read_segments
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory

MIB = 1 << 20
Maker = Callable[..., bytes]


def test_segments_are_stored_and_zeroed(elf: Maker) -> None:
    memory = GuestMemory(8 * MIB)
    memory.write(MIB, b"\xaa" * 0x4000)
    image = read_segments(elf(((MIB, b"code", 0x1000), (3 * MIB, b"data", 4)), entry=MIB + 2))
    load_segments(memory, image)
    assert memory.read(MIB, 0x1001) == b"code" + bytes(0xFFC) + b"\xaa"
    assert memory.read(3 * MIB, 5) == b"data\0"
    assert (image.entry, image.base, image.end) == (MIB + 2, MIB, 3 * MIB + 4)
    memory.close()


def test_virtual_entry_becomes_physical(elf: Maker) -> None:
    base = 0xFFFFFFFF80000000
    image = read_segments(elf(virtual=base, entry=base + 16 * MIB + 64))
    assert image.entry == 16 * MIB + 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"klass": 3}, "."),
        ({"data": 2}, "another machine|damaged"),
        ({"machine": 183}, "e_machine 183"),
        ({"machine": 3}, "e_machine 3"),
        ({"type": 1}, "no executable"),
        ({"phnum": 0}, "no segment"),
        ({"phnum": 2000}, "cut off"),
        ({"phnum": 0xFFFF}, "."),
        ({"phoff": 1 << 40}, "cut off"),
        ({"phentsize": 32}, "program headers"),
        ({"entry": 5}, "outside"),
        ({"segments": ((0x1000, b"x", 1),), "entry": 0x1000}, "or above"),
        ({"segments": ((16 * MIB, b"xyz", 1),)}, "larger in the file"),
        ({"segments": ((16 * MIB, b"x", 99), (16 * MIB + 98, b"y", 1))}, "overlap"),
        ({"segments": ((1 << 60, b"x", 1),), "entry": 1 << 60}, "damaged"),
    ],
)
def test_bad_elf(changes: dict[str, int], says: str, elf: Maker) -> None:
    with pytest.raises(ImageError, match=says):
        read_segments(elf(**changes))


def test_cut_off_anywhere(elf: Maker) -> None:
    whole = elf()
    for length in [*range(130), len(whole) // 2, len(whole) - 1]:
        with pytest.raises(ImageError):
            read_segments(whole[:length])


def test_beyond_memory(elf: Maker) -> None:
    memory = GuestMemory(16 * MIB)
    with pytest.raises(ImageError, match="at least 20 MiB"):
        load_segments(memory, read_segments(elf()))
    memory.close()


def test_mangled_headers_never_surprise(elf: Maker) -> None:
    source = random.Random(4)
    whole = elf(((MIB, b"code" * 20, 0x1000), (3 * MIB, b"data", 4)), entry=MIB)
    for _ in range(1000):
        mangled = bytearray(whole)
        for _ in range(source.randrange(1, 6)):
            mangled[source.randrange(4, 64 + 2 * 56)] = source.randrange(256)
        try:
            read_segments(bytes(mangled))
        except ImageError as error:
            assert "\n" not in str(error)
