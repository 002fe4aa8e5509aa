"""The time-stamp counter: the host's, scaled and moved to what the guest shall read.

A machine has one rate and one time line (`Tsc`); each vCPU has a counter on it (`VcpuTsc`), which
its guest may set (IA32_TSC, IA32_TSC_ADJUST). What RDTSC gives is

    guest = (host * tsc_ratio >> 48) + tsc_offset        modulo 2**64

with both words in the vCPU's `Cpu`, where translated code and effects read them. The ratio has 48
fraction bits, as VMX's TSC multiplier has. It is one, and costs nothing, unless the machine asked
for a rate of its own or was born on a host with another. A pause, or a move to another host,
changes offsets only, all vCPUs' by the same amount: what a guest has measured stays true.

Source: Intel SDM vol. 3, 18.17 (time-stamp counter), 26.3 (TSC multiplier).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.state import TSC_RATIO_BITS, TSC_RATIO_ONE, Cpu
from ringfence.errors import UsageError
from ringfence.native.dialect import mulhi, native_inline, rdtsc
from ringfence.native.routine import routine

MSR_TSC, MSR_TSC_ADJUST = 0x10, 0x3B
MSRS = (MSR_TSC, MSR_TSC_ADJUST)
SAME_RATE = 100e-6
"""Rates that differ by no more than this share are taken for the same: measuring costs as much."""
RATES = (1_000_000, 1 << 40)
"""The least and the most ticks per second that a guest's counter can have."""
_SAMPLE_NS = 30_000_000
_CODE = bytes.fromhex("0f3148c1e2204809d0c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
MASK64 = (1 << 64) - 1


@native_inline
def guest_tsc(cpu: Cpu) -> int:
    """The guest's counter now."""
    host = rdtsc()
    ratio: int = cpu.tsc_ratio
    high = mulhi(host, ratio) << 64 - TSC_RATIO_BITS
    return (high | (host * ratio) >> TSC_RATIO_BITS) + cpu.tsc_offset


@cache
def _reader() -> Callable[..., int]:
    return routine(_CODE)


def read_host_tsc() -> int:
    """The host's counter now."""
    return int(_reader()())


def _pair() -> tuple[int, int]:
    """The counter and the host's raw clock at one moment, the tightest of a few tries."""
    best = None
    for _ in range(8):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read_host_tsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = (after - before, ticks, (before + after) // 2)
    assert best is not None
    return best[1], best[2]


@cache
def _first() -> tuple[int, int]:
    return _pair()


@cache
def host_hz() -> int:
    """The counter's frequency in Hz, measured against the host's clock in at least 30 ms."""
    ticks, at = _first()
    wait = _SAMPLE_NS - (time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - at)
    if wait > 0:
        time.sleep(wait / 1e9)
    now_ticks, now = _pair()
    return (now_ticks - ticks) * 1_000_000_000 // (now - at)


class HostCounter(Protocol):
    """What guests' counters are made of."""

    @property
    def hz(self) -> int:
        """Ticks per second."""

    def read(self) -> int:
        """The counter now."""


class _Hardware:
    """The counter of the CPU that this process runs on."""

    def __init__(self) -> None:
        _first()

    @property
    def hz(self) -> int:
        return host_hz()

    def read(self) -> int:
        return read_host_tsc()


class Tsc:
    """The time line that all counters of a machine are on, beginning at 0.

    Parameters
    ----------
    hz : int, optional
        Ticks per second that the guest shall see; by default the host's rate.
    host : HostCounter, optional
        What it is made of; tests give another.

    Attributes
    ----------
    ratio : int
        Guest ticks per host tick, with 48 fraction bits.

    Raises
    ------
    UsageError
        No counter can have this rate.
    """

    def __init__(self, hz: int | None = None, host: HostCounter | None = None) -> None:
        if hz is not None and not RATES[0] <= hz <= RATES[1]:
            raise UsageError(f"a TSC of {hz} Hz: expected {RATES[0]} to {RATES[1]}")
        self.host = host or _Hardware()
        self.ratio = TSC_RATIO_ONE
        self._hz = 0
        if hz is not None and abs(hz - self.host.hz) > self.host.hz * SAME_RATE:
            self._hz = hz
            self.ratio = (hz << TSC_RATIO_BITS) // self.host.hz
        self.offset = -self._scaled(self.host.read()) & MASK64
        """What is added to the scaled host's counter, for who hasn't set their counter."""
        self._stopped: int | None = None
        self._vcpus: dict[int, VcpuTsc] = {}

    @property
    def hz(self) -> int:
        """Ticks per second."""
        return self._hz or self.host.hz

    @property
    def scaled(self) -> bool:
        """Whether the guest's rate is not the host's."""
        return self.ratio != TSC_RATIO_ONE

    def vcpu(self, number: int) -> VcpuTsc:
        """The counter of one vCPU."""
        if number not in self._vcpus:
            self._vcpus[number] = VcpuTsc(self)
        return self._vcpus[number]

    def read(self) -> int:
        """The time line now."""
        return self.base() + self.offset & MASK64

    def base(self) -> int:
        """The host's counter in guest ticks; that of the pause while it lasts."""
        return self._scaled(self.host.read()) if self._stopped is None else self._stopped

    def pause(self) -> None:
        """Stop all counters; the vCPUs must stand still. A second pause changes nothing."""
        if self._stopped is None:
            self._stopped = self._scaled(self.host.read())

    def resume(self) -> None:
        """Let them go on from where they stopped."""
        if self._stopped is not None:
            stopped, self._stopped = self._stopped, None
            self._move(stopped - self._scaled(self.host.read()))

    def set_now(self, now: int) -> None:
        """Have the time line read ``now``; all vCPUs' counters move with it (restore)."""
        self._move(now - self.read())

    def _move(self, ticks: int) -> None:
        self.offset = self.offset + ticks & MASK64
        for vcpu in self._vcpus.values():
            vcpu.move(ticks)

    def _scaled(self, ticks: int) -> int:
        return ticks * self.ratio >> TSC_RATIO_BITS & MASK64


class VcpuTsc:
    """One vCPU's counter, and the two registers by which its guest sets it."""

    def __init__(self, line: Tsc) -> None:
        self.line = line
        self._view: Any = None
        self._moved: Callable[[int], int] = lambda offset: offset
        self.on_set: Callable[[], None] = lambda: None
        """Called when the guest has set the counter."""

    @property
    def hz(self) -> int:
        """Ticks per second."""
        return self.line.hz

    @property
    def offset(self) -> int:
        """What is added to the scaled host's counter, modulo 2**64."""
        return self.line.offset if self._view is None else int(self._view.tsc_offset)

    def attach(self, view: Any, moved: Callable[[int], int] | None = None) -> None:
        """Put the counter into a vCPU's state, at the time line's reading.

        ``moved`` is called with each new offset and gives the one that the guest really has.
        """
        self._view = view
        self._moved = moved or self._moved
        view.tsc_ratio = self.line.ratio
        self.set_offset(self.line.offset)

    def read(self) -> int:
        """The counter now."""
        return self.line.base() + self.offset & MASK64

    def set_offset(self, offset: int) -> None:
        """Change what is added, modulo 2**64."""
        self._view.tsc_offset = self._moved(offset & MASK64)

    def move(self, ticks: int) -> None:
        """Have the counter read ``ticks`` more."""
        if self._view is not None:
            self.set_offset(self._view.tsc_offset + ticks)

    def msr_read(self, index: int) -> int:
        """IA32_TSC or IA32_TSC_ADJUST."""
        return self.read() if index == MSR_TSC else int(self._view.tsc_adjust)

    def msr_write(self, index: int, value: int) -> None:
        """Set the counter: IA32_TSC to a value, IA32_TSC_ADJUST by a difference."""
        if index not in MSRS:
            raise GeneralProtection(f"wrmsr {index:#x}: not the time-stamp counter's")
        view = self._view
        ticks = value - (self.read() if index == MSR_TSC else view.tsc_adjust)
        view.tsc_adjust = view.tsc_adjust + ticks & MASK64
        self.move(ticks)
        self.on_set()
