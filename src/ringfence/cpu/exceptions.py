"""Delivery of exceptions and interrupts; the way through the 64-bit IDT.

A fault while an event is delivered becomes the next event, or a double fault, or shutdown; this
is a loop, and the class of the event can only rise, so it ends. Sources: Intel SDM vol. 3, 6.12
(gates), 6.14 (64-bit mode), 6.15 (double fault classes); vol. 2, INT n.
"""

from __future__ import annotations

from ringfence.cpu.flags import get_rflags, is_canonical, raise_fault
from ringfence.cpu.gates import EXCEPTION, EXTERNAL, NOT_FAULTS, SOFTWARE, enter_protected
from ringfence.cpu.ports import linear_read, linear_write, mode_changed, step_masked
from ringfence.cpu.realmode import enter_real, iopl_refuses
from ringfence.cpu.segments import (
    DESC_CODE,
    DESC_CONFORMING,
    DESC_D,
    DESC_L,
    DESC_P,
    DESC_S,
    descriptor_dpl,
    descriptor_mark,
    descriptor_read,
    segment_fill,
    segment_null,
)
from ringfence.cpu.state import (
    BR,
    CR0_PE,
    CS,
    DB,
    DE,
    DF,
    EFER_LMA,
    EXIT,
    EXIT_SHUTDOWN,
    FAULT,
    FLAG_NT,
    FLAG_OF,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    GP,
    HAS_ERROR_CODE,
    NM,
    NMI,
    NO_EXCEPTION,
    NP,
    OF,
    OK,
    PF,
    RSP,
    SS,
    SS_FAULT,
    TR,
    TS,
    UD,
    Cpu,
)
from ringfence.native.dialect import native, native_inline, sext, slt

CONTRIBUTORY = (1 << DE) | (1 << TS) | (1 << NP) | (1 << SS_FAULT) | (1 << GP)
TYPE_INTERRUPT_GATE, TYPE_TRAP_GATE = 14, 15
MAX_ROUNDS = 8


@native
def tss_stack(cpu: Cpu, offset: int, external_event: int) -> int:
    """Read a stack pointer out of the 64-bit TSS into ``cpu.value`` (SDM vol. 3, 8.7)."""
    if offset + 7 > cpu.seg_limit[TR]:
        return raise_fault(cpu, TS, (cpu.seg_selector[TR] & 0xFFFC) | external_event)
    if linear_read(cpu, cpu.seg_base[TR] + offset, 8, 0):
        return FAULT
    if not is_canonical(cpu.value):
        return raise_fault(cpu, SS_FAULT, external_event)
    return OK


@native
def frame_fault(cpu: Cpu, external_event: int) -> int:
    """A push of an interrupt frame failed: #GP becomes #SS."""
    if cpu.exc_vector == GP:
        return raise_fault(cpu, SS_FAULT, external_event)
    return FAULT


@native
def enter_event(cpu: Cpu, vector: int, error: int, origin: int, return_rip: int) -> int:
    """Take one event to its handler; on FAULT nothing but the unused stack has changed."""
    if cpu.efer & EFER_LMA:
        return enter_gate(cpu, vector, error, origin, return_rip)
    if cpu.cr0 & CR0_PE:
        return enter_protected(cpu, vector, error, origin, return_rip)
    return enter_real(cpu, vector, return_rip)


