"""The KVM engine: runs one vCPU by the host's virtualization extensions, through /dev/kvm.

`run` enters the guest and handles what comes out, until something ends it. Interrupt controllers
and timers are the board's, as under every engine, so KVM is used without an irqchip of its own: the
local APIC is reached by exits, its vectors go in through KVM_INTERRUPT, and the task priority
travels in ``kvm_run.cr8``. Model-specific registers other than the few in `transfer` come to us
too, which makes the paravirtual clock and the memory-type registers the same as under translation.

**Kicks.** Whoever wants something of the vCPU (the board by its wake callback, the owner by
`request_stop` and `request_pause`) notes what, *then* looks whether the vCPU is inside KVM, and if
so sends its thread a signal. The vCPU's thread says that it is inside, *then* looks at the notes
once more. Under Python's global lock these four steps have one order, so at least one side sees the
other. The signal is blocked in the thread and let through only while KVM runs
(KVM_SET_SIGNAL_MASK): one that arrives early stays pending and ends the next KVM_RUN at once. No
handler is ever called, and as SIGURG is ignored by default, one that comes after the run does no
harm.

**Pending accesses.** KVM finishes an access to a device when it is entered the next time. Before
`run` returns, `_settle` therefore enters once more with ``immediate_exit``, which runs no guest
code.

Source: Linux, Documentation/virt/kvm/api.rst (KVM_RUN and struct kvm_run).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ringfence.cpu import cpuid, reset, signals, state
from ringfence.cpu.dump import dump
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.registers import named_registers, set_named_register
from ringfence.cpu.saved import State, restore_cpu, save_cpu
from ringfence.cpu.tsc import MSR_TSC
from ringfence.cpu.tsc import MSRS as TSC_MSRS
from ringfence.engine import EngineConfig, MsrDevice, Services, StopReason
from ringfence.engine import exits as vocabulary
from ringfence.engine.exits import ExitCounters, Reason
from ringfence.engine.kvm import abi, model, transfer
from ringfence.engine.kvm.abi import Exit
from ringfence.engine.kvm.device import Kernel, VcpuFile
from ringfence.engine.kvm.machine import KvmMachine
from ringfence.engine.kvm.msrs import ModelRegisters
from ringfence.engine.kvm.owner import OwnerDebug
from ringfence.errors import HostError
from ringfence.memory.ram import PAGE

if TYPE_CHECKING:
    from ringfence.cpu.reset import EntryState
    from ringfence.engine.debug import DebugPoints, DebugStop
    from ringfence.memory.ram import GuestMemory

MASK64 = (1 << 64) - 1
KICK = signal.SIGURG
AGAIN_MAX = 1000
"""How often in a row KVM may say EAGAIN until that counts as broken."""
TSC_SLACK = 1 << 24
"""Ticks by which two readings of one counter may differ, from different CPUs."""


def create_vcpus(
    memory: GuestMemory, board: Any, config: EngineConfig, kernel: Kernel | None = None
) -> list[KvmEngine]:
    """All vCPUs of a machine."""
    machine = KvmMachine(memory, kernel)
    made: list[KvmEngine] = []
    try:
        for index in range(config.cpus):
            made.append(KvmEngine(machine, board, config, index))
    except BaseException:
        for vcpu in made:
            vcpu.close()
        raise
    return made


class KvmEngine:
    """One vCPU under KVM; see ``engine.VirtualCpu`` for the protocol.

    Parameters
    ----------
    machine : KvmMachine
        What it shares with the other vCPUs; closed with the last of them.
    board : Board
        The chipset: ports, MMIO, interrupt controllers.
    config : EngineConfig
        ``cache_dir`` means nothing here.
    index : int
        The vCPU's number.

    Raises
    ------
    HostError
        KVM can't give such a vCPU.
    """

    def __init__(
        self, machine: KvmMachine, board: Any, config: EngineConfig, index: int = 0
    ) -> None:
        self.index = index
        self.machine = machine
        self.memory = machine.memory
        self.board = board
        self._page = mmap.mmap(-1, -(-state.Cpu.size // PAGE) * PAGE)
        self.view = state.Cpu.at(ctypes.addressof(ctypes.c_char.from_buffer(self._page)))
        reset.reset(self.view)
        self.view.wait_for_sipi = index != 0
        self.vcpu = machine.create_vcpu(index)
        try:
            rows = cpuid.build_cpuid(
                cpuid.host_cpuid,
                cpu_index=index,
                cpus=config.cpus,
                paravirtual=config.paravirtual,
                only=config.features,
            )
            rows = model.offered(rows, machine.system.supported_cpuid())
            cpuid.require(config.features, rows)
            self.features = cpuid.offered(rows)
            self.vcpu.set_cpuid(model.cpuid_entries(rows))
            self._start_tsc(self.vcpu)
        except BaseException:
            self.close()
            raise
        self._msrs = ModelRegisters(self.view, board, index)
        self._msrs.attach(TSC_MSRS, board.tsc.vcpu(index))
        self._services: Services | None = None
        self._owner = OwnerDebug(self.vcpu)
        self._stop = self._pause = self._irq = self._signalled = False
        self._inside = self._halted = False
        self._cr8 = 0
        self._again = 0
        self._thread: int | None = None
        self._thread_lock = threading.Lock()
        self._wake = threading.Event()
        board.set_wake(index, self._woken)
        self.counters = ExitCounters()
        self._trace: Callable[[vocabulary.TraceRecord], None] | None = None
        self._guest_ns = self._vmm_ns = self._idle_ns = 0
        self._crash = ""
        self._handlers: dict[int, Callable[[Any], StopReason | None]] = {
            Exit.IO: self._on_io,
            Exit.MMIO: self._on_mmio,
            Exit.HLT: self._on_halt,
            Exit.DEBUG: self._on_debug,
            Exit.X86_RDMSR: self._on_msr_read,
            Exit.X86_WRMSR: self._on_msr_write,
            Exit.IRQ_WINDOW_OPEN: self._nothing,
            Exit.SET_TPR: self._nothing,
            Exit.SHUTDOWN: self._on_shutdown,
            Exit.INTERNAL_ERROR: self._on_internal_error,
            Exit.FAIL_ENTRY: self._on_fail_entry,
        }

    def _start_tsc(self, vcpu: VcpuFile) -> None:
        """Give the guest its counter, where KVM can; board and guest agree in any case."""
        line = self.board.tsc
        if line.scaled:
            raise HostError(
                f"a TSC of {line.hz} Hz on a host with {line.host.hz} Hz is not available under"
                " engine 'kvm': use --engine translate"
            )
        vcpu.set_tsc_offset(line.offset)
        before = line.read()
        (seen,) = vcpu.get_msrs([MSR_TSC])
        self._tsc_movable = seen - before & MASK64 < line.read() - before + TSC_SLACK
        line.vcpu(self.index).attach(self.view, lambda offset: self._set_tsc_offset(vcpu, offset))

    def _set_tsc_offset(self, vcpu: VcpuFile, offset: int) -> int:
        """Move the guest's counter; under a software KVM it stays the host's."""
        offset = offset if self._tsc_movable else 0
        vcpu.set_tsc_offset(offset)
        return offset

    # --- the protocol ------------------------------------------------------------------------

    def set_boot_state(self, boot: EntryState | None) -> None:
        """See ``VirtualCpu``."""
        reset.set_boot_state(self.view, boot)
        transfer.load(self.vcpu, self.view)

    def attach_msrs(self, indexes: Iterable[int], device: MsrDevice) -> None:
        """See ``VirtualCpu``."""
        self._msrs.attach(indexes, device)

    def attach_services(self, services: Services) -> None:
        """See ``VirtualCpu``. Hypercalls are the kernel's, which answers those that it knows."""
        self._services = services

    def run(self) -> StopReason:
        """See ``VirtualCpu``; HostError if KVM fails in a way that no guest can cause."""
        self._owner.begin()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK})
        with self._thread_lock:
            self._thread = threading.get_ident()
        try:
            self.vcpu.set_signal_mask(sum(1 << number - 1 for number in blocked - {KICK}))
            if self._services is not None:
                self._services.begin()
            return self._loop()
        finally:
            self._inside = False
            if self._services is not None:
                self._services.end()
            with self._thread_lock:
                self._thread = None
            signal.sigtimedwait({KICK}, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def request_stop(self) -> None:
        """See ``VirtualCpu``."""
        self._stop = True
        self._kick()

    def request_pause(self) -> None:
        """See ``VirtualCpu``."""
        self._pause = True
        self._kick()

    def kick(self) -> None:
        """See ``VirtualCpu``."""
        self.view.kicked = 1
        self._wake.set()

    def signal(self, kind: int, vector: int) -> None:
        """See ``VirtualCpu``."""
        if signals.note(self.view, kind, vector):
            self._signalled = True
            self._kick()

    def forget_pause(self) -> None:
        """See ``VirtualCpu``."""
        self._pause = False

    def registers(self) -> dict[str, int]:
        """See ``VirtualCpu``."""
        self._fetch()
        return named_registers(self.view)

    def set_registers(self, values: dict[str, int]) -> None:
        """See ``VirtualCpu``; general registers, ``rip`` and ``rflags``."""
        transfer.store_regs(self.vcpu, self.view)
        for name, value in values.items():
            set_named_register(self.view, name, value)
        transfer.load_regs(self.vcpu, self.view)
        self._halted = self._halted and "rip" not in values
        self._not_ready()

    def arm(self, points: DebugPoints) -> None:
        """See ``VirtualCpu``."""
        self._owner.arm(points)

    def step(self, wanted: bool) -> None:
        """See ``VirtualCpu``."""
        self._owner.step(wanted)
        self._halted = self._halted and not wanted

    def debug_stop(self) -> DebugStop | None:
        """See ``VirtualCpu``."""
        return self._owner.stop

    def vector_state(self) -> bytes:
        """See ``VirtualCpu``."""
        self._fetch()
        return bytes(self.view.xsave[: state.XSAVE_BYTES])

    def set_vector_state(self, area: bytes) -> None:
        """See ``VirtualCpu``."""
        self._fetch()
        ctypes.memmove(self.view.xsave, area, min(len(area), state.XSAVE_BYTES))
        transfer.load_xsave(self.vcpu, self.view)

    def translate(self, address: int) -> int | None:
        """See ``VirtualCpu``; as a supervisor would read."""
        return self.vcpu.translate(address & MASK64)

    def set_trace(self, callback: Callable[[vocabulary.TraceRecord], None] | None) -> None:
        """See ``VirtualCpu``."""
        self._trace = callback

    def save(self) -> State:
        """See ``VirtualCpu``."""
        interrupt = transfer.store(self.vcpu, self.view)
        self.view.cr8 = self.board.read_cr8(self.index)
        self.view.halted = self._halted
        return {"cpu": save_cpu(self.view), "interrupt": interrupt}

    def restore(self, saved: State) -> None:
        """See ``VirtualCpu``."""
        restore_cpu(self.view, saved["cpu"], transfer.XSTATE_KEPT)
        if self.view.exc_vector == state.PF:
            self.view.cr2 = self.view.exc_address
        self._halted = bool(self.view.halted)
        transfer.load(self.vcpu, self.view, saved["interrupt"])

    def crash_dump(self) -> str:
        """See ``VirtualCpu``."""
        self._fetch()
        return (self._crash + "\n" if self._crash else "") + dump(self.view)

    def stats(self) -> dict[str, Any]:
        """See ``VirtualCpu``."""
        vectors = {f"{n:#04x}": count for n, count in enumerate(self.view.interrupts) if count}
        return {
            "exits": self.counters.by_reason(),
            "interrupts": vectors,
            "time": {
                "guest": self._guest_ns,
                "vmm": self._vmm_ns - self._idle_ns,
                "translation": 0,
                "idle": self._idle_ns,
            },
        }

    def close(self) -> None:
        """See ``VirtualCpu``. Safe to repeat."""
        self.machine.close_vcpu(self.vcpu)

    def log_dirty(self, enabled: bool) -> None:
        """See ``VirtualCpu``."""
        self.machine.log_dirty(enabled)

    def fetch_dirty(self) -> None:
        """See ``VirtualCpu``: from KVM's log, which is empty then."""
        self.machine.fetch_dirty()

    # --- the loop ----------------------------------------------------------------------------

    def _loop(self) -> StopReason:
        run, clock = self.vcpu.run, time.perf_counter_ns
        left = clock()
        while True:
            if self._halted or self.view.wait_for_sipi:
                self._sleep(run)
            self._inside = True
            if self._signalled:
                outcome = self._on_signal()
                if outcome is not None:
                    return outcome
                if self.view.wait_for_sipi:
                    self._inside = False
                    continue
            if self._irq:
                self._deliver(run)
            if self._stop or self._pause:
                self._inside = False
                outcome = self._settle()
                if outcome is not None:
                    return outcome
                if self._stop:
                    return StopReason.STOPPED
                self._pause = False
                return StopReason.PAUSED
            entered = clock()
            self._vmm_ns += entered - left
            error = self._enter(run)
            left = clock()
            self._guest_ns += left - entered
            self._inside = False
            if error:
                self._interrupted(error)
                continue
            self._again = 0
            outcome = self._exit(run)
            if outcome is not None:
                return outcome

    def _enter(self, run: Any) -> int:
        """Enter the guest; 0 or an error number. The board learns of its task priority at once."""
        error = self.vcpu.enter()
        if run.cr8 != self._cr8:
            self._cr8 = run.cr8
            self.board.write_cr8(self.index, run.cr8)
        return error

    def _exit(self, run: Any) -> StopReason | None:
        """Handle what the guest wants; a reason if it ends the run."""
        handler = self._handlers.get(run.exit_reason)
        if handler is None:
            raise HostError(
                f"KVM left the guest for reason {run.exit_reason}, which this engine doesn't know:"
                " use --engine translate"
            )
        outcome = handler(run)
        run.cr8 = self._cr8 = self.board.read_cr8(self.index)
        return outcome

    def _interrupted(self, error: int) -> None:
        """KVM_RUN returned an error number: a kick, a moment's refusal, or the end."""
        if error == errno.EINTR:
            signal.sigtimedwait({KICK}, 0)
        elif error == errno.EAGAIN and self._again < AGAIN_MAX:
            self._again += 1
        else:
            raise HostError(
                f"KVM can't run the guest any more ({os.strerror(error)}): see what the host's"
                " kernel log says"
            )

    def _settle(self) -> StopReason | None:
        """Have KVM finish a device access that is under way, without running guest code."""
        run = self.vcpu.run
        run.immediate_exit = 1
        try:
            while True:
                error = self._enter(run)
                if error == errno.EINTR:
                    return None
                if error:
                    self._interrupted(error)
                    continue
                outcome = self._exit(run)  # an instruction with several accesses
                if outcome is not None:
                    return outcome
        finally:
            run.immediate_exit = 0

    def _woken(self) -> None:
        """The board has an interrupt for us (any thread, the board's lock held)."""
        self._irq = True
        self._kick()

    def _kick(self) -> None:
        """Get the vCPU out of KVM or out of its sleep (any thread)."""
        self._wake.set()
        if self._inside and self._thread != threading.get_ident():
            with self._thread_lock:  # the thread may end
                if self._thread is not None:
                    signal.pthread_kill(self._thread, KICK)

    def _deliver(self, run: Any) -> None:
        """Give the guest an interrupt, or have KVM say when it can take one."""
        began = time.perf_counter_ns()
        vector = -1
        with self.board.lock:
            pending = self.board.interrupt_pending(self.index)
            if pending and run.ready_for_interrupt_injection and run.if_flag:
                vector = self.board.acknowledge(self.index)
                pending = self.board.interrupt_pending(self.index)
            self._irq = pending
        run.request_interrupt_window = pending
        if vector >= 0:
            if self._services is not None:
                self._services.refresh()
            self.vcpu.interrupt(vector)
            self.view.interrupts[vector] += 1
            self._not_ready()
            self._count(Reason.INTERRUPT_WINDOW, began, lambda: vocabulary.InterruptWindow(vector))

    def _on_signal(self) -> StopReason | None:
        """See to the messages that have come for the CPU itself."""
        view = self.view
        if view.init_pending:
            outcome = self._settle()
            if outcome is not None:
                return outcome
        with self.board.lock:
            self._signalled = False
            if view.init_pending:
                self._initialize()
                return None
            nmis, view.nmi_pending = view.nmi_pending, 0
        for _ in range(nmis):
            self.vcpu.nmi()
        return None

    def _initialize(self) -> None:
        """INIT has come (the board's lock is held)."""
        transfer.store(self.vcpu, self.view)
        signals.initialize(self.view, boot=self.index == 0)
        self._begin()

    def _begin(self) -> None:
        """Give KVM the state of a CPU that starts anew."""
        self._halted = False
        transfer.load(self.vcpu, self.view)
        self._not_ready()

    def _not_ready(self) -> None:
        """What KVM said at the last exit about interrupts holds no longer."""
        self.vcpu.run.ready_for_interrupt_injection = 0

    def _fetch(self) -> None:
        """Bring the view up to date."""
        transfer.store(self.vcpu, self.view)
        self.view.cr8 = self.board.read_cr8(self.index)

    def _count(self, reason: Reason, began: int, event: Callable[[], vocabulary.Exit]) -> None:
        """Account for an exit, and show it to whoever traces."""
        elapsed = time.perf_counter_ns() - began
        self.counters.add(reason, elapsed)
        if self._trace is not None:
            transfer.store_regs(self.vcpu, self.view)
            self._trace(vocabulary.TraceRecord(event(), self.view.rip, elapsed))

    # --- exits -------------------------------------------------------------------------------

    def _nothing(self, run: Any) -> None:
        """The loop does what there is to do."""

    def _on_io(self, run: Any) -> None:
        """IN, OUT and the string forms; KVM hands over up to a page of elements at once."""
        began = time.perf_counter_ns()
        port, size, count = run.io.port, run.io.size, run.io.count
        data = self.vcpu.data(run.io.data_offset, size * count)
        if run.io.direction == abi.EXIT_IO_OUT:
            value = 0
            for at in range(0, size * count, size):
                value = int.from_bytes(data[at : at + size], "little")
                self.board.port_write(port, size, value)
            self._count(Reason.PORT_OUT, began, lambda: vocabulary.PortOut(port, size, value))
            return
        mask = (1 << 8 * size) - 1
        for at in range(0, size * count, size):
            value = self.board.port_read(port, size) & mask
            data[at : at + size] = list(value.to_bytes(size, "little"))
        self._count(Reason.PORT_IN, began, lambda: vocabulary.PortIn(port, size))

    def _on_mmio(self, run: Any) -> None:
        began = time.perf_counter_ns()
        mmio = run.mmio
        address, size = mmio.phys_addr, min(mmio.len, 8)
        if mmio.is_write:
            value = int.from_bytes(mmio.data[:size], "little")
            self.board.mmio_write(address, size, value, self.index)
            event: vocabulary.Exit = vocabulary.MmioWrite(address, size, value)
            self._count(Reason.MMIO_WRITE, began, lambda: event)
            return
        value = self.board.mmio_read(address, size, self.index) & (1 << 8 * size) - 1
        mmio.data[:size] = list(value.to_bytes(size, "little"))
        self._count(Reason.MMIO_READ, began, lambda: vocabulary.MmioRead(address, size))

    def _on_debug(self, run: Any) -> StopReason | None:
        """The owner's debugger wants to look, or a breakpoint was passed."""
        told = self._owner.note(run.debug.arch, self.index)
        event = vocabulary.Debug(run.debug.arch.dr6)
        self._count(Reason.DEBUG, time.perf_counter_ns(), lambda: event)
        if not told:
            return None
        return StopReason.STOPPED if self._stop else StopReason.PAUSED

    def _on_halt(self, run: Any) -> None:
        self._halted = True
        self.board.idle()
        self._count(Reason.HALT, time.perf_counter_ns(), vocabulary.Halt)

    def _sleep(self, run: Any) -> None:
        """Sleep until there is something to do; see "Attention" in docs/architecture.md.

        A pause doesn't end the guest's sleep: it goes on with the next `run`.
        """
        began = time.perf_counter_ns()
        while True:
            self._wake.clear()
            if self._stop or self._pause:
                break
            with self.board.lock:
                if self._is_roused(run):
                    break
            self._wake.wait()
        self._idle_ns += time.perf_counter_ns() - began

    def _is_roused(self, run: Any) -> bool:
        """Whether the CPU sleeps no longer (the board's lock is held)."""
        view = self.view
        if view.init_pending:
            self._initialize()
        if view.wait_for_sipi:
            if not signals.start(view):
                return False
            self._begin()
        elif run.if_flag and self.board.interrupt_pending(self.index):
            self._halted, self._irq = False, True
        elif view.kicked or view.nmi_pending:
            self._halted, view.kicked = False, 0
        return not self._halted

    def _on_msr_read(self, run: Any) -> None:
        began = time.perf_counter_ns()
        index = run.msr.index
        try:
            run.msr.data = self._msrs.read(index)
            run.msr.error = 0
        except GeneralProtection:
            run.msr.error = 1
        self._count(Reason.MSR_READ, began, lambda: vocabulary.MsrRead(index))

    def _on_msr_write(self, run: Any) -> None:
        began = time.perf_counter_ns()
        index, value = run.msr.index, run.msr.data
        try:
            self._msrs.write(index, value)
            run.msr.error = 0
        except GeneralProtection:
            run.msr.error = 1
        self._count(Reason.MSR_WRITE, began, lambda: vocabulary.MsrWrite(index, value))

    def _on_shutdown(self, run: Any) -> StopReason:
        # KVM doesn't tell what could not be delivered; the last was a double fault.
        event = vocabulary.Shutdown(state.DF)
        self._count(Reason.SHUTDOWN, time.perf_counter_ns(), lambda: event)
        self._crash = "triple fault"
        return StopReason.CRASH

    def _on_internal_error(self, run: Any) -> StopReason:
        """KVM gave up on what the guest does: code that it had to emulate and can't, mostly."""
        failure = run.emulation_failure
        what = f"something that KVM can't carry out (internal error {failure.suberror})"
        if failure.suberror == abi.INTERNAL_ERROR_EMULATION:
            code = bytes(failure.insn_bytes[: min(failure.insn_size, 15)])
            what = f"an instruction that KVM can't emulate ({code.hex(' ') or 'unknown'})"
        event = vocabulary.Unsupported(what)
        self._count(Reason.UNSUPPORTED, time.perf_counter_ns(), lambda: event)
        self._crash = f"the guest needs {what}"
        return StopReason.CRASH

    def _on_fail_entry(self, run: Any) -> StopReason:
        reason = run.fail_entry.hardware_entry_failure_reason
        raise HostError(
            f"the host's CPU refused to enter the guest (hardware reason {reason:#x}):"
            " use --engine translate"
        )
