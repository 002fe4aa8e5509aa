"""Time on the board: clocks, and the queue of things that shall happen later.

A `Clock` counts nanoseconds since the machine started and stands still while it is paused.
`TimerQueue` is a heap of deadlines on that clock. Its thread sleeps in the kernel on a timerfd:
arming an earlier deadline from a vCPU thread is one system call that reprograms the sleep and
wakes nobody, and timerfd is not subject to the timer slack that a condition's timeout suffers.
A deadline later than the one slept for costs nothing at all.

Callbacks run with the board's lock held. Cancelled timers stay in the heap until they surface,
or until they are the majority.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ringfence.errors import HostError

NS_PER_SECOND = 1_000_000_000


class Clock(Protocol):
    """What the board asks the time."""

    def now(self) -> int:
        """Nanoseconds since machine start; stands still while paused."""

    def wall(self) -> int:
        """Nanoseconds since the Unix epoch, UTC."""

    def attach(self, queue: TimerQueue) -> None:
        """Tell the clock whose timers depend on it."""

    @property
    def running(self) -> bool:
        """False while paused: no deadline will come by waiting."""

    def set_now(self, now: int) -> None:
        """Continue from ``now`` nanoseconds (restore)."""


class HostClock:
    """The host's monotonic clock minus the time spent in pauses. Starts running, at 0."""

    def __init__(self) -> None:
        self._zero = time.monotonic_ns()
        self._stopped_at: int | None = None
        self._queues: list[TimerQueue] = []

    def now(self) -> int:
        """See `Clock.now`."""
        if self._stopped_at is not None:
            return self._stopped_at
        return time.monotonic_ns() - self._zero

    def wall(self) -> int:
        """See `Clock.wall`."""
        return time.time_ns()

    def attach(self, queue: TimerQueue) -> None:
        """See `Clock.attach`."""
        self._queues.append(queue)

    @property
    def running(self) -> bool:
        """See `Clock.running`."""
        return self._stopped_at is None

    def pause(self) -> None:
        """Stop the clock; a second pause changes nothing."""
        if self._stopped_at is None:
            self._stopped_at = self.now()

    def resume(self) -> None:
        """Continue from where `pause` stopped."""
        if self._stopped_at is not None:
            self._zero = time.monotonic_ns() - self._stopped_at
            self._stopped_at = None
            for queue in self._queues:
                queue.kick()

    def set_now(self, now: int) -> None:
        """See `Clock.set_now`."""
        self._zero = time.monotonic_ns() - now
        if self._stopped_at is not None:
            self._stopped_at = now


class MockClock:
    """A clock that moves only when told; for tests.

    Parameters
    ----------
    wall : int
        Nanoseconds since the Unix epoch at machine start.
    """

    def __init__(self, wall: int = 0) -> None:
        self._now = 0
        self._wall = wall
        self._queues: list[TimerQueue] = []

    def now(self) -> int:
        """See `Clock.now`."""
        return self._now

    def wall(self) -> int:
        """See `Clock.wall`."""
        return self._wall + self._now

    def attach(self, queue: TimerQueue) -> None:
        """See `Clock.attach`."""
        self._queues.append(queue)

    @property
    def running(self) -> bool:
        """See `Clock.running`."""
        return True

    def set_now(self, now: int) -> None:
        """See `Clock.set_now`."""
        self._now = now

    def advance(self, ns: int) -> None:
        """Move on by ``ns``, firing each due timer at exactly its deadline, in order."""
        target = self._now + ns
        while True:
            deadlines = [queue.next_deadline() for queue in self._queues]
            due = [when for when in deadlines if when is not None and when <= target]
            if not due:
                break
            self._now = max(self._now, min(due))
            for queue in self._queues:
                queue.run_due()
        self._now = target


