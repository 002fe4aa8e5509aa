"""What vCPUs have to tell each other about pages of RAM: who may write there, who has code there.

A vCPU translates guest code for itself and keeps a TLB for itself; RAM is everybody's. Two rules
keep translations true to memory:

* **A page that any vCPU has translated code from is in no TLB as writable.** One word for each RAM
  page, shared by all vCPUs, has a bit per vCPU for "has code from there" and one for "may write
  there by its TLB". Either is claimed with one locked operation on that word, so of two vCPUs that
  claim at the same time at least one sees the other. Who claims to write and finds code does not
  enter the page; who claims code and finds writers has their entries dropped first (the engine
  sees to that, as it can wait for a vCPU to leave guest code).
* **All other writes are compared with the lines that translated code depends on**, each vCPU's own
  mask of 64-byte lines, *after* the bytes are in memory. A vCPU that translates says so before it
  reads the bytes (``reading``). Either the writer sees that, or the reader sees the bytes.

What is found is left with the vCPU whose code it is, as stale lines; it drops that code before its
next trace. This is where order comes from: the note is stored before the writer's next instruction,
so whoever sees what the writer stores later, finds ``attention`` set at the next trace that it
starts (x86 keeps the order of stores, and of loads).

Notes are bits in three levels (lines, pages, groups of pages) and one word that says that there are
any. They are set from below and taken from above with locked operations, by anybody at any time:
no lock that a vCPU could hold while the host runs another, and no list that could be full.
"""

from __future__ import annotations

from typing import Annotated, cast

from ringfence.cpu.ports import code_is_stale
from ringfence.memory.walk_state import Walker
from ringfence.native.dialect import (
    address_of,
    atomic_and64,
    atomic_cas64,
    atomic_or64,
    load64,
    native,
    native_inline,
    sched_yield,
)
from ringfence.native.layout import Array, u8, u32, u64

VCPUS_MAX = 32
CODE_BITS = (1 << VCPUS_MAX) - 1
"""Bits of a page's word: vCPU n has translated code from the page. The bits above them: vCPU n may
write there by its TLB."""
OUTSIDE = VCPUS_MAX
"""Stands for the number of a writer that is no vCPU: a device, the owner."""


class Coherent(Walker):
    """A virtual CPU among others that share its RAM."""

    vcpu_number: Annotated[int, u32]
    alone: Annotated[int, u8]
    """Whether it is the machine's only vCPU: then only devices write at the same time."""
    split_lock: Annotated[int, u64]
    """Host address of the shared word by which one vCPU at a time changes an operand that lies in
    two pages: such operands are worked on in a copy."""
    split_held: Annotated[int, u8]
    """Whether this vCPU has it."""
    vcpus: Annotated[int, u64]
    """Host address of a table of all vCPUs' blocks."""
    page_use: Annotated[int, u64]
    """Host address of the shared word of each RAM page (see the module's text)."""
    code_lines: Annotated[int, u64]
    """Host address of one 64-bit mask per RAM page: the lines that own translated code needs."""
    reading: Annotated[Array, u64, 2]
    """Numbers plus 1 of the RAM pages that code is being translated from; 0 for none."""
    stale_code: Annotated[int, u32]
    """Whether there are notes about own translated code that others, or itself, wrote over."""
    debug_pending: Annotated[int, u32]
    """What else has to be seen to before the next instruction (see `mmu`): traps that are due
    (PENDING_GUEST: bits of DR6; PENDING_OWNER: one per watchpoint of the owner's), PENDING_LOOK
    where each instruction is to be looked up. Emitted code compares both words in one."""
    stale_groups: Annotated[int, u64]
    """Host address of the notes' upper level: a bit for each word of the middle level."""
    stale_group_words: Annotated[int, u64]
    stale_pages: Annotated[int, u64]
    """Host address of the middle level: a bit for each RAM page."""
    stale_lines: Annotated[int, u64]
    """Host address of the lowest level: a mask of lines for each RAM page."""


@native_inline
def code_bit(cpu: Coherent) -> int:
    """Own bit of a page's word: has translated code."""
    return 1 << cpu.vcpu_number


@native_inline
def writer_bit(cpu: Coherent) -> int:
    """Own bit of a page's word: may write by the TLB."""
    return 1 << (cpu.vcpu_number + VCPUS_MAX)


@native_inline
def fence(cpu: Coherent) -> int:
    """Make own stores seen by all before the loads that follow are done."""
    return atomic_or64(address_of(cpu.reading[0]), 0)


