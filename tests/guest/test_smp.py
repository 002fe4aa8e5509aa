"""A guest with four CPUs, on however many the host has: all are used, and can be put off-line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.images.store import Image

pytestmark = pytest.mark.boot

CPUS = 4
STORM = (
    "storm() { j=0; while [ $j -lt $1 ]; do busybox true; k=$(echo $j | sed s/^/x/);"
    " j=$((j+1)); done; }; "
)
"""Forks, executions and pipes."""
ONLINE = "/sys/devices/system/cpu/cpu$c/online"


@pytest.fixture(scope="module")
def several(cloud: Image, initrd: Path, cache: Path) -> Iterator[Shell]:
    """A shell on a machine with several CPUs."""
    with Machine(
        kernel=cloud.kernel,
        initrd=initrd,
        append=APPEND,
        engine="translate",
        cache_dir=cache,
        cpus=CPUS,
    ) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        yield shell


def busy(shell: Shell) -> list[int]:
    """Ticks that each CPU was not idle for."""
    found = []
    for line in shell.run("grep '^cpu[0-9]' /proc/stat").splitlines():
        user, nice, system = map(int, line.split()[1:4])
        found.append(user + nice + system)
    return found


def test_a_storm_of_processes_uses_all(several: Shell) -> None:
    assert several.run("nproc") == f"{CPUS}\n"
    before = busy(several)
    several.run(STORM + "for i in 1 2 3 4 5 6; do storm 15 & done; wait", timeout=120)
    assert all(now > then for now, then in zip(busy(several), before, strict=True))
    assert several.run("dmesg | grep -ciE 'lockup|stall|bug:|oops' || true") == "0\n"


def test_off_and_on(several: Shell) -> None:
    """A CPU that is put off-line is silenced by INIT when it comes back, and started anew."""
    for _ in range(2):
        several.run(f"for c in $(seq {CPUS - 1}); do echo 0 > {ONLINE}; done")
        assert several.run("nproc") == "1\n"
        several.run(f"for c in $(seq {CPUS - 1}); do echo 1 > {ONLINE}; done")
        assert several.run("nproc") == f"{CPUS}\n"
    several.run(STORM + "for i in 1 2 3; do storm 5 & done; wait", timeout=120)


def test_programs_give_the_same_as_on_one(several: Shell, shell: Shell) -> None:
    """Threads, signals, memory, and what is printed of them."""
    for each in (several, shell):
        each.run("mkdir -p /tmp/alone && cp /test/life /tmp/alone")
    once = shell.run("cd /tmp/alone && ./life", timeout=90, status=23)
    assert several.run("cd /tmp/alone && ./life", timeout=90, status=23) == once


def test_a_pause_stops_all(several: Shell) -> None:
    machine = several.machine
    machine.console.send(STORM + "storm 30 & storm 30 & storm 30 & wait; echo '[[''over'\n")
    for _ in range(10):
        machine.pause()
        assert len({vcpu.index for vcpu in machine.vcpus}) == CPUS
        assert all(vcpu.registers()["rip"] for vcpu in machine.vcpus)
        machine.resume()
    machine.console.wait_for("[[over", 120)
    assert set(machine.stats()["vcpus"]) == {str(n) for n in range(CPUS)}
