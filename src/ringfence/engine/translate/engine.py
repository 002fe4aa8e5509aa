"""The binary-translation engine: runs one vCPU by translating its code a trace at a time.

``run`` enters translated code and handles what comes out: code that has no translation yet, device
accesses, halts, attention. Nothing else of the guest's life passes through Python. The state that
emitted code and helpers share is one ``Vcpu`` block (see ``block``); the routines that lead in and
out are in ``thunks``.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ringfence.cpu import components, cpuid, reset, state
from ringfence.cpu import signals as cpu_signals
from ringfence.cpu.debug import DR7_GD
from ringfence.cpu.dump import dump
from ringfence.cpu.tsc import MSRS as TSC_MSRS
from ringfence.engine import EngineConfig, MsrDevice, Services, StopReason
from ringfence.engine import exits as vocabulary
from ringfence.engine.direct.policy import DirectExecution
from ringfence.engine.exits import ExitCounters, Reason
from ringfence.engine.translate import block, debugging, natives, pages, signals, statistics
from ringfence.engine.translate.accesses import MASK64, DeviceAccesses
from ringfence.engine.translate.block import GS_BIAS, Vcpu, bits_of
from ringfence.engine.translate.owner import OwnerDebug
from ringfence.engine.translate.siblings import Siblings
from ringfence.engine.translate.standing import Standing
from ringfence.engine.translate.thunks import THUNKS
from ringfence.engine.translate.translator import NUMBER_MAX, Translator
from ringfence.errors import GuestCrash, HostError
from ringfence.memory import mmu, strings
from ringfence.memory.summons import ABOUT, ASLEEP, INSIDE
from ringfence.memory.zeroed import ZeroedPages

if TYPE_CHECKING:
    from ringfence.cpu.reset import EntryState
    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library

ORDERS_SINGLY = 64
"""More orders than that, after a long sleep, and dropping the whole TLB is quicker."""
TRACE_SLOTS = 1 << 19
PAGE_ROWS = 1 << 16


def prepare(config: EngineConfig) -> None:
    """Compile or load the native library ahead of the first engine (see ``engine.preload``)."""
    natives.load(config.cache_dir)


def create_vcpus(memory: GuestMemory, board: Any, config: EngineConfig) -> list[TranslateEngine]:
    """All vCPUs of a machine."""
    siblings = Siblings(memory, board, config.cpus)
    return [TranslateEngine(memory, board, config, index, siblings) for index in range(config.cpus)]


class TranslateEngine(DeviceAccesses, Standing):
    """One vCPU under binary translation; see ``engine.VirtualCpu`` for the protocol.

    Parameters
    ----------
    memory : GuestMemory
        Guest RAM.
    board : Board
        The chipset: ports, MMIO, interrupt controllers.
    config : EngineConfig
        ``cache_dir`` is where the engine's own compiled code is kept.
    index : int
        The vCPU's number.
    siblings : Siblings, optional
        What it shares with the machine's other vCPUs; without, it is the only one.
    """

    def __init__(
        self,
        memory: GuestMemory,
        board: Any,
        config: EngineConfig,
        index: int = 0,
        siblings: Siblings | None = None,
    ) -> None:
        self.index = index
        self.siblings = siblings or Siblings(memory, board, 1)
        self.memory = memory
        self.board = board
        self.config = config
        self._natives = natives.load(config.cache_dir)
        library = self.library = self._natives.library
        self._pages = ZeroedPages()
        self.block = self._pages.take(Vcpu.size + 4096, dense=True)
        self.view = Vcpu.at(self.block)
        view = self.view
        view.self_address = self.block
        self._enter = library.function("rf_enter", 1, long=True)
        self._set_gs = library.function("rf_set_gs", 1)
        self._deliver_interrupt = self._reaching("deliver_interrupt", 2)
        self._deliver_nmi = self._reaching("deliver_nmi", 1)
        self._flush_all = library.function("tlb_flush_all", 1)
        self._mode_changed = library.function("mode_changed", 1)
        self._linear_read = self._reaching("linear_read", 4)
        self._linear_write = self._reaching("linear_write", 5)
        self._walk = self._reaching("walk", 3)
        self._string = library.function("fx_string", 1, long=True)
        self._segment_linear = library.function("segment_linear", 5)
        self._natives.use(self._adopt)
        view.gather_write, view.gather_read = board.gathered.write, board.gathered.read
        view.registers = board.registers.address
        self._gather_timer = False
        self._find_code = library.function("find_code", 2)
        self._find = library.address("rf_find")
        self._follow = library.address("rf_follow")
        self._resume = library.address("rf_resume")
        self._deliver = library.address("rf_deliver")
        view.ram_host = memory.host_base
        view.ram_low = memory.regions[0].size
        view.ram_high = memory.regions[1].size if len(memory.regions) > 1 else 0
        if memory.rom is not None:
            view.rom_base, view.rom_size = memory.rom.base, memory.rom.size
        self._allocate_notes()
        self.siblings.add(self)
        self.inside = False
        """Whether the vCPU is in guest code, or about to be."""
        self._door, self._place = board.summons.add_door(
            *(self.block + Vcpu.offset_of(n) for n in ("service_request", "attention")),
            self.block + Vcpu.offset_of("direct_running"),
        )
        """Where it is, for native code of devices."""
        self.orders: deque[int] = deque()
        """RAM pages that the TLB may not let it write to any more (see `siblings`)."""
        self._awaited: list[threading.Event] = []
        self._protect = library.function("tlb_protect_page", 2)
        self._release_write = library.function("release_write", 2)
        self._release_split_lock = library.function("release_split_lock", 1)
        self._note_outside_write = library.function("note_outside_write", 3)
        self._note_outside_runs = library.function("note_outside_runs", 3)
        view.trace_table = self._pages.take(TRACE_SLOTS * pages.SLOT_BYTES, dense=True)
        view.trace_slots = TRACE_SLOTS
        view.page_table = self._pages.take(PAGE_ROWS * pages.ROW_BYTES, dense=True)
        view.page_rows = PAGE_ROWS
        view.breaks = self._pages.take((debugging.BREAKS_MAX + 4) * 8 * 2)
        view.owner_breaks = self._pages.take(debugging.BREAKS_MAX * 8)
        view.owner_skip = debugging.NO_SKIP
        view.variants = self._pages.take((NUMBER_MAX + 1) * 8)
        self._init_host_state()
        rows = cpuid.build_cpuid(
            cpuid.host_cpuid,
            cpu_index=index,
            cpus=config.cpus,
            paravirtual=config.paravirtual,
            only=config.features,
        )
        self._init_vector_state(rows)
        cpuid.require(config.features, rows)
        self.features = cpuid.offered(rows)
        packed = cpuid.pack(rows)
        view.cpuid_table = self._pages.take(len(packed))
        ctypes.memmove(view.cpuid_table, packed, len(packed))
        view.cpuid_rows = len(rows)
        view.reserved_bits = ((1 << 52) - 1) & ~((1 << cpuid.PHYSICAL_BITS) - 1)
        reset.reset(view)
        view.wait_for_sipi = index != 0
        counter = board.tsc.vcpu(index)
        counter.attach(view)
        answers = self.siblings.known_answers(
            config.cache_dir,
            self._natives.key,
            sorted(self.features),
            view.tsc_ratio != state.TSC_RATIO_ONE,
        )
        self.translator = Translator(
            memory, view, library, lambda feature: cpuid.offers(feature, rows), answers
        )
        view.code_start = self.translator.cache.base
        view.code_end = self.translator.cache.base + self.translator.cache.size
        view.code_alias = (self.translator.cache.alias - self.translator.cache.base) & MASK64
        library.function("tlb_reset", 1)(self.block)
        self._wake = threading.Event()
        self._thread = 0
        """Which thread runs it, as `threading.get_ident` says; 0: none."""
        board.set_wake(index, self._woken)
        self._stop = self._pause = False
        self._services: Services | None = None
        self._msrs: dict[int, MsrDevice] = dict.fromkeys(TSC_MSRS, counter)
        self._owner = OwnerDebug(view, library, index)
        self._direct = DirectExecution(view, lambda: self._natives.library, memory, config.direct)
        self.counters = ExitCounters()
        self._trace: Callable[[vocabulary.TraceRecord], None] | None = None
        self._guest_ns = self._vmm_ns = self._idle_ns = self._asking_ns = 0
        self._crash = ""
        self._handlers: dict[int, Callable[[], StopReason | None]] = {
            block.EXIT_ASK: self._on_translator,
            block.EXIT_FLUSH: self._on_translator,
            block.EXIT_WRITERS: self._on_translator,
            block.EXIT_ATTENTION: self._on_attention,
            block.EXIT_HOST_FAULT: self._on_host_fault,
            block.EXIT_MMIO_READ: self._on_mmio_read,
            block.EXIT_MMIO_WRITE: self._on_mmio_write,
            block.EXIT_EFFECT: self._on_effect,
            block.EXIT_FETCH_OUTSIDE: self._on_fetch_outside,
            block.EXIT_EMULATE: self._on_emulate,
            block.EXIT_DEBUG: self._on_debug,
            block.EXIT_DIRECT: self._on_direct,
            state.EXIT_PORT_IN: self._on_port_in,
            state.EXIT_PORT_OUT: self._on_port_out,
            state.EXIT_PORT_STRING: self._on_port_string,
            state.EXIT_HALT: self._on_halt,
            state.EXIT_MSR_READ: self._on_msr_read,
            state.EXIT_MSR_WRITE: self._on_msr_write,
            state.EXIT_HYPERCALL: self._on_hypercall,
            state.EXIT_SHUTDOWN: self._on_shutdown,
            state.EXIT_CR8_READ: self._on_cr8_read,
            state.EXIT_CR8_WRITE: self._on_cr8_write,
            strings.EXIT_MMIO_STRING: self._on_mmio_string,
        }

    def _adopt(self, library: Library) -> None:
        """Let guest code call this library's functions from now on (any thread)."""
        view = self.view
        for number, name in enumerate(THUNKS):
            view.thunks[number] = library.address(f"rf_{name}")
        for name, number in natives.EFFECT_NUMBERS.items():
            # Console ports are served on the spot while nothing can come of it.
            symbol = f"{name}_gathered" if name in ("fx_in", "fx_out") else name
            view.effects[number] = library.address(symbol)

    def _reaching(self, name: str, arguments: int) -> Callable[..., int]:
        """A quick function that reaches RAM; it leaves Python's lock while pages are to come."""
        quick = self.library.function(name, arguments)
        slow = self.library.function(name, arguments, long=True)
        memory = self.memory
        return lambda *given: (slow if memory.incomplete else quick)(*given)

    def _allocate_notes(self) -> None:
        """Which code is whose, and what others wrote over: see `memory.coherence`."""
        view, pages = self.view, self.memory.mapped >> 12
        view.code_lines = self._pages.take(pages * 8)
        view.stale_lines = self._pages.take(pages * 8)
        middle = -(-pages // 64)
        view.stale_pages = self._pages.take(middle * 8)
        view.stale_group_words = -(-middle // 64)
        view.stale_groups = self._pages.take(view.stale_group_words * 8)

    def _init_host_state(self) -> None:
        """The XSAVE area that gives the host a clean vector state after guest code."""
        at = self.block + Vcpu.offset_of("host_init")
        ctypes.memset(at, 0, 1024)
        ctypes.memmove(at, (0x037F).to_bytes(2, "little"), 2)
        ctypes.memmove(at + 24, (0x1F80).to_bytes(4, "little"), 4)

    def _init_vector_state(self, rows: list[cpuid.Row]) -> None:
        """Choose which components change hands, and in which format the host saves them."""
        view = self.view
        view.xstate_mask = components.X87_STATE | components.SSE_STATE | components.AVX_STATE
        if cpuid.offers("AVX512F", rows):
            view.xstate_mask |= components.AVX512_STATE
            view.xcomp_bv = components.COMPACTED | view.xstate_mask

    # --- the protocol ------------------------------------------------------------------------

    def set_boot_state(self, boot: EntryState | None) -> None:
        """See ``Engine``."""
        reset.set_boot_state(self.view, boot)
        self._start_anew()

    def _start_anew(self) -> None:
        """The state was replaced: nothing that was derived from the old one holds."""
        self._flush_all(self.block)
        self._owner.renew()
        self._mode_changed(self.block)
        self.view.jump_target = self._find

    def attach_msrs(self, indexes: Iterable[int], device: MsrDevice) -> None:
        """See ``VirtualCpu``."""
        self._msrs.update((index, device) for index in indexes)

    def attach_services(self, services: Services) -> None:
        """See ``VirtualCpu``."""
        self._services = services
        self._direct.on_process = services.helped

    def run(self) -> StopReason:
        """Run until the machine ends, or the owner wants the CPU."""
        self._owner.begin()
        self._thread = threading.get_ident()
        self._set_gs(self.block + GS_BIAS)
        signals.install(self.library.address("rf_signal_handler"))
        if self._services is not None:
            self._services.begin()
        view, place, registers = self.view, self._place, self.board.registers
        enter, handlers, block, clock = (
            self._enter,
            self._handlers,
            self.block,
            time.perf_counter_ns,
        )
        left = clock()
        try:
            outcome = self._rest()
            while outcome is None:
                self.inside = True
                place.value = INSIDE
                if self.orders:
                    self._obey()
                entered = clock()
                self._vmm_ns += entered - left
                code = enter(block)
                left = clock()
                self._guest_ns += left - entered
                if view.gathered_count:
                    self._hand_over()
                if registers.posted:
                    self.board.settle()
                self.inside = False
                place.value = ABOUT
                if self._awaited:
                    self._tell_awaiting()
                outcome = handlers[code]()
            return outcome
        finally:
            self.inside = False
            place.value = ASLEEP
            self._thread = 0
            self._direct.close()
            self._tell_awaiting()
            self._set_gs(0)
            if self._services is not None:
                self._services.end()

    def _obey(self) -> None:
        """Carry out what other vCPUs have ordered."""
        if len(self.orders) > ORDERS_SINGLY:
            self.orders.clear()
            self._flush_all(self.block)
        while self.orders:
            self._protect(self.block, self.memory.host_base + (self.orders.popleft() << 12))

    def call_out(self) -> threading.Event | None:
        """Make the vCPU leave guest code; what to wait for, None if it is outside (any thread)."""
        if not self.inside:
            return None
        event = threading.Event()
        self._awaited.append(event)
        if not self.inside:
            return None
        self.view.service_request = 1
        self.view.attention = 1
        self._rouse()
        return event

    def _tell_awaiting(self) -> None:
        """Wake those who wait for the vCPU to be outside."""
        while self._awaited:
            self._awaited.pop().set()

    def release_write(self, page: int) -> None:
        """The order for a RAM page will be carried out before anything is written there."""
        self._release_write(self.block, page)

    def note_outside_write(self, first: int, count: int) -> None:
        """RAM pages were written by a device or the owner (any thread)."""
        self._note_outside_write(self.block, first, count)

    def note_outside_runs(self, table: int, count: int) -> None:
        """The same for many places; see ``GuestMemory.watch_dma``."""
        self._note_outside_runs(self.block, table, count)

    def request_stop(self) -> None:
        """See ``VirtualCpu``."""
        self._stop = True
        self._call_attention()

    def request_pause(self) -> None:
        """See ``VirtualCpu``."""
        self._pause = True
        self._call_attention()

    def signal(self, kind: int, vector: int) -> None:
        """See ``VirtualCpu``."""
        if cpu_signals.note(self.view, kind, vector):
            self.view.attention = 1
            self._rouse()

    def forget_pause(self) -> None:
        """See ``VirtualCpu``."""
        self._pause = False
        self.view.stop_request = self._stop

    def kick(self) -> None:
        """See ``VirtualCpu``."""
        self.view.kicked = 1
        self._wake.set()

    def _call_attention(self) -> None:
        self.view.stop_request = 1
        self.view.attention = 1
        self._rouse()

    def _rouse(self) -> None:
        """End the vCPU's sleep, or what it runs directly: ``attention`` is set."""
        self._wake.set()  # has the barrier between that and what `kick` reads
        self._direct.kick()

    def _woken(self) -> None:
        """The board has an interrupt for us (any thread, the board's lock held)."""
        view = self.view
        view.irq_request = 1
        view.attention = 1
        if threading.get_ident() != self._thread:  # who handles its own exit is awake
            self._rouse()

    def set_trace(self, callback: Callable[[vocabulary.TraceRecord], None] | None) -> None:
        """See ``VirtualCpu``."""
        self._trace = callback
        # Whoever traces sees every exit: none is handled inside.
        self.view.registers = 0 if callback else self.board.registers.address

    def crash_dump(self) -> str:
        """See ``VirtualCpu``."""
        self.view.cr8 = self.board.read_cr8(self.index)
        return (self._crash + "\n" if self._crash else "") + dump(self.view)

    def stats(self) -> dict[str, Any]:
        """See ``VirtualCpu``."""
        spent = {
            "guest": self._guest_ns,
            "vmm": self._vmm_ns - self._idle_ns - self._asking_ns,
            "asking": self._asking_ns,
            "idle": self._idle_ns,
        }
        ticks, direct = self.translator.writer.translation_ticks, self._direct.statistics()
        return {
            "exits": self.counters.by_reason(statistics.answered(self.view)),
            **statistics.events(self.view),
            "translation": self.translator.statistics(),
            "dispatch": statistics.dispatch(self.view),
            "direct": direct,
            "tlb": statistics.tlb(self.view),
            "time": statistics.times(spent, ticks, direct["ns"]),
        }

    def close(self) -> None:
        """See ``VirtualCpu``."""
        self._natives.release(self._adopt)
        self.siblings.remove(self)
        self.translator.close()
        self.view = None

    # --- exits -------------------------------------------------------------------------------

    def _on_translator(self) -> StopReason | None:
        """The translator met something for the first time, or a table of its is full."""
        view = self.view
        mode = view.exit_data[0]
        while True:
            if view.exit_reason == block.EXIT_ASK:
                began = time.perf_counter_ns()
                self.translator.answer(mode)
                self._asking_ns += time.perf_counter_ns() - began
            elif view.exit_reason == block.EXIT_FLUSH:
                self.translator.flush()
            elif view.exit_reason == block.EXIT_WRITERS:
                self.siblings.stop_writers(view.exit_data[1])
            else:
                return self._handlers[view.exit_reason]()
            status = self._find_code(self.block, mode)
            if status == state.OK:
                return None
            if status == state.FAULT:
                view.jump_target = self._deliver
                return self._stopped_between()  # the fetch faults again

    def _on_attention(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        view.jump_target = self._find
        self._direct.look()
        stopped = self._stopped_between()
        if stopped is not None:
            return stopped
        allowed, nmi = bool(view.flag_if), False
        if view.service_request:
            view.service_request = 0
            self.board.collect()
        with self.board.lock:
            view.attention = 0
            if view.init_pending:
                self._initialize()
                allowed = False
            elif view.owner_step:
                allowed = False  # events wait for its end
            elif view.nmi_pending and not view.nmi_blocked:
                view.nmi_pending -= 1
                allowed, nmi = False, True
            vector, pending = self.board.next_interrupt(self.index, allowed=allowed)
            if nmi:
                vector = state.NMI
            view.irq_request = pending
            if pending:
                view.attention = 1
        if view.stop_request or view.service_request or view.stale_code:
            view.attention = 1
        if vector >= 0 and self._services is not None:
            self._services.refresh()
        if vector >= 0 and self._deliver_event(vector) != state.OK:
            return self._on_shutdown()
        self._count(Reason.INTERRUPT_WINDOW, began, lambda: vocabulary.InterruptWindow(vector))
        return self._rest()

    def _stopped_between(self) -> StopReason | None:
        """Whether to stop before the instruction at RIP; it is looked up when the guest goes on."""
        if self.view.stop_request and self._pause and not self._stop:
            self._pause = False
            self.view.stop_request = 0
            self.view.jump_target = self._find
            return StopReason.PAUSED
        return self._stopped()

    def _on_halt(self) -> StopReason | None:
        self.view.jump_target = self._find
        outcome = self._rest()
        self._count(Reason.HALT, time.perf_counter_ns(), vocabulary.Halt)
        return outcome if outcome is not None else self._on_attention()

    def _rest(self) -> StopReason | None:
        """Sleep for as long as the CPU does: behind HLT, or until a SIPI starts it.

        A pause doesn't end the guest's sleep: it goes on with the next `run`.
        """
        view = self.view
        if not (view.halted or view.wait_for_sipi):
            return None
        began = time.perf_counter_ns()
        outcome = None if self._is_roused_soon() else self._sleep()
        self._idle_ns += time.perf_counter_ns() - began
        return outcome

    def _is_roused_soon(self) -> bool:
        """Whether what devices will have done in a moment ends the sleep before it begins."""
        while self.board.await_done(self._door):
            self.board.collect()
            with self.board.lock:
                if self._is_roused():
                    return True
        return False

    def _sleep(self) -> StopReason | None:
        """Sleep until the CPU is roused, or its run is to end."""
        self._place.value = ASLEEP
        self.board.idle()
        self._direct.release()
        outcome = None
        while outcome is None:
            self._wake.clear()
            outcome = self._stopped_between()
            with self.board.lock:
                if outcome is not None or self._is_roused():
                    break
            self._wake.wait()
        self._place.value = ABOUT
        return outcome

    def _is_roused(self) -> bool:
        """Whether the CPU sleeps no longer (the board's lock is held)."""
        view = self.view
        if view.init_pending:
            self._initialize()
        if view.wait_for_sipi:
            return cpu_signals.start(view)
        if (
            view.kicked
            or view.debug_pending  # a step does not sleep, nor does the trap behind one
            or (view.nmi_pending and not view.nmi_blocked)
            or (view.flag_if and self.board.interrupt_pending(self.index))
        ):
            view.halted = view.kicked = 0
        return not view.halted

    def _initialize(self) -> None:
        """INIT has come (the board's lock is held)."""
        cpu_signals.initialize(self.view, boot=self.index == 0)
        self._start_anew()

    def _deliver_event(self, vector: int) -> int:
        """Take an interrupt, or an NMI, through the IDT; a status."""
        if vector == state.NMI:
            return int(self._deliver_nmi(self.block))
        return int(self._deliver_interrupt(self.block, vector))

    def _on_debug(self) -> StopReason | None:
        """The owner's debugger wants to look."""
        view = self.view
        view.jump_target = self._find
        self._owner.note(view.exit_data[0])
        traps = view.debug_pending & mmu.PENDING_GUEST
        if traps:  # the guest's own of the same instruction come when it goes on
            view.debug_pending &= ~traps
            view.dr[6] |= traps
            view.dr[7] &= ~DR7_GD
            self._raise(state.DB)
        self._count(Reason.DEBUG, time.perf_counter_ns(), vocabulary.Debug)
        return StopReason.STOPPED if self._stop else StopReason.PAUSED

    def _on_direct(self) -> StopReason | None:
        """A process that ran user code directly is gone."""
        self._direct.lost()
        self.view.jump_target = self._find
        return self._stopped_between()

    def _on_fetch_outside(self) -> StopReason | None:
        """Code outside RAM reads as all ones, which is an invalid opcode."""
        self._raise(state.UD)
        return self._stopped_between()

    def _on_emulate(self) -> StopReason | None:
        """An instruction that is carried out here, element by element (see ``emulate``)."""
        from ringfence.engine.translate.emulate import emulate  # rare, and needs the decoder

        view, block = self.view, self.block
        user = int(view.cpl == 3)
        status = emulate(
            view,
            bits_of(view.mode),
            lambda address, size: int(self._linear_read(block, address, size, user)),
            lambda address, size, value: int(self._linear_write(block, address, size, value, user)),
            lambda address: int(self._walk(block, address, user << 2 | state.PF_WRITE)),
        )
        if status == state.EXIT:
            return self._unsupported("an instruction that the translator lacks")
        if status == state.OK:
            self._continue()
        else:
            view.jump_target = self._deliver
        return None

    def _on_shutdown(self) -> StopReason | None:
        vector = self.view.exit_data[0]
        self._count(Reason.SHUTDOWN, time.perf_counter_ns(), lambda: vocabulary.Shutdown(vector))
        self._crash = "triple fault"
        return StopReason.CRASH

    def _unsupported(self, what: str) -> StopReason:
        self._count(
            Reason.UNSUPPORTED, time.perf_counter_ns(), lambda: vocabulary.Unsupported(what)
        )
        self._crash = f"the guest needs {what}"
        return StopReason.CRASH

    def _on_host_fault(self) -> StopReason | None:
        """The host's CPU raised an exception in translated code: it is the guest's."""
        view = self.view
        self._release_split_lock(self.block)
        found = self.translator.locate(view.fault_pc)
        trap = view.fault_trap
        if found is None or trap == state.PF:
            raise HostError(
                f"translated code faulted at {view.fault_pc:#x} (trap {trap}), which should not be"
            )
        view.rip, parked, swaps = found
        while swaps:
            homeless, displaced = swaps & 0xF, swaps >> 4 & 0xF
            view.gpr[homeless] = view.gpr[displaced]
            view.gpr[displaced] = view.displaced[displaced]
            swaps >>= 8
        if not parked:
            view.status = view.scratch[5] & state.STATUS_FLAGS
        if trap == state.GP and (view.gpr[state.RSP] + (1 << 47) & MASK64) >> 48:
            trap = state.SS_FAULT  # only the stack's own look-up lets such an address through
        if trap not in (state.DE, state.UD, state.GP, state.SS_FAULT, state.AC, state.MF, state.XM):
            raise GuestCrash(f"unexpected host trap {trap}", dump(view))
        self._raise(trap)
        return None
