"""Clocks and the timer queue."""

from __future__ import annotations

import threading

from ringfence.chipset.clock import Deadline, HostClock, MockClock, TimerQueue


def queue() -> tuple[MockClock, TimerQueue]:
    clock = MockClock()
    return clock, TimerQueue(clock, threading.RLock())


def test_timers_fire_in_order_at_their_own_time() -> None:
    clock, timers = queue()
    fired: list[tuple[str, int]] = []
    for name, deadline in (("b", 20), ("a", 10), ("c", 30)):
        timers.arm(deadline, lambda name=name: fired.append((name, clock.now())))
    assert timers.next_deadline() == 10
    clock.advance(25)
    assert fired == [("a", 10), ("b", 20)]
    assert clock.now() == 25
    clock.advance(5)
    assert fired[-1] == ("c", 30)
    assert timers.next_deadline() is None


def test_callbacks_may_arm_again() -> None:
    clock, timers = queue()
    times: list[int] = []

    def tick() -> None:
        times.append(clock.now())
        timers.arm(clock.now() + 10, tick)

    timers.arm(10, tick)
    clock.advance(35)
    assert times == [10, 20, 30]


def test_cancelled_timers_do_not_fire_nor_pile_up() -> None:
    clock, timers = queue()
    fired: list[int] = []
    deadline = Deadline(timers, lambda: fired.append(clock.now()))
    for when in range(1000, 3000):
        deadline.set(when)
    assert len(timers._heap) < 300
    clock.advance(5000)
    assert fired == [2999]
    assert not deadline.armed


def test_host_clock_stands_still_while_paused() -> None:
    clock = HostClock()
    clock.pause()
    at = clock.now()
    assert clock.now() == at
    assert not clock.running
    clock.set_now(10**15)
    assert clock.now() == 10**15
    clock.resume()
    assert clock.now() >= 10**15


def test_thread_fires_and_a_pause_holds_it() -> None:
    clock = HostClock()
    lock = threading.RLock()
    timers = TimerQueue(clock, lock)
    fired = threading.Event()
    timers.start()
    try:
        with lock:
            timers.arm(clock.now() + 10**12, lambda: None)
            timers.arm(clock.now() + 1000, fired.set)
        assert fired.wait(10)
        clock.pause()
        again = threading.Event()
        with lock:
            timers.arm(clock.now() + 1, again.set)
        assert not again.is_set()
        clock.resume()
        assert again.wait(10)
    finally:
        timers.stop()
    timers.stop()
