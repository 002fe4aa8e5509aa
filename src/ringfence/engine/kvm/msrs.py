"""Model-specific registers that KVM leaves to us: who answers for each.

A device that was attached comes first, then the board (local APIC), then the model in `cpu.msr`,
the same functions that translated code calls, interpreted: such accesses are rare.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ringfence.cpu import msr, state
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.tsc import read_host_tsc
from ringfence.engine import MsrDevice
from ringfence.engine.kvm import transfer
from ringfence.native.interpret import Interpreter


class ModelRegisters:
    """Reads and writes of one vCPU; both raise GeneralProtection where the CPU would.

    Parameters
    ----------
    view : Cpu
        Where the model keeps its state.
    board : Board
        The local APIC's owner.
    """

    def __init__(self, view: Any, board: Any, index: int = 0) -> None:
        self._index = index
        self._view = view
        self._board = board
        self._devices: dict[int, MsrDevice] = {}
        host = Interpreter({"rdtsc": read_host_tsc})
        self._belongs_to_vmm = host.function(msr.belongs_to_vmm)
        self._read_msr = host.function(msr.read_msr)
        self._write_msr = host.function(msr.write_msr)

    def attach(self, indexes: Iterable[int], device: MsrDevice) -> None:
        """Let a device answer for some registers."""
        self._devices.update((index, device) for index in indexes)

    def read(self, index: int) -> int:
        """A register's value."""
        device = self._device(index)
        if device is not None:
            return device.msr_read(index)
        if self._belongs_to_vmm(index):
            return int(self._board.msr_read(self._index, index))
        if self._read_msr(self._view, index) != state.OK:
            raise GeneralProtection(f"MSR {index:#x} does not exist")
        return int(self._view.value)

    def write(self, index: int, value: int) -> None:
        """Set a register."""
        device = self._device(index)
        if device is not None:
            device.msr_write(index, value)
        elif self._belongs_to_vmm(index):
            self._board.msr_write(self._index, index, value)
        elif self._write_msr(self._view, index, value) != state.OK:
            raise GeneralProtection(f"MSR {index:#x} refuses {value:#x}")

    def _device(self, index: int) -> MsrDevice | None:
        """The device that was attached for a register; GeneralProtection where KVM refused."""
        if index in transfer.KVM_MSRS:
            raise GeneralProtection(f"KVM refused an access to its MSR {index:#x}")
        return self._devices.get(index)