@native
def take_split_lock(cpu: Coherent) -> int:
    """Be the only vCPU that changes an operand across two pages; held for one instruction."""
    while not atomic_cas64(cpu.split_lock, 0, 1):
        sched_yield()
    cpu.split_held = 1
    return 0


@native
def release_split_lock(cpu: Coherent) -> int:
    """The operand is written, or the instruction has failed."""
    if cpu.split_held:
        cpu.split_held = 0
        atomic_and64(cpu.split_lock, 0)
    return 0


@native_inline
def claim_write(cpu: Coherent, page: int) -> int:
    """Before a RAM page (its number) is entered as writable: whether that is allowed."""
    at = cpu.page_use + page * 8
    use = load64(at)
    if use & CODE_BITS:
        return 0
    if not use & writer_bit(cpu) and atomic_or64(at, writer_bit(cpu)) & CODE_BITS:
        atomic_and64(at, ~writer_bit(cpu))
        return 0
    return 1


@native
def claim_code(cpu: Coherent, page: int) -> int:
    """Before code is read from a RAM page: the bits of the vCPUs that may still write there."""
    at = cpu.page_use + page * 8
    use = load64(at)
    if not use & code_bit(cpu):
        use = atomic_or64(at, code_bit(cpu))
    return use & ~CODE_BITS


@native
def release_write(cpu: Coherent, page: int) -> int:
    """No entry of this vCPU's TLB will be used to write to the page."""
    return atomic_and64(cpu.page_use + page * 8, ~writer_bit(cpu))


@native
def release_code(cpu: Coherent, page: int) -> int:
    """This vCPU has no code from the page any more."""
    return atomic_and64(cpu.page_use + page * 8, ~code_bit(cpu))


@native
def note_code_write(cpu: Coherent, host: int, size: int) -> int:
    """Behind a write of ``size`` bytes at a host address, in one page: was it code of anybody's?"""
    page = (host - cpu.ram_host) >> 12
    if not cpu.alone:
        fence(cpu)
    use = load64(cpu.page_use + page * 8) & CODE_BITS
    if use == 0 or size == 0:
        return 0
    first = (host & 0xFFF) >> 6
    last = ((host & 0xFFF) + size - 1) >> 6
    lines = ((2 << (last - first)) - 1) << first
    if last - first >= 63:
        lines = 0xFFFFFFFFFFFFFFFF
    return tell(cpu, page, lines, use, cpu.vcpu_number)


@native
def note_outside_write(cpu: Coherent, first: int, count: int) -> int:
    """Behind a write to RAM pages by a device or the owner; ``cpu`` is any vCPU."""
    fence(cpu)
    for page in range(first, first + count):
        use = load64(cpu.page_use + page * 8) & CODE_BITS
        if use:
            tell(cpu, page, 0xFFFFFFFFFFFFFFFF, use, OUTSIDE)
    return 0


@native
def note_outside_runs(cpu: Coherent, table: int, count: int) -> int:
    """As ``note_outside_write``, for pairs of an offset into RAM and a length, of bytes."""
    fence(cpu)
    for number in range(count):
        offset = load64(table + number * 16)
        length = load64(table + number * 16 + 8)
        if length:
            for page in range(offset >> 12, ((offset + length - 1) >> 12) + 1):
                use = load64(cpu.page_use + page * 8) & CODE_BITS
                if use:
                    tell(cpu, page, 0xFFFFFFFFFFFFFFFF, use, OUTSIDE)
    return 0


@native
def tell(cpu: Coherent, page: int, lines: int, use: int, writer: int) -> int:
    """Leave a note with each vCPU whose bit is in ``use`` and whose code depends on the lines."""
    number = 0
    while use:
        if use & 1:
            other: Coherent = cast(Coherent, load64(cpu.vcpus + number * 8))
            needed = load64(other.code_lines + page * 8)
            if other.reading[0] == page + 1 or other.reading[1] == page + 1:
                needed = 0xFFFFFFFFFFFFFFFF
            if needed & lines:
                note_stale(other, page, lines)
                if number != writer:
                    code_is_stale(other)
        use = use >> 1
        number += 1
    return 0


@native
def note_stale(cpu: Coherent, page: int, lines: int) -> int:
    """Leave a note: lowest level first."""
    atomic_or64(cpu.stale_lines + page * 8, lines)
    atomic_or64(cpu.stale_pages + (page >> 6) * 8, 1 << (page & 63))
    atomic_or64(cpu.stale_groups + (page >> 12) * 8, 1 << ((page >> 6) & 63))
    atomic_or64(address_of(cpu.stale_code), 1)
    return 0
