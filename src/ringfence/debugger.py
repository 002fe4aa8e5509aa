"""The owner's debugger: breakpoints, watchpoints and steps of a machine's vCPUs.

A `Machine` has one as ``machine.debug``. What is asked of it holds until it is taken back, through
the guest's resets. When a vCPU meets one of its breakpoints, the machine pauses, all vCPUs and time
with it, and says why in `Debugger.stops`.

>>> machine.debug.breakpoint(0xFFFFFFFF82F4E0A0)  # doctest: +SKIP
>>> machine.start()  # doctest: +SKIP
>>> machine.debug.wait(10)  # doctest: +SKIP
DebugStop(kind=<StopKind.BREAKPOINT: 'breakpoint'>, cpu=0, rip=18446744071611441312, …)
>>> machine.debug.step()  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from ringfence.engine import Engine
from ringfence.engine.debug import Access, DebugPoints, DebugStop, Watchpoint

STEP_PATIENCE = 10.0
"""Seconds that one instruction may take."""


class Debuggee(Protocol):
    """What a debugger needs of its machine."""

    def still_engine(self) -> Engine:
        """The engine of a machine that stands still; UsageError if it runs."""

    def go(self) -> None:
        """Start it, or go on after a pause."""

    def wait_still(self, timeout: float | None) -> None:
        """Wait until it stands still; GuestTimeout if it does not within so many seconds."""


class Debugger:
    """See the module's text. Everything but `stops` and `wait` wants the guest to stand still."""

    def __init__(self, machine: Debuggee) -> None:
        self._machine = machine
        self._points = DebugPoints()
        self._listeners: list[Callable[[], None]] = []
        self.stops: tuple[DebugStop, ...] = ()
        """Why the machine pauses, a vCPU each; empty if its owner asked for the pause."""

    @property
    def points(self) -> DebugPoints:
        """All breakpoints and watchpoints."""
        return self._points

    def breakpoint(self, address: int) -> None:
        """Stop before the instruction at a linear address, whichever program's it is."""
        self._arm(DebugPoints(self._points.breakpoints | {address}, self._points.watchpoints))

    def remove_breakpoint(self, address: int) -> None:
        """Don't stop there any more."""
        self._arm(DebugPoints(self._points.breakpoints - {address}, self._points.watchpoints))

    def watchpoint(
        self, address: int, length: int = 8, access: Access = Access.WRITE
    ) -> Watchpoint:
        """Stop behind instructions that access data at a linear address.

        Raises
        ------
        UsageError
            The engine has no room for one more, or it can't be.
        """
        made = Watchpoint(address, length, access)
        if made not in self._points.watchpoints:
            watchpoints = (*self._points.watchpoints, made)
            self._arm(DebugPoints(self._points.breakpoints, watchpoints))
        return made

    def remove_watchpoint(self, watchpoint: Watchpoint) -> None:
        """Don't stop for it any more."""
        left = tuple(each for each in self._points.watchpoints if each != watchpoint)
        self._arm(DebugPoints(self._points.breakpoints, left))

    def clear(self) -> None:
        """Remove all breakpoints and watchpoints."""
        self._arm(DebugPoints())

    def _arm(self, points: DebugPoints) -> None:
        self._machine.still_engine().arm(points)
        self._points = points

    def step(self, cpu: int = 0) -> DebugStop | None:
        """Let one vCPU carry out one instruction, the others none; why it stopped again."""
        others = set(range(len(self._machine.still_engine().vcpus))) - {cpu}
        self.go(step={cpu}, hold=others)
        return self.wait(STEP_PATIENCE)

    def go(self, *, step: Collection[int] = (), hold: Collection[int] = ()) -> None:
        """Let the guest run, some vCPUs for one instruction only, some not at all.

        It is over with the next pause.
        """
        self._machine.still_engine().plan(step=step, hold=hold)
        self._machine.go()

    def wait(self, timeout: float | None = None) -> DebugStop | None:
        """Wait until the machine pauses: why, or None if its owner asked for it, or it ended.

        Raises
        ------
        GuestTimeout
            It still runs after ``timeout`` seconds.
        """
        self._machine.wait_still(timeout)
        return self.stops[0] if self.stops else None

    def when_stopped(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` at each pause, from the vCPU's thread; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- the machine's side ----------------------------------------------------------------------

    def attach(self, engine: Engine) -> None:
        """There is a new engine, after a reset."""
        engine.arm(self._points)

    def settle(self, engine: Engine) -> bool:
        """The engine came back for a pause: note why; whether it was for the debugger."""
        self.stops = tuple(engine.debug_stops())
        engine.plan()
        return bool(self.stops)

    def tell(self) -> None:
        """The machine stands still: tell who listens."""
        for listener in list(self._listeners):
            listener()
