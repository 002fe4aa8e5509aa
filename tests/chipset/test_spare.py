"""What waits until a vCPU has nothing to do."""

from __future__ import annotations

import threading

from ringfence.chipset.clock import MockClock, TimerQueue
from ringfence.chipset.spare import SpareTime


def make() -> tuple[MockClock, TimerQueue, SpareTime, list[str]]:
    clock = MockClock(0)
    timers = TimerQueue(clock, threading.RLock())
    return clock, timers, SpareTime(timers), []


def test_sleep_and_time() -> None:
    clock, timers, spare, log = make()
    spare.put_off(lambda: log.append("first"), 100)
    spare.put_off(lambda: log.append("second"), 200)
    spare.begin()
    assert log == ["first", "second"]
    assert not spare.waiting
    clock.advance(50)
    spare.put_off(lambda: log.append("third"), 100)
    clock.advance(99)  # at 149; the first one's timer has expired, and found nothing due
    assert log == ["first", "second"]
    clock.advance(1)
    assert log == ["first", "second", "third"]
    clock.advance(1000)
    assert timers.next_deadline() is None


def test_one_timer_serves_all() -> None:
    clock, timers, spare, log = make()
    for number in range(100):
        spare.put_off(lambda number=number: log.append(str(number)), 1000 + number)
        assert len(timers._heap) == 1
    clock.advance(1049)
    assert log == [str(number) for number in range(50)]
    clock.advance(1000)
    assert len(log) == 100


def test_cancelled_and_put_off_again() -> None:
    clock, timers, spare, log = make()
    spare.put_off(lambda: log.append("never"), 100).cancel()

    def again() -> None:
        log.append("again")
        if len(log) < 3:
            spare.put_off(again, 100)

    spare.put_off(again, 100)
    spare.begin()
    assert log == ["again"], "what comes up meanwhile waits"
    spare.begin()
    clock.advance(1000)
    assert log == ["again"] * 3
    assert timers.next_deadline() is None
