"""The local APIC's timer (SDM 3A 11.5.4): one-shot, periodic and TSC-deadline.

Nothing counts: the current count is computed from the clock when the guest asks, and one
deadline in the board's timer queue stands for the expiry. The input clock is 1 GHz, so that
counts divided by nothing are nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from ringfence.chipset.clock import NS_PER_SECOND, Deadline, TimerQueue
from ringfence.chipset.state import Saved

MINIMUM_PERIOD_NS = 100_000
"""A periodic timer fires no oftener than this, whatever the guest asks: the host must live."""


class TscSource(Protocol):
    """One CPU's time-stamp counter."""

    @property
    def hz(self) -> int:
        """Ticks per second."""

    def read(self) -> int:
        """Return the TSC as RDTSC would now."""


class TscLine(Protocol):
    """The time-stamp counters of a machine."""

    def vcpu(self, number: int) -> TscSource:
        """Return the counter of one CPU."""


class TimerMode(IntEnum):
    """LVT timer register bits 18:17."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


def divider(divide: int) -> int:
    """Return what a divide configuration register value divides by (SDM figure 11-10)."""
    code = divide & 3 | divide >> 1 & 4
    return 1 << (code + 1 & 7)


class LapicTimer(Saved):
    """The counter behind the LVT timer entry.

    Parameters
    ----------
    queue : TimerQueue
        The board's timers.
    tsc : TscSource
        What TSC-deadline mode compares with.
    expired : Callable[[], None]
        Called at each expiry; masks and vectors are the LVT's business.
    """

    FIELDS = ("mode", "initial", "divide", "start", "deadline", "spent")

    def __init__(self, queue: TimerQueue, tsc: TscSource, expired: Callable[[], None]) -> None:
        self._clock = queue.clock
        self._tsc = tsc
        self._expired = expired
        self._timer = Deadline(queue, self._fire)
        self.reset()

    def reset(self) -> None:
        """Stop, and forget everything."""
        self.mode = int(TimerMode.ONE_SHOT)
        self.initial = 0
        self.divide = 0
        self.start = 0
        self.deadline = 0
        self.spent = False
        self._timer.set(None)

    def set_mode(self, mode: int) -> None:
        """Follow the LVT's mode; entering or leaving TSC-deadline mode disarms.

        Between the other two the count goes on from where it is. One that has run to zero stays
        there until the initial count register is written, in periodic mode, too.
        """
        if mode == self.mode:
            return
        now = self._clock.now()
        if TimerMode.TSC_DEADLINE in (mode, self.mode):
            self.initial = self.deadline = 0
        elif self.initial:
            length = self.initial * divider(self.divide)
            if self.mode == TimerMode.PERIODIC:
                self.start += (now - self.start) // length * length
            else:
                self.spent = now - self.start >= length
        self.mode = int(mode)
        self._arm(now)

    def write_initial(self, count: int) -> None:
        """Write the initial count register: start anew, or stop with 0."""
        if self.mode == TimerMode.TSC_DEADLINE:
            return
        self.initial = count & 0xFFFF_FFFF
        self.start = self._clock.now()
        self.spent = False
        self._arm(self.start)

    def write_divide(self, value: int) -> None:
        """Write the divide configuration register; a running count goes on from where it is."""
        elapsed = self.initial - self.read_current()
        self.divide = value & 0xB
        if self.initial:
            now = self._clock.now()
            self.start = now - elapsed * divider(self.divide)
            self._arm(now)

    def read_current(self) -> int:
        """Return the current count register."""
        if self.mode == TimerMode.TSC_DEADLINE or not self.initial or self.spent:
            return 0
        ticks = (self._clock.now() - self.start) // divider(self.divide)
        if self.mode == TimerMode.PERIODIC:
            return self.initial - ticks % self.initial
        return max(0, self.initial - ticks)

    def write_deadline(self, value: int) -> None:
        """Write IA32_TSC_DEADLINE (0 disarms); ignored in the other modes."""
        if self.mode == TimerMode.TSC_DEADLINE:
            self.deadline = value
            self._arm(self._clock.now())

    def read_deadline(self) -> int:
        """Return IA32_TSC_DEADLINE; 0 once it has fired."""
        return self.deadline

    def restored(self) -> None:
        """Arm again; the clock and the TSC must have been restored before."""
        self._arm(self._clock.now())

    def _arm(self, now: int) -> None:
        """Set the deadline that the registers describe.

        A count that has run out by ``now`` has fired; one that only just started has not, however
        short it is.
        """
        if self.mode == TimerMode.TSC_DEADLINE:
            if not self.deadline:
                self._timer.set(None)
                return
            ticks = self.deadline - self._tsc.read()
            if ticks <= 0:
                self._timer.set(None)
                self._fire()
            else:
                ns = -(-ticks * NS_PER_SECOND // self._tsc.hz)
                self._timer.set(now + ns)
        elif not self.initial or self.spent:
            self._timer.set(None)
        else:
            length = self.initial * divider(self.divide)
            elapsed = now - self.start
            if self.mode == TimerMode.PERIODIC:
                period = length * -(-MINIMUM_PERIOD_NS // length)
                self._timer.set(self.start + (elapsed // period + 1) * period)
            elif elapsed < length:
                self._timer.set(self.start + length)
            else:
                self._timer.set(None)

    def _fire(self) -> None:
        if self.mode == TimerMode.TSC_DEADLINE:
            self.deadline = 0
        elif self.mode == TimerMode.PERIODIC:
            self._arm(self._clock.now())
        self._expired()
