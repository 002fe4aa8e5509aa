"""The part of the virtual CPU's state that page walks use, and where RAM is in the host."""

from __future__ import annotations

from typing import Annotated

from ringfence.cpu.state import Cpu
from ringfence.native.dialect import native_inline, store8
from ringfence.native.layout import Array, u64

PAGE_WRITE = 2
PAGE_USER = 4


class Walker(Cpu):
    """A virtual CPU that can walk guest page tables.

    The RAM map follows ``memory.ram``: low RAM from 0, high RAM from 4 GiB, then the ROM,
    contiguous in the host.
    """

    ram_host: Annotated[int, u64]
    ram_low: Annotated[int, u64]
    """Bytes of RAM below the device hole."""
    ram_high: Annotated[int, u64]
    """Bytes of RAM from 4 GiB on."""
    rom_base: Annotated[int, u64]
    rom_size: Annotated[int, u64]
    """Bytes of ROM; behind RAM in the host."""
    dirty_map: Annotated[int, u64]
    """Host address of one byte per RAM page, 1 once it was written; 0: nobody wants to know (see
    ``memory.dirty``)."""
    reserved_bits: Annotated[int, u64]
    """Physical-address bits beyond MAXPHYADDR: reserved in every paging-structure entry."""
    walk_pa: Annotated[int, u64]
    """Guest-physical address that the last walk found."""
    walk_perms: Annotated[int, u64]
    """PAGE_WRITE if a write may be entered now (dirty bit set), PAGE_USER."""
    walk_shift: Annotated[int, u64]
    """log2 of the size of the page found."""
    walk_global: Annotated[int, u64]
    walk_entry: Annotated[Array, u64, 4]
    """Host addresses of the entries used, by level."""
    walks: Annotated[int, u64]
    walk_references: Annotated[int, u64]
    """Paging-structure entries read by walks."""
    status_word: Annotated[int, u64]


@native_inline
def ram_pointer(walker: Walker, physical: int) -> int:
    """Host address of a guest-physical byte; 0 outside RAM."""
    if physical < walker.ram_low:
        return walker.ram_host + physical
    high = physical - 0x100000000
    if high < walker.ram_high:
        return walker.ram_host + walker.ram_low + high
    return 0


@native_inline
def mark_dirty(walker: Walker, host: int) -> int:
    """Note that the RAM page of a host address is written, or may be from now on."""
    if walker.dirty_map:
        store8(walker.dirty_map + ((host - walker.ram_host) >> 12), 1)
    return 0


@native_inline
def rom_pointer(walker: Walker, physical: int) -> int:
    """Host address of a guest-physical byte of the ROM; 0 outside it."""
    offset = physical - walker.rom_base
    if offset < walker.rom_size:
        return walker.ram_host + walker.ram_low + walker.ram_high + offset
    return 0


@native_inline
def code_pointer(walker: Walker, physical: int) -> int:
    """Host address of a byte that instructions may be fetched from; 0 outside RAM and ROM."""
    host = ram_pointer(walker, physical)
    return host if host else rom_pointer(walker, physical)
