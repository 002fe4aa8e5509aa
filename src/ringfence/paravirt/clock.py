"""The paravirtual clock that KVM defined: time, and the TSC's frequency, without measuring.

The guest names a guest-physical address in an MSR; the VMM writes there how to get nanoseconds from
the TSC. Host time and TSC stop together while a machine is paused, so one writing is enough until
the guest asks again. Source: Linux, Documentation/virt/kvm/x86/msr.rst and cpuid.rst.
"""

from __future__ import annotations

import struct
from typing import Protocol

from ringfence.cpu.faults import GeneralProtection
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
_TSC_STABLE = 1
_TIME_INFO = struct.Struct("<IIQQIbBxx")  # struct pvclock_vcpu_time_info
_WALL_CLOCK = struct.Struct("<III")  # struct pvclock_wall_clock
_SECOND = 1_000_000_000


class Clock(Protocol):
    """The machine's clock, in nanoseconds."""

    def now(self) -> int:
        """Since the machine started."""

    def wall(self) -> int:
        """Since the Unix epoch."""


class Tsc(Protocol):
    """The guest's time-stamp counter."""

    @property
    def hz(self) -> int:
        """Ticks per second."""

    def read(self) -> int:
        """The counter now."""


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


def _shifted(hz: int, shift: int) -> int:
    return hz << shift if shift >= 0 else hz >> -shift


class ParavirtualClock:
    """The clock of one vCPU.

    Parameters
    ----------
    memory : GuestMemory
        Where the guest's structures are.
    clock : Clock
        The machine's time.
    tsc : Tsc
        The guest's counter.
    """

    def __init__(self, memory: GuestMemory, clock: Clock, tsc: Tsc) -> None:
        self._memory = memory
        self._clock = clock
        self._tsc = tsc
        self._version = 0
        self._values = dict.fromkeys(MSRS, 0)

    def msr_read(self, index: int) -> int:
        """What the guest last wrote."""
        return self._values[index]

    def msr_write(self, index: int, value: int) -> None:
        """Fill in the structure that the guest names; GeneralProtection outside RAM."""
        address = value & ~_ENABLED
        try:
            if index == MSR_WALL_CLOCK:
                self._write_wall_clock(value)
            elif value & _ENABLED:
                self._write_time(address)
        except IndexError as error:
            raise GeneralProtection(f"the clock's structure is outside RAM: {error}") from error
        self._values[index] = value

    def _write_wall_clock(self, address: int) -> None:
        start = self._clock.wall() - self._clock.now()
        self._memory.write(address, _WALL_CLOCK.pack(2, start // _SECOND, start % _SECOND))

    def _write_time(self, address: int) -> None:
        multiplier, shift = time_scale(self._tsc.hz)
        ticks, now = self._tsc.read(), self._clock.now()
        self._version += 2
        self._memory.write(
            address,
            _TIME_INFO.pack(
                self._version & 0xFFFFFFFE, 0, ticks, now, multiplier, shift, _TSC_STABLE
            ),
        )
