"""Far transfers: IRET, far JMP, CALL and RET, in every mode.

What real and virtual-8086 mode do instead is in ``realmode``, gates of 16- and 32-bit segments are
in ``gates``, task switches in ``tasks``, SYSCALL and its like in ``syscalls``. Sources: Intel SDM
vol. 3, 5.8 (control transfers), 6.12.1 and 6.14 (IRET); vol. 2, the instructions' pages.
"""

from __future__ import annotations

from ringfence.cpu.exceptions import tss_stack
from ringfence.cpu.flags import get_rflags, is_canonical, raise_fault, set_rflags
from ringfence.cpu.gates import legacy_gate
from ringfence.cpu.ports import linear_read, linear_write, mode_changed
from ringfence.cpu.realmode import far_real, iret_real, iret_to_v86, return_far_real
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
    TYPE_CALL_GATE16,
    TYPE_TASK_GATE,
    TYPE_TSS,
    TYPE_TSS16,
    descriptor_dpl,
    descriptor_limit,
    descriptor_mark,
    descriptor_read,
    descriptor_read_high,
    operand_store,
    segment_fill,
    segment_null,
)
from ringfence.cpu.signals import unblock_nmi
from ringfence.cpu.stack import (
    in_64bit,
    is_protected,
    set_stack,
    stack_failed,
    stack_mask,
    stack_read,
    stack_write,
)
from ringfence.cpu.state import (
    ATTR_DPL_SHIFT,
    CS,
    DS,
    EFER_LMA,
    ES,
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
    RSP,
    SS,
    SS_FAULT,
    STATUS_FLAGS,
    Cpu,
)
from ringfence.cpu.tasks import FROM_CALL, FROM_JMP, task_return, task_switch
from ringfence.native.dialect import native, native_inline

CODE_LIKE = 0x1C
"""S, code and conforming among a segment's attributes."""
CODE_KIND = DESC_S | DESC_CODE
STACK_KIND = DESC_S | DESC_CODE | DESC_WRITABLE
IRET_FLAGS = STATUS_FLAGS | FLAG_TF | FLAG_DF | FLAG_NT
IRET_FLAGS_WIDE = FLAG_RF | FLAG_AC | FLAG_ID
LOW32 = 0xFFFFFFFF
LEGACY_SYSTEM = (
    (1 << TYPE_TSS16) | (1 << TYPE_CALL_GATE16) | (1 << TYPE_TASK_GATE) | (1 << TYPE_TSS)
    | (1 << TYPE_CALL_GATE)
)  # fmt: skip
"""System descriptors that far JMP and CALL go through outside long mode."""


@native_inline
def code_check(cpu: Cpu, selector: int, code: int) -> int:
    """Checks that all transfers end with: present, and not both 64- and 32-bit code."""
    if not code & DESC_P:
        return raise_fault(cpu, NP, selector & 0xFFFC)
    if cpu.efer & EFER_LMA and code & DESC_L and code & DESC_D:
        return raise_fault(cpu, GP, selector & 0xFFFC)
    return OK


@native_inline
def is_64bit_code(cpu: Cpu, code: int) -> int:
    """Whether a descriptor is one of 64-bit code."""
    return 1 if code & DESC_L and cpu.efer & EFER_LMA else 0


@native
def target_check(cpu: Cpu, code: int, target: int) -> int:
    """#GP(0) for a target that is not canonical, or beyond the code segment's limit."""
    if is_64bit_code(cpu, code):
        return OK if is_canonical(target) else raise_fault(cpu, GP, 0)
    if target & LOW32 > descriptor_limit(code):
        return raise_fault(cpu, GP, 0)
    return OK


@native_inline
def go_to_code(cpu: Cpu, selector: int, code: int, target: int, level: int) -> int:
    """Load CS after all checks."""
    segment_fill(cpu, CS, (selector & 0xFFFC) | level, code)
    cpu.cpl = level
    cpu.rip = target if is_64bit_code(cpu, code) else target & LOW32
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
    return code_check(cpu, selector, code)


@native
def return_stack_check(cpu: Cpu, selector: int, level: int, long: int) -> int:
    """Check a stack selector popped for CPL ``level``; descriptor in ``cpu.value``, 0 if null.

    ``long``: whether the transfer leads to 64-bit code, where a null selector may do.
    """
    error = selector & 0xFFFC
    if error == 0:
        cpu.value = 0
        return OK if level != 3 and long else raise_fault(cpu, GP, 0)
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
    """IRET: op[0] the operand size (SDM vol. 2, IRET)."""
    if not is_protected(cpu):
        return iret_real(cpu, cpu.op[0])
    if cpu.other_flags & FLAG_NT:
        if cpu.efer & EFER_LMA:
            return raise_fault(cpu, GP, 0)
        return task_return(cpu)
    return iret_protected(cpu, cpu.op[0])


