"""Groups of accesses near each other off one base register: they share one TLB look-up.

The first access of a group checks for all of it, also for what lies behind a side exit. Should the
whole not lie in one page with the rights that the group needs, the rest of the trace is left for a
*careful* trace, in which every access looks itself up.

A look-up clobbers the host's flags. Where the guest's are live at a group's first access, it is
done earlier, at an instruction before which they are not, or at the trace's start where they are
parked anyway: as long as no jump lies between, all that could differ is when it misses, and then
the careful trace does the accesses in their order.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import RSP
from ringfence.engine.translate.block import SLOW_WRITE, gs
from ringfence.engine.translate.tables import (
    ABSOLUTE,
    F_COPY,
    JCC,
    LOOP,
    NONE,
    STI,
    Group,
    Insn,
    Writer,
)
from ringfence.native.dialect import address_of, native, native_inline, slt

SPAN = 512
"""Bytes that a group of accesses may cover; the more, the likelier is a page boundary in it."""
SLOTS = 16
"""Groups of one trace, the stack's not counted."""
NO_DISTANCE = 1 << 63
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
    g.opens = n
    g.shift = 0
    g.indexed = 0
    g.kept = 0
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
    if g.base == RSP and g.opens == g.first:
        g.slot = gs("stack_delta") + w.user * 8
        return 1
    # Early ones of the stack keep a copy: another access may change the stack's page meanwhile.
    if (g.members > 1 or g.opens != g.first) and used < SLOTS:
        g.slot = gs("shared") + used * 8
        return 2
    return 0


@native_inline
def forget_opening(i: Insn) -> int:
    """A look-up does not stand before this instruction after all."""
    i.opens -= 1
    return 0


@native_inline
def leave_group(i: Insn, number: int) -> int:
    """The access looks itself up after all."""
    if i.group == number:
        i.group = NONE
    return 0


@native
def lone_group(w: Writer, i: Insn, n: int) -> int:
    """A group for an access with an index, which is worth it if its look-up can be early."""
    number = w.group_count
    g: Group = cast(Group, group_at(w, number))
    g.base = NONE
    g.first = n
    g.low = 0
    g.high = i.access & 0xFFF
    g.moved = 0
    g.members = 1
    g.write = 1 if i.access & SLOW_WRITE else 0
    g.opens = n
    g.shift = 0
    g.indexed = 1
    g.kept = 0
    w.group_count = number + 1
    i.group = number
    return 0


@native
def ends_search(i: Insn) -> int:
    """Whether a look-up may not move before an instruction: it may not be executed then."""
    return i.kind in (JCC, LOOP, STI)


@native
def moves_by(i: Insn, base: int) -> int:
    """By how much an instruction moves a register, or NO_DISTANCE if by no constant."""
    if base == ABSOLUTE or not i.written >> base & 1:
        return 0
    return i.adjustment if i.adjusted == base else NO_DISTANCE


@native
def open_early(w: Writer, g: Group, f: Insn) -> int:
    """Find the place for a look-up whose first access, ``f``, is where flags are live."""
    base = f.base if g.indexed else g.base
    index = f.index if g.indexed else NONE
    shift = 0
    best = g.first
    n = g.first
    while n:
        i: Insn = cast(Insn, insn_at(w, n - 1))
        if ends_search(i):
            break
        if index != NONE and i.written >> index & 1:
            break
        if base != NONE:
            distance = moves_by(i, base)
            if distance == NO_DISTANCE or (g.indexed and distance):
                break
            shift += distance
        n -= 1
        if not i.alive or n == 0:
            best = n
            g.shift = shift
            break
    g.opens = best
    if best != g.first:
        count_opening(cast(Insn, insn_at(w, best)))
    return 0


@native_inline
def count_opening(i: Insn) -> int:
    """A look-up stands before this instruction."""
    i.opens += 1
    return 0


@native_inline
def is_lone(w: Writer, i: Insn) -> int:
    """Whether an access could be a group of its own: one with an index, where flags are live.

    In 64-bit code only: elsewhere its segment is looked at each time, which costs the flags.
    """
    return w.long and i.form_kind == F_COPY and i.clobbers and i.index != NONE and i.alive


@native
def find_groups(w: Writer) -> int:
    """Set the group of each instruction of the trace, and where it is looked up."""
    w.group_count = 0
    for base in range(17):
        w.opened[base] = NONE
    for n in range(w.count):
        i: Insn = cast(Insn, insn_at(w, n))
        i.group = NONE
        i.opens = 0
        if i.shared_base != NONE:
            join_group(w, i, n)
        elif is_lone(w, i):
            lone_group(w, i, n)
        if i.written:
            close_groups(w, i)
        if i.kind == JCC and slt(i.value, 0):
            # Mostly taken: what lies behind gains little, and pays for what it shares.
            for base in range(17):
                if base != RSP:
                    w.opened[base] = NONE
    used = 0
    for number in range(w.group_count):
        g: Group = cast(Group, group_at(w, number))
        first: Insn = cast(Insn, insn_at(w, g.first))
        if first.alive:
            open_early(w, g, first)
        chosen = choose(w, g, used)
        if chosen == 2:
            used += 1
        elif chosen == 0:
            if g.opens != g.first:
                forget_opening(cast(Insn, insn_at(w, g.opens)))
                g.opens = (
                    g.first
                )  # or it would be opened with another that is, in no slot of its own
            for n in range(w.count):
                leave_group(cast(Insn, insn_at(w, n)), number)
    return 0
