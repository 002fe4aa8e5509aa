"""Far transfers of 64-bit mode: IRET, SYSCALL and SYSRET, far JMP, CALL and RET; and ENTER.

A transfer to a code segment without L would leave 64-bit mode, and is EXIT_UNSUPPORTED. Sources:
Intel SDM vol. 3, 5.8 (control transfers), 6.14 (IRET in 64-bit mode); vol. 2, the instructions'
pages; AMD APM vol. 3, SYSCALL, SYSRET, SYSENTER.
"""

from __future__ import annotations

from ringfence.cpu.exceptions import tss_stack
from ringfence.cpu.flags import (
    get_rflags,
    is_canonical,
    raise_fault,
    set_rflags,
    stack_read,
    stack_write,
)
from ringfence.cpu.ports import linear_read, mode_changed, step_masked
from ringfence.cpu.segments import (
    DESC_CODE,
    DESC_CONFORMING,
    DESC_D,
    DESC_L,
    DESC_P,
    DESC_S,
    DESC_TYPE_SHIFT,
    DESC_WRITABLE,
    TYPE_CALL_GATE,
    descriptor_dpl,
    descriptor_mark,
    descriptor_read,
    descriptor_read_high,
    operand_store,
    segment_fill,
    segment_null,
)
from ringfence.cpu.signals import unblock_nmi
from ringfence.cpu.state import (
    ATTR_DPL_SHIFT,
    CS,
    DS,
    EFER_SCE,
    ES,
    EXIT,
    EXIT_UNSUPPORTED,
    FAULT,
    FLAG_AC,
    FLAG_DF,
    FLAG_ID,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    FS,
    GP,
    GS,
    NP,
    OK,
    RBP,
    RCX,
    RSP,
    SS,
    SS_FAULT,
    STATUS_FLAGS,
    UD,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

R11 = 11
FLAT_LIMIT = 0xFFFFFFFF
ATTR_FLAT_CODE = 0xA9B
"""G, L, present, DPL 0, code, readable, accessed."""
ATTR_FLAT_DATA = 0xC93
"""G, D, present, DPL 0, data, writable, accessed."""
CODE_LIKE = 0x1C
"""S, code and conforming among a segment's attributes."""
CODE_KIND = DESC_S | DESC_CODE
STACK_KIND = DESC_S | DESC_CODE | DESC_WRITABLE
IRET_FLAGS = STATUS_FLAGS | FLAG_TF | FLAG_DF | FLAG_NT
IRET_FLAGS_WIDE = FLAG_RF | FLAG_AC | FLAG_ID
SYSRET_FLAGS = 0x3C7FD7


@native_inline
def unsupported(cpu: Cpu, selector: int) -> int:
    """The transfer leads to compatibility mode, which the translator lacks."""
    cpu.exit_reason = EXIT_UNSUPPORTED
    cpu.exit_data[0] = selector
    return EXIT


@native_inline
def long_code_check(cpu: Cpu, selector: int, code: int) -> int:
    """Checks that all transfers end with: present, 64-bit code; marks the descriptor accessed."""
    if not code & DESC_P:
        return raise_fault(cpu, NP, selector & 0xFFFC)
    if not code & DESC_L:
        return unsupported(cpu, selector)
    if code & DESC_D:
        return raise_fault(cpu, GP, selector & 0xFFFC)
    return OK


@native
def return_code_check(cpu: Cpu, selector: int) -> int:
    """Check a code selector that IRET or RET popped; its descriptor is left in ``cpu.value``."""
    error = selector & 0xFFFC
    rpl = selector & 3
    if error == 0:
        return raise_fault(cpu, GP, 0)
    if descriptor_read(cpu, selector, GP, 0):
        return FAULT
    code = cpu.value
    dpl = descriptor_dpl(code)
    if (code & CODE_KIND) != CODE_KIND or rpl < cpu.cpl:
        return raise_fault(cpu, GP, error)
    if dpl != rpl and (dpl > rpl or not code & DESC_CONFORMING):
        return raise_fault(cpu, GP, error)
    return long_code_check(cpu, selector, code)


@native
def return_stack_check(cpu: Cpu, selector: int, level: int) -> int:
    """Check a stack selector popped for CPL ``level``; descriptor in ``cpu.value``, 0 if null."""
    error = selector & 0xFFFC
    if error == 0:
        cpu.value = 0
        return OK if level != 3 else raise_fault(cpu, GP, 0)
    if (selector & 3) != level:
        return raise_fault(cpu, GP, error)
    if descriptor_read(cpu, selector, GP, 0):
        return FAULT
    stack = cpu.value
    if (stack & STACK_KIND) != (DESC_S | DESC_WRITABLE) or descriptor_dpl(stack) != level:
        return raise_fault(cpu, GP, error)
    if not stack & DESC_P:
        return raise_fault(cpu, SS_FAULT, error)
    return OK


@native_inline
def revoke_segment(cpu: Cpu, sreg: int, level: int) -> int:
    """On return outward, null a segment register that ``level`` may not use; the base stays."""
    attr = cpu.seg_attr[sreg]
    below = ((attr >> ATTR_DPL_SHIFT) & 3) < level and (attr & CODE_LIKE) != CODE_LIKE
    if below and cpu.seg_selector[sreg] & 0xFFFC:
        cpu.seg_selector[sreg] = 0
        cpu.seg_attr[sreg] = 0
    return OK


@native_inline
def revoke_segments(cpu: Cpu, level: int) -> int:
    """Null the data segment registers above an outer level's privilege (SDM vol. 2, RET)."""
    revoke_segment(cpu, ES, level)
    revoke_segment(cpu, DS, level)
    revoke_segment(cpu, FS, level)
    revoke_segment(cpu, GS, level)
    return OK


@native_inline
def stack_fill(cpu: Cpu, selector: int, descriptor: int, level: int) -> int:
    """Load SS after ``return_stack_check``."""
    if descriptor:
        segment_fill(cpu, SS, selector, descriptor)
    else:
        segment_null(cpu, SS, selector, level)
    return OK


@native
def fx_iret(cpu: Cpu) -> int:
    """IRET: op[0] the operand size; SS:RSP is always popped in 64-bit mode (SDM vol. 2, IRET)."""
    size = cpu.op[0]
    level = cpu.cpl
    user = level == 3
    at = cpu.gpr[RSP]
    if cpu.other_flags & FLAG_NT:
        return raise_fault(cpu, GP, 0)
    if stack_read(cpu, at, size, user):
        return FAULT
    target = cpu.value
    if stack_read(cpu, at + size, size, user):
        return FAULT
    code_selector = cpu.value & 0xFFFF
    if stack_read(cpu, at + size * 2, size, user):
        return FAULT
    flags = cpu.value
    if stack_read(cpu, at + size * 3, size, user):
        return FAULT
    new_rsp = cpu.value
    if stack_read(cpu, at + size * 4, size, user):
        return FAULT
    stack_selector = cpu.value & 0xFFFF
    new_level = code_selector & 3
    status = return_code_check(cpu, code_selector)
    if status:
        return status
    code = cpu.value
    if return_stack_check(cpu, stack_selector, new_level):
        return FAULT
    stack = cpu.value
    if not is_canonical(target):
        return raise_fault(cpu, GP, 0)
    if descriptor_mark(cpu, code_selector, code):
        return FAULT
    if stack and descriptor_mark(cpu, stack_selector, stack):
        return FAULT

    mask = IRET_FLAGS
    if size != 2:
        mask = mask | IRET_FLAGS_WIDE
    if level == 0:
        mask = mask | FLAG_IOPL
    if level <= (cpu.other_flags & FLAG_IOPL) >> 12:
        mask = mask | FLAG_IF
    if new_level != level:
        revoke_segments(cpu, new_level)
    segment_fill(cpu, CS, code_selector, code)
    stack_fill(cpu, stack_selector, stack, new_level)
    cpu.cpl = new_level
    cpu.rip = target
    cpu.gpr[RSP] = new_rsp
    unblock_nmi(cpu)
    set_rflags(cpu, (flags & mask) | (get_rflags(cpu) & ~mask & ~FLAG_VM))
    mode_changed(cpu)
    return OK


@native_inline
def flat_segments(cpu: Cpu, code: int, stack: int, level: int) -> int:
    """The fixed flat segments of SYSCALL and SYSRET (SDM vol. 2, SYSCALL)."""
    cpu.seg_selector[CS] = code
    cpu.seg_base[CS] = 0
    cpu.seg_limit[CS] = FLAT_LIMIT
    cpu.seg_attr[CS] = ATTR_FLAT_CODE | (level << ATTR_DPL_SHIFT)
    cpu.seg_selector[SS] = stack
    cpu.seg_base[SS] = 0
    cpu.seg_limit[SS] = FLAT_LIMIT
    cpu.seg_attr[SS] = ATTR_FLAT_DATA | (level << ATTR_DPL_SHIFT)
    cpu.cpl = level
    return OK


@native
def fx_syscall(cpu: Cpu) -> int:
    """SYSCALL from 64-bit mode (SDM vol. 2, SYSCALL)."""
    if not cpu.efer & EFER_SCE:
        return raise_fault(cpu, UD, 0)
    flags = get_rflags(cpu) & ~FLAG_RF
    cpu.gpr[RCX] = cpu.next_rip
    cpu.gpr[R11] = flags
    selector = (cpu.star >> 32) & 0xFFFC
    flat_segments(cpu, selector, selector + 8, 0)
    cpu.rip = cpu.lstar
    set_rflags(cpu, flags & ~cpu.sfmask)
    if cpu.sfmask & FLAG_TF:
        step_masked(cpu)
    mode_changed(cpu)
    return OK


@native
def fx_sysret(cpu: Cpu) -> int:
    """SYSRET: op[0] is 1 with REX.W (AMD APM vol. 3, SYSRET).

    RCX is not checked to be canonical: as on AMD CPUs, the fault follows at CPL 3.
    """
    if not cpu.efer & EFER_SCE:
        return raise_fault(cpu, UD, 0)
    if cpu.cpl:
        return raise_fault(cpu, GP, 0)
    selector = (cpu.star >> 48) & 0xFFFF
    if not cpu.op[0]:
        return unsupported(cpu, selector | 3)
    flat_segments(cpu, ((selector + 16) & 0xFFFF) | 3, ((selector + 8) & 0xFFFF) | 3, 3)
    cpu.rip = cpu.gpr[RCX]
    set_rflags(cpu, cpu.gpr[R11] & SYSRET_FLAGS)
    mode_changed(cpu)
    return OK


@native
def fx_sysenter(cpu: Cpu) -> int:
    """SYSENTER: #UD in long mode, as on AMD CPUs (AMD APM vol. 3, SYSENTER)."""
    return raise_fault(cpu, UD, 0)


@native
def fx_sysexit(cpu: Cpu) -> int:
    """SYSEXIT: #UD in long mode, as on AMD CPUs (AMD APM vol. 3, SYSEXIT)."""
    return raise_fault(cpu, UD, 0)


@native
def push_return(cpu: Cpu, stack: int, size: int, user: int) -> int:
    """Push CS and the return address below ``stack``, without moving RSP."""
    if stack_write(cpu, stack - size, size, cpu.seg_selector[CS], user):
        return FAULT
    return stack_write(cpu, stack - size * 2, size, cpu.next_rip, user)


@native
def far_gate(cpu: Cpu, selector: int, gate: int, call: int) -> int:
    """Go through a 64-bit call gate (SDM vol. 3, 5.8.3.1 and 5.8.4)."""
    level = cpu.cpl
    dpl = descriptor_dpl(gate)
    if dpl < level or dpl < selector & 3:
        return raise_fault(cpu, GP, selector & 0xFFFC)
    if not gate & DESC_P:
        return raise_fault(cpu, NP, selector & 0xFFFC)
    if descriptor_read_high(cpu, selector):
        return FAULT
    high = cpu.value
    if (high >> DESC_TYPE_SHIFT) & 0x1F:
        return raise_fault(cpu, GP, selector & 0xFFFC)
    target = (gate & 0xFFFF) | ((gate >> 32) & 0xFFFF0000) | (high << 32)
    inner = (gate >> 16) & 0xFFFF
    error = inner & 0xFFFC
    if error == 0:
        return raise_fault(cpu, GP, 0)
    if descriptor_read(cpu, inner, GP, 0):
        return FAULT
    code = cpu.value
    dpl = descriptor_dpl(code)
    if (code & CODE_KIND) != CODE_KIND or dpl > level:
        return raise_fault(cpu, GP, error)
    new_level = level if code & DESC_CONFORMING else dpl
    if (code & (DESC_L | DESC_D)) != DESC_L or (new_level != level and not call):
        return raise_fault(cpu, GP, error)
    if not code & DESC_P:
        return raise_fault(cpu, NP, error)
    if not is_canonical(target):
        return raise_fault(cpu, GP, 0)

    rsp = cpu.gpr[RSP]
    if new_level != level:
        if tss_stack(cpu, 4 + new_level * 8, 0):
            return FAULT
        stack = cpu.value
        if stack_write(cpu, stack - 8, 8, cpu.seg_selector[SS], 0):
            return FAULT
        if stack_write(cpu, stack - 16, 8, rsp, 0):
            return FAULT
        if push_return(cpu, stack - 16, 8, 0):
            return FAULT
        rsp = stack - 32
    elif call:
        if push_return(cpu, rsp, 8, level == 3):
            return FAULT
        rsp = rsp - 16
    if descriptor_mark(cpu, inner, code):
        return FAULT
    if new_level != level:
        segment_null(cpu, SS, new_level, new_level)
    segment_fill(cpu, CS, error | new_level, code)
    cpu.cpl = new_level
    cpu.gpr[RSP] = rsp
    cpu.rip = target
    mode_changed(cpu)
    return OK


@native
def far_transfer(cpu: Cpu, call: int) -> int:
    """Far JMP or CALL through the pointer at ea: offset of op[0] bytes, then a selector."""
    size = cpu.op[0]
    level = cpu.cpl
    user = level == 3
    if linear_read(cpu, cpu.ea, size, user):
        return FAULT
    target = cpu.value
    if linear_read(cpu, cpu.ea + size, 2, user):
        return FAULT
    selector = cpu.value
    error = selector & 0xFFFC
    if error == 0:
        return raise_fault(cpu, GP, 0)
    if descriptor_read(cpu, selector, GP, 0):
        return FAULT
    code = cpu.value
    if (code >> DESC_TYPE_SHIFT) & 0x1F == TYPE_CALL_GATE:
        return far_gate(cpu, selector, code, call)
    dpl = descriptor_dpl(code)
    if (code & CODE_KIND) != CODE_KIND or dpl > level:
        return raise_fault(cpu, GP, error)
    if not code & DESC_CONFORMING and (dpl != level or selector & 3 > level):
        return raise_fault(cpu, GP, error)
    status = long_code_check(cpu, selector, code)
    if status:
        return status
    if not is_canonical(target):
        return raise_fault(cpu, GP, 0)
    if call and push_return(cpu, cpu.gpr[RSP], size, user):
        return FAULT
    if descriptor_mark(cpu, selector, code):
        return FAULT
    segment_fill(cpu, CS, error | level, code)
    if call:
        cpu.gpr[RSP] -= size * 2
    cpu.rip = target
    mode_changed(cpu)
    return OK


@native
def fx_jmp_far(cpu: Cpu) -> int:
    """JMP m16:16/32/64: op[0] the operand size, the pointer at ea (SDM vol. 2, JMP)."""
    return far_transfer(cpu, 0)


@native
def fx_call_far(cpu: Cpu) -> int:
    """CALL m16:16/32/64: op[0] the operand size, the pointer at ea (SDM vol. 2, CALL)."""
    return far_transfer(cpu, 1)


@native
def fx_ret_far(cpu: Cpu) -> int:
    """Far RET: op[0] the operand size, op[1] the bytes to release (SDM vol. 2, RET)."""
    size = cpu.op[0]
    level = cpu.cpl
    user = level == 3
    at = cpu.gpr[RSP]
    if stack_read(cpu, at, size, user):
        return FAULT
    target = cpu.value
    if stack_read(cpu, at + size, size, user):
        return FAULT
    selector = cpu.value & 0xFFFF
    status = return_code_check(cpu, selector)
    if status:
        return status
    code = cpu.value
    if not is_canonical(target):
        return raise_fault(cpu, GP, 0)
    at = at + size * 2 + cpu.op[1]
    new_level = selector & 3
    if new_level != level:
        if stack_read(cpu, at, size, user):
            return FAULT
        new_rsp = cpu.value
        if stack_read(cpu, at + size, size, user):
            return FAULT
        stack_selector = cpu.value & 0xFFFF
        if return_stack_check(cpu, stack_selector, new_level):
            return FAULT
        stack = cpu.value
        if stack and descriptor_mark(cpu, stack_selector, stack):
            return FAULT
        if descriptor_mark(cpu, selector, code):
            return FAULT
        revoke_segments(cpu, new_level)
        stack_fill(cpu, stack_selector, stack, new_level)
        at = new_rsp + cpu.op[1]
    elif descriptor_mark(cpu, selector, code):
        return FAULT
    segment_fill(cpu, CS, selector, code)
    cpu.cpl = new_level
    cpu.gpr[RSP] = at
    cpu.rip = target
    mode_changed(cpu)
    return OK


@native
def fx_enter(cpu: Cpu) -> int:
    """ENTER: op[0] the operand size, op[1] bytes of locals, op[2] the nesting level (vol. 2)."""
    size = cpu.op[0]
    depth = cpu.op[2] & 31
    user = cpu.cpl == 3
    outer = cpu.gpr[RBP]
    stack = cpu.gpr[RSP] - size
    frame = stack
    if stack_write(cpu, stack, size, outer, user):
        return FAULT
    for _ in range(1, depth):
        outer = outer - size
        if stack_read(cpu, outer, size, user):
            return FAULT
        stack = stack - size
        if stack_write(cpu, stack, size, cpu.value, user):
            return FAULT
    if depth:
        stack = stack - size
        if stack_write(cpu, stack, size, frame, user):
            return FAULT
    cpu.gpr[RSP] = stack - (cpu.op[1] & 0xFFFF)
    operand_store(cpu, RBP, size, frame)
    cpu.rip = cpu.next_rip
    return OK