@native
def enter_gate(cpu: Cpu, vector: int, error: int, origin: int, return_rip: int) -> int:
    """Take one event through a gate of the 64-bit IDT."""
    ext = 0 if origin == SOFTWARE else 1
    gate_error = (vector << 3) | 2 | ext
    at = vector << 4
    level = cpu.cpl
    if at + 15 > cpu.idtr_limit:
        return raise_fault(cpu, GP, gate_error)
    if linear_read(cpu, cpu.idtr_base + at, 8, 0):
        return FAULT
    gate = cpu.value
    kind = (gate >> 40) & 0x1F
    if kind != TYPE_INTERRUPT_GATE and kind != TYPE_TRAP_GATE:
        return raise_fault(cpu, GP, gate_error)
    if origin == SOFTWARE and descriptor_dpl(gate) < level:
        return raise_fault(cpu, GP, gate_error)
    if not gate & DESC_P:
        return raise_fault(cpu, NP, gate_error)
    if linear_read(cpu, cpu.idtr_base + at + 8, 8, 0):
        return FAULT
    target = (gate & 0xFFFF) | ((gate >> 32) & 0xFFFF0000) | (cpu.value << 32)

    selector = (gate >> 16) & 0xFFFF
    selector_error = (selector & 0xFFFC) | ext
    if (selector & 0xFFFC) == 0:
        return raise_fault(cpu, GP, ext)
    if descriptor_read(cpu, selector, GP, ext):
        return FAULT
    code = cpu.value
    dpl = descriptor_dpl(code)
    if (code & (DESC_S | DESC_CODE)) != (DESC_S | DESC_CODE) or dpl > level:
        return raise_fault(cpu, GP, selector_error)
    if not code & DESC_P:
        return raise_fault(cpu, NP, selector_error)
    if (code & (DESC_L | DESC_D)) != DESC_L:
        return raise_fault(cpu, GP, selector_error)
    if not is_canonical(target):
        return raise_fault(cpu, GP, ext)
    new_level = level if code & DESC_CONFORMING else dpl

    old_rsp = cpu.gpr[RSP]
    stack = old_rsp
    ist = (gate >> 32) & 7
    if ist:
        if tss_stack(cpu, 0x1C + ist * 8, ext):
            return FAULT
        stack = cpu.value
    elif new_level != level:
        if tss_stack(cpu, 4 + new_level * 8, ext):
            return FAULT
        stack = cpu.value
    stack = stack & ~15

    flags = get_rflags(cpu)
    if origin == EXCEPTION and not (NOT_FAULTS >> vector) & 1:
        flags = flags | FLAG_RF
    user = new_level == 3
    if linear_write(cpu, stack - 8, 8, cpu.seg_selector[SS], user):
        return frame_fault(cpu, ext)
    if linear_write(cpu, stack - 16, 8, old_rsp, user):
        return frame_fault(cpu, ext)
    if linear_write(cpu, stack - 24, 8, flags, user):
        return frame_fault(cpu, ext)
    if linear_write(cpu, stack - 32, 8, cpu.seg_selector[CS], user):
        return frame_fault(cpu, ext)
    stack = stack - 40
    if linear_write(cpu, stack, 8, return_rip, user):
        return frame_fault(cpu, ext)
    if origin == EXCEPTION and (HAS_ERROR_CODE >> vector) & 1:
        stack = stack - 8
        if linear_write(cpu, stack, 8, error, user):
            return frame_fault(cpu, ext)
    if descriptor_mark(cpu, selector, code):
        return FAULT

    segment_fill(cpu, CS, (selector & 0xFFFC) | new_level, code)
    if new_level != level:
        segment_null(cpu, SS, new_level, new_level)
    cpu.cpl = new_level
    cpu.gpr[RSP] = stack
    cpu.rip = target
    cpu.other_flags &= ~(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)
    if kind == TYPE_INTERRUPT_GATE:
        cpu.flag_if = 0
    cpu.interrupt_shadow = 0
    mode_changed(cpu)
    return OK


@native_inline
def shut_down(cpu: Cpu, vector: int) -> int:
    """Triple fault: the CPU stops until it is reset (SDM vol. 3, 6.15, #DF)."""
    cpu.delivering = NO_EXCEPTION
    cpu.exc_vector = NO_EXCEPTION
    cpu.exit_reason = EXIT_SHUTDOWN
    cpu.exit_data[0] = vector
    return EXIT


