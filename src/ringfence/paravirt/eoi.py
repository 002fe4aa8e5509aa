"""Ending interrupts without an exit: a bit that the VMM sets and the guest clears.

After a vector has been delivered, its handler has to write the local APIC's EOI register, which is
an exit. If nothing else waits, the VMM sets bit 0 of a word that the guest has named; a guest that
finds it set clears it and is done. The local APIC (`chipset.lapic`) decides when the bit may be
lent, and finds out when it matters whether it was used. Only the vCPU's own thread changes the
word, and never while the guest runs, as the guest clears the bit without a lock. An INIT ends it.

Source: Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_PV_EOI_EN).
"""

from __future__ import annotations

from ringfence.chipset.board import Board
from ringfence.chipset.state import Saved, State
from ringfence.cpu.faults import GeneralProtection
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory

MSR_PV_EOI = 0x4B564D04
FEATURE_PV_EOI = 1 << 6
"""CPUID 0x40000001 EAX: the MSR exists (KVM_FEATURE_PV_EOI)."""

_ENABLED, _RESERVED = 1, 2
_BYTES = 4


class PvEoi(Saved):
    """The word of one vCPU.

    Parameters
    ----------
    memory : GuestMemory
        Where the word is.
    board : Board
        Has the vCPU's local APIC.
    number : int
        The vCPU.
    """

    FIELDS = ("register",)

    def __init__(self, memory: GuestMemory, board: Board, number: int) -> None:
        self._memory = memory
        self._board = board
        self._lapic = board.lapics[number]
        self._address = self._at = 0
        self.register = 0
        """What the guest last wrote."""

    def msr_read(self, index: int) -> int:
        """What the guest last wrote, or 0 after an INIT."""
        if self._lapic.eoi_flag is not self:
            self.register = 0
        return self.register

    def msr_write(self, index: int, value: int) -> None:
        """Tell where the word is; GeneralProtection for reserved bits, or outside RAM."""
        if value & _RESERVED:
            raise GeneralProtection(f"PV EOI {value:#x}: reserved bits")
        try:
            if value & _ENABLED:
                self._memory.offset(value & ~_ENABLED, _BYTES)
        except IndexError as error:
            raise GeneralProtection(f"PV EOI's word is outside RAM: {error}") from error
        with self._board.lock:
            self._lapic.reclaim_eoi()
            self.register = value
            self._connect()

    def save(self) -> State:
        """See ``Saved``."""
        self.msr_read(MSR_PV_EOI)
        return super().save()

    def restored(self) -> None:
        """Connect with the local APIC, whose state says whether the bit is lent."""
        try:
            self._connect()
        except IndexError as error:
            raise ImageError(f"saved PV EOI: its word is outside RAM: {error}") from error

    def _connect(self) -> None:
        """Let the local APIC use the word that the register names, or none."""
        self._lapic.eoi_flag = None
        if self.register & _ENABLED:
            self._address = self.register & ~_ENABLED
            self._at = self._memory.offset(self._address, _BYTES)
            self._lapic.eoi_flag = self

    # ---- what the local APIC asks (``chipset.lapic.EoiFlag``)

    def is_set(self) -> bool:
        """Whether the guest has left the bit alone."""
        return bool(self._read() & 1)

    def set(self) -> None:
        """Lend the bit."""
        self._write(self._read() | 1)

    def clear(self) -> bool:
        """Take the bit back; whether it was still set."""
        value = self._read()
        if value & 1:
            self._write(value & ~1)
        return bool(value & 1)

    def _read(self) -> int:
        self._memory.await_pages(self._at, 1)
        return self._memory.view[self._at]

    def _write(self, value: int) -> None:
        self._memory.dma_write(self._address, bytes((value,)))