@native
def iret_protected(cpu: Cpu, size: int) -> int:
    """IRET to the same or an outer level; 64-bit mode always pops SS:RSP."""
    level = cpu.cpl
    user = level == 3
    at = cpu.gpr[RSP]
    from_64bit = in_64bit(cpu)
    if stack_read(cpu, at, size, user):
        return FAULT
    target = cpu.value
    if stack_read(cpu, at + size, size, user):
        return FAULT
    code_selector = cpu.value & 0xFFFF
    if stack_read(cpu, at + size * 2, size, user):
        return FAULT
    flags = cpu.value
    if flags & FLAG_VM and level == 0 and size == 4 and not cpu.efer & EFER_LMA:
        return iret_to_v86(cpu, target, code_selector, flags)
    new_level = code_selector & 3
    pops_stack = from_64bit or new_level > level
    new_rsp = at + size * 3
    stack_selector = 0
    if pops_stack:
        if stack_read(cpu, at + size * 3, size, user):
            return FAULT
        new_rsp = cpu.value
        if stack_read(cpu, at + size * 4, size, user):
            return FAULT
        stack_selector = cpu.value & 0xFFFF
    if return_code_check(cpu, code_selector):
        return FAULT
    code = cpu.value
    stack = 0
    if pops_stack:
        if return_stack_check(cpu, stack_selector, new_level, is_64bit_code(cpu, code)):
            return FAULT
        stack = cpu.value
    if target_check(cpu, code, target):
        return FAULT
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
    go_to_code(cpu, code_selector, code, target, new_level)
    if pops_stack:
        stack_fill(cpu, stack_selector, stack, new_level)
    set_stack(cpu, new_rsp)
    unblock_nmi(cpu)
    set_rflags(cpu, (flags & mask) | (get_rflags(cpu) & ~mask & ~FLAG_VM))
    mode_changed(cpu)
    return OK


@native
def push_return(cpu: Cpu, stack: int, size: int, user: int) -> int:
    """Push CS and the return address below ``stack``, without moving RSP."""
    if stack_write(cpu, stack - size, size, cpu.seg_selector[CS], user):
        return FAULT
    return stack_write(cpu, stack - size * 2, size, cpu.next_rip, user)


@native
def push_wide(cpu: Cpu, address: int, value: int, user: int) -> int:
    """Write to the stack of 64-bit code, whatever mode the CPU is still in."""
    if linear_write(cpu, address, 8, value, user):
        return stack_failed(cpu)
    return OK


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
        if push_wide(cpu, stack - 8, cpu.seg_selector[SS], 0):
            return FAULT
        if push_wide(cpu, stack - 16, rsp, 0):
            return FAULT
        if push_wide(cpu, stack - 24, cpu.seg_selector[CS], 0):
            return FAULT
        if push_wide(cpu, stack - 32, cpu.next_rip, 0):
            return FAULT
        rsp = stack - 32
    elif call:
        if push_wide(cpu, rsp - 8, cpu.seg_selector[CS], level == 3):
            return FAULT
        if push_wide(cpu, rsp - 16, cpu.next_rip, level == 3):
            return FAULT
        rsp = rsp - 16
    if descriptor_mark(cpu, inner, code):
        return FAULT
    if new_level != level:
        segment_null(cpu, SS, new_level, new_level)
    go_to_code(cpu, inner, code, target, new_level)
    cpu.gpr[RSP] = rsp
    mode_changed(cpu)
    return OK


@native
def far_transfer(cpu: Cpu, call: int, size: int, selector: int, target: int) -> int:
    """Far JMP or CALL; ``size`` is the operand size."""
    level = cpu.cpl
    if not is_protected(cpu):
        return far_real(cpu, call, size, selector, target)
    error = selector & 0xFFFC
    if error == 0:
        return raise_fault(cpu, GP, 0)
    if descriptor_read(cpu, selector, GP, 0):
        return FAULT
    code = cpu.value
    kind = (code >> DESC_TYPE_SHIFT) & 0x1F
    if cpu.efer & EFER_LMA:
        if kind == TYPE_CALL_GATE:
            return far_gate(cpu, selector, code, call)
    elif kind < 16 and (LEGACY_SYSTEM >> kind) & 1:
        return far_system(cpu, selector, code, call)
    dpl = descriptor_dpl(code)
    if (code & CODE_KIND) != CODE_KIND or dpl > level:
        return raise_fault(cpu, GP, error)
    if not code & DESC_CONFORMING and (dpl != level or selector & 3 > level):
        return raise_fault(cpu, GP, error)
    if code_check(cpu, selector, code):
        return FAULT
    if target_check(cpu, code, target):
        return FAULT
    stack = cpu.gpr[RSP]
    if call and push_return(cpu, stack, size, level == 3):
        return FAULT
    if descriptor_mark(cpu, selector, code):
        return FAULT
    if call:
        set_stack(cpu, stack - size * 2)
    go_to_code(cpu, selector, code, target, level)
    mode_changed(cpu)
    return OK


