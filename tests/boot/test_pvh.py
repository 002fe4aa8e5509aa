"""PVH kernels: what they find in memory, and which ones are refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from boot.kernels import BASE, MIB, elf32, pvh_elf, pvh_note
from ringfence.boot.loader import load_guest, recognize
from ringfence.boot.pvh import START_MAGIC, entry_point
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory


@pytest.fixture(name="memory")
def memory_fixture() -> Iterator[GuestMemory]:
    """8 MiB of guest RAM."""
    memory = GuestMemory(8 * MIB)
    yield memory
    memory.close()


def test_information(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1" * 5000)
    state = load_guest(
        memory, kernel=pvh_elf("hlt"), initrd=tmp_path / "one", cmdline="x y", rsdp=0xE0000
    )
    assert (state.cr0 & 1, state.cr0 >> 31, state.efer) == (1, 0, 0)
    assert state.rip == BASE + 1
    magic, version, flags, count, modules, cmdline, rsdp, ranges, rows, zero = struct.unpack(
        "<4I4Q2I", memory.read(state.rbx, 56)
    )
    assert (magic, version, flags, count, rsdp, zero) == (START_MAGIC, 1, 0, 1, 0xE0000, 0)
    assert memory.read(cmdline, 4) == b"x y\0"
    base, size, text, reserved = struct.unpack("<4Q", memory.read(modules, 32))
    assert memory.read(base, size) == b"1" * 5000
    assert memory.read(text, 8) == str(tmp_path / "one").encode()[:8]
    assert reserved == 0
    found = list(struct.iter_unpack("<QQII", memory.read(ranges, 24 * rows)))
    assert (0x100000, 7 * MIB, 1, 0) in found
    assert all(a.end <= b.base for a, b in pairwise(state.placements))


def test_recognized(elf: Callable[..., bytes]) -> None:
    assert recognize(pvh_elf("hlt")) == "pvh"
    assert recognize(pvh_elf("hlt") + b"Linux version 6.1.0") == "linux"
    assert recognize(elf()) == "linux"
    assert entry_point(elf32(((BASE, b"x", 1),), BASE, note=pvh_note(BASE, 8))) == BASE


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (elf32(((BASE, b"x", 1),), BASE), "no PVH entry point"),
        (elf32(((BASE, b"x", 1),), BASE, note=pvh_note(BASE)[:-2]), "no PVH entry point"),
        (elf32(((BASE, b"x", 1),), BASE, note=b"\xff" * 64), "no PVH entry point"),
        (elf32(((BASE, b"x", 1),), BASE, note=pvh_note(BASE + 1)), "outside"),
        (elf32(((BASE, b"x", 1),), BASE, note=pvh_note(BASE), machine=40), "another machine"),
        (b"MZ", "no ELF file"),
    ],
)
def test_refused(kernel: bytes, says: str, memory: GuestMemory) -> None:
    with pytest.raises(ImageError, match=says):
        load_guest(memory, kernel=kernel, boot="pvh")
    assert not any(memory.read(0, 1 << 20))


def test_mangled_files_never_surprise(memory: GuestMemory) -> None:
    source = random.Random(8)
    whole = pvh_elf("hlt")
    for _ in range(500):
        mangled = bytearray(whole)
        for _ in range(source.randrange(1, 5)):
            mangled[source.randrange(4, len(mangled))] = source.randrange(256)
        try:
            load_guest(memory, kernel=bytes(mangled), boot="pvh")
        except ImageError as error:
            assert "\n" not in str(error)
