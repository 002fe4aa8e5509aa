"""All vCPUs of a machine as one: begin, pause, end; nobody is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.engine import Engine, StopReason


class Cpu:
    """A vCPU that waits to be told, or does ``act`` after a moment."""

    def __init__(self, index: int, act: Callable[[], StopReason] | None = None) -> None:
        self.index = index
        self.act = act
        self.runs = 0
        self.heard: list[tuple[int, int]] = []
        self.stop = self.pause = False
        self.told = threading.Event()

    def run(self) -> StopReason:
        self.runs += 1
        if self.act is not None:
            time.sleep(0.01)
            return self.act()
        while True:
            if self.stop:
                return StopReason.STOPPED
            if self.pause:
                self.pause = False
                return StopReason.PAUSED
            self.told.wait()
            self.told.clear()

    def request_stop(self) -> None:
        self.stop = True
        self.told.set()

    def request_pause(self) -> None:
        self.pause = True
        self.told.set()

    def forget_pause(self) -> None:
        self.pause = False

    def signal(self, kind: int, vector: int) -> None:
        self.heard.append((kind, vector))

    def stats(self) -> dict[str, Any]:
        spent = {"guest": 10 + self.index, "idle": 1}
        return {"exits": {"halt": {"count": self.index, "ns": 5}}, "time": spent}

    def crash_dump(self) -> str:
        return f"registers of {self.index}"


def group(*vcpus: Cpu) -> tuple[Engine, Any]:
    """An engine of these, and its board."""
    board = SimpleNamespace(on_signal=None)
    return Engine(vcpus, board), board  # type: ignore[arg-type]


def crash() -> StopReason:
    return StopReason.CRASH


def fail() -> StopReason:
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("which", [0, 2])
def test_the_first_to_end_takes_the_others_along(which: int) -> None:
    vcpus = [Cpu(n, crash if n == which else None) for n in range(3)]
    engine, _ = group(*vcpus)
    assert engine.run() is StopReason.CRASH
    assert all(vcpu.stop for vcpu in vcpus)
    assert engine.crash_dump() == f"vCPU {which} of 3\nregisters of {which}"


@pytest.mark.parametrize("which", [0, 1])
def test_a_bug_in_one_ends_all_and_is_told(which: int) -> None:
    engine, _ = group(*(Cpu(n, fail if n == which else None) for n in range(3)))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        engine.run()


def test_a_pause_is_over_for_all_at_once() -> None:
    vcpus = [Cpu(n) for n in range(3)]
    engine, _ = group(*vcpus)
    for runs in range(1, 4):
        later = threading.Timer(0.02, engine.request_pause)
        later.start()
        assert engine.run() is StopReason.PAUSED
        later.join()
        assert [vcpu.runs for vcpu in vcpus] == [runs] * 3
        assert not any(vcpu.pause for vcpu in vcpus)
    engine.request_stop()
    assert engine.run() is StopReason.STOPPED


def test_one_that_pauses_by_itself_pauses_all() -> None:
    vcpus = [Cpu(0), Cpu(1, lambda: StopReason.PAUSED), Cpu(2)]
    engine, _ = group(*vcpus)
    assert engine.run() is StopReason.PAUSED
    assert not any(vcpu.stop for vcpu in vcpus)


def test_a_request_before_the_run_is_remembered() -> None:
    engine, _ = group(Cpu(0), Cpu(1))
    engine.request_pause()
    assert engine.run() is StopReason.PAUSED


def test_messages_reach_the_cpu_they_are_for() -> None:
    vcpus = [Cpu(n) for n in range(3)]
    _, board = group(*vcpus)
    board.on_signal(2, 4, 0)
    assert [vcpu.heard for vcpu in vcpus] == [[], [], [(4, 0)]]


def test_counters_are_added_up() -> None:
    engine, _ = group(Cpu(0), Cpu(1), Cpu(2))
    stats = engine.stats()
    assert stats["exits"] == {"halt": {"count": 3, "ns": 15}}
    assert stats["time"] == {"guest": 33, "idle": 3}
    assert stats["vcpus"]["2"] == {"guest": 12, "idle": 1}
    assert "vcpus" not in group(Cpu(0))[0].stats()
