"""What a guest sees of the host's scheduler, and the exits that its interrupts cost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import Shell
from ringfence import Machine
from ringfence.paravirt import steal

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(not steal.available(), reason="the host counts no run delays"),
]
TICK = 10_000_000
"""Nanoseconds of /proc/stat's unit."""


def delay(machine: Machine) -> int:
    """The host's own count for the vCPU's thread, in nanoseconds."""
    return int(
        Path(f"/proc/self/task/{machine._thread.native_id}/schedstat").read_text().split()[1]
    )


def stolen(shell: Shell) -> int:
    """The guest's, in ticks: the eighth number of the line "cpu"."""
    return int(shell.run("head -1 /proc/stat").split()[8])


@pytest.fixture
def crowded(machine: Machine) -> Iterator[None]:
    """The vCPU's thread and a busy process have to share one CPU."""
    thread = machine._thread.native_id
    assert thread is not None
    before = os.sched_getaffinity(thread)
    cpu = min(before)
    os.sched_setaffinity(thread, {cpu})
    program = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    hog = subprocess.Popen([sys.executable, "-c", program])
    yield
    hog.kill()
    hog.wait()
    os.sched_setaffinity(thread, before)


def test_steal_is_what_the_host_measured(machine: Machine, shell: Shell, crowded: None) -> None:
    """A loop that takes a while, in a guest that gets about half of a CPU."""
    guest, host = stolen(shell), delay(machine)
    shell.run("i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done")
    guest, host = stolen(shell) - guest, delay(machine) - host
    assert host > 100_000_000
    assert guest * TICK == pytest.approx(host, rel=0.1, abs=100_000_000)


def test_ends_of_interrupts_cost_no_exits(machine: Machine, shell: Shell) -> None:
    """Timer interrupts, each of which would write EOI."""

    def counts() -> tuple[int, int]:
        stats = machine.stats()
        return stats["exits"]["msr_write"]["count"], sum(stats["interrupts"].values())

    before = counts()
    shell.run("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    writes, interrupts = (now - then for now, then in zip(counts(), before, strict=True))
    assert interrupts > 20
    assert writes < 1.5 * interrupts  # about one each, to set the timer
