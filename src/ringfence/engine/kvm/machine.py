"""What the vCPUs of a machine share under KVM: /dev/kvm, the VM, its memory slots.

Guest RAM becomes memory slots as it is mapped, the ROM one more behind them. The files are closed
with the last vCPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringfence.engine.kvm import model
from ringfence.engine.kvm.device import HostKernel, Kernel, System, VcpuFile, Vm

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory


class KvmMachine:
    """A VM with its memory.

    Parameters
    ----------
    memory : GuestMemory
        Guest RAM.
    kernel : Kernel, optional
        The way to /dev/kvm; tests give another.

    Raises
    ------
    HostError
        /dev/kvm is missing, not permitted, or lacks something.
    """

    def __init__(self, memory: GuestMemory, kernel: Kernel | None = None) -> None:
        self.memory = memory
        self._vcpus: set[int] = set()
        self.system = System(kernel or HostKernel())
        try:
            self.vm: Vm = self.system.create_vm()
        except BaseException:
            self.system.close()
            raise
        try:
            self.vm.prepare(model.msr_filter())
            self._set_slots(log=False)
            self._set_rom()
        except BaseException:
            self.close()
            raise

    def create_vcpu(self, index: int) -> VcpuFile:
        """A virtual CPU; give it back by `close_vcpu`."""
        try:
            made = self.vm.create_vcpu(index)
        except BaseException:
            if not self._vcpus:
                self.close()
            raise
        self._vcpus.add(index)
        return made

    def close_vcpu(self, file: VcpuFile) -> None:
        """Close a vCPU's file, and with the last one the machine. Safe to repeat."""
        file.close()
        if file.number in self._vcpus:
            self._vcpus.remove(file.number)
            if not self._vcpus:
                self.close()

    def close(self) -> None:
        """Close VM and device."""
        self.vm.close()
        self.system.close()

    def _set_slots(self, *, log: bool) -> None:
        for slot, region in enumerate(self.memory.regions):
            host = self.memory.host_base + region.offset
            self.vm.set_memory(slot, region.base, region.size, host, log=log)

    def _set_rom(self) -> None:
        rom = self.memory.rom
        if rom is not None:
            host = self.memory.host_base + rom.offset
            self.vm.set_rom(len(self.memory.regions), rom.base, rom.size, host)

    def log_dirty(self, enabled: bool) -> None:
        """Have KVM note which pages of RAM the guest writes, or stop it. The guest may run."""
        self._set_slots(log=enabled)

    def fetch_dirty(self) -> None:
        """Bring what KVM has noted since the last time to the memory's own log."""
        for slot, region in enumerate(self.memory.regions):
            self.memory.dirty.mark_bits(region.offset, self.vm.dirty_log(slot, region.size))
