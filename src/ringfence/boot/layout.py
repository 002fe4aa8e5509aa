"""What every loader shares: the memory map, low memory, and how a kernel is entered.

Loaders plan everything first, so that a guest that can't fit leaves memory untouched, then store.
The result, `BootState`, is plain data; the engine turns it into CPU state.

Nothing that loaders place below 1 MiB overlaps, and all of it is free again once the kernel has
copied its parameters; a loader's own text says which of these it uses:

======================  ====================================================================
0x00000 - 0x01000       real-mode vectors and the BIOS data area (`bios`)
0x01000 - 0x02000       GDT
0x02000 - 0x07000       boot stack, grows down from 0x07000
0x07000 - 0x09000       Linux: zero page (``struct boot_params``), setup_data
0x09000 - 0x0F000       64-bit entry: page tables; multiboot and PVH: their information
0x10000 - 0x20000       command lines
0x9FC00 - 0xA0000       EBDA, reserved
0xE0000 - 0x100000      ACPI tables and BIOS, reserved; written by the chipset
======================  ====================================================================

The hole 0xA0000 - 0xE0000 is in no e820 entry: it is neither RAM nor reserved.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ringfence.boot.elf import Program
from ringfence.boot.params import E820, E820Entry
from ringfence.cpu.reset import EntryState
from ringfence.errors import ImageError, UsageError
from ringfence.memory.ram import HIGH_RAM_BASE, PAGE, GuestMemory

GDT_BASE = 0x1000
STACK_LIMIT, STACK_TOP = 0x2000, 0x7000
PML4_BASE, PDPT_BASE, PD_BASE = 0x9000, 0xA000, 0xB000
MAPPED_GIB = 4
"""GiB that the boot page tables map, from 0 on."""
INFO_BASE, INFO_LIMIT = 0x9000, 0x10000
CMDLINE_BASE, CMDLINE_LIMIT = 0x10000, 0x20000
EBDA_BASE, EBDA_END = 0x9FC00, 0xA0000
BIOS_BASE, BIOS_END = 0xE0000, 0x100000

BOOT_CS, BOOT_DS = 0x10, 0x18
GDT_64 = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
GDT_32 = (0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
"""Null, unused, __BOOT_CS (flat code), __BOOT_DS (flat data); SDM vol. 3A section 3.4.5."""

# Page table entries, SDM vol. 3A section 4.5.4
_P, _RW, _PS = 1 << 0, 1 << 1, 1 << 7
_LARGE_PAGE = 1 << 21

# SDM vol. 3A section 2.5
CR0_PROTECTED = 1 << 4 | 1 << 0
"""ET, PE."""
CR0_LONG = 1 << 31 | 1 << 16 | 1 << 5 | CR0_PROTECTED
"""PG, WP, NE, ET, PE."""
CR4_LONG = 1 << 5
"""PAE."""
EFER_LONG = 1 << 10 | 1 << 8
"""LMA, LME."""


@dataclass(frozen=True)
class Placement:
    """What is where: ``size`` bytes of ``name`` from guest-physical ``base`` on."""

    name: str
    base: int
    size: int

    @property
    def end(self) -> int:
        """First guest-physical address behind it."""
        return self.base + self.size


@dataclass(frozen=True, kw_only=True)
class BootState(EntryState):
    """How to enter the guest, and what lies where; the latter is for people to see."""

    placements: tuple[Placement, ...] = ()
    kernel_version: str = ""


def memory_map(memory: GuestMemory) -> list[E820Entry]:
    """The e820 map of a guest's RAM, ascending."""
    low_end = memory.regions[0].size
    entries = [
        E820Entry(0, EBDA_BASE, E820.RAM),
        E820Entry(EBDA_BASE, EBDA_END - EBDA_BASE, E820.RESERVED),
        E820Entry(BIOS_BASE, BIOS_END - BIOS_BASE, E820.RESERVED),
    ]
    if low_end > BIOS_END:
        entries.append(E820Entry(BIOS_END, low_end - BIOS_END, E820.RAM))
    entries += [E820Entry(r.base, r.size, E820.RAM) for r in memory.regions[1:]]
    return entries


def store_gdt(memory: GuestMemory, bits: int) -> tuple[Placement, int]:
    """Put the GDT for 32- or 64-bit code at GDT_BASE; return where it is, and its limit."""
    table = GDT_64 if bits == 64 else GDT_32
    memory.write(GDT_BASE, struct.pack(f"<{len(table)}Q", *table))
    return Placement("gdt", GDT_BASE, 8 * len(table)), 8 * len(table) - 1


def identity_tables() -> bytes:
    """PML4, PDPT and page directories, to be stored at PML4_BASE: 2 MiB pages, 4 GiB, identity."""
    table = struct.Struct("<512Q")
    links = [PD_BASE + PAGE * gib | _P | _RW for gib in range(MAPPED_GIB)]
    pages = [at * _LARGE_PAGE | _PS | _P | _RW for at in range(512 * MAPPED_GIB)]
    return (
        table.pack(PDPT_BASE | _P | _RW, *[0] * 511)
        + table.pack(*links, *[0] * (512 - MAPPED_GIB))
        + struct.pack(f"<{len(pages)}Q", *pages)
    )


def encode_text(text: str, what: str = "the command line") -> bytes:
    """A command line as kernels take it, NUL included."""
    encoded = text.encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise UsageError(f"{what} has a NUL in it: expected plain text")
    return encoded + b"\0"


def check_fits(memory: GuestMemory, program: Program, extra: int, what: str) -> int:
    """The first page behind a kernel, where ``extra`` bytes of ``what`` have room, too.

    Raises
    ------
    ImageError
        They don't fit into low RAM; says how much memory would do.
    """
    kernel_end = -(-program.end // PAGE) * PAGE
    end = kernel_end + extra
    if kernel_end > HIGH_RAM_BASE:
        raise ImageError(
            f"the kernel wants to be at {program.base:#x} - {program.end:#x}: expected below 4 GiB"
        )
    if end > memory.regions[0].size:
        needed = -(-end // (1 << 20))
        raise ImageError(
            f"{memory.size >> 20} MiB of memory is too small: the kernel ends at"
            f" {-(-kernel_end // (1 << 20))} MiB, {what} takes {-(-extra // (1 << 20))} MiB;"
            f" give the guest at least {needed} MiB, better {max(64, 2 * needed)} MiB"
        )
    return kernel_end
