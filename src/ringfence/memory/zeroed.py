"""Zeroed memory for the tables that native code works on; memory that is not needed any more.

The pages are private, which costs the host half of what shared ones do, and large tables that are
used all over lie on huge pages where the host grants them: then a few faults fill them instead of
thousands, and the processor finds its way to them without walking page tables each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

_libc = ctypes.CDLL(None)
_PAGE = mmap.PAGESIZE
HUGE = 2 << 20

_PR_SET_THP_DISABLE = 41


def use_small_pages() -> None:
    """Have this process use no huge pages from now on: it is one of many that are to be small.

    A machine that is booted fills the tables in no time. One that goes on and then mostly sleeps
    would have two megabytes for each few entries of its own (prctl(2), PR_SET_THP_DISABLE).
    """
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


class ZeroedPages:
    """Hands out memory that lives as long as the object, or whoever has a ctypes view of it."""

    def __init__(self) -> None:
        self._taken: list[mmap.mmap] = []

    def take(self, size: int, *, dense: bool = False) -> int:
        """Host address of at least ``size`` zeroed bytes at a page's start.

        ``dense`` says that nearly all of them will be used, in any order.
        """
        unit = HUGE if dense and size > HUGE // 2 else _PAGE
        made = mmap.mmap(-1, -(-size // unit) * unit, flags=mmap.MAP_PRIVATE)
        if unit == HUGE:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                made.madvise(mmap.MADV_HUGEPAGE)
        self._taken.append(made)
        return ctypes.addressof(ctypes.c_char.from_buffer(made))


def give_back() -> None:
    """Give the host back what malloc keeps for later, after work on much that is gone now."""
    trim = getattr(_libc, "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
