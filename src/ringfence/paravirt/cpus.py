"""Hypercalls by which the guest's CPUs reach each other: interrupts to many at once, kicks, yields.

A CPU is named by its APIC ID, which is its number. Numbers that no CPU has are not errors where
KVM ignores them, too.

Source: Linux, Documentation/virt/kvm/x86/hypercalls.rst; Intel SDM vol. 3, 11.6.1 (ICR).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ringfence.chipset.apicbus import Delivery
from ringfence.chipset.board import Board
from ringfence.paravirt.hypercalls import Call, Error, HypercallError, Hypercalls, Number

FEATURE_PV_UNHALT = 1 << 7
"""CPUID 0x40000001 EAX: a kick ends a HLT that interrupts may not end (KVM_FEATURE_PV_UNHALT)."""
FEATURE_PV_SEND_IPI = 1 << 11
FEATURE_PV_SCHED_YIELD = 1 << 13
FEATURES = FEATURE_PV_UNHALT | FEATURE_PV_SEND_IPI | FEATURE_PV_SCHED_YIELD

_ICR_VECTOR, _ICR_MODE_SHIFT, _ICR_MODE = 0xFF, 8, 7
_ICR_DESTINATION = 3 << 18
"""Shorthand for destinations; the bitmap says which CPUs are meant."""


class CpuCalls:
    """SEND_IPI, KICK_CPU and SCHED_YIELD.

    Parameters
    ----------
    board : Board
        Carries the interrupts.
    kicks : sequence of Callable[[], None]
        By CPU: ends its HLT.
    """

    def __init__(self, board: Board, kicks: Sequence[Callable[[], None]]) -> None:
        self._board = board
        self._kicks = kicks

    def provide(self, table: Hypercalls) -> None:
        """Enter the functions."""
        table.provide(Number.SEND_IPI, self._send_ipi)
        table.provide(Number.KICK_CPU, self._kick)
        table.provide(Number.SCHED_YIELD, self._yield)

    def _send_ipi(self, call: Call) -> int:
        """To each CPU of the bitmap at once; the result is how many took it."""
        low, high, first, icr = call.arguments
        if icr & _ICR_DESTINATION:
            raise HypercallError(Error.EINVAL)
        mode, vector = icr >> _ICR_MODE_SHIFT & _ICR_MODE, icr & _ICR_VECTOR
        if mode not in (Delivery.FIXED, Delivery.NMI):
            raise HypercallError(Error.EINVAL)
        if mode == Delivery.FIXED and vector < 16:
            return 0
        wanted = (low | high << call.bits) << min(first, len(self._kicks))
        cpus = [cpu for cpu in range(len(self._kicks)) if wanted >> cpu & 1]
        return self._board.send_ipi(cpus, mode, vector)

    def _kick(self, call: Call) -> int:
        cpu = call.arguments[1]
        if cpu < len(self._kicks):
            self._kicks[cpu]()
        return 0

    def _yield(self, call: Call) -> int:
        """The host's scheduler decides who is next; it is told that this CPU can wait."""
        os.sched_yield()
        return 0
