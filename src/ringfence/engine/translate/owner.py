"""The owner's debugger at a vCPU under translation: Python's side of `debugging`."""

from __future__ import annotations

import ctypes
from typing import Any

from ringfence.cpu.state import CS
from ringfence.engine.debug import DebugPoints, DebugStop, StopKind, Watchpoint
from ringfence.engine.translate.block import MODE_LONG, STOP_BREAKPOINT, STOP_STEP
from ringfence.engine.translate.debugging import BREAKS_MAX, NO_SKIP
from ringfence.errors import UsageError
from ringfence.memory.mmu import OWNER_WATCHES, PENDING_OWNER_SHIFT
from ringfence.native.library import Library

MASK64 = (1 << 64) - 1


class OwnerDebug:
    """Breakpoints, watchpoints and single steps of one vCPU's owner; the vCPU is not running.

    Parameters
    ----------
    view : Vcpu
        The vCPU's block.
    library : Library
        The engine's native code.
    index : int
        The vCPU's number.
    """

    def __init__(self, view: Any, library: Library, index: int) -> None:
        self._view = view
        self._changed = library.function("debug_changed", 1)
        self._mode_changed = library.function("mode_changed", 1)
        self._index = index
        self._points = DebugPoints()
        self.stop: DebugStop | None = None
        """Why the vCPU came back, if it was for the owner's debugger."""

    def arm(self, points: DebugPoints) -> None:
        """Stop at these from now on, and at no others.

        Raises
        ------
        UsageError
            They are more than there is room for; nothing has changed.
        """
        check(points)
        view = self._view
        self._points = points
        table = (ctypes.c_uint64 * len(points.breakpoints))(*sorted(points.breakpoints))
        ctypes.memmove(view.owner_breaks, table, ctypes.sizeof(table))
        view.owner_break_count = len(points.breakpoints)
        for n, watch in enumerate(points.watchpoints):
            view.owner_first[n] = watch.address
            view.owner_last[n] = (watch.address + watch.length - 1) & MASK64
            view.owner_access[n] = int(watch.access)
        view.owner_watches = len(points.watchpoints)
        self._changed(view.self_address)

    def step(self, wanted: bool) -> None:
        """Whether to stop behind the next instruction; interrupts are held back meanwhile."""
        view = self._view
        if view.owner_step != wanted:
            view.owner_step = wanted
            view.attention = 1  # an interrupt may have waited for the end of it
            self._mode_changed(view.self_address)

    def renew(self) -> None:
        """The vCPU's state was replaced, its debug registers with it."""
        view = self._view
        view.debug_pending = view.begun_flags = view.stepped = view.passing = 0
        self._changed(view.self_address)

    def begin(self) -> None:
        """The vCPU is about to run: where it stopped for the owner, it goes on."""
        stop, self.stop = self.stop, None
        view = self._view
        here = stop is not None and stop.rip == view.rip
        at = view.rip
        if not view.mode & MODE_LONG:
            at = (at + view.seg_base[CS]) & 0xFFFFFFFF
        view.owner_skip = at if here else NO_SKIP

    def note(self, why: int) -> None:
        """The vCPU left guest code for EXIT_DEBUG; ``why`` is its ``exit_data``."""
        rip = self._view.rip
        kind, watch = StopKind.STEP, None
        if why == STOP_BREAKPOINT:
            kind = StopKind.BREAKPOINT
        elif why != STOP_STEP:
            number = (why >> PENDING_OWNER_SHIFT).bit_length() - 1
            kind, watch = StopKind.WATCHPOINT, self._points.watchpoints[number]
        self.stop = DebugStop(kind, self._index, rip, watch)


def check(points: DebugPoints) -> None:
    """UsageError if an engine can't have all of these at a time."""
    if len(points.breakpoints) > BREAKS_MAX:
        raise UsageError(f"{len(points.breakpoints)} breakpoints: at most {BREAKS_MAX} fit")
    if len(points.watchpoints) > OWNER_WATCHES:
        raise UsageError(f"{len(points.watchpoints)} watchpoints: at most {OWNER_WATCHES} fit")
    for watch in points.watchpoints:
        check_watchpoint(watch)


def check_watchpoint(watch: Watchpoint) -> None:
    """UsageError for one that reaches around the end of the address space, or watches nothing."""
    if watch.length < 1 or watch.address + watch.length > 1 << 64 or not watch.access:
        raise UsageError(f"a watchpoint of {watch.length} bytes at {watch.address:#x} can't be")
