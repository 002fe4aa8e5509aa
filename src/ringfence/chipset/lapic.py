"""The local APIC (SDM 3A chapter 11), as xAPIC page and as x2APIC MSRs.

A register has one number in both views: MMIO offset >> 4, or MSR index - 0x800. Two tables of
bound methods, indexed by that number, are the register file; the views differ only in how they
check an access. IRR, ISR and TMR are 256-bit Python ints, so that the highest vector is one
``bit_length()``; PPR is kept up to date rather than computed, because `pending_vector` is asked
far more often than TPR or ISR change.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag
from functools import partial
from typing import Protocol

from ringfence.chipset.apicbus import BROADCAST, BROADCAST_8, ApicBus, Delivery
from ringfence.chipset.clock import TimerQueue
from ringfence.chipset.lapic_timer import LapicTimer, TimerMode, TscSource
from ringfence.chipset.state import Saved, State, check_version
from ringfence.cpu.cpuid import PHYSICAL_BITS
from ringfence.cpu.faults import GeneralProtection

__all__ = ["GeneralProtection", "Lapic", "TscSource"]

APIC_BASE = 0x1B
"""MSR IA32_APIC_BASE (SDM 4, table 2-2)."""
TSC_DEADLINE = 0x6E0
"""MSR IA32_TSC_DEADLINE."""
X2APIC_FIRST, X2APIC_LAST = 0x800, 0x8FF
DEFAULT_BASE = 0xFEE0_0000
PAGE = 0x1000

BASE_BSP = 1 << 8
BASE_EXTD = 1 << 10
BASE_EN = 1 << 11
_BASE_RESERVED = ~((1 << PHYSICAL_BITS) - PAGE | BASE_BSP | BASE_EXTD | BASE_EN)

VERSION = 0x14 | 5 << 16
"""Integrated APIC; six LVT entries (SDM 3A 11.4.8)."""
SVR_ENABLE = 1 << 8
LVT_MASKED = 1 << 16
LVT_LEVEL = 1 << 15


class Reg(IntEnum):
    """Register numbers: MMIO offset >> 4 (SDM 3A table 11-1, table 11-6)."""

    ID = 0x02
    VERSION = 0x03
    TPR = 0x08
    APR = 0x09
    PPR = 0x0A
    EOI = 0x0B
    LDR = 0x0D
    DFR = 0x0E
    SVR = 0x0F
    ISR = 0x10
    TMR = 0x18
    IRR = 0x20
    ESR = 0x28
    ICR = 0x30
    ICR_HIGH = 0x31
    LVT_TIMER = 0x32
    LVT_THERMAL = 0x33
    LVT_PERFORMANCE = 0x34
    LVT_LINT0 = 0x35
    LVT_LINT1 = 0x36
    LVT_ERROR = 0x37
    INITIAL_COUNT = 0x38
    CURRENT_COUNT = 0x39
    DIVIDE = 0x3E
    SELF_IPI = 0x3F


class Error(IntFlag):
    """Error status register (SDM 3A 11.5.3)."""

    SEND_ILLEGAL_VECTOR = 1 << 5
    RECEIVE_ILLEGAL_VECTOR = 1 << 6
    ILLEGAL_REGISTER = 1 << 7


_LVT_WRITABLE = (0x700FF, 0x107FF, 0x107FF, 0x1A7FF, 0x1A7FF, 0x100FF)
"""Writable bits of LVT timer, thermal, performance, LINT0, LINT1, error (SDM figure 11-8)."""
_XAPIC_ONLY = {Reg.APR, Reg.DFR, Reg.ICR_HIGH}
_X2APIC_LIMITS = {Reg.TPR: 0xFF, Reg.EOI: 0, Reg.SVR: 0x1FF, Reg.ESR: 0, Reg.DIVIDE: 0xB} | {
    Reg.LVT_TIMER + index: bits | (0x5000 if index in (3, 4) else 0x1000)
    for index, bits in enumerate(_LVT_WRITABLE)
}
"""x2APIC registers whose other bits are reserved: writing those raises #GP."""


class EoiFlag(Protocol):
    """A bit in guest memory by which the guest may end a vector in place of writing EOI."""

    def is_set(self) -> bool:
        """Tell whether the guest has not used it."""

    def set(self) -> None:
        """Lend it; the guest does not run."""

    def clear(self) -> bool:
        """Take it back, and tell whether it had not been used; the guest does not run."""


