"""Steal time: what the host's scheduler counted, in the guest's structure."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time

import pytest

from paravirt.support import RAM, Guest
from ringfence.cpu.faults import GeneralProtection
from ringfence.paravirt import services, steal
from ringfence.paravirt.steal import FEATURE_STEAL_TIME, MSR_STEAL_TIME, RunDelay, StealTime

PAGE = 0x5000
pytestmark = pytest.mark.skipif(not steal.available(), reason="the host counts no run delays")


class Delay:
    """A thread's run delay, as told."""

    total = 10**9

    def read(self) -> int:
        return self.total

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def stolen(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> StealTime:
    """A vCPU's steal time that sees what `Delay` says, at any interval."""
    monkeypatch.setattr(steal, "RunDelay", Delay)
    monkeypatch.setattr(steal, "INTERVAL_NS", 0)
    monkeypatch.setattr(Delay, "total", 10**9)
    made = guest.services.vcpus[0].steal
    made.begin()
    return made


def structure(guest: Guest) -> tuple[int, ...]:
    """Steal, version, flags, preempted."""
    return struct.unpack("<QIIB47x", guest.memory.read(PAGE, 64))


def test_it_is_offered() -> None:
    assert services.features(True, 1) & FEATURE_STEAL_TIME


def test_what_the_guest_reads(guest: Guest, stolen: StealTime) -> None:
    stolen.msr_write(MSR_STEAL_TIME, PAGE | 1)
    assert stolen.msr_read(MSR_STEAL_TIME) == PAGE | 1
    assert structure(guest) == (0, 2, 0, 0)
    Delay.total += 5000
    stolen.refresh()
    assert structure(guest) == (5000, 4, 0, 0)
    stolen.refresh()
    assert structure(guest) == (5000, 4, 0, 0)
    stolen.msr_write(MSR_STEAL_TIME, 0)
    Delay.total += 1
    stolen.refresh()
    assert structure(guest) == (5000, 4, 0, 0)
    stolen.msr_write(MSR_STEAL_TIME, PAGE | 1)
    assert structure(guest)[0] == 5001


def test_a_pause_is_not_stolen(guest: Guest, stolen: StealTime) -> None:
    stolen.msr_write(MSR_STEAL_TIME, PAGE | 1)
    Delay.total += 7
    stolen.end()
    Delay.total += 10**9
    stolen.begin()
    Delay.total += 3
    stolen.refresh()
    assert structure(guest)[0] == stolen.stolen == 10
    stolen.end()
    stolen.end()


def test_saved_and_restored(guest: Guest, stolen: StealTime) -> None:
    stolen.msr_write(MSR_STEAL_TIME, PAGE | 1)
    Delay.total += 7
    stolen.refresh()
    other = guest.services.vcpus[1].steal
    other.restore(stolen.save())
    other.begin()
    Delay.total += 2
    other.refresh()
    assert structure(guest) == (9, 6, 0, 0)


@pytest.mark.parametrize(
    "value", [RAM | 1, 0xFEE00001, 1 << 63 | 1, PAGE | 3, PAGE | 0x20, PAGE | 0x21]
)
def test_bad_structures(guest: Guest, stolen: StealTime, value: int) -> None:
    before = guest.memory.read(0, RAM)
    with pytest.raises(GeneralProtection):
        stolen.msr_write(MSR_STEAL_TIME, value)
    assert stolen.msr_read(MSR_STEAL_TIME) == 0
    assert guest.memory.read(0, RAM) == before


def test_a_host_that_counts_nothing(guest: Guest) -> None:
    it = StealTime(guest.memory, counted=False)
    it.begin()
    it.msr_write(MSR_STEAL_TIME, PAGE | 1)
    it.refresh()
    it.end()
    assert structure(guest)[0] == 0


def test_the_host_s_accounting() -> None:
    """A thread that shares a CPU with a busy process waits for about as long as it runs."""
    cpu = min(os.sched_getaffinity(0))
    waited: list[int] = []

    def work() -> None:
        os.sched_setaffinity(0, {cpu})
        delay = RunDelay()
        before = delay.read()
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            hash(bytes(1 << 20))
        waited.append(delay.read() - before)
        delay.close()

    busy = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile 1: pass"
    hog = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    try:
        assert hog.stdout is not None
        hog.stdout.readline()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        hog.kill()
        hog.communicate()
    assert waited[0] > 50_000_000
