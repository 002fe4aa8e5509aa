"""Groups of accesses near each other off one base register: they share one TLB look-up.

The first access of a group checks for all of it, also for what lies behind a side exit. Should the
whole not lie in one page with the rights that the group needs, the rest of the trace is left for a
*careful* trace, in which every access looks itself up.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import RSP
from ringfence.engine.translate.block import gs
from ringfence.engine.translate.tables import ABSOLUTE, NONE, Group, Insn, Writer
from ringfence.native.dialect import address_of, native, native_inline, slt

SPAN = 512
"""Bytes that a group of accesses may cover; the more, the likelier is a page boundary in it."""
SLOTS = 16
"""Groups of one trace, the stack's not counted."""
FAR = (1 << 31) - (1 << 16)
"""Distances from the base that may not fit an instruction any more once the base has moved."""


@native_inline
def group_at(w: Writer, number: int) -> int:
    """Address of a group."""
    return address_of(w.groups[0]) + number * Group.size


@native_inline
def insn_at(w: Writer, number: int) -> int:
    """Address of an instruction of the trace."""
    return address_of(w.items[0]) + number * Insn.size


@native
def extend_group(g: Group, i: Insn, at: int) -> int:
    """Take an access into a group if it stays small enough; whether it did."""
    at = at + g.moved
    low = at if slt(at, g.low) else g.low
    end = at + i.shared_size
    high = end if slt(g.high, end) else g.high
    if high - low > SPAN or not slt(low, FAR) or not slt(0 - FAR, low):
        return 0
    g.low = low
    g.high = high
    g.members += 1
    g.write = g.write | i.shared_write
    return 1


@native
def open_group(w: Writer, i: Insn, n: int, at: int) -> int:
    """A new group, of one access; its number."""
    number = w.group_count
    g: Group = cast(Group, group_at(w, number))
    g.base = i.shared_base
    g.first = n
    g.low = at
    g.high = at + i.shared_size
    g.moved = 0
    g.members = 1
    g.write = i.shared_write
    w.group_count = number + 1
    return number


@native
def join_group(w: Writer, i: Insn, n: int) -> int:
    """Find or open the group of an access."""
    base = i.shared_base
    at = i.shared_displacement
    if base == ABSOLUTE:
        at = i.offset + i.value
    number = w.opened[base]
    if number != NONE and extend_group(cast(Group, group_at(w, number)), i, at):
        i.group = number
        return 0
    i.group = open_group(w, i, n, at)
    w.opened[base] = i.group
    return 0


@native_inline
def move_group(g: Group, distance: int) -> int:
    """The base has moved."""
    g.moved += distance
    return 0


@native
def close_groups(w: Writer, i: Insn) -> int:
    """After an instruction: forget the groups whose base has changed by more than a constant."""
    written = i.written
    if i.adjusted != NONE:
        written = written & ~(1 << i.adjusted)
        number = w.opened[i.adjusted]
        if number != NONE:
            move_group(cast(Group, group_at(w, number)), i.adjustment)
    for base in range(16):
        if written >> base & 1:
            w.opened[base] = NONE
    return 0


@native_inline
def choose(w: Writer, g: Group, used: int) -> int:
    """Whether a group is worth its look-up: 2 if it also takes a slot, 1 if not, 0 if no group."""
    if g.base == RSP:
        g.slot = gs("stack_delta") + w.user * 8
        return 1
    if g.members > 1 and used < SLOTS:
        g.slot = gs("shared") + used * 8
        return 2
    return 0


@native_inline
def leave_group(i: Insn, number: int) -> int:
    """The access looks itself up after all."""
    if i.group == number:
        i.group = NONE
    return 0


@native
def find_groups(w: Writer) -> int:
    """Set the group of each instruction of the trace."""
    w.group_count = 0
    for base in range(17):
        w.opened[base] = NONE
    for n in range(w.count):
        i: Insn = cast(Insn, insn_at(w, n))
        i.group = NONE
        if i.shared_base != NONE:
            join_group(w, i, n)
        if i.written:
            close_groups(w, i)
    used = 0
    for number in range(w.group_count):
        chosen = choose(w, cast(Group, group_at(w, number)), used)
        if chosen == 2:
            used += 1
        elif chosen == 0:
            for n in range(w.count):
                leave_group(cast(Insn, insn_at(w, n)), number)
    return 0
