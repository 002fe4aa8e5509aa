"""The owner's debugger at a vCPU under KVM: the CPU's four debug registers, through KVM.

While the owner has any breakpoint, watchpoint or step, the guest's own debug registers don't count
(KVM_GUESTDBG_USE_HW_BP). A vCPU that stands at a breakpoint *passes* it by a single step without
it; RF would do on hardware, but not where KVM emulates the instruction.

Source: Linux, Documentation/virt/kvm/api.rst, KVM_SET_GUEST_DEBUG; SDM vol. 3, 18.2.
"""

from __future__ import annotations

from typing import Any

from ringfence.cpu.debug import DR6_B, DR6_BS, DR7_FIXED, RW_ACCESS, RW_WRITE
from ringfence.engine.debug import Access, DebugPoints, DebugStop, StopKind, Watchpoint
from ringfence.engine.kvm import abi
from ringfence.engine.kvm.abi import Request
from ringfence.engine.kvm.device import VcpuFile
from ringfence.errors import UsageError

REGISTERS = 4
LEN = {1: 0, 2: 1, 8: 2, 4: 3}
"""DR7.LEN by bytes."""


class OwnerDebug:
    """Breakpoints, watchpoints and single steps of one vCPU's owner; the vCPU is not running."""

    def __init__(self, vcpu: VcpuFile) -> None:
        self._vcpu = vcpu
        self._slots: list[int | Watchpoint] = []
        """What each debug register is for."""
        self._step = False
        self._told = False
        self._passed: int | None = None
        """The breakpoint that the vCPU is about to pass."""
        self.stop: DebugStop | None = None
        """Why the vCPU came back, if it was for the owner's debugger."""

    def arm(self, points: DebugPoints) -> None:
        """Stop at these from now on, and at no others; UsageError if the CPU can't."""
        slots: list[int | Watchpoint] = [*sorted(points.breakpoints), *points.watchpoints]
        if len(slots) > REGISTERS:
            raise UsageError(
                f"{len(slots)} breakpoints and watchpoints: the CPU under KVM has {REGISTERS}"
            )
        for watch in points.watchpoints:
            if watch.length not in LEN or watch.address % watch.length or not watch.access:
                raise UsageError(
                    f"a watchpoint of {watch.length} bytes at {watch.address:#x}: under KVM they"
                    " are of 1, 2, 4 or 8 bytes, and aligned"
                )
        self._slots = slots
        self._tell()

    def step(self, wanted: bool) -> None:
        """Whether to stop behind the next instruction; interrupts are held back meanwhile."""
        if self._step != wanted:
            self._step = wanted
            self._tell()

    def _tell(self) -> None:
        debug = abi.KvmGuestDebug()
        if self._slots:
            debug.control |= abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_HW_BP
        if self._step or self._passed is not None:
            debug.control |= abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP | abi.GUESTDBG_BLOCKIRQ
        if not debug.control and not self._told:
            return
        control = DR7_FIXED
        for n, slot in enumerate(self._slots):
            if slot == self._passed:
                continue
            control |= 2 << 2 * n
            if isinstance(slot, Watchpoint):
                kind = RW_ACCESS if slot.access & Access.READ else RW_WRITE
                control |= (kind | LEN[slot.length] << 2) << 16 + 4 * n
                debug.debugreg[n] = slot.address
            else:
                debug.debugreg[n] = slot
        debug.debugreg[7] = control
        self._vcpu.ask(Request.SET_GUEST_DEBUG, debug)
        self._told = True

    def begin(self) -> None:
        """The vCPU is about to run: where it stopped for the owner, it goes on."""
        stop, self.stop = self.stop, None
        if stop is not None and stop.rip in self._slots:
            regs = self._vcpu.get(Request.GET_REGS, abi.KvmRegs)
            if regs.rip == stop.rip:
                self._passed = stop.rip
                self._tell()

    def note(self, arch: Any, cpu: int) -> bool:
        """The vCPU left the guest with KVM_EXIT_DEBUG; whether its owner wants to know."""
        passed, self._passed = self._passed, None
        if passed is not None:
            self._tell()
        hit = arch.dr6 & DR6_B & (1 << len(self._slots)) - 1
        if not hit or arch.dr6 & DR6_BS:
            if self._step:
                self.stop = DebugStop(StopKind.STEP, cpu, arch.pc)
            return self._step
        slot = self._slots[hit.bit_length() - 1]
        if isinstance(slot, Watchpoint):
            self.stop = DebugStop(StopKind.WATCHPOINT, cpu, arch.pc, slot)
        else:
            self.stop = DebugStop(StopKind.BREAKPOINT, cpu, arch.pc)
        return True