@native
def deliver_event(cpu: Cpu, vector: int, error: int, origin: int) -> int:
    """Deliver an event, or whatever its delivery leads to (SDM vol. 3, table 6-5)."""
    for _ in range(MAX_ROUNDS):
        cpu.delivering = vector
        status = enter_event(cpu, vector, error, origin, cpu.rip)
        if status == OK:
            if origin == EXCEPTION:
                cpu.exceptions[vector & 31] += 1
            cpu.delivering = NO_EXCEPTION
            cpu.exc_vector = NO_EXCEPTION
            return OK
        if status == EXIT:
            cpu.delivering = NO_EXCEPTION
            return EXIT
        nested = cpu.exc_vector
        if nested == PF:
            cpu.cr2 = cpu.exc_address
        first = 1 << vector if origin == EXCEPTION else 0
        second = 1 << nested
        if first & (1 << DF):
            return shut_down(cpu, nested)
        origin = EXCEPTION
        worse = CONTRIBUTORY | (1 << PF) if first & (1 << PF) else CONTRIBUTORY
        if first & (CONTRIBUTORY | (1 << PF)) and second & worse:
            vector = DF
        else:
            vector = nested
        error = 0 if vector == DF else cpu.exc_error
    return shut_down(cpu, vector)


@native
def deliver_exception(cpu: Cpu) -> int:
    """Deliver the pending exception; ``cpu.rip`` is the return address."""
    if cpu.exc_vector == PF:
        cpu.cr2 = cpu.exc_address
    return deliver_event(cpu, cpu.exc_vector, cpu.exc_error, EXCEPTION)


@native
def deliver_interrupt(cpu: Cpu, vector: int) -> int:
    """Deliver an external interrupt and wake the CPU (SDM vol. 3, 6.3.2)."""
    cpu.halted = 0
    cpu.interrupts[vector & 0xFF] += 1
    return deliver_event(cpu, vector & 0xFF, 0, EXTERNAL)


@native
def deliver_nmi(cpu: Cpu) -> int:
    """Deliver an NMI; further ones wait for IRET (SDM vol. 3, 6.7.1)."""
    cpu.halted = 0
    cpu.nmi_blocked = 1
    cpu.exceptions[NMI] += 1
    return deliver_event(cpu, NMI, 0, EXTERNAL)


@native
def fx_int(cpu: Cpu) -> int:
    """INT n, INT3: op[0] the vector, op[1] 1 for INT n; checks the gate's DPL (vol. 2, INT n)."""
    if cpu.op[1] and iopl_refuses(cpu):
        return raise_fault(cpu, GP, 0)
    if enter_event(cpu, cpu.op[0] & 0xFF, 0, SOFTWARE, cpu.next_rip):
        return FAULT
    cpu.software_interrupts += 1
    step_masked(cpu)
    return OK


@native
def fx_into(cpu: Cpu) -> int:
    """INTO: #OF as a trap if OF is set (SDM vol. 2, INT n)."""
    if not cpu.status & FLAG_OF:
        cpu.rip = cpu.next_rip
        return OK
    if enter_event(cpu, OF, 0, SOFTWARE, cpu.next_rip):
        return FAULT
    cpu.software_interrupts += 1
    step_masked(cpu)
    return OK


@native
def fx_bound(cpu: Cpu) -> int:
    """BOUND: op[0] general register, op[1] operand size, bounds at ea (SDM vol. 2, BOUND)."""
    size = cpu.op[1]
    user = cpu.cpl == 3
    bits = size * 8
    if linear_read(cpu, cpu.ea, size, user):
        return FAULT
    low = sext(cpu.value, 16) if size == 2 else sext(cpu.value, 32)
    if linear_read(cpu, cpu.ea + size, size, user):
        return FAULT
    high = sext(cpu.value, 16) if size == 2 else sext(cpu.value, 32)
    index = cpu.gpr[cpu.op[0]] & ((1 << bits) - 1)
    index = sext(index, 16) if size == 2 else sext(index, 32)
    if slt(index, low) or slt(high, index):
        return raise_fault(cpu, BR, 0)
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_int1(cpu: Cpu) -> int:
    """INT1: a #DB trap whose gate's DPL is not checked (SDM vol. 2, INT n)."""
    cpu.rip = cpu.next_rip
    return raise_fault(cpu, DB, 0)


@native
def fx_ud(cpu: Cpu) -> int:
    """#UD."""
    return raise_fault(cpu, UD, 0)


@native
def fx_gp(cpu: Cpu) -> int:
    """#GP(0)."""
    return raise_fault(cpu, GP, 0)


@native
def fx_nm(cpu: Cpu) -> int:
    """#NM: the FPU is not available (CR0.TS or CR0.EM)."""
    return raise_fault(cpu, NM, 0)
