"""Clock and counter stop, jump and move to other hosts together."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.chipset import timekeeping
from ringfence.chipset.clock import HostClock, TimerQueue
from ringfence.chipset.timekeeping import PauseClock, Timekeeper
from ringfence.cpu.tsc import Tsc
from ringfence.errors import ImageError

SECOND = 10**9


class World:
    """A host: its clocks, and a counter of some rate, that move when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hz: int) -> None:
        self.hz = hz
        self.ns = 5 * SECOND
        self.epoch = 1_700_000_000 * SECOND
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.ns)
        monkeypatch.setattr(time, "time_ns", lambda: self.epoch + self.ns)

    def read(self) -> int:
        return self.ns * self.hz // SECOND

    def wait(self, seconds: float) -> None:
        self.ns += int(seconds * SECOND)


def keeper(world: World, policy: PauseClock, hz: int | None = None) -> Timekeeper:
    made = Timekeeper(HostClock(), Tsc(hz, world), policy)
    made.tsc.vcpu(0).attach(SimpleNamespace(tsc_offset=0, tsc_ratio=0, tsc_adjust=0))
    return made


def reading(it: Timekeeper) -> tuple[float, float]:
    """Seconds on clock and counter."""
    return it.clock.now() / SECOND, it.tsc.vcpu(0).read() / it.tsc.hz


@pytest.mark.parametrize("hz", [None, 1_300_000_000])
@pytest.mark.parametrize(("policy", "after"), [(PauseClock.STOP, 2), (PauseClock.RUN, 62)])
def test_a_pause(
    monkeypatch: pytest.MonkeyPatch, policy: PauseClock, after: int, hz: int | None
) -> None:
    world = World(monkeypatch, 2 * SECOND)
    it = keeper(world, policy, hz)
    told: list[bool] = []
    it.on_resume.append(told.append)
    world.wait(2)
    it.resume()
    it.pause()
    it.pause()
    world.wait(60)
    assert reading(it) == pytest.approx((2, 2))
    it.resume()
    assert reading(it) == pytest.approx((after, after))
    assert told == [policy is PauseClock.RUN]
    world.wait(1)
    assert reading(it) == pytest.approx((after + 1, after + 1))


@pytest.mark.parametrize("born", [2 * SECOND, 3_100_000_000])
@pytest.mark.parametrize(("policy", "after"), [(PauseClock.STOP, 2), (PauseClock.RUN, 3602)])
def test_another_host(
    monkeypatch: pytest.MonkeyPatch, policy: PauseClock, after: int, born: int
) -> None:
    """An hour passes on the way; the other host's clocks read something else entirely."""
    old = World(monkeypatch, born)
    it = keeper(old, policy)
    it.tsc.vcpu(0).msr_write(0x3B, 17)
    old.wait(2)
    it.pause()
    old.wait(100)
    state = it.save(1)
    assert (state["hz"], state["host_hz"], state["ahead"]) == (born, born, [17])
    new = World(monkeypatch, 2 * SECOND)
    new.ns = 10**6 * SECOND
    new.epoch = state["wall"] + 3600 * SECOND - new.ns
    there = keeper(new, PauseClock.STOP, state["hz"])
    assert there.tsc.scaled == (born != 2 * SECOND)
    new.wait(0.3)
    new.epoch -= 300_000_000
    there.restore(state)
    assert reading(there) == pytest.approx((2, 2))
    assert there.policy is policy
    there.resume()
    assert reading(there) == pytest.approx((after, after))
    assert there.tsc.vcpu(0).offset - there.tsc.offset == 17
    new.wait(1)
    assert reading(there) == pytest.approx((after + 1, after + 1))


def test_the_wall_clock_may_have_gone_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2 * SECOND)
    it = keeper(world, PauseClock.RUN)
    it.pause()
    state = it.save(1)
    it.restore(state | {"wall": state["wall"] + 10 * SECOND})
    it.resume()
    assert reading(it) == pytest.approx((0, 0))


def test_unknown_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    it = keeper(World(monkeypatch, SECOND), PauseClock.STOP)
    with pytest.raises(ImageError, match="version"):
        it.restore({"version": 99})
    it.pause()
    good = it.save(1)
    for bad in ({"policy": "fly"}, {"now": "soon"}, {"ticks": None}, {"ahead": 7}, {"ahead": [[]]}):
        with pytest.raises(ImageError, match="damaged"):
            it.restore(good | bad)


def test_timers_that_were_due_fire_after_a_jump() -> None:
    clock = HostClock()
    queue = TimerQueue(clock, threading.RLock())
    it = Timekeeper(clock, Tsc(), PauseClock.RUN)
    fired: list[int] = []
    queue.arm(clock.now() + 3600 * SECOND, lambda: fired.append(clock.now()))
    it.pause()
    it._began = timekeeping.time.monotonic_ns() - 7200 * SECOND
    it.resume()
    queue.run_due()
    assert len(fired) == 1
    assert fired[0] >= 7200 * SECOND


def test_saving_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain data, and nothing changes by it."""
    world = World(monkeypatch, 2 * SECOND)
    it = keeper(world, PauseClock.STOP)
    it.pause()
    first: dict[str, Any] = it.save(1)
    world.wait(5)
    assert it.save(1) == first
