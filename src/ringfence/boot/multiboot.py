"""Load a kernel by the Multiboot Specification, version 0.6.96 ("multiboot 1").

The kernel says by a header in its first 8192 bytes how it wants to be loaded: as an ELF file (the
32-bit ones of the specification, or 64-bit ones whose first instructions are 32-bit code), or by
addresses in the header (the "a.out kludge"). It is entered in protected mode without paging, EAX
holding a magic number and EBX the address of the information structure (3.2, "Machine state").

A kernel that asks for a video mode gets none, as from peers without a display; other required
features that we don't know end in an error. Section numbers are the specification's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ringfence.boot.elf import PF_X, Program, Segment, load_segments, read_segments
from ringfence.boot.layout import (
    EBDA_BASE,
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

HEADER_MAGIC, LOADED_MAGIC = 0x1BADB002, 0x2BADB002
SEARCHED = 8192
"""The header is in so many bytes from the start, at a multiple of 4 (3.1)."""
LOADER_NAME = b"Ringfence\0"

# Header flags (3.1.2)
ALIGN_MODULES, MEMORY_INFO, VIDEO_MODE, ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
_UNDERSTOOD = ALIGN_MODULES | MEMORY_INFO | VIDEO_MODE
_REQUIRED = 0xFFFF
# Information flags (3.3)
INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MAP, INFO_NAME = (
    1 << 0,
    1 << 2,
    1 << 3,
    1 << 6,
    1 << 9,
)
_INFO = struct.Struct("<11I I I 4I I 12x 28x 4x")
"""flags … syms (11 words), mmap_length, mmap_addr, drives and config table, loader name, APM, VBE,
framebuffer: 120 bytes."""


@dataclass(frozen=True)
class Header:
    """A multiboot header at ``offset`` in the file; the addresses are those of the kludge."""

    offset: int
    flags: int
    header_addr: int = 0
    load_addr: int = 0
    load_end_addr: int = 0
    bss_end_addr: int = 0
    entry_addr: int = 0


def find_header(data: bytes) -> Header | None:
    """The first multiboot header of a file; None if it has none."""
    head = data[:SEARCHED]
    at = -1
    while (at := head.find(struct.pack("<I", HEADER_MAGIC), at + 1)) >= 0:
        if at % 4 or at + 12 > len(head):
            continue
        _, flags, checksum = struct.unpack_from("<III", head, at)
        if HEADER_MAGIC + flags + checksum & 0xFFFF_FFFF:
            continue
        if not flags & ADDRESSES:
            return Header(at, flags)
        if at + 32 <= len(head):
            return Header(at, flags, *struct.unpack_from("<5I", head, at + 12))
    return None


def read_program(data: bytes, header: Header) -> Program:
    """What is to be loaded of a file with this header.

    Raises
    ------
    ImageError
        The header asks for what we don't know, or for what makes no sense.
    """
    unknown = header.flags & _REQUIRED & ~_UNDERSTOOD
    if unknown:
        raise ImageError(f"the multiboot kernel requires features that nobody knows: {unknown:#x}")
    if not header.flags & ADDRESSES:
        return read_segments(data)
    start = header.offset - (header.header_addr - header.load_addr)
    end = start + header.load_end_addr - header.load_addr if header.load_end_addr else len(data)
    base = header.load_addr
    size = max(end - start, header.bss_end_addr - base)
    if header.load_addr > header.header_addr or not 0 <= start < end <= len(data):
        raise ImageError(
            f"the multiboot kernel is damaged: it wants bytes {start} to {end} of a file of"
            f" {len(data)}"
        )
    if not base <= header.entry_addr < base + size:
        raise ImageError(
            f"the multiboot kernel starts at {header.entry_addr:#x}, outside of what is loaded"
        )
    if base < 1 << 20:
        raise ImageError(f"the multiboot kernel wants to be at {base:#x}: expected 1 MiB or above")
    segment = Segment(base, base, size, PF_X, memoryview(data)[start:end])
    return Program(header.entry_addr, (segment,), 32)


def load_multiboot(
    memory: GuestMemory,
    *,
    kernel: bytes,
    modules: Sequence[str | tuple[ImageSource, str]] = (),
    cmdline: str = "",
) -> BootState:
    """Put a multiboot kernel, its modules and the information structure into guest memory.

    Raises
    ------
    ImageError
        There is no multiboot header, or the kernel is damaged or doesn't fit in memory.
    UsageError
        The command lines or modules make no sense.
    """
    header = find_header(kernel)
    if header is None:
        raise ImageError("the kernel has no multiboot header in its first 8192 bytes")
    program = read_program(kernel, header)
    loaded = load_modules(memory, program, modules, cmdline)
    load_segments(memory, program)
    listed = b"".join(
        struct.pack("<IIII", module.base, module.base + module.size, module.text, 0)
        for module in loaded.modules
    )
    ranges = b"".join(
        struct.pack("<IQQI", 20, entry.base, entry.size, entry.type) for entry in memory_map(memory)
    )
    name_at = INFO_BASE + _INFO.size
    map_at = name_at + -(-len(LOADER_NAME) // 4) * 4
    list_at = map_at + len(ranges)
    low_end = memory.regions[0].size
    info = _INFO.pack(
        INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MAP | INFO_NAME,
        EBDA_BASE >> 10, max(0, low_end - (1 << 20)) >> 10,  # mem_lower, mem_upper: KiB
        0,  # boot_device
        loaded.cmdline,
        len(loaded.modules), list_at,
        0, 0, 0, 0,  # syms
        len(ranges), map_at,
        0, 0, 0,  # drives, config_table
        name_at,
        0,  # apm_table
    )  # fmt: skip
    assert list_at + len(listed) <= INFO_LIMIT
    memory.write(INFO_BASE, info + LOADER_NAME)
    memory.write(map_at, ranges + listed)
    information = Placement("multiboot information", INFO_BASE, list_at + len(listed) - INFO_BASE)
    return protected_entry(memory, program, loaded, information, program.entry, LOADED_MAGIC)
