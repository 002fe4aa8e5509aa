"""Interrupt, trap and call gates outside long mode, to 16- and 32-bit segments.

Pushes to a new stack happen through SS while it is loaded for a try: what fails puts the old one
back, so that nothing has changed. Sources: Intel SDM vol. 3, 5.8.3 to 5.8.5 (call gates, stack
switching), 6.12.1 (exception and interrupt procedures), 20.3 (out of virtual-8086 mode).
"""

from __future__ import annotations

from ringfence.cpu.flags import get_rflags, raise_fault
from ringfence.cpu.ports import linear_read, mode_changed
from ringfence.cpu.segments import (
    DESC_CODE,
    DESC_CONFORMING,
    DESC_P,
    DESC_S,
    DESC_WRITABLE,
    TYPE_CALL_GATE,
    TYPE_TASK_GATE,
    TYPE_TSS16_BUSY,
    descriptor_dpl,
    descriptor_limit,
    descriptor_mark,
    descriptor_read,
    segment_fill,
    segment_null,
)
from ringfence.cpu.stack import set_stack, stack_read, stack_write
from ringfence.cpu.state import (
    ATTR_TYPE,
    BP,
    CS,
    DB,
    DS,
    ES,
    FAULT,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    FS,
    GP,
    GS,
    HAS_ERROR_CODE,
    MC,
    NMI,
    NP,
    OF,
    OK,
    RSP,
    SS,
    SS_FAULT,
    TR,
    TS,
    Cpu,
)
from ringfence.cpu.tasks import FROM_GATE, task_switch
from ringfence.native.dialect import native, native_inline

EXCEPTION, EXTERNAL, SOFTWARE = range(3)
"""What an event is: the origin decides error codes, RF and the gate's privilege check."""
NOT_FAULTS = (1 << DB) | (1 << NMI) | (1 << BP) | (1 << OF) | (1 << MC)
"""Exceptions that push RF as it is; faults push it set (SDM vol. 3, 6.8.3 and 17.3.1.1)."""
KINDS = (1 << TYPE_TASK_GATE) | (1 << 6) | (1 << 7) | (1 << 14) | (1 << 15)
"""Types that an IDT may hold: a task gate, 16- and 32-bit interrupt and trap gates."""
CODE_KIND = DESC_S | DESC_CODE
STACK_KIND = DESC_S | DESC_CODE | DESC_WRITABLE
WIDE = 8
"""What the type of a 32-bit gate has more than a 16-bit one."""
PARAMETERS = 31


@native
def inner_stack(cpu: Cpu, level: int, ext: int) -> int:
    """The TSS's stack for a privilege level: selector << 32 | offset in ``cpu.value``."""
    error = (cpu.seg_selector[TR] & 0xFFFC) | ext
    narrow = (cpu.seg_attr[TR] & ATTR_TYPE) == TYPE_TSS16_BUSY
    at = 2 + level * 4 if narrow else 4 + level * 8
    size = 2 if narrow else 4
    if at + size + 1 > cpu.seg_limit[TR]:
        return raise_fault(cpu, TS, error)
    if linear_read(cpu, cpu.seg_base[TR] + at, size, 0):
        return FAULT
    offset = cpu.value
    if linear_read(cpu, cpu.seg_base[TR] + at + size, 2, 0):
        return FAULT
    cpu.value = offset | (cpu.value << 32)
    return OK


@native
def inner_stack_check(cpu: Cpu, selector: int, level: int, ext: int) -> int:
    """Check the stack segment of an inner level; its descriptor is left in ``cpu.value``."""
    error = (selector & 0xFFFC) | ext
    if (selector & 0xFFFC) == 0:
        return raise_fault(cpu, TS, ext)
    if descriptor_read(cpu, selector, TS, ext):
        return FAULT
    stack = cpu.value
    if (selector & 3) != level or descriptor_dpl(stack) != level:
        return raise_fault(cpu, TS, error)
    if (stack & STACK_KIND) != (DESC_S | DESC_WRITABLE):
        return raise_fault(cpu, TS, error)
    if not stack & DESC_P:
        return raise_fault(cpu, SS_FAULT, error)
    return OK


@native
def push_frame(cpu: Cpu, size: int, flags: int, return_rip: int, outer: int) -> int:
    """Push an interrupt's frame; ``outer`` is SS << 32 | ESP to be pushed, or all ones for none.

    From virtual-8086 mode the data segment registers come first. RSP moves on in ``cpu.op[0]``.
    """
    at = cpu.op[0]
    if cpu.other_flags & FLAG_VM:
        if stack_write(cpu, at - size, size, cpu.seg_selector[GS], 0):
            return FAULT
        if stack_write(cpu, at - size * 2, size, cpu.seg_selector[FS], 0):
            return FAULT
        if stack_write(cpu, at - size * 3, size, cpu.seg_selector[DS], 0):
            return FAULT
        if stack_write(cpu, at - size * 4, size, cpu.seg_selector[ES], 0):
            return FAULT
        at = at - size * 4
    if outer != 0xFFFFFFFFFFFFFFFF:
        if stack_write(cpu, at - size, size, outer >> 32, 0):
            return FAULT
        if stack_write(cpu, at - size * 2, size, outer, 0):
            return FAULT
        at = at - size * 2
    # At the same level this may be CPL 3; pages are checked for what the CPU becomes.
    user = cpu.cpl == 3
    if stack_write(cpu, at - size, size, flags, user):
        return FAULT
    if stack_write(cpu, at - size * 2, size, cpu.seg_selector[CS], user):
        return FAULT
    if stack_write(cpu, at - size * 3, size, return_rip, user):
        return FAULT
    cpu.op[0] = at - size * 3
    return OK


