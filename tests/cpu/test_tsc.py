"""Counters on one time line, on hosts whose counters run at any rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.cpu import tsc
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.state import TSC_RATIO_BITS, TSC_RATIO_ONE
from ringfence.cpu.tsc import MASK64, Tsc
from ringfence.errors import UsageError

SECOND = 10**9


class Host:
    """A host's counter that moves when told."""

    def __init__(self, hz: int, ticks: int = 1 << 40) -> None:
        self.hz = hz
        self.ticks = ticks

    def read(self) -> int:
        return self.ticks

    def wait(self, seconds: float) -> None:
        self.ticks += int(self.hz * seconds)


def view() -> Any:
    return SimpleNamespace(tsc_offset=0, tsc_ratio=0, tsc_adjust=0)


def seen(cpu: Any, host: Host) -> int:
    """What RDTSC gives."""
    return (host.ticks * cpu.tsc_ratio >> TSC_RATIO_BITS) + cpu.tsc_offset & MASK64


def test_the_real_counter() -> None:
    before = tsc.read_host_tsc()
    assert 10**8 < tsc.host_hz() < 10**11
    assert before < tsc.read_host_tsc()


@pytest.mark.parametrize("hz", [None, 2 * SECOND, 1_000_000, 3_700_000_000, 1 << 40])
def test_counters_begin_at_zero_and_run_at_the_rate(hz: int | None) -> None:
    host = Host(2 * SECOND)
    line = Tsc(hz, host)
    assert line.scaled == (line.ratio != TSC_RATIO_ONE) == (hz not in (None, 2 * SECOND))
    cpus = [view() for _ in range(2)]
    line.vcpu(0).attach(cpus[0])
    host.wait(5)
    line.vcpu(1).attach(cpus[1])
    rate = hz or host.hz
    assert line.hz == rate
    for number, cpu in enumerate(cpus):
        assert abs(seen(cpu, host) - 5 * rate) <= max(2, 1e-9 * rate)
        assert line.vcpu(number).read() == line.read() == seen(cpu, host)


def test_rates_that_measuring_cannot_tell_apart_are_the_same() -> None:
    assert not Tsc(2_000_100_000, Host(2 * SECOND)).scaled
    assert Tsc(2_000_300_000, Host(2 * SECOND)).scaled


@pytest.mark.parametrize("hz", [0, -5, 999_999, (1 << 40) + 1])
def test_rates_that_no_counter_has(hz: int) -> None:
    with pytest.raises(UsageError, match="TSC"):
        Tsc(hz, Host(SECOND))


@pytest.mark.parametrize("hz", [None, 3 * SECOND])
def test_a_pause_moves_all_counters_alike(hz: int | None) -> None:
    host = Host(2 * SECOND)
    line = Tsc(hz, host)
    cpus = [view() for _ in range(3)]
    for number, cpu in enumerate(cpus):
        line.vcpu(number).attach(cpu)
    line.vcpu(2).msr_write(tsc.MSR_TSC, 1 << 50)
    host.wait(1)
    line.pause()
    before = [line.vcpu(n).read() for n in range(3)]
    host.wait(1000)
    line.pause()
    assert [line.vcpu(n).read() for n in range(3)] == before
    line.resume()
    line.resume()
    assert [seen(cpu, host) for cpu in cpus] == before
    host.wait(1)
    for cpu, start in zip(cpus, before, strict=True):
        assert abs(seen(cpu, host) - start - line.hz) <= 2


def test_the_guest_sets_its_own_counter() -> None:
    host = Host(2 * SECOND)
    line = Tsc(None, host)
    cpus = [view(), view()]
    told: list[int] = []
    for number, cpu in enumerate(cpus):
        line.vcpu(number).attach(cpu)
        line.vcpu(number).on_set = lambda number=number: told.append(number)
    host.wait(1)
    line.vcpu(1).msr_write(tsc.MSR_TSC, 7)
    assert (seen(cpus[0], host), seen(cpus[1], host)) == (2 * SECOND, 7)
    assert line.vcpu(1).msr_read(tsc.MSR_TSC_ADJUST) == 7 - 2 * SECOND & MASK64
    line.vcpu(1).msr_write(tsc.MSR_TSC_ADJUST, 0)
    assert seen(cpus[1], host) == line.vcpu(1).msr_read(tsc.MSR_TSC) == 2 * SECOND
    assert told == [1, 1]
    with pytest.raises(GeneralProtection):
        line.vcpu(1).msr_write(0x11, 0)


def test_a_counter_that_cannot_be_moved() -> None:
    """An engine may say what offset a guest really has."""
    host = Host(2 * SECOND)
    line = Tsc(None, host)
    cpu = view()
    line.vcpu(0).attach(cpu, lambda offset: 0)
    host.wait(1)
    assert line.vcpu(0).read() == seen(cpu, host) == host.ticks
    assert line.read() == 2 * SECOND
