"""What load_linux leaves in memory, and what it refuses."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from ringfence.boot.layout import (
    CMDLINE_BASE,
    GDT_64,
    PML4_BASE,
    BootState,
    identity_tables,
    memory_map,
)
from ringfence.boot.linux import ZERO_PAGE, load_linux
from ringfence.boot.params import E820, BootParams
from ringfence.errors import ImageError, UsageError
from ringfence.memory.ram import GuestMemory, Region

MIB = 1 << 20
Maker = Callable[..., bytes]


@pytest.fixture(name="memory")
def memory_fixture() -> Iterator[GuestMemory]:
    """64 MiB of guest RAM."""
    memory = GuestMemory(64 * MIB)
    yield memory
    memory.close()


def zero_page(memory: GuestMemory, state: BootState) -> BootParams:
    params = BootParams()
    params.raw[:] = memory.read(state.rsi, 4096)
    return params


@pytest.mark.parametrize("kind", ["bzimage", "vmlinux"])
def test_zero_page(kind: str, memory: GuestMemory, elf: Maker, bzimage: Maker, pack: Maker) -> None:
    kernel = elf() if kind == "vmlinux" else bzimage(pack("zstd", elf()))
    state = load_linux(memory, kernel=kernel, initrd=b"i" * 5000, cmdline="a=b", rsdp=0xE0000)
    params = zero_page(memory, state)
    assert params.header == int.from_bytes(b"HdrS", "little")
    assert params.boot_flag == 0xAA55
    assert params.type_of_loader == 0xFF
    assert params.loadflags == 1  # LOADED_HIGH; no KASLR_FLAG
    assert params.acpi_rsdp_addr == 0xE0000
    assert params.sentinel == 0
    assert params.setup_data == 0
    assert params.cmdline_size == 2047
    assert memory.read(params.cmd_line_ptr, 4) == b"a=b\0"
    assert memory.read(params.ramdisk_image, params.ramdisk_size) == b"i" * 5000
    assert params.ramdisk_image == 64 * MIB - 8192
    assert (state.rip, state.rsi) == (16 * MIB, ZERO_PAGE)
    assert memory.read(state.rip, 256) == bytes(range(256))


def test_no_initrd(memory: GuestMemory, elf: Maker) -> None:
    params = zero_page(memory, load_linux(memory, kernel=elf()))
    assert (params.ramdisk_image, params.ramdisk_size) == (0, 0)
    assert memory.read(CMDLINE_BASE, 1) == b"\0"


def test_registers_and_gdt(memory: GuestMemory, elf: Maker) -> None:
    state = load_linux(memory, kernel=elf())
    assert state.cr0 & (1 << 31 | 1) == 1 << 31 | 1
    assert state.cr4 & 1 << 5
    assert state.efer == 0x500
    assert (state.cs, state.ds, state.gdt_limit) == (0x10, 0x18, 31)
    entries = struct.unpack("<4Q", memory.read(state.gdt_base, 32))
    assert entries == GDT_64
    code, data = entries[2], entries[3]
    assert code >> 53 & 1  # L
    assert not code >> 54 & 1  # D
    assert code >> 40 & 0xFF == 0x9B
    assert data >> 40 & 0xFF == 0x93


def walk(memory: GuestMemory, cr3: int, address: int) -> int:
    """Translate by the boot page tables (2 MiB pages)."""
    table = cr3
    for shift in (39, 30, 21):
        entry = int.from_bytes(memory.read(table + (address >> shift & 511) * 8, 8), "little")
        assert entry & 3 == 3, "present, writable"
        if entry & 0x80:
            return (entry & ~0x1FFFFF) | address & 0x1FFFFF
        table = entry & ~0xFFF
    raise AssertionError("no large page")


@pytest.mark.parametrize("address", [0, 0x7123, 16 * MIB, (3 << 30) - 1, (4 << 30) - 1])
def test_identity_map(address: int, memory: GuestMemory, elf: Maker) -> None:
    state = load_linux(memory, kernel=elf())
    assert state.cr3 == PML4_BASE
    assert walk(memory, state.cr3, address) == address
    assert len(identity_tables()) == 6 * 4096


def test_nothing_overlaps(memory: GuestMemory, elf: Maker, bzimage: Maker, pack: Maker) -> None:
    kernel = bzimage(pack("gzip", elf()), cmdline_size=60000)
    state = load_linux(
        memory, kernel=kernel, initrd=b"x" * 9 * MIB, cmdline="c" * 60000, rng_seed=bytes(1024)
    )
    assert {p.name for p in state.placements} == {
        "gdt",
        "stack",
        "zero page",
        "setup_data",
        "page tables",
        "command line",
        "kernel",
        "initrd",
    }
    for below, above in pairwise(state.placements):
        assert below.end <= above.base, (below, above)
    usable = [e for e in zero_page(memory, state).get_e820() if e.type is E820.RAM]
    for placement in state.placements:
        assert any(e.base <= placement.base and placement.end <= e.end for e in usable), placement


@dataclass
class FakeMemory:
    """A memory of a size that the host need not have."""

    regions: tuple[Region, ...]


@pytest.mark.parametrize(
    ("regions", "usable"),
    [
        ([(0, 1 * MIB)], [(0, 0x9FC00)]),
        ([(0, 64 * MIB)], [(0, 0x9FC00), (MIB, 64 * MIB)]),
        ([(0, 3 << 30)], [(0, 0x9FC00), (MIB, 3 << 30)]),
        (
            [(0, 3 << 30), (4 << 30, 5 << 30)],
            [(0, 0x9FC00), (MIB, 3 << 30), (4 << 30, 9 << 30)],
        ),
    ],
)
def test_e820(regions: list[tuple[int, int]], usable: list[tuple[int, int]]) -> None:
    memory = FakeMemory(tuple(Region(base, size, 0) for base, size in regions))
    entries = memory_map(memory)  # type: ignore[arg-type]
    assert [(e.base, e.end) for e in entries if e.type is E820.RAM] == usable
    assert [(e.base, e.end) for e in entries if e.type is E820.RESERVED] == [
        (0x9FC00, 0xA0000),
        (0xE0000, 0x100000),
    ]
    for below, above in pairwise(entries):
        assert below.end <= above.base
    params = BootParams()
    params.set_e820(entries)
    assert params.get_e820() == entries


def test_initrd_stays_below_initrd_addr_max(
    memory: GuestMemory, elf: Maker, bzimage: Maker, pack: Maker
) -> None:
    kernel = bzimage(pack("gzip", elf()), initrd_addr_max=40 * MIB - 1)
    params = zero_page(memory, load_linux(memory, kernel=kernel, initrd=b"x" * 100))
    assert params.ramdisk_image == 40 * MIB - 4096


def test_random_seed(memory: GuestMemory, elf: Maker) -> None:
    state = load_linux(memory, kernel=elf(), rng_seed=b"s" * 32)
    at = zero_page(memory, state).setup_data
    assert memory.read(at, 48) == struct.pack("<QII", 0, 9, 32) + b"s" * 32
    with pytest.raises(UsageError, match="1024"):
        load_linux(memory, kernel=elf(), rng_seed=bytes(1025))


@pytest.mark.parametrize(
    ("size", "initrd", "says"),
    [
        (1, 0, "at least 19 MiB"),
        (16, 0, "at least 19 MiB"),
        (18, 0, "at least 19 MiB"),
        (20, 2 * MIB, "at least 21 MiB"),
        (20, 100 * MIB, "at least 119 MiB"),
    ],
)
def test_memory_too_small(size: int, initrd: int, says: str, elf: Maker) -> None:
    memory = GuestMemory(size * MIB)
    with pytest.raises(ImageError, match=says):
        load_linux(memory, kernel=elf(), initrd=bytes(initrd) if initrd else None)
    assert not any(memory.read(0, 1 * MIB)), "memory stays untouched"
    memory.close()


def test_smallest_memory_that_is_said_to_do(elf: Maker) -> None:
    memory = GuestMemory(21 * MIB)
    load_linux(memory, kernel=elf(), initrd=bytes(2 * MIB))
    memory.close()


def test_initrd_larger_than_the_kernel_allows(
    memory: GuestMemory, elf: Maker, bzimage: Maker, pack: Maker
) -> None:
    kernel = bzimage(pack("gzip", elf()), initrd_addr_max=20 * MIB - 1)
    with pytest.raises(ImageError, match="smaller initrd"):
        load_linux(memory, kernel=kernel, initrd=bytes(2 * MIB))


def test_kernel_beyond_4_gib(memory: GuestMemory, elf: Maker) -> None:
    high = 4 << 30
    with pytest.raises(ImageError, match="below 4 GiB"):
        load_linux(memory, kernel=elf(((high, b"x", 1),), entry=high))


@pytest.mark.parametrize(
    ("cmdline", "says"),
    [("x" * 2048, "takes at most 2047"), ("a\0b", "NUL"), ("é" * 1024, "2048 bytes")],
)
def test_bad_command_line(cmdline: str, says: str, memory: GuestMemory, elf: Maker) -> None:
    with pytest.raises(UsageError, match=says):
        load_linux(memory, kernel=elf(), cmdline=cmdline)
    load_linux(memory, kernel=elf(), cmdline="x" * 2047)


def test_bad_initrd(memory: GuestMemory, elf: Maker, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="initrd is empty"):
        load_linux(memory, kernel=elf(), initrd=b"")
    with pytest.raises(ImageError, match=r"initrd .* is a directory"):
        load_linux(memory, kernel=elf(), initrd=tmp_path)
    with pytest.raises(ImageError, match=r"initrd .* does not exist"):
        load_linux(memory, kernel=elf(), initrd=tmp_path / "none")
