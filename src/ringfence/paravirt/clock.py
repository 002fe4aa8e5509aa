"""The paravirtual clock that KVM defined: time, and the TSC's frequency, without measuring.

The guest names a guest-physical address in an MSR; the VMM writes there how to get nanoseconds from
the TSC. All vCPUs have the same straight line, from the machine's first moment to its last: it is
drawn through the time-stamp counters' time line (`cpu.tsc.Tsc`) once, and whoever asks gets it,
expressed in their own counter. So it doesn't matter when a structure is written, or how often; a
pause moves the counters, and the line with them; and a machine that moves to another host takes its
line along. Only a changed rate of the counter breaks it, into two that meet.

The calculation is the guest's own, with its rounding, so that a clock is never behind itself.

Source: Linux, Documentation/virt/kvm/x86/msr.rst and cpuid.rst; pvclock-abi.h.
"""

from __future__ import annotations

import struct
import threading

from ringfence.chipset.state import Saved
from ringfence.chipset.timekeeping import Timekeeper
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.tsc import MASK64, RATES, VcpuTsc
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory

MSR_WALL_CLOCK = 0x4B564D00
MSR_SYSTEM_TIME = 0x4B564D01
MSRS = (MSR_WALL_CLOCK, MSR_SYSTEM_TIME)
FEATURE_CLOCK = 1 << 3
"""CPUID 0x40000001 EAX: the two MSRs exist (KVM_FEATURE_CLOCKSOURCE2)."""
FEATURE_CLOCK_STABLE = 1 << 24
"""The clock never goes backwards between CPUs (KVM_FEATURE_CLOCKSOURCE_STABLE_BIT)."""
FEATURES = FEATURE_CLOCK | FEATURE_CLOCK_STABLE

_ENABLED = 1
_FLAG_TSC_STABLE, _FLAG_GUEST_STOPPED = 1, 2
_TIME_INFO = struct.Struct("<IIQQIbBxx")  # struct pvclock_vcpu_time_info
_VERSION = struct.Struct("<I")
_WALL_CLOCK = struct.Struct("<III")  # struct pvclock_wall_clock
_SECOND = 1_000_000_000


def time_scale(hz: int) -> tuple[int, int]:
    """(multiplier, shift) with nanoseconds = (ticks << shift) * multiplier >> 32.

    The multiplier fits 32 bits; a negative shift is to the right.
    """
    shift = 0
    while (_SECOND << 32) // _shifted(hz, shift) >= 1 << 32:
        shift += 1
    while (_SECOND << 32) // _shifted(hz, shift) < 1 << 31 and shift > -31:
        shift -= 1
    return (_SECOND << 32) // _shifted(hz, shift), shift


def _shifted(ticks: int, shift: int) -> int:
    return ticks << shift if shift >= 0 else ticks >> -shift


class TimeLine(Saved):
    """The line that all vCPUs' `clocks` are on: ``origin_ns`` at tick ``origin`` of the machine.

    Parameters
    ----------
    time : Timekeeper
        The machine's time.
    """

    FIELDS = ("origin", "origin_ns", "hz")

    def __init__(self, time: Timekeeper) -> None:
        self.time = time
        self.origin = time.tsc.read()
        self.origin_ns = time.clock.now()
        self.hz = time.tsc.hz
        self.clocks: list[ParavirtualClock] = []
        self._lock = threading.Lock()

    def at(self, ticks: int) -> int:
        """Nanoseconds at a reading of the machine's counter, as a guest calculates them."""
        multiplier, shift = time_scale(self.hz)
        ticks = _shifted(ticks - self.origin & MASK64, shift)
        return self.origin_ns + (ticks * multiplier >> 32) & MASK64

    @property
    def stable(self) -> bool:
        """Whether all vCPUs' counters agree: no guest has set one of them alone."""
        return all(clock.ahead == 0 for clock in self.clocks)

    def publish(self, *, stopped: bool = False) -> None:
        """Write all structures anew; ``stopped`` tells the guests' watchdogs that time jumped."""
        with self._lock:
            for clock in self.clocks:
                clock.publish(stopped=stopped)

    def restored(self) -> None:
        """Where the counter has a new rate, go on at that from here; restore the time before."""
        if not RATES[0] <= self.hz <= RATES[1]:
            raise ImageError(f"saved clock: a counter of {self.hz} Hz")
        self.origin, self.origin_ns = self.origin & MASK64, self.origin_ns & MASK64
        if self.hz != self.time.tsc.hz:
            now = self.time.tsc.read()
            self.origin_ns, self.origin, self.hz = self.at(now), now, self.time.tsc.hz


class ParavirtualClock(Saved):
    """The clock of one vCPU.

    Parameters
    ----------
    memory : GuestMemory
        Where the guest's structures are.
    line : TimeLine
        The machine's.
    tsc : VcpuTsc
        The vCPU's counter.
    """

    FIELDS = ("wall_clock", "system_time", "sequence")

    def __init__(self, memory: GuestMemory, line: TimeLine, tsc: VcpuTsc) -> None:
        self._memory = memory
        self._line = line
        self._tsc = tsc
        line.clocks.append(self)
        self.sequence = 0
        self.wall_clock = self.system_time = 0
        """What the guest last wrote to the two registers."""

    def msr_read(self, index: int) -> int:
        """What the guest last wrote."""
        return self.wall_clock if index == MSR_WALL_CLOCK else self.system_time

    def msr_write(self, index: int, value: int) -> None:
        """Fill in the structure that the guest names; GeneralProtection outside RAM."""
        try:
            if index == MSR_WALL_CLOCK:
                self._write_wall_clock(value)
                self.wall_clock = value
            else:
                self._write_time(value, stopped=False)
                self.system_time = value
        except IndexError as error:
            raise GeneralProtection(f"the clock's structure is outside RAM: {error}") from error

    @property
    def ahead(self) -> int:
        """Ticks by which the vCPU's counter is ahead of the machine's, modulo 2**64."""
        return self._tsc.offset - self._tsc.line.offset & MASK64

    def restored(self) -> None:
        """Refuse what no guest could have set up."""
        if self.system_time & _ENABLED:
            try:
                self._memory.offset(self.system_time & ~_ENABLED, _TIME_INFO.size)
            except IndexError as error:
                raise ImageError(f"saved clock: its structure is outside RAM: {error}") from error

    def publish(self, *, stopped: bool = False) -> None:
        """Write the structure anew, if there is one; see `TimeLine.publish`."""
        self._write_time(self.system_time, stopped=stopped)

    def _write_wall_clock(self, address: int) -> None:
        time = self._line.time
        start = time.clock.wall() - self._line.at(time.tsc.read())
        self._memory.dma_write(address, _WALL_CLOCK.pack(2, start // _SECOND, start % _SECOND))

    def _write_time(self, register: int, *, stopped: bool) -> None:
        """Write the line, with an odd version while the rest is not whole."""
        if not register & _ENABLED:
            return
        address = register & ~_ENABLED
        line = self._line
        multiplier, shift = time_scale(line.hz)
        flags = _FLAG_TSC_STABLE if line.stable else 0
        flags |= _FLAG_GUEST_STOPPED if stopped else 0
        self.sequence = self.sequence + 2 & 0xFFFFFFFE
        ticks = line.origin + self.ahead & MASK64
        whole = _TIME_INFO.pack(self.sequence, 0, ticks, line.origin_ns, multiplier, shift, flags)
        self._memory.dma_write(address, _VERSION.pack(self.sequence - 1 & 0xFFFFFFFF) + whole[4:])
        self._memory.dma_write(address, whole[:4])
