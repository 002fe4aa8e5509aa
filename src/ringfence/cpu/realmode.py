"""Real and virtual-8086 mode: transfers and interrupts by selectors that are paragraph numbers.

Both compute a segment's base from its selector. Virtual-8086 mode runs at CPL 3 under a protected
kernel, which gets its interrupts, and with IOPL below 3 its PUSHF, POPF, INT n and IRET, too.
Virtual-mode extensions (CR4.VME) are not offered. Sources: Intel SDM vol. 3, 20.1 (real mode),
20.2 and 20.3 (virtual-8086 mode); vol. 2, INT n, IRET, CALL, JMP, RET.
"""

from __future__ import annotations

from ringfence.cpu.flags import get_rflags, raise_fault, set_rflags
from ringfence.cpu.ports import linear_read, mode_changed
from ringfence.cpu.segments import ATTR_V86, segment_real
from ringfence.cpu.signals import unblock_nmi
from ringfence.cpu.stack import set_stack, stack_read, stack_write
from ringfence.cpu.state import (
    CS,
    DS,
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
    OK,
    RSP,
    SS,
    STATUS_FLAGS,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

LOW32 = 0xFFFFFFFF
VECTOR_BYTES = 4
"""Of an entry of the interrupt vector table: offset, then segment."""
FLAGS_16 = STATUS_FLAGS | FLAG_TF | FLAG_DF | FLAG_NT | FLAG_IF
FLAGS_32 = FLAG_RF | FLAG_AC | FLAG_ID


@native_inline
def iopl_refuses(cpu: Cpu) -> int:
    """Whether virtual-8086 mode leaves the IOPL-sensitive instructions to the kernel."""
    return 1 if cpu.other_flags & FLAG_VM and (cpu.other_flags & FLAG_IOPL) != FLAG_IOPL else 0


@native
def enter_real(cpu: Cpu, vector: int, return_rip: int) -> int:
    """Take an interrupt or exception through the interrupt vector table."""
    at = vector * VECTOR_BYTES
    if at + VECTOR_BYTES - 1 > cpu.idtr_limit:
        return raise_fault(cpu, GP, 0)
    if linear_read(cpu, cpu.idtr_base + at, 4, 0):
        return FAULT
    target = cpu.value
    stack = cpu.gpr[RSP]
    flags = get_rflags(cpu)
    if stack_write(cpu, stack - 2, 2, flags & 0xFFFF, 0):
        return FAULT
    if stack_write(cpu, stack - 4, 2, cpu.seg_selector[CS], 0):
        return FAULT
    if stack_write(cpu, stack - 6, 2, return_rip & 0xFFFF, 0):
        return FAULT
    set_stack(cpu, stack - 6)
    segment_real(cpu, CS, target >> 16)
    cpu.rip = target & 0xFFFF
    cpu.flag_if = 0
    cpu.other_flags = cpu.other_flags & ~(FLAG_TF | FLAG_AC | FLAG_RF)
    cpu.interrupt_shadow = 0
    return mode_changed(cpu)


@native
def target_real(cpu: Cpu, target: int) -> int:
    """#GP(0) for an offset beyond CS's limit."""
    return raise_fault(cpu, GP, 0) if target > cpu.seg_limit[CS] else OK


@native
def iret_real(cpu: Cpu, size: int) -> int:
    """IRET in real or virtual-8086 mode."""
    user = cpu.cpl == 3
    at = cpu.gpr[RSP]
    if iopl_refuses(cpu):
        return raise_fault(cpu, GP, 0)
    if stack_read(cpu, at, size, user):
        return FAULT
    target = cpu.value
    if stack_read(cpu, at + size, size, user):
        return FAULT
    selector = cpu.value & 0xFFFF
    if stack_read(cpu, at + size * 2, size, user):
        return FAULT
    flags = cpu.value
    if target_real(cpu, target):
        return FAULT
    mask = FLAGS_16 if size == 2 else FLAGS_16 | FLAGS_32
    if not user:
        mask = mask | FLAG_IOPL
    set_stack(cpu, at + size * 3)
    segment_real(cpu, CS, selector)
    cpu.rip = target
    unblock_nmi(cpu)
    set_rflags(cpu, (flags & mask) | (get_rflags(cpu) & ~mask))
    return mode_changed(cpu)


@native
def far_real(cpu: Cpu, call: int, size: int, selector: int, target: int) -> int:
    """Far JMP or CALL in real or virtual-8086 mode."""
    user = cpu.cpl == 3
    stack = cpu.gpr[RSP]
    if target_real(cpu, target):
        return FAULT
    if call:
        if stack_write(cpu, stack - size, size, cpu.seg_selector[CS], user):
            return FAULT
        if stack_write(cpu, stack - size * 2, size, cpu.next_rip, user):
            return FAULT
        set_stack(cpu, stack - size * 2)
    segment_real(cpu, CS, selector & 0xFFFF)
    cpu.rip = target
    return mode_changed(cpu)


@native
def return_far_real(cpu: Cpu, size: int, release: int) -> int:
    """Far RET in real or virtual-8086 mode, releasing bytes of arguments."""
    user = cpu.cpl == 3
    at = cpu.gpr[RSP]
    if stack_read(cpu, at, size, user):
        return FAULT
    target = cpu.value
    if stack_read(cpu, at + size, size, user):
        return FAULT
    if target_real(cpu, target):
        return FAULT
    segment_real(cpu, CS, cpu.value & 0xFFFF)
    set_stack(cpu, at + size * 2 + release)
    cpu.rip = target
    return mode_changed(cpu)


@native_inline
def segment_v86(cpu: Cpu, sreg: int, selector: int) -> int:
    """Load a segment register on the way into virtual-8086 mode."""
    cpu.seg_selector[sreg] = selector
    cpu.seg_base[sreg] = (selector & 0xFFFF) << 4
    cpu.seg_limit[sreg] = 0xFFFF
    cpu.seg_attr[sreg] = ATTR_V86
    return OK


@native
def iret_to_v86(cpu: Cpu, target: int, selector: int, flags: int) -> int:
    """IRETD at CPL 0 to a frame with VM set (SDM vol. 3, 20.2.5): CS:EIP and EFLAGS are known."""
    at = cpu.gpr[RSP]
    # ESP, SS, ES, DS, FS, GS; checked first, as a fault must leave everything as it was.
    for n in range(3, 9):
        if stack_read(cpu, at + n * 4, 4, 0):
            return FAULT
    if target & LOW32 > 0xFFFF:
        return raise_fault(cpu, GP, 0)
    stack_read(cpu, at + 12, 4, 0)
    stack = cpu.value
    stack_read(cpu, at + 20, 4, 0)
    extra = cpu.value
    stack_read(cpu, at + 24, 4, 0)
    data = cpu.value
    stack_read(cpu, at + 28, 4, 0)
    first = cpu.value
    stack_read(cpu, at + 32, 4, 0)
    second = cpu.value
    stack_read(cpu, at + 16, 4, 0)
    segment_v86(cpu, SS, cpu.value)
    segment_v86(cpu, ES, extra)
    segment_v86(cpu, DS, data)
    segment_v86(cpu, FS, first)
    segment_v86(cpu, GS, second)
    segment_v86(cpu, CS, selector)
    cpu.cpl = 3
    cpu.rip = target
    cpu.gpr[RSP] = stack
    unblock_nmi(cpu)
    set_rflags(cpu, flags)
    return mode_changed(cpu)
