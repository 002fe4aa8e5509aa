"""Hardware, software or nothing: what the probe concludes, and what engines make of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.kvm.fake import FakeKernel, leave
from ringfence import engine as engines
from ringfence.engine.kvm import probe, verdict
from ringfence.engine.kvm.abi import Exit
from ringfence.engine.kvm.probe import examine
from ringfence.engine.kvm.verdict import Kind, Verdict
from ringfence.errors import HostError, UsageError

HALT = leave(Exit.HLT)


def ticking(*durations: int) -> Any:
    """A clock for ``durations`` of measurements, in order; the last repeats."""

    def moments() -> Iterator[int]:
        now = 0
        for took in (*durations, *[durations[-1]] * 20):
            yield now
            now += took
            yield now

    values = moments()
    return lambda: next(values)


NATIVE = (9000, 2000, 3000)


@pytest.mark.parametrize(
    ("guest", "kind"),
    [
        ((60_000,), Kind.HARDWARE),
        ((3_000_000, 2_000_000, 90_000), Kind.HARDWARE),
        ((600_000,), Kind.SOFTWARE),
        ((8_000_000, 7_000_000, 9_000_000), Kind.SOFTWARE),
    ],
)
def test_time_tells(guest: tuple[int, ...], kind: Kind) -> None:
    found = examine(FakeKernel([HALT] * 3), ticking(*NATIVE, *guest))
    assert found.kind is kind
    assert found.host_ns == 2000
    assert found.guest_ns == min(guest)
    if kind is Kind.SOFTWARE:
        assert "million instructions a second" in found.detail


@pytest.mark.parametrize(
    ("kernel", "detail"),
    [
        (FakeKernel(open_error=errno.EACCES), "join the group"),
        (FakeKernel([leave(Exit.SHUTDOWN)]), "can't run a loop .error 0, exit 8"),
        (FakeKernel([errno.EFAULT]), "can't run a loop .error 14"),
        (FakeKernel([errno.EINTR] * 3), "interrupted"),
    ],
)
def test_nothing_usable(kernel: FakeKernel, detail: str) -> None:
    found = examine(kernel, ticking(*NATIVE, 60_000))
    assert found.kind is Kind.NONE
    assert re.search(detail, found.detail)
    assert not kernel.calls or kernel.closed


def test_a_signal_costs_one_try() -> None:
    found = examine(FakeKernel([errno.EINTR, HALT]), ticking(*NATIVE, 60_000))
    assert found.kind is Kind.HARDWARE


@pytest.mark.parametrize(
    ("kind", "auto", "named"),
    [
        (Kind.HARDWARE, "kvm", "kvm"),
        (Kind.SOFTWARE, "translate", "kvm"),
        (Kind.NONE, "translate", None),
    ],
)
def test_what_engines_make_of_it(
    kind: Kind, auto: str, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "DEVICE", Path("/dev/null"))
    monkeypatch.setattr(verdict, "verdict", lambda: Verdict(kind, "do this"))
    assert engines.resolve("auto") == auto
    assert engines.resolve("translate") == "translate"
    if named:
        assert engines.resolve("kvm") == named
    else:
        with pytest.raises(HostError, match="do this"):
            engines.resolve("kvm")
    with pytest.raises(UsageError, match="unknown engine 'warp'"):
        engines.resolve("warp")


def test_without_a_device_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "DEVICE", Path("/nonexistent"))
    monkeypatch.setattr(verdict, "verdict", lambda: pytest.fail("asked"))
    assert engines.resolve("auto") == "translate"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with some device, seen for the first time; where its verdict is kept."""
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    monkeypatch.setattr(verdict, "DEVICE", Path("/dev/null"))
    monkeypatch.setattr(verdict, "verdict", verdict.verdict.__wrapped__)
    return tmp_path / "code" / verdict.FILE


def asked(monkeypatch: pytest.MonkeyPatch, found: Verdict) -> bool:
    """Whether the probe was asked for a verdict, which is ``found``."""
    calls: list[None] = []
    monkeypatch.setattr(probe, "probe_host", lambda: calls.append(None) or found)
    assert verdict.verdict() == found
    return bool(calls)


SLOW = Verdict(Kind.SOFTWARE, "slow", 5000, 10)


def test_what_was_found_is_remembered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, SLOW)
    assert not asked(monkeypatch, SLOW)
    monkeypatch.setattr(verdict, "DEVICE", Path("/dev/zero"))
    assert asked(monkeypatch, SLOW)


def test_nothing_is_not_remembered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Verdict(Kind.NONE, "join the group")
    assert asked(monkeypatch, nothing)
    assert asked(monkeypatch, nothing)
    assert not home.exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", b'{"host": 1}'])
def test_a_damaged_memory_is_none(
    home: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, SLOW)
    home.write_bytes(damage)
    assert asked(monkeypatch, SLOW)
    assert not asked(monkeypatch, SLOW)


def test_what_others_could_have_written_is_not_believed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, SLOW)
    home.chmod(0o666)
    assert asked(monkeypatch, SLOW)


def test_without_a_place_it_works_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").write_text("a file")
    assert asked(monkeypatch, SLOW)
    assert asked(monkeypatch, SLOW)


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this host has no /dev/kvm")
def test_this_host() -> None:
    found = probe.probe_host()
    assert found.kind in (Kind.HARDWARE, Kind.SOFTWARE), found.detail
    assert found.guest_ns > found.host_ns > 0