class Lapic(Saved):
    """One CPU's local APIC. The board's lock must be held around every method.

    With an `eoi_flag`, the highest vector in service may have ended without our knowing (`lent`).
    `settle` finds that out, from any thread; `reclaim_eoi`, for the CPU's own, also ends the loan.
    A request that arrives meanwhile wakes the CPU whatever its priority, so that it looks.

    Parameters
    ----------
    cpu : int
        CPU index; also the APIC ID.
    bus : ApicBus
        Carries IPIs and EOIs.
    queue : TimerQueue
        For the timer.
    tsc : TscSource
        For TSC-deadline mode.

    Attributes
    ----------
    wake : Callable[[], None]
        Called when an interrupt becomes deliverable.
    eoi_flag : EoiFlag or None
        What the guest has agreed on, if it has.
    """

    FIELDS = (
        "base", "tpr", "ppr", "ldr", "dfr", "svr", "irr", "isr", "tmr",
        "esr", "errors", "icr", "lvt", "lint", "lent",
    )  # fmt: skip

    def __init__(self, cpu: int, bus: ApicBus, queue: TimerQueue, tsc: TscSource) -> None:
        self.cpu = cpu
        self._bus = bus
        self.wake: Callable[[], None] = lambda: None
        self.timer = LapicTimer(queue, tsc, partial(self._lvt_event, 0))
        self.base = DEFAULT_BASE | BASE_EN | (BASE_BSP if cpu == 0 else 0)
        self.lint = [False, False]
        self._readers: dict[int, Callable[[], int]] = {
            Reg.ID: self._read_id,
            Reg.VERSION: lambda: VERSION,
            Reg.TPR: lambda: self.tpr,
            Reg.APR: lambda: 0,
            Reg.PPR: lambda: self.ppr,
            Reg.LDR: lambda: self.logical_id() if self.x2apic else self.ldr,
            Reg.DFR: lambda: self.dfr,
            Reg.SVR: lambda: self.svr,
            Reg.ESR: lambda: self.esr,
            Reg.ICR: lambda: self.icr & 0xFFFF_FFFF,
            Reg.ICR_HIGH: lambda: self.icr >> 32,
            Reg.INITIAL_COUNT: lambda: self.timer.initial,
            Reg.CURRENT_COUNT: self.timer.read_current,
            Reg.DIVIDE: lambda: self.timer.divide,
        }
        self._writers: dict[int, Callable[[int], None]] = {
            Reg.TPR: self._write_tpr,
            Reg.EOI: self.end_of_interrupt,
            Reg.LDR: self._write_ldr,
            Reg.DFR: self._write_dfr,
            Reg.SVR: self._write_svr,
            Reg.ESR: self._write_esr,
            Reg.ICR: self._write_icr_low,
            Reg.ICR_HIGH: self._write_icr_high,
            Reg.INITIAL_COUNT: self.timer.write_initial,
            Reg.DIVIDE: self.timer.write_divide,
        }
        for index in range(8):
            for base, name in ((Reg.ISR, "isr"), (Reg.TMR, "tmr"), (Reg.IRR, "irr")):
                self._readers[base + index] = partial(self._read_vectors, name, index)
        for index in range(len(_LVT_WRITABLE)):
            self._readers[Reg.LVT_TIMER + index] = partial(self._read_lvt, index)
            self._writers[Reg.LVT_TIMER + index] = partial(self._write_lvt, index)
        self.reset()

    def reset(self) -> None:
        """Take the registers' power-up values (SDM 3A 11.4.7.1), but stay enabled as is."""
        self.tpr = self.ppr = 0
        self.ldr, self.dfr = 0, 0xFFFF_FFFF
        self._bus.renamed()
        self.svr = 0xFF
        self.irr = self.isr = self.tmr = 0
        self.lent = False
        self.eoi_flag: EoiFlag | None = None
        self.esr = self.errors = 0
        self.icr = 0
        self.lvt = [LVT_MASKED] * len(_LVT_WRITABLE)
        self.timer.reset()

    def reset_by_init(self) -> None:
        """Do what an INIT does (SDM 3A 11.4.7.3)."""
        self.reset()

    def set_virtual_wire(self) -> None:
        """Be as firmware leaves the boot CPU's: enabled, 8259 on LINT0, NMI on LINT1."""
        self._write_svr(SVR_ENABLE | 0x0F)
        self._write_lvt(3, Delivery.EXTINT << 8)
        self._write_lvt(4, Delivery.NMI << 8)

    # ---- state that others ask for

    @property
    def enabled(self) -> bool:
        """IA32_APIC_BASE.EN."""
        return bool(self.base & BASE_EN)

    @property
    def x2apic(self) -> bool:
        """True in x2APIC mode."""
        return bool(self.base & BASE_EXTD)

    @property
    def accepts_fixed(self) -> bool:
        """True if it takes fixed interrupts: enabled in hardware and in software."""
        return bool(self.base & BASE_EN and self.svr & SVR_ENABLE)

    @property
    def mmio_base(self) -> int | None:
        """Guest-physical address of the register page, or None where there is none."""
        return self.base & ~0xFFF if self.enabled and not self.x2apic else None

    def accepts_extint(self) -> bool:
        """Tell whether the 8259's interrupt reaches the CPU through LINT0."""
        if not self.enabled:
            return True
        return self.lvt[3] & (LVT_MASKED | 0x700) == Delivery.EXTINT << 8

    def logical_id(self) -> int:
        """Return the x2APIC logical ID (SDM 3A 11.12.10.2)."""
        return self.cpu >> 4 << 16 | 1 << (self.cpu & 0xF)

    def matches(self, destination: int, logical: bool) -> bool:
        """Tell whether a destination other than broadcast means this one (SDM 3A 11.6.2)."""
        if not self.enabled:
            return False
        if not logical:
            return destination == self.cpu
        if self.x2apic:
            own = self.logical_id()
            return destination >> 16 == own >> 16 and bool(destination & own & 0xFFFF)
        own = self.ldr >> 24
        if self.dfr >> 28 == 0xF:
            return bool(destination & own)
        return destination >> 4 == own >> 4 and bool(destination & own & 0xF)

    # ---- interrupts in

    def accept(self, vector: int, level: bool) -> None:
        """Request a fixed interrupt."""
        if vector < 16:
            self._error(Error.RECEIVE_ILLEGAL_VECTOR)
            return
        bit = 1 << vector
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        if not self.irr & bit:
            self.settle()
            self.irr |= bit
            if self.lent or vector >> 4 > self.ppr >> 4:
                self.wake()

    def set_lint(self, pin: int, level: bool) -> None:
        """Drive LINT0 (the 8259) or LINT1 (NMI)."""
        rising = level and not self.lint[pin]
        self.lint[pin] = level
        if not self.enabled:
            if rising and pin == 0:
                self.wake()
            elif rising:
                self._bus.on_signal(self.cpu, Delivery.NMI, 2)
        elif rising:
            self._lvt_event(3 + pin)

    def _lvt_event(self, index: int) -> None:
        """Deliver what an LVT entry says (SDM 3A 11.5.1)."""
        entry = self.lvt[index]
        if entry & LVT_MASKED:
            return
        mode = entry >> 8 & 7 if index not in (0, 5) else Delivery.FIXED
        if mode == Delivery.FIXED:
            if self.accepts_fixed:
                self.accept(entry & 0xFF, bool(index == 3 and entry & LVT_LEVEL))
        elif mode == Delivery.EXTINT:
            self.wake()
        else:
            self._bus.deliver([self], mode, entry & 0xFF, False)

    def _error(self, error: Error) -> None:
        first = not self.errors & error
        self.errors |= int(error)
        if first and self.lvt[5] & 0xFF >= 16:
            self._lvt_event(5)

    # ---- interrupts out

    def pending_vector(self) -> int | None:
        """Return the highest requested vector that PPR lets through, or None."""
        vector = self.irr.bit_length() - 1
        if vector >= 0 and vector >> 4 > self.ppr >> 4 and self.base & BASE_EN:
            return vector
        return None

    def acknowledge(self) -> int:
        """Move the pending vector into service and return it; spurious vector if none."""
        self.reclaim_eoi()
        vector = self.pending_vector()
        if vector is None:
            return self.svr & 0xFF
        bit = 1 << vector
        self.irr &= ~bit
        self.isr |= bit
        self._update_ppr()
        if self.eoi_flag is not None and not self.irr and not self.tmr & bit:
            self.eoi_flag.set()
            self.lent = True
        return vector

    def settle(self) -> None:
        """If the guest has ended a vector by the flag, do what that means."""
        if self.lent and self.eoi_flag is not None and not self.eoi_flag.is_set():
            self.lent = False
            self._retire()

    def reclaim_eoi(self) -> None:
        """Settle, and if the guest has not ended its vector, have it write EOI for that."""
        if self.lent and self.eoi_flag is not None:
            self.lent = False
            if not self.eoi_flag.clear():
                self._retire()

    def end_of_interrupt(self, _value: int = 0) -> None:
        """Write EOI: retire the highest vector in service."""
        self.reclaim_eoi()
        self._retire()

    def _retire(self) -> None:
        """Take the highest vector out of service."""
        vector = self.isr.bit_length() - 1
        if vector < 0:
            return
        bit = 1 << vector
        self.isr &= ~bit
        self._update_ppr()
        if self.tmr & bit:
            self._bus.on_eoi(vector)
        if self.pending_vector() is not None:
            self.wake()

    def read_cr8(self) -> int:
        """Return CR8: the task priority class."""
        return self.tpr >> 4

    def write_cr8(self, value: int) -> None:
        """Set CR8."""
        self.settle()
        self._write_tpr((value & 0xF) << 4)

    def _update_ppr(self) -> None:
        """PPR from TPR and ISR (SDM 3A 11.8.3.1)."""
        serving = max(0, self.isr.bit_length() - 1) & 0xF0
        self.ppr = self.tpr if self.tpr & 0xF0 >= serving else serving

    # ---- the two views

    def read(self, offset: int, size: int) -> int:
        """Read the register page; a register is 4 bytes at a multiple of 16."""
        self.settle()
        reader = self._readers.get(offset >> 4)
        if reader is None or not self.enabled:
            self._error(Error.ILLEGAL_REGISTER)
            return 0
        return reader() >> 8 * (offset & 0xF) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the register page; only whole registers can be written."""
        self.settle()
        writer = self._writers.get(offset >> 4)
        if offset & 0xF or size < 4:
            return
        if writer is not None:
            writer(value & 0xFFFF_FFFF)
        elif offset >> 4 not in self._readers:
            self._error(Error.ILLEGAL_REGISTER)

    def msr_read(self, index: int) -> int:
        """Read IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; else #GP."""
        self.settle()
        if index == TSC_DEADLINE:
            return self.timer.read_deadline()
        if index == APIC_BASE:
            return self.base
        number = index - X2APIC_FIRST
        reader = self._readers.get(number)
        if not self.x2apic or reader is None or number in _XAPIC_ONLY:
            raise GeneralProtection(f"rdmsr {index:#x}")
        return self.icr if number == Reg.ICR else reader()

    def msr_write(self, index: int, value: int) -> None:
        """Write one of the MSRs that `msr_read` reads; #GP where the CPU would."""
        self.settle()
        if index == TSC_DEADLINE:
            self.timer.write_deadline(value)
        elif index == APIC_BASE:
            self._write_base(value)
        elif not self.x2apic:
            raise GeneralProtection(f"wrmsr {index:#x} outside x2APIC mode")
        else:
            self._x2apic_write(index - X2APIC_FIRST, value)

    def _x2apic_write(self, number: int, value: int) -> None:
        if number == Reg.ICR:
            if value & 0xFFF3_2000:
                raise GeneralProtection(f"wrmsr ICR {value:#x}: reserved bits")
            self.icr = value & ~0x1000
            self._send_ipi(value >> 32, BROADCAST)
            return
        if number == Reg.SELF_IPI and value <= 0xFF:
            self._self_ipi(value)
            return
        writer = self._writers.get(number)
        limit = _X2APIC_LIMITS.get(number, 0xFFFF_FFFF)
        if writer is None or value & ~limit or number in _XAPIC_ONLY or number == Reg.LDR:
            raise GeneralProtection(f"wrmsr {X2APIC_FIRST + number:#x} {value:#x}")
        writer(value)

    def _write_base(self, value: int) -> None:
        """Write IA32_APIC_BASE; allowed transitions are in SDM 3A figure 11-27."""
        was, now = self.base & (BASE_EN | BASE_EXTD), value & (BASE_EN | BASE_EXTD)
        illegal = (
            now == BASE_EXTD
            or (was == BASE_EN | BASE_EXTD and now == BASE_EN)
            or (was == 0 and now == BASE_EN | BASE_EXTD)
        )
        if illegal or value & _BASE_RESERVED:
            raise GeneralProtection(f"wrmsr IA32_APIC_BASE {value:#x}, was {self.base:#x}")
        self.base = value
        self._bus.renamed()
        if was and not now:
            self.reset()
        elif now & BASE_EXTD and not was & BASE_EXTD:
            self.icr &= 0xFFFF_FFFF

    # ---- registers

    def _read_id(self) -> int:
        return self.cpu if self.x2apic else self.cpu << 24

    def _read_vectors(self, name: str, index: int) -> int:
        vectors: int = getattr(self, name)
        return vectors >> 32 * index & 0xFFFF_FFFF

    def _read_lvt(self, index: int) -> int:
        return self.lvt[index]

    def _write_tpr(self, value: int) -> None:
        lowered = value & 0xFF < self.tpr
        self.tpr = value & 0xFF
        self._update_ppr()
        if lowered and self.pending_vector() is not None:
            self.wake()

    def _write_ldr(self, value: int) -> None:
        self.ldr = value & 0xFF00_0000
        self._bus.renamed()

    def _write_dfr(self, value: int) -> None:
        self.dfr = value | 0x0FFF_FFFF
        self._bus.renamed()

    def _write_svr(self, value: int) -> None:
        self.svr = value & 0x1FF
        if not value & SVR_ENABLE:
            for index, entry in enumerate(self.lvt):
                self.lvt[index] = entry | LVT_MASKED

    def _write_esr(self, _value: int) -> None:
        self.esr, self.errors = self.errors, 0

    def _write_lvt(self, index: int, value: int) -> None:
        value &= _LVT_WRITABLE[index]
        if not self.svr & SVR_ENABLE:
            value |= LVT_MASKED
        self.lvt[index] = value
        if index == 0:
            self.timer.set_mode(TimerMode(value >> 17 & 3))
        elif index in (3, 4) and self.lint[index - 3] and value >> 8 & 7 == Delivery.EXTINT:
            self._lvt_event(index)

    def _write_icr_high(self, value: int) -> None:
        self.icr = self.icr & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32

    def _write_icr_low(self, value: int) -> None:
        self.icr = self.icr & ~0xFFFF_FFFF | value & 0xC_CFFF
        self._send_ipi(self.icr >> 56, BROADCAST_8)

    def _send_ipi(self, destination: int, broadcast: int) -> None:
        """Send what ICR says (SDM 3A 11.6.1)."""
        vector, mode = self.icr & 0xFF, self.icr >> 8 & 7
        shorthand = self.icr >> 18 & 3
        if mode in (Delivery.FIXED, Delivery.LOWEST_PRIORITY) and vector < 16:
            self._error(Error.SEND_ILLEGAL_VECTOR)
            return
        if mode == Delivery.INIT and self.icr & 0xC000 == 0x8000:
            return  # INIT level de-assert: long obsolete, nothing to do
        if shorthand == 0:
            if destination == broadcast:
                destination = BROADCAST
            targets = self._bus.targets(destination, bool(self.icr & 0x800))
        elif shorthand == 1:
            targets = [self]
        else:
            targets = [lapic for lapic in self._bus.lapics if shorthand == 2 or lapic is not self]
        self._bus.deliver(targets, mode, vector, False)

    def _self_ipi(self, vector: int) -> None:
        if vector < 16:
            self._error(Error.SEND_ILLEGAL_VECTOR)
        elif self.accepts_fixed:
            self.accept(vector, False)

    # ---- state

    def save(self) -> State:
        """See `Saved.save`; the timer is a part of it."""
        self.settle()
        return super().save() | {"timer": self.timer.save()}

    def restore(self, state: State) -> None:
        """See `Saved.restore`; clock and TSC must have been restored before."""
        check_version("Lapic", state, self.VERSION)
        super().restore(state)
        self._bus.renamed()
        self.timer.restore(state["timer"])
