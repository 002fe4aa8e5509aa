"""What translated code leaves for that belongs to the board: ports, MMIO, MSRs, CR8, hypercalls.

`DeviceAccesses` is the part of the engine that carries them out: it finds the access described in
the vCPU's block (``exit_data``), asks board or service, stores the result where the instruction
wants it, and says where guest code goes on (``jump_target``). `engine.TranslateEngine` is the rest.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ringfence.cpu import state
from ringfence.cpu.faults import GeneralProtection
from ringfence.engine import MsrDevice, Services, StopReason
from ringfence.engine import exits as vocabulary
from ringfence.engine.exits import ExitCounters, Reason
from ringfence.engine.translate.block import SLOW_SIZE
from ringfence.memory import strings
from ringfence.memory.mmu import CARRIED_OUT, IGNORED
from ringfence.memory.ram import HIGH_RAM_BASE

GATHER_NS = 3_000_000
"""How long console output may wait for the guest to leave translated code by itself."""
MASK64 = (1 << 64) - 1
_EFFECT = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)
"""Leaves Python's lock to others: an effect may have to wait for RAM that follows the guest."""


class DeviceAccesses:
    """The handlers of these exits, and what all handlers share."""

    board: Any
    view: Any
    """The vCPU's block as a ctypes structure."""
    block: int
    """Its address."""
    index: int
    siblings: Any
    counters: ExitCounters
    _trace: Callable[[vocabulary.TraceRecord], None] | None
    _msrs: dict[int, MsrDevice]
    _services: Services | None
    _stop: bool
    _gather_timer: bool
    _rouse: Callable[[], None]
    # Native functions, and places in the thunks where guest code goes on.
    _linear_read: Callable[..., int]
    _linear_write: Callable[..., int]
    _walk: Callable[..., int]
    _string: Callable[..., int]
    _segment_linear: Callable[..., int]
    _handlers: dict[int, Callable[[], StopReason | None]]
    _find: int
    _follow: int
    _resume: int
    _deliver: int

    def _count(self, reason: Reason, began: int, event: Callable[[], Any]) -> None:
        """Account for an exit, and show it to whoever traces."""
        elapsed = time.perf_counter_ns() - began
        self.counters.add(reason, elapsed)
        if self._trace is not None:
            self._trace(vocabulary.TraceRecord(event(), self.view.rip, elapsed))

    def _continue(self) -> None:
        """Go on behind the instruction that caused the exit."""
        view = self.view
        view.rip = view.next_rip
        view.jump_target = self._follow

    def _raise(self, vector: int, error: int = 0) -> None:
        """Deliver an exception at the present instruction."""
        view = self.view
        view.exc_vector, view.exc_error = vector, error
        view.jump_target = self._deliver

    def _stopped(self) -> StopReason | None:
        """Whether the machine ends, in the middle of an instruction perhaps; a pause waits."""
        return StopReason.STOPPED if self.view.stop_request and self._stop else None

    def _gather_ports(self) -> None:
        """After an access to the board: may the console's ports be served without it?"""
        with self.board.lock:
            status = self.board.quiet_status()
            if status is None or not self.siblings.may_gather(self):
                return
            self.view.gather_value = status
            self.view.gather = 1
            if not self._gather_timer:
                self._gather_timer = True
                timers = self.board.timers
                timers.arm(self.board.clock.now() + GATHER_NS, self._gathered_long_enough)

    def _gathered_long_enough(self) -> None:
        """Fetch bytes that have waited (the timer thread, with the board's lock)."""
        self._gather_timer = False
        view = self.view
        if view is None:
            return
        view.gather = 0  # the next access arms the timer anew
        if view.gathered_count:
            view.service_request = 1
            view.attention = 1
            self._rouse()

    def _hand_over(self) -> None:
        """Give the board the bytes gathered since the last exit."""
        view = self.view
        count = view.gathered_count
        view.gathered_count = 0
        began = time.perf_counter_ns()
        self.board.write_gathered(bytes(view.gathered[:count]))
        self.counters.add(Reason.PORT_OUT, time.perf_counter_ns() - began)

    def _on_port_in(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        port, size = view.exit_data[0], view.exit_data[1]
        view.gather = 0
        if port == view.gather_read:
            self.siblings.take_console(self)
        value = self.board.port_read(port, size)
        if size == 4:
            view.gpr[0] = value & 0xFFFFFFFF
        else:
            mask = (1 << 8 * size) - 1
            view.gpr[0] = view.gpr[0] & ~mask & MASK64 | value & mask
        self._count(Reason.PORT_IN, began, lambda: vocabulary.PortIn(port, size))
        if port == view.gather_read:
            self._gather_ports()
        self._continue()
        return None

    def _on_port_out(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        port, size, value = view.exit_data[0], view.exit_data[1], view.exit_data[2]
        view.gather = 0
        if port == view.gather_write:
            self.siblings.take_console(self)
        self.board.port_write(port, size, value)
        self._count(Reason.PORT_OUT, began, lambda: vocabulary.PortOut(port, size, value))
        self._continue()
        return self._stopped()

    def _on_port_string(self) -> StopReason | None:
        """INS and OUTS, up to 4096 elements at a time."""
        began = time.perf_counter_ns()
        view = self.view
        port, size, outward, repeat = (view.exit_data[n] for n in range(4))
        flags = view.op[3]
        mask = (MASK64, 0xFFFFFFFF, 0xFFFF)[flags & 3]
        checked = flags & strings.CHECKED
        segment = (flags >> 8 & 0xFF) - 1 if outward else state.ES
        base = view.seg_base[segment] if outward and segment >= 0 else 0
        user = int(view.cpl == 3)
        index = state.RSI if outward else state.RDI
        step = -size if view.flag_df else size
        left = view.gpr[state.RCX] & mask if repeat else 1
        for _ in range(min(left, 1 if view.debug_pending else 4096)):
            offset = view.gpr[index] & mask
            address = (offset + base) & MASK64
            if checked:
                if self._segment_linear(self.block, segment, offset, size, int(not outward)):
                    view.jump_target = self._deliver
                    return None
                address = view.linear
            if outward:
                if self._linear_read(self.block, address, size, user):
                    view.jump_target = self._deliver
                    return None
                value = view.value
                if self._in_device(address, size, user << 2):
                    value = self.board.mmio_read(view.walk_pa, size, self.index)
                self.board.port_write(port, size, value & (1 << 8 * size) - 1)
            else:
                # Ask whether the write is allowed before the device gives up its data.
                ends = (address, (address + size - 1) & MASK64)
                if any(self._walk(self.block, at, user << 2 | state.PF_WRITE) for at in ends):
                    view.jump_target = self._deliver
                    return None
                value = self.board.port_read(port, size)
                if self._in_device(address, size, user << 2 | state.PF_WRITE):
                    self.board.mmio_write(view.walk_pa, size, value, self.index)
                else:
                    self._linear_write(self.block, address, size, value, user)
            kept = 0xFFFF if mask == 0xFFFF else MASK64
            view.gpr[index] = view.gpr[index] & ~kept | (offset + step) & mask
            left -= 1
            if repeat:
                view.gpr[state.RCX] = view.gpr[state.RCX] & ~kept | left
        reason = Reason.PORT_OUT if outward else Reason.PORT_IN
        self._count(
            reason,
            began,
            lambda: vocabulary.PortOut(port, size, 0) if outward else vocabulary.PortIn(port, size),
        )
        if left == 0:
            self._continue()
        else:
            view.jump_target = self._find
            if view.debug_pending:
                view.other_flags |= state.FLAG_RF  # as `strings.fx_string` does
        return self._stopped()

    def _in_device(self, address: int, size: int, access: int) -> bool:
        """Whether an operand in one page, that may be accessed, is a device's (at ``walk_pa``)."""
        if (address & 0xFFF) + size > 0x1000 or self._walk(self.block, address, access):
            return False
        view = self.view
        at = view.walk_pa
        if at < view.ram_low or 0 <= at - HIGH_RAM_BASE < view.ram_high:
            return False
        return bool(access & state.PF_WRITE or not 0 <= at - view.rom_base < view.rom_size)

    def _on_mmio_read(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        for place, address, size in self._outside_parts():
            ctypes.memmove(place, self._read_mmio(address, size), size)
            self._count(Reason.MMIO_READ, began, partial(vocabulary.MmioRead, address, size))
        view.jump_target = self._resume
        return None

    def _outside_parts(self) -> Iterator[tuple[int, int, int]]:
        """The parts of a slow operand in devices: where its bytes are, physical address, size."""
        view = self.view
        start = view.slow_pointer + view.slow_skipped
        first_pa, first, second_pa, second = (view.exit_data[n] for n in range(4))
        if first:
            yield start, first_pa, first
        if second:
            yield start + (view.slow_kind & SLOW_SIZE) - second, second_pa, second

    def _read_mmio(self, address: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            take = min(8, size - len(data))
            value = self.board.mmio_read(address + len(data), take, self.index)
            data += (value & (1 << 8 * take) - 1).to_bytes(take, "little")
        return data

    def _on_mmio_write(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        address, size, _, second = view.exit_data[:4]
        if size <= 8 and not second:  # a register, in one piece: all but odd ones are
            place = view.slow_pointer + view.slow_skipped
            value = int.from_bytes(ctypes.string_at(place, size), "little")
            self.board.mmio_write(address, size, value, self.index)
            self._count(
                Reason.MMIO_WRITE, began, partial(vocabulary.MmioWrite, address, size, value)
            )
            view.jump_target = self._resume
            return None
        for place, address, size in self._outside_parts():
            data = ctypes.string_at(place, size)
            for at in range(0, size, 8):
                part = data[at : at + 8]
                self.board.mmio_write(
                    address + at, len(part), int.from_bytes(part, "little"), self.index
                )
            low = int.from_bytes(data[:8], "little")
            self._count(Reason.MMIO_WRITE, began, partial(vocabulary.MmioWrite, address, size, low))
        view.jump_target = self._resume
        return None  # its instruction is still under way: who wants the CPU waits for the next one

    def _on_effect(self) -> StopReason | None:
        """An effect that came to a device: run with the devices' answers until it is through."""
        began = time.perf_counter_ns()
        view = self.view
        effect = _EFFECT(view.effects[view.effect_number])
        view.effect_read_count = 0
        view.effect_devices = CARRIED_OUT
        while True:
            view.effect_stopped = view.effect_read_next = view.effect_write_count = 0
            status = effect(self.block)
            if not view.effect_stopped:
                break
            address, size = view.exit_data[0], view.exit_data[1]
            data = self._read_mmio(address, size)
            view.effect_reads[view.effect_read_count] = int.from_bytes(data, "little")
            view.effect_read_count += 1
            self._count(Reason.MMIO_READ, began, partial(vocabulary.MmioRead, address, size))
        view.effect_devices = IGNORED
        if status == state.FAULT:
            view.jump_target = self._deliver
            return None
        for n in range(view.effect_write_count):
            address, size, value = view.effect_writes[3 * n : 3 * n + 3]
            value &= (1 << 8 * size) - 1
            self.board.mmio_write(address, size, value, self.index)
            self._count(
                Reason.MMIO_WRITE, began, partial(vocabulary.MmioWrite, address, size, value)
            )
        view.jump_target = self._find
        return self._handlers[view.exit_reason]() if status == state.EXIT else self._stopped()

    def _on_mmio_string(self) -> StopReason | None:
        """An element in a device: carried to its end before the guest or an interrupt goes on."""
        view = self.view
        while True:
            self._string_access()
            status = self._string(self.block)
            if status != state.EXIT or not view.string_ready:
                break
        view.jump_target = self._deliver if status == state.FAULT else self._find
        return self._stopped()

    def _string_access(self) -> None:
        """One half of an element: from the device, or to it."""
        began = time.perf_counter_ns()
        view = self.view
        address, size, which, value = (view.exit_data[n] for n in range(4))
        value &= (1 << 8 * size) - 1
        if which == strings.WRITE:
            self.board.mmio_write(address, size, value, self.index)
            self._count(
                Reason.MMIO_WRITE, began, lambda: vocabulary.MmioWrite(address, size, value)
            )
        else:
            view.string_value[which] = self.board.mmio_read(address, size, self.index)
            self._count(Reason.MMIO_READ, began, lambda: vocabulary.MmioRead(address, size))
        view.string_ready |= 1 << which

    def _on_msr_read(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        index = view.exit_data[0]
        try:
            device = self._msrs.get(index)
            value = device.msr_read(index) if device else self.board.msr_read(self.index, index)
        except GeneralProtection:
            self._raise(state.GP)
            return None
        view.gpr[state.RAX] = value & 0xFFFFFFFF
        view.gpr[state.RDX] = value >> 32 & 0xFFFFFFFF
        self._continue()
        self._count(Reason.MSR_READ, began, lambda: vocabulary.MsrRead(index))
        return None

    def _on_msr_write(self) -> StopReason | None:
        began = time.perf_counter_ns()
        view = self.view
        index, value = view.exit_data[0], view.exit_data[1]
        try:
            device = self._msrs.get(index)
            if device:
                device.msr_write(index, value)
            else:
                self.board.msr_write(self.index, index, value)
                view.apic_disabled = not self.board.apic_enabled(self.index)
        except GeneralProtection:
            self._raise(state.GP)
            return None
        self._continue()
        self._count(Reason.MSR_WRITE, began, lambda: vocabulary.MsrWrite(index, value))
        return self._stopped()

    def _on_cr8_read(self) -> StopReason | None:
        self.view.gpr[self.view.exit_data[0]] = self.board.read_cr8(self.index)
        self._continue()
        return None

    def _on_cr8_write(self) -> StopReason | None:
        value = self.view.exit_data[0]
        if value >> 4:
            self._raise(state.GP)
            return None
        self.board.write_cr8(self.index, value)
        self._continue()
        return None

    def _on_hypercall(self) -> StopReason | None:
        """VMCALL and VMMCALL, with KVM's calling convention (see ``paravirt.hypercalls``)."""
        began = time.perf_counter_ns()
        view = self.view
        if self._services is None:
            self._raise(state.UD)
            return None
        wide = view.efer & state.EFER_LMA and view.seg_attr[state.CS] & state.ATTR_L
        bits = 64 if wide else 32
        mask = (1 << bits) - 1
        registers = (state.RAX, state.RBX, state.RCX, state.RDX, state.RSI)
        number, *arguments = (view.gpr[register] & mask for register in registers)
        view.gpr[state.RAX] = self._services.hypercall(view.cpl, number, arguments, bits) & mask
        self._continue()
        self._count(Reason.HYPERCALL, began, lambda: vocabulary.Hypercall(number, tuple(arguments)))
        return self._stopped()
