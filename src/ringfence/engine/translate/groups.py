"""Groups of accesses near each other off one base register: they share one TLB look-up.

The first access of a group checks for all of it, also for what lies behind a side exit. Should the
whole not lie in one page with the rights that the group needs, the rest of the trace is left for a
*careful* trace, in which every access looks itself up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ringfence.cpu.state import RSP
from ringfence.engine.translate.block import gs
from ringfence.engine.translate.trace import Item

SPAN = 512
"""Bytes that a group of accesses may cover; the more, the likelier is a page boundary in it."""
SLOTS = 16
"""Groups of one trace, the stack's not counted."""


@dataclass(slots=True)
class Group:
    """Accesses that share a look-up; distances count from the base's value at the first one."""

    base: int
    first: int
    low: int
    high: int
    members: list[int] = field(default_factory=list)
    write: bool = False
    moved: int = 0
    """How far the base has moved since the first access."""
    slot: int = 0


def find_groups(items: list[Item], user: bool) -> dict[int, Group]:
    """The groups of a trace by the index of each member; ``user`` says whose stack it is."""
    opened: dict[int, Group] = {}
    found: list[Group] = []
    for n, (offset, recipe, value) in enumerate(items):
        shared = recipe.shared
        if shared is None:
            if not opened:
                continue
        else:
            base = shared.base
            at = offset + value if shared.displacement is None else shared.displacement
            group = opened.get(base)
            if group is not None:
                at += group.moved
                low, high = min(group.low, at), max(group.high, at + shared.size)
                if high - low > SPAN or abs(low) >= (1 << 31) - (1 << 16):
                    group = None
                    at -= opened[base].moved
            if group is None:
                group = opened[base] = Group(base, n, at, at + shared.size)
                found.append(group)
            else:
                group.low, group.high = low, high
            group.members.append(n)
            group.write = group.write or shared.write
        written = recipe.written
        if recipe.adjusted >= 0:
            written &= ~(1 << recipe.adjusted)
            group = opened.get(recipe.adjusted)
            if group is not None:
                group.moved += recipe.adjustment
        if written:
            for base in [base for base in opened if written >> base & 1]:
                del opened[base]
    members: dict[int, Group] = {}
    used = 0
    for group in found:
        if group.base == RSP:
            group.slot = gs("stack_delta", int(user))
        elif len(group.members) > 1 and used < SLOTS:
            group.slot = gs("shared", used)
            used += 1
        else:
            continue
        members.update(dict.fromkeys(group.members, group))
    return members
