"""Load a kernel by Xen's PVH protocol ("x86/HVM direct boot ABI", docs/misc/pvh.pandoc).

The ELF file's note XEN_ELFNOTE_PHYS32_ENTRY gives the physical address at which the kernel is
entered, in protected mode without paging, EBX pointing to ``struct hvm_start_info`` (Xen's
public/arch-x86/hvm/start_info.h, version 1), which has the memory map, too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ringfence.boot.elf import find_note, load_segments, read_segments
from ringfence.boot.layout import (
    INFO_BASE,
    INFO_LIMIT,
    BootState,
    Placement,
    memory_map,
)
from ringfence.boot.modules import load_modules, protected_entry
from ringfence.boot.source import ImageSource
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory

NOTE_OWNER, PHYS32_ENTRY = b"Xen", 18
START_MAGIC, START_VERSION = 0x336EC578, 1
_START = struct.Struct("<4I4Q2I")
"""magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap_entries, reserved."""


def entry_point(elf: bytes) -> int | None:
    """Where an ELF kernel is entered by this protocol; None if it doesn't speak it.

    Raises
    ------
    ImageError
        The ELF file is damaged.
    """
    found = find_note(elf, NOTE_OWNER, PHYS32_ENTRY)
    return int.from_bytes(found[:8], "little") if found else None


def load_pvh(
    memory: GuestMemory,
    *,
    kernel: bytes,
    modules: Sequence[str | tuple[ImageSource, str]] = (),
    cmdline: str = "",
    rsdp: int | None = None,
) -> BootState:
    """Put a PVH kernel, its modules and the start information into guest memory.

    Raises
    ------
    ImageError
        The kernel has no such note, is damaged, or doesn't fit in memory.
    UsageError
        The command lines or modules make no sense.
    """
    entry = entry_point(kernel)
    if entry is None:
        raise ImageError("the kernel has no PVH entry point (Xen's note 18): is it for Xen at all?")
    program = read_segments(kernel)
    if not any(segment.paddr <= entry < segment.end for segment in program.segments):
        raise ImageError(f"the kernel's PVH entry point {entry:#x} is outside of its own segments")
    loaded = load_modules(memory, program, modules, cmdline)
    load_segments(memory, program)
    listed = b"".join(
        struct.pack("<4Q", module.base, module.size, module.text, 0) for module in loaded.modules
    )
    ranges = [
        struct.pack("<QQII", each.base, each.size, each.type, 0) for each in memory_map(memory)
    ]
    map_at = INFO_BASE + _START.size
    list_at = map_at + sum(map(len, ranges))
    assert list_at + len(listed) <= INFO_LIMIT
    memory.write(
        INFO_BASE,
        _START.pack(
            START_MAGIC, START_VERSION, 0, len(loaded.modules), list_at if listed else 0,
            loaded.cmdline, rsdp or 0, map_at, len(ranges), 0,
        )
        + b"".join(ranges)
        + listed,
    )  # fmt: skip
    information = Placement("start information", INFO_BASE, list_at + len(listed) - INFO_BASE)
    return protected_entry(memory, program, loaded, information, entry)
