"""Hypercalls about time: what the wall clock was at a TSC, and what a pause shall do to clocks.

Source: Linux, Documentation/virt/kvm/x86/hypercalls.rst (KVM_HC_CLOCK_PAIRING).
"""

from __future__ import annotations

import struct

from ringfence.chipset.timekeeping import PauseClock, Timekeeper
from ringfence.paravirt.hypercalls import Call, Error, HypercallError, Hypercalls, Number

_PAIRING = struct.Struct("<QQQI36x")  # struct kvm_clock_pairing
_WALLCLOCK = 0
_POLICIES = (PauseClock.STOP, PauseClock.RUN)
_QUERY = len(_POLICIES)
_SECOND = 1_000_000_000


class TimeCalls:
    """CLOCK_PAIRING and PAUSE_CLOCK.

    Parameters
    ----------
    time : Timekeeper
        The machine's time.
    """

    def __init__(self, time: Timekeeper) -> None:
        self._time = time

    def provide(self, table: Hypercalls) -> None:
        """Enter the functions."""
        table.provide(Number.CLOCK_PAIRING, self._pairing)
        table.provide(Number.PAUSE_CLOCK, self._pause_clock)

    def _pairing(self, call: Call) -> int:
        """Write seconds, nanoseconds, the caller's TSC, flags: the host's wall clock now."""
        address, kind = call.arguments[:2]
        if kind != _WALLCLOCK:
            raise HypercallError(Error.EOPNOTSUPP)
        counter = self._time.tsc.vcpu(call.vcpu)
        before = counter.read()
        wall = self._time.clock.wall()
        ticks = before + (counter.read() - before) // 2
        call.write(address, _PAIRING.pack(wall // _SECOND, wall % _SECOND, ticks, 0))
        return 0

    def _pause_clock(self, call: Call) -> int:
        """Choose, or with `_QUERY` only ask; the result is what held before."""
        wanted = call.arguments[0]
        before = _POLICIES.index(self._time.policy)
        if wanted > _QUERY:
            raise HypercallError(Error.EINVAL)
        if wanted < _QUERY:
            self._time.policy = _POLICIES[wanted]
        return before