@native_inline
def revoke_v86(cpu: Cpu) -> int:
    """Out of virtual-8086 mode the data segment registers are null."""
    segment_null(cpu, GS, 0, 0)
    segment_null(cpu, FS, 0, 0)
    segment_null(cpu, DS, 0, 0)
    segment_null(cpu, ES, 0, 0)
    return OK


@native
def enter_protected(cpu: Cpu, vector: int, error: int, origin: int, return_rip: int) -> int:
    """Take one event through a gate of a 32-bit IDT; on FAULT nothing has changed."""
    ext = 0 if origin == SOFTWARE else 1
    gate_error = (vector << 3) | 2 | ext
    level = cpu.cpl
    if vector * 8 + 7 > cpu.idtr_limit:
        return raise_fault(cpu, GP, gate_error)
    if linear_read(cpu, cpu.idtr_base + vector * 8, 8, 0):
        return FAULT
    gate = cpu.value
    kind = (gate >> 40) & 0x1F
    if kind > 15 or not (KINDS >> kind) & 1:
        return raise_fault(cpu, GP, gate_error)
    if origin == SOFTWARE and descriptor_dpl(gate) < level:
        return raise_fault(cpu, GP, gate_error)
    if not gate & DESC_P:
        return raise_fault(cpu, NP, gate_error)
    selector = (gate >> 16) & 0xFFFF
    coded = origin == EXCEPTION and (HAS_ERROR_CODE >> vector) & 1
    if kind == TYPE_TASK_GATE:
        if task_switch(cpu, selector, FROM_GATE, return_rip):
            return FAULT
        if coded:
            return push_error(cpu, error)
        return OK
    selector_error = (selector & 0xFFFC) | ext
    if (selector & 0xFFFC) == 0:
        return raise_fault(cpu, GP, ext)
    if descriptor_read(cpu, selector, GP, ext):
        return FAULT
    code = cpu.value
    dpl = descriptor_dpl(code)
    if (code & CODE_KIND) != CODE_KIND or dpl > level:
        return raise_fault(cpu, GP, selector_error)
    if not code & DESC_P:
        return raise_fault(cpu, NP, selector_error)
    new_level = level if code & DESC_CONFORMING else dpl
    if cpu.other_flags & FLAG_VM and new_level:
        return raise_fault(cpu, GP, selector_error)
    target = gate & 0xFFFF
    size = 2
    if kind & WIDE:
        target = target | ((gate >> 32) & 0xFFFF0000)
        size = 4

    flags = get_rflags(cpu)
    if origin == EXCEPTION and not (NOT_FAULTS >> vector) & 1:
        flags = flags | FLAG_RF
    outer = 0xFFFFFFFFFFFFFFFF
    new_stack = 0
    new_selector = 0
    if new_level != level:
        if inner_stack(cpu, new_level, ext):
            return FAULT
        new_selector = cpu.value >> 32
        new_stack = cpu.value & 0xFFFFFFFF
        if inner_stack_check(cpu, new_selector, new_level, ext):
            return FAULT
        outer = cpu.gpr[RSP] | (cpu.seg_selector[SS] << 32)
    stack_descriptor = cpu.value
    if target > descriptor_limit(code):
        return raise_fault(cpu, GP, ext)

    # The old SS, to be put back if a push fails.
    base = cpu.seg_base[SS]
    limit = cpu.seg_limit[SS]
    attr = cpu.seg_attr[SS]
    old_selector = cpu.seg_selector[SS]
    cpu.op[0] = cpu.gpr[RSP]
    if new_level != level:
        segment_fill(cpu, SS, new_selector, stack_descriptor)
        cpu.cpl = new_level
        cpu.op[0] = new_stack
    failed = push_frame(cpu, size, flags, return_rip, outer)
    if not failed and coded:
        cpu.op[0] -= size
        failed = stack_write(cpu, cpu.op[0], size, error, cpu.cpl == 3)
    if not failed:
        failed = descriptor_mark(cpu, selector, code)
    if not failed and new_level != level:
        failed = descriptor_mark(cpu, new_selector, stack_descriptor)
    if failed:
        cpu.seg_base[SS] = base
        cpu.seg_limit[SS] = limit
        cpu.seg_attr[SS] = attr
        cpu.seg_selector[SS] = old_selector
        cpu.cpl = level
        if cpu.exc_vector == SS_FAULT:
            cpu.exc_error = ext | (new_selector & 0xFFFC if new_level != level else 0)
        return FAULT

    if new_level != level:
        cpu.gpr[RSP] = new_stack
    set_stack(cpu, cpu.op[0])
    if cpu.other_flags & FLAG_VM:
        revoke_v86(cpu)
    segment_fill(cpu, CS, (selector & 0xFFFC) | new_level, code)
    cpu.rip = target
    cpu.other_flags = cpu.other_flags & ~(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)
    if not kind & 1:
        cpu.flag_if = 0
    cpu.interrupt_shadow = 0
    return mode_changed(cpu)


