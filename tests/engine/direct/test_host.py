"""What a host may refuse to direct execution: the owner is told, and nothing is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence.engine.direct import host, ptrace, stub

AVX, AVX512 = 0x4, 0xE0


@pytest.mark.parametrize(
    ("enabled", "offered", "flags", "reason"),
    [
        (0x7 | AVX512, 0x7 | AVX512, {"umip"}, ""),
        (0x7, 0x7, {"umip"}, ""),
        (0x7, 0x7, {"fsgsbase"}, "UMIP"),
        (0x3, 0x7, {"umip"}, "no AVX"),
        (0x7 | AVX512, 0x7, {"umip"}, "parts that the guest's has not"),
    ],
)
def test_what_can_be_seen(enabled: int, offered: int, flags: set[str], reason: str) -> None:
    found = host.lacking(enabled, offered, flags)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_python_without_process_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    assert "pidfd" in host.lacking(0x7, 0x7, {"umip"})


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host.features.__wrapped__() == frozenset()
    host.CPUINFO.write_text("model name: flag\nflags\t\t: umip avx\nbugs: none\n" * 9)
    assert host.features.__wrapped__() == {"umip", "avx"}


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of processes that were made; some host that offers everything."""
    monkeypatch.setattr(host, "lacking", lambda *about: "")
    pids: list[int] = []
    spawn = os.posix_spawn

    def note(*arguments: Any, **more: Any) -> int:
        pids.append(spawn(*arguments, **more))
        return pids[-1]

    monkeypatch.setattr(os, "posix_spawn", note)
    return pids


def are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


NOTHING = 9999
"""No system call, request or option has this number."""


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (stub, "_PTRACE", "PTRACE_TRACEME"),
        (stub, "_PR_SET_TSC", "PR_SET_TSC"),
        (stub, "_PR_SET_SECCOMP", "PR_SET_SECCOMP"),
        (ptrace, "SIGNAL_SYSTEM_CALL", "ptrace doesn't stop processes as it should"),
    ],
)
def test_what_can_only_be_tried(
    module: Any, name: str, reason: str, spawned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, NOTHING)
    assert reason in host.obstacle()
    assert spawned and are_gone(spawned)


def full(*arguments: Any) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def before(count: int, call: Callable[..., int]) -> Callable[..., int]:
    """A call that fails from the second, third… time on."""
    left = iter(range(count))
    return lambda *arguments: call(*arguments) if next(left, None) is not None else full()


@pytest.mark.parametrize("name", ["memfd_create", "pidfd_open"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_descriptors(
    name: str, count: int, spawned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs directly then, and guests go on under translation."""
    if name == "pidfd_open":
        count = 0
    memory = host.GuestMemory(1 << 20)
    monkeypatch.setattr(host, "GuestMemory", lambda size: memory)
    monkeypatch.setattr(os, name, before(count, getattr(os, name)))
    assert os.strerror(errno.EMFILE) in host.obstacle()
    assert are_gone(spawned)
