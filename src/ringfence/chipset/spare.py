"""Work that can wait for spare time: until a vCPU has nothing to do, but not longer than it may.

A device that would be told of each request by itself may put its work off. A vCPU that goes to
sleep (HLT) says that its guest won't add to it for now, which is the moment to do all of it at
once; a guest that stays busy is not waited for longer than the delay asked for.

One timer serves all. It is left running when the work is done early, and armed anew only if work is
there when it expires: so its thread wakes once per delay at most, and not once per piece of work.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.clock import Deadline, TimerQueue


class Waiting:
    """A piece of work."""

    __slots__ = ("action", "due")

    def __init__(self, action: Callable[[], None], due: int) -> None:
        self.action: Callable[[], None] | None = action
        self.due = due

    def cancel(self) -> None:
        """Don't do it; harmless if it has been done."""
        self.action = None


class SpareTime:
    """What waits on one board. All methods are called with its lock held.

    Parameters
    ----------
    timers : TimerQueue
        For the end of the wait.
    """

    def __init__(self, timers: TimerQueue) -> None:
        self._clock = timers.clock
        self._timer = Deadline(timers, self._expired)
        self.waiting: list[Waiting] = []

    def put_off(self, action: Callable[[], None], delay: int) -> Waiting:
        """Have ``action`` called when a vCPU goes to sleep, or in ``delay`` ns."""
        work = Waiting(action, self._clock.now() + delay)
        self.waiting.append(work)
        if not self._timer.armed:
            self._timer.set(work.due)
        return work

    def begin(self) -> None:
        """Do all that waits; what comes up meanwhile waits for the next time."""
        waiting, self.waiting = self.waiting, []
        self._do(waiting)

    def _expired(self) -> None:
        now = self._clock.now()
        due = [work for work in self.waiting if work.due <= now]
        self.waiting = [work for work in self.waiting if work.due > now and work.action]
        self._do(due)
        if self.waiting and not self._timer.armed:
            self._timer.set(min(work.due for work in self.waiting))

    @staticmethod
    def _do(waiting: list[Waiting]) -> None:
        for work in waiting:
            action, work.action = work.action, None
            if action is not None:
                action()