@native
def push_error(cpu: Cpu, error: int) -> int:
    """The error code on the stack of a task that an exception switched to."""
    size = 2 if (cpu.seg_attr[TR] & ATTR_TYPE) == TYPE_TSS16_BUSY else 4
    at = cpu.gpr[RSP] - size
    if stack_write(cpu, at, size, error, cpu.cpl == 3):
        return FAULT
    return set_stack(cpu, at)


@native
def legacy_gate(cpu: Cpu, gate: int, call: int) -> int:
    """Far JMP or CALL through a call gate whose own privilege was checked (SDM vol. 3, 5.8.4)."""
    level = cpu.cpl
    user = level == 3
    selector = (gate >> 16) & 0xFFFF
    error = selector & 0xFFFC
    target = gate & 0xFFFF
    size = 2
    if (gate >> 40) & 0x1F == TYPE_CALL_GATE:
        target = target | ((gate >> 32) & 0xFFFF0000)
        size = 4
    if error == 0:
        return raise_fault(cpu, GP, 0)
    if descriptor_read(cpu, selector, GP, 0):
        return FAULT
    code = cpu.value
    dpl = descriptor_dpl(code)
    if (code & CODE_KIND) != CODE_KIND or dpl > level:
        return raise_fault(cpu, GP, error)
    new_level = level if code & DESC_CONFORMING else dpl
    if not call and new_level != level:
        return raise_fault(cpu, GP, error)
    if not code & DESC_P:
        return raise_fault(cpu, NP, error)
    if target > descriptor_limit(code):
        return raise_fault(cpu, GP, 0)
    at = cpu.gpr[RSP]
    if new_level != level:
        if call_inward(cpu, new_level, size, (gate >> 32) & PARAMETERS):
            return FAULT
        at = cpu.op[0]
    elif call:
        if stack_write(cpu, at - size, size, cpu.seg_selector[CS], user):
            return FAULT
        if stack_write(cpu, at - size * 2, size, cpu.next_rip, user):
            return FAULT
        at = at - size * 2
    if descriptor_mark(cpu, selector, code):
        return FAULT
    segment_fill(cpu, CS, error | new_level, code)
    cpu.cpl = new_level
    set_stack(cpu, at)
    cpu.rip = target
    return mode_changed(cpu)


@native
def call_inward(cpu: Cpu, new_level: int, size: int, parameters: int) -> int:
    """Switch to an inner level's stack, with SS:ESP, parameters and CS:EIP of the outer one.

    SS, ESP and CPL are the new ones on OK; ``cpu.op[0]`` is the stack pointer behind the frame.
    """
    level = cpu.cpl
    user = level == 3
    if inner_stack(cpu, new_level, 0):
        return FAULT
    new_selector = cpu.value >> 32
    new_stack = cpu.value & 0xFFFFFFFF
    if inner_stack_check(cpu, new_selector, new_level, 0):
        return FAULT
    descriptor = cpu.value
    base = cpu.seg_base[SS]
    limit = cpu.seg_limit[SS]
    attr = cpu.seg_attr[SS]
    old_selector = cpu.seg_selector[SS]
    old_stack = cpu.gpr[RSP]
    code_selector = cpu.seg_selector[CS]
    at = new_stack
    failed = 0
    for n in range(parameters + 4):
        value = old_selector
        if n == 1:
            value = old_stack
        elif n == parameters + 2:
            value = code_selector
        elif n == parameters + 3:
            value = cpu.next_rip
        elif n > 1:
            # Parameters are read from the old stack, the last one first.
            cpu.seg_base[SS] = base
            cpu.seg_limit[SS] = limit
            cpu.seg_attr[SS] = attr
            failed = failed | stack_read(cpu, old_stack + (parameters + 1 - n) * size, size, user)
            value = cpu.value
        segment_fill(cpu, SS, new_selector, descriptor)
        at = at - size
        if not failed:
            failed = stack_write(cpu, at, size, value, new_level == 3)
    if not failed:
        failed = descriptor_mark(cpu, new_selector, descriptor)
    if failed:
        cpu.seg_base[SS] = base
        cpu.seg_limit[SS] = limit
        cpu.seg_attr[SS] = attr
        cpu.seg_selector[SS] = old_selector
        return FAULT
    cpu.gpr[RSP] = new_stack
    cpu.op[0] = at
    return OK
