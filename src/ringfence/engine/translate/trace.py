"""A trace: a run of guest instructions inside one page, as one piece of host code.

A trace has one entry for each way of getting there, in this order in memory:

* *indirect*: R9 holds the guest address wanted; the trace checks that it is its own;
* *checked*: from another code page by a direct jump; the trace checks that its linear page still
  leads to the code page it was made for (one comparison with ``itlb_*``);
* *local*: from the same code page; nothing to check.

All then look at ``attention``. At the indirect and the checked entry the guest's status flags are
parked in the block (or dead); at the local entry they are in the host's flags. A trace knows
whether its own code reads the flags it enters with, so these checks cost no flag juggling almost
everywhere.

Inside, flags move between host and block on demand: a TLB comparison clobbers the host's flags, so
live ones are parked before it and brought back before an instruction that needs them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from ringfence.engine.translate.recipe import CALL, EFFECT, INDIRECT, JMP, Recipe

PAGE = 4096

# Relocations: what a word of the trace depends on besides its content.
RELOC_VA32, RELOC_VA64, RELOC_ITLB, RELOC_PAGE = range(4)
RELOC_FAR = 1 << 29

HOST, PARKED = range(2)
"""Where the guest's status flags are."""
ENDS = frozenset({JMP, CALL, INDIRECT, EFFECT})
"""Kinds of recipes that end a trace."""
Item = tuple[int, Recipe, int]
"""Offset in the page, recipe, relative address (see ``Recipes.make``)."""


@dataclass(slots=True)
class Trace:
    """A finished trace; positions are offsets into ``code``."""

    offset: int
    end: int
    code: bytearray
    lines: int = 0
    """64-byte lines of the page whose bytes the trace depends on."""
    next_lines: int = 0
    """The same in the following page, for an instruction across the boundary."""
    instructions: int = 0
    indirect: int = 0
    checked: int = 0
    local: int = 0
    reenter: int = 0
    reenter_local: int = 0
    swaps: int = 0
    """Registers arranged otherwise inside: a byte each, homeless register | displaced one << 4."""
    relocations: array[int] = field(default_factory=lambda: array("i"))
    """Pairs: position << 2 | RELOC_*, addend; addends of addresses count from the page's start."""
    marks: array[int] = field(default_factory=lambda: array("I"))
    """Position << 16 | flags are parked << 15 | guest offset, ascending."""
    length: int = 0
    """Bytes of ``code``, which is dropped once it is placed and stored."""
    start: int = 0
    """Host address once it is placed."""

    def forget_code(self) -> None:
        """Free what only placing and storing need."""
        self.code = _NO_CODE
        self.relocations = _NO_RELOCATIONS


_NO_CODE = bytearray()
_NO_RELOCATIONS = array("i")


def line_mask(start: int, end: int) -> int:
    """Mask of the 64-byte lines of a page that hold bytes [start, end)."""
    first, last = start >> 6, (end - 1) >> 6
    return ((2 << (last - first)) - 1) << first