@native
def far_system(cpu: Cpu, selector: int, descriptor: int, call: int) -> int:
    """Through a call gate, a task gate or a TSS (SDM vol. 3, 5.8.3 and 7.3)."""
    error = selector & 0xFFFC
    dpl = descriptor_dpl(descriptor)
    if dpl < cpu.cpl or dpl < selector & 3:
        return raise_fault(cpu, GP, error)
    kind = (descriptor >> DESC_TYPE_SHIFT) & 0x1F
    if not descriptor & DESC_P:
        return raise_fault(cpu, NP, error)
    if kind in (TYPE_CALL_GATE, TYPE_CALL_GATE16):
        return legacy_gate(cpu, descriptor, call)
    if kind == TYPE_TASK_GATE:
        selector = (descriptor >> 16) & 0xFFFF
    return task_switch(cpu, selector, FROM_CALL if call else FROM_JMP, cpu.next_rip)


@native
def far_pointer(cpu: Cpu, call: int) -> int:
    """Far JMP or CALL through the pointer at ea: offset of op[0] bytes, then a selector."""
    size = cpu.op[0]
    user = cpu.cpl == 3
    if linear_read(cpu, cpu.ea, size, user):
        return FAULT
    target = cpu.value
    if linear_read(cpu, cpu.ea + size, 2, user):
        return FAULT
    return far_transfer(cpu, call, size, cpu.value, target)


@native
def fx_jmp_far(cpu: Cpu) -> int:
    """JMP m16:16/32/64: op[0] the operand size, the pointer at ea (SDM vol. 2, JMP)."""
    return far_pointer(cpu, 0)


@native
def fx_call_far(cpu: Cpu) -> int:
    """CALL m16:16/32/64: op[0] the operand size, the pointer at ea (SDM vol. 2, CALL)."""
    return far_pointer(cpu, 1)


@native
def fx_jmp_far_direct(cpu: Cpu) -> int:
    """JMP ptr16:16/32: op[0] the operand size, op[1] the selector, op[2] the offset."""
    return far_transfer(cpu, 0, cpu.op[0], cpu.op[1], cpu.op[2] & LOW32)


@native
def fx_call_far_direct(cpu: Cpu) -> int:
    """CALL ptr16:16/32: op[0] the operand size, op[1] the selector, op[2] the offset."""
    return far_transfer(cpu, 1, cpu.op[0], cpu.op[1], cpu.op[2] & LOW32)


@native
def fx_ret_far(cpu: Cpu) -> int:
    """Far RET: op[0] the operand size, op[1] the bytes to release (SDM vol. 2, RET)."""
    size = cpu.op[0]
    level = cpu.cpl
    user = level == 3
    at = cpu.gpr[RSP]
    if not is_protected(cpu):
        return return_far_real(cpu, size, cpu.op[1])
    if stack_read(cpu, at, size, user):
        return FAULT
    target = cpu.value
    if stack_read(cpu, at + size, size, user):
        return FAULT
    selector = cpu.value & 0xFFFF
    if return_code_check(cpu, selector):
        return FAULT
    code = cpu.value
    if target_check(cpu, code, target):
        return FAULT
    at = at + size * 2 + cpu.op[1]
    new_level = selector & 3
    stack = 0
    stack_selector = 0
    if new_level != level:
        if stack_read(cpu, at, size, user):
            return FAULT
        new_rsp = cpu.value
        if stack_read(cpu, at + size, size, user):
            return FAULT
        stack_selector = cpu.value & 0xFFFF
        if return_stack_check(cpu, stack_selector, new_level, is_64bit_code(cpu, code)):
            return FAULT
        stack = cpu.value
        if stack and descriptor_mark(cpu, stack_selector, stack):
            return FAULT
        at = new_rsp + cpu.op[1]
    if descriptor_mark(cpu, selector, code):
        return FAULT
    go_to_code(cpu, selector, code, target, new_level)
    if new_level != level:
        revoke_segments(cpu, new_level)
        stack_fill(cpu, stack_selector, stack, new_level)
    set_stack(cpu, at)
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
    if stack_write(cpu, stack, size, outer, user):
        return FAULT
    mask = stack_mask(cpu)
    frame = stack & mask
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
    set_stack(cpu, stack - (cpu.op[1] & 0xFFFF))
    operand_store(cpu, RBP, size, frame)
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_leave(cpu: Cpu) -> int:
    """LEAVE outside 64-bit mode: op[0] the operand size (SDM vol. 2, LEAVE)."""
    size = cpu.op[0]
    if stack_read(cpu, cpu.gpr[RBP], size, cpu.cpl == 3):
        return FAULT
    set_stack(cpu, cpu.gpr[RBP] + size)
    operand_store(cpu, RBP, size, cpu.value)
    cpu.rip = cpu.next_rip
    return OK