class Timer:
    """One armed deadline; `cancel` it at any time, with the board's lock held."""

    __slots__ = ("_queue", "callback", "deadline")

    def __init__(self, queue: TimerQueue, deadline: int, callback: Callable[[], None]) -> None:
        self._queue = queue
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never fire; harmless if it already has."""
        if self.callback is not None:
            self.callback = None
            self._queue.forget()

    def __lt__(self, other: Timer) -> bool:
        return self.deadline < other.deadline


class _Itimerspec(ctypes.Structure):
    """struct itimerspec of timerfd_settime(2)."""

    _fields_ = [
        ("interval_sec", ctypes.c_long),
        ("interval_nsec", ctypes.c_long),
        ("value_sec", ctypes.c_long),
        ("value_nsec", ctypes.c_long),
    ]


_CLOCK_MONOTONIC = 1
_TFD_CLOEXEC = 0o2000000
_COMPACT_ABOVE = 64
"""Cancelled timers in the heap that are not worth a clean-up."""
# PyDLL: neither call blocks, so giving up the GIL around them would only cost.
_libc = ctypes.PyDLL(None, use_errno=True)


class TimerQueue:
    """Timers on one clock.

    Parameters
    ----------
    clock : Clock
        Deadlines are in its ``now()``.
    lock : threading.RLock
        The board's lock; held by whoever calls `arm` or `Timer.cancel`, and during callbacks.
    """

    def __init__(self, clock: Clock, lock: threading.RLock) -> None:
        self.clock = clock
        self.lock = lock
        self._heap: list[Timer] = []
        self._cancelled = 0
        self._fd = -1
        self._sleeping_until: int | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        clock.attach(self)

    def arm(self, deadline: int, callback: Callable[[], None]) -> Timer:
        """Have ``callback`` called once when the clock reads ``deadline`` ns or more."""
        timer = Timer(self, deadline, callback)
        heapq.heappush(self._heap, timer)
        if self._fd >= 0 and (self._sleeping_until is None or deadline < self._sleeping_until):
            self._program(deadline)
        return timer

    def forget(self) -> None:
        """Count one cancelled timer; drop them all when they are the majority."""
        self._cancelled += 1
        if self._cancelled > _COMPACT_ABOVE and 2 * self._cancelled > len(self._heap):
            self._heap = [timer for timer in self._heap if timer.callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_deadline(self) -> int | None:
        """Deadline of the first timer that is still armed, or None."""
        heap = self._heap
        while heap and heap[0].callback is None:
            heapq.heappop(heap)
            self._cancelled = max(0, self._cancelled - 1)
        return heap[0].deadline if heap else None

    def run_due(self) -> None:
        """Fire every timer whose deadline has come. Takes the lock."""
        with self.lock:
            now = self.clock.now()
            while (deadline := self.next_deadline()) is not None and deadline <= now:
                timer = heapq.heappop(self._heap)
                action, timer.callback = timer.callback, None
                if action is not None:
                    action()

    def kick(self) -> None:
        """Reconsider the sleep: the clock has jumped or resumed."""
        with self.lock:
            deadline = self.next_deadline()
            self._sleeping_until = None
            if self._fd >= 0 and deadline is not None:
                self._program(deadline)

    def start(self) -> None:
        """Start the thread that fires timers; a second start changes nothing."""
        if self._thread is not None:
            return
        self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_CLOEXEC)
        if self._fd < 0:
            reason = os.strerror(ctypes.get_errno())
            raise HostError(f"the host gives no timerfd ({reason}): raise the open-files limit")
        self._stopping = False
        self._sleeping_until = None
        self._thread = threading.Thread(target=self._run, name="ringfence-timers", daemon=True)
        self.kick()
        self._thread.start()

    def stop(self) -> None:
        """End the thread; armed timers stay armed. Don't call it with the lock held."""
        thread = self._thread
        if thread is None:
            return
        with self.lock:
            self._stopping = True
            self._settime(1)
        if thread is not threading.current_thread():
            thread.join()
        with self.lock:
            os.close(self._fd)
            self._fd = -1
            self._thread = None

    def _program(self, deadline: int) -> None:
        """Make the thread wake at ``deadline``."""
        self._sleeping_until = deadline
        if self.clock.running and not self._stopping:
            self._settime(max(1, deadline - self.clock.now()))

    def _settime(self, remaining: int) -> None:
        spec = _Itimerspec(0, 0, *divmod(remaining, NS_PER_SECOND))
        _libc.timerfd_settime(self._fd, 0, ctypes.byref(spec), None)

    def _run(self) -> None:
        while True:
            os.read(self._fd, 8)
            with self.lock:
                if self._stopping:
                    return
                self._sleeping_until = None
                if not self.clock.running:
                    continue
                self.run_due()
                if self._stopping:
                    return
                deadline = self.next_deadline()
                if deadline is not None and (
                    self._sleeping_until is None or deadline < self._sleeping_until
                ):
                    self._program(deadline)


class Deadline:
    """At most one pending timer: what most devices need.

    Parameters
    ----------
    queue : TimerQueue
        Where it is armed.
    callback : Callable[[], None]
        Called when it expires.
    """

    def __init__(self, queue: TimerQueue, callback: Callable[[], None]) -> None:
        self._queue = queue
        self._callback = callback
        self._timer: Timer | None = None

    @property
    def armed(self) -> bool:
        """True while it is pending."""
        return self._timer is not None and self._timer.callback is not None

    def set(self, deadline: int | None) -> None:
        """Expire at ``deadline`` ns instead of whatever was set before; None: never."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if deadline is None else self._queue.arm(deadline, self._callback)
