"""What guests see of the host's scheduler, and the exits that their interrupts cost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.engine.direct import policy
from ringfence.images.store import Image
from ringfence.paravirt import steal

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(not steal.available(), reason="the host counts no run delays"),
]
CPUS = 4
TICK = 10_000_000
"""Nanoseconds of /proc/stat's unit."""
RIVAL = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
"""A program that competes for a CPU."""
LOOP = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done"


@pytest.fixture(scope="module")
def machine(cloud: Image, initrd: Path, cache: Path) -> Iterator[Machine]:
    """A machine with four vCPUs."""
    with Machine(
        kernel=cloud.kernel,
        initrd=initrd,
        append=APPEND,
        engine="translate",
        cache_dir=cache,
        cpus=CPUS,
        direct=False,  # what processes of user code wait for is in their accounts
    ) as made:
        made.start()
        yield made


@pytest.fixture(scope="module", autouse=True)
def _crowded(shell: Shell) -> None:
    """The vCPUs share at most two of the host's CPUs."""
    few = sorted(os.sched_getaffinity(0))[:2]
    for thread in threads():
        os.sched_setaffinity(thread, few)


def threads() -> list[int]:
    """The vCPUs' threads, in order."""
    found = {each.name: each.native_id for each in threading.enumerate()}
    return [found[f"vcpu{cpu}"] or 0 for cpu in range(CPUS)]


def delays() -> list[int]:
    """The host's own count of nanoseconds that they waited for a CPU."""
    return [delay(thread) for thread in threads()]


def delay(thread: int) -> int:
    """The same of one thread, which may be a process."""
    return int(Path(f"/proc/{thread}/schedstat").read_text().split()[1])


def stolen(shell: Shell) -> list[int]:
    """The guest's, in ticks by vCPU: the eighth numbers of /proc/stat."""
    lines = shell.run("grep '^cpu[0-9]' /proc/stat").splitlines()
    return [int(line.split()[8]) for line in lines]


def test_steal_is_what_the_host_measured(machine: Machine, shell: Shell) -> None:
    guest, host = stolen(shell), delays()
    assert len(guest) == CPUS
    shell.run(f"sh -c 'for n in 1 2 3 4; do ({LOOP}) & done; wait'", timeout=300)
    guest, host = (
        [now - then for now, then in zip(after, before, strict=True)]
        for after, before in ((stolen(shell), guest), (delays(), host))
    )
    for ticks, ns in zip(guest, host, strict=True):
        assert ticks * TICK == pytest.approx(ns, rel=0.1, abs=150_000_000)
    assert sum(guest) * TICK == pytest.approx(sum(host), rel=0.1, abs=300_000_000)
    assert sum(host) > 100_000_000


def test_steal_of_user_code_that_runs_directly(
    cloud: Image, initrd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a process, which waits for a CPU in its thread's place: that counts as well."""
    cpu = min(os.sched_getaffinity(0))
    waited: dict[int, int] = {}

    class Counted(policy.Process):
        """One whose waiting is looked up before it ends."""

        def close(self) -> None:
            with suppress(OSError):
                waited[self.pid] = delay(self.pid)
            super().close()

    monkeypatch.setattr(policy, "Process", Counted)
    with Machine(
        kernel=cloud.kernel, initrd=initrd, append=APPEND, engine="translate", cache_dir=cache
    ) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        thread = made._thread.native_id or 0
        os.sched_setaffinity(thread, {cpu})
        rival = subprocess.Popen([sys.executable, "-c", RIVAL, str(cpu)])
        try:
            made.pause()
            made.resume()
            waited.clear()  # from now on
            guest, own = stolen(shell)[0], delay(thread)
            deadline = time.monotonic() + support.BOOT
            while sum(waited.values()) < 300_000_000:
                assert time.monotonic() < deadline
                shell.run(LOOP)
                made.pause()  # which ends the processes
                made.resume()
            guest, own = stolen(shell)[0] - guest, delay(thread) - own
        finally:
            rival.kill()
            rival.wait()
    wanted = sum(waited.values()) + own
    assert guest * TICK == pytest.approx(wanted, rel=0.1, abs=100_000_000), (waited, own)


def test_ends_of_interrupts_cost_no_exits(machine: Machine, shell: Shell) -> None:
    """Timer interrupts, each of which would write EOI."""

    def counts() -> tuple[int, int]:
        stats = machine.stats()
        return stats["exits"]["msr_write"]["count"], sum(stats["interrupts"].values())

    before = counts()
    shell.run(LOOP)
    writes, interrupts = (now - then for now, then in zip(counts(), before, strict=True))
    assert interrupts > 10
    assert writes < 1.6 * interrupts  # about one each, to set the timer
