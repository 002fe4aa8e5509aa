"""The pieces of host code that are the same in all traces but for some words (see ``emit``)."""

from __future__ import annotations

import ctypes

from ringfence.engine.translate import assembling, emit
from ringfence.engine.translate.emit import R10
from ringfence.engine.translate.tables import TEMPLATES, Template
from ringfence.engine.translate.thunks import THUNK


def _look_up(write: bool, user: bool) -> tuple[bytes, int, int]:
    """A look-up in the TLB, the positions of its size and of the displacement of its jump."""
    code, miss = emit.tlb_check(1, write, user)
    return code, miss - 6, miss


def _all() -> dict[int, tuple[bytes, int, int]]:
    """Template by number: code, position of the size (or slot), position of a jump's target."""
    made: dict[int, tuple[bytes, int, int]] = {
        assembling.T_PARK: (emit.PARK, 0, 0),
        assembling.T_PARK_R10: (emit.park(R10), 0, 0),
        assembling.T_UNPARK: (emit.UNPARK, 0, 0),
    }
    for user in (False, True):
        delta = emit.tlb_delta(user, 0)
        stack = emit.stack_check(1, user)
        made |= {
            assembling.T_READ + user: _look_up(False, user),
            assembling.T_WRITE + user: _look_up(True, user),
            assembling.T_DELTA + user: (delta, len(delta) - 4, 0),
            assembling.T_STACK + user: (stack, len(stack) - 10, len(stack) - 4),
            assembling.T_STACK_PAGE + user: (emit.stack_page(user), 0, 0),
            assembling.T_RECOVER + user: (emit.tlb_recover(False, user), 0, 0),
            assembling.T_RECOVER_WRITE + user: (emit.tlb_recover(True, user), 0, 0),
            assembling.T_INDIRECT + user: (emit.indirect_jump(user), 0, 0),
            assembling.T_CHECKED + user: (emit.checked_jump(user, THUNK["lookup"]), 0, 0),
        }
    return made


def fill(address: int) -> None:
    """Write all templates to the array of `TEMPLATES` rows at ``address``."""
    for number, (code, size, target) in _all().items():
        assert number < TEMPLATES
        row = Template.at(address + number * Template.size)
        row.length, row.size_word, row.target_word = len(code), size, target
        ctypes.memmove(ctypes.addressof(row.code), code, len(code))
