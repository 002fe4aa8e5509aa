"""When user code is looked at, and when it had better be left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.cpu.state import CR4_FSGSBASE, CR4_UMIP, CS, SS
from ringfence.engine.direct import policy
from ringfence.engine.direct.policy import DirectExecution
from ringfence.engine.direct.run import DIRECT_SPACES, NOWHERE, USER_CS, USER_SS
from ringfence.engine.translate.block import MODE_AVX, MODE_AVX512, MODE_CPL, MODE_LONG, MODE_SSE
from ringfence.errors import HostError

ROOT = 0x5000


class Refused(Exception):
    """Raised in place of making a process."""


@pytest.fixture(autouse=True)
def _any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.host, "lacking", lambda *about: "")


def processes_are(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def make(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(policy, "Process", make)


def execution(**memory: Any) -> tuple[DirectExecution, Any]:
    view = SimpleNamespace(
        xstate_mask=0xE7,
        xcr0=0xE7,
        cr4=CR4_UMIP | CR4_FSGSBASE,
        mode=MODE_CPL | MODE_LONG | MODE_SSE | MODE_AVX | MODE_AVX512,
        seg_selector={CS: USER_CS, SS: USER_SS},
        direct_roots=[0] * DIRECT_SPACES,
        direct_spaces=[0] * DIRECT_SPACES,
        direct_mode=0,
        direct_running=0,
        cpl=3,
        cr3=ROOT,
        user_entries=0,
    )
    ram: Any = SimpleNamespace(**{"fd": 5, "incomplete": False, **memory})
    library: Any = None
    return DirectExecution(view, lambda: library, ram, wanted=True), view


def looks(made: DirectExecution, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many interrupts, 4 ms apart."""
    clock = iter(range(1, 1000))
    monkeypatch.setattr(policy.time, "monotonic", lambda: next(clock) * 0.004)
    for _ in range(count):
        made.look()


def test_code_that_computes_gets_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    processes_are(monkeypatch, Refused())
    made, view = execution()
    assert view.direct_roots == [NOWHERE] * DIRECT_SPACES
    with pytest.raises(Refused):
        looks(made, policy.PATIENCE + 1, monkeypatch)


@pytest.mark.parametrize("memory", [{"fd": -1}, {"incomplete": True}])
def test_ram_that_cannot_be_shared(memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is private, or pages of it are still on their way."""
    processes_are(monkeypatch, Refused())
    made = execution(**memory)[0]
    looks(made, 20, monkeypatch)
    assert bool(made.statistics()["refusal"]) == ("fd" in memory)


def test_kernels_and_busy_callers_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    processes_are(monkeypatch, Refused())
    made, view = execution()
    view.cpl = 0
    looks(made, 20, monkeypatch)
    view.cpl = 3
    clock = iter(range(1, 1000))
    monkeypatch.setattr(policy.time, "monotonic", lambda: next(clock) * 0.004)
    for _ in range(20):
        view.user_entries += 100
        made.look()


def test_failures_wait_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = execution()
    space = SimpleNamespace(root=ROOT, failed=1)
    process: Any = SimpleNamespace(space=space)
    made._processes[1] = process
    now = 10.0
    for turn in range(8):
        space.failed = 1
        assert made._waits(ROOT, now)
        wait = min(policy.FIRST_PENALTY * 2**turn, policy.LAST_PENALTY)
        assert made._waits(ROOT, now + wait * 0.99)
        assert not made._waits(ROOT, now + wait)
        now += wait
    assert not made._waits(ROOT + 4096, now)
    for root in range(0, policy.REMEMBERED * 4096, 4096):
        space.root, space.failed = root, 1
        made._waits(root, now)
    assert len(made._penalty) <= policy.REMEMBERED


def test_a_host_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processes_are(monkeypatch, HostError("no ptrace"))
    made, _ = execution()
    looks(made, 20, monkeypatch)
    assert made.refusal == "no ptrace"
    assert made.statistics()["spaces"] == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mode": MODE_CPL}, "64-bit"),
        ({"cr4": CR4_UMIP}, "UMIP and FSGSBASE"),
        ({"cr4": CR4_FSGSBASE}, "UMIP and FSGSBASE"),
        ({"xcr0": 7}, "vector state"),
        ({"seg_selector": {CS: 0x43, SS: 0x3B}}, "selectors"),
    ],
)
def test_guests_that_do_not_suit(
    changed: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is made in vain, and the owner is told, until one is made."""
    processes_are(monkeypatch, Refused())
    made, view = execution()
    before = dict(vars(view))
    vars(view).update(changed)
    looks(made, 20, monkeypatch)
    assert reason in made.statistics()["refusal"]
    vars(view).update(before)
    made._looked = 0.0  # the clock begins anew
    with pytest.raises(Refused):
        looks(made, 20, monkeypatch)
    assert made.statistics()["refusal"] == ""
