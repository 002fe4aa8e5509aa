"""Segment registers and descriptors, in every mode.

Sources: Intel SDM vol. 3, 3.4 (selectors, descriptors), 5.2-5.6 (limit, type and privilege
checks), 8.2.2 and 8.2.3 (LDT and TSS descriptors of 16 bytes); vol. 2, MOV, POP, LxS, LLDT, LTR,
LAR, LSL, VERR.
"""

from __future__ import annotations

from ringfence.cpu.flags import is_canonical, raise_fault
from ringfence.cpu.ports import linear_read, linear_write, mode_changed
from ringfence.cpu.stack import in_64bit, is_protected, push, set_stack, stack_read
from ringfence.cpu.state import (
    ATTR_DPL_SHIFT,
    CS,
    EFER_LMA,
    FAULT,
    FLAG_VM,
    FLAG_ZF,
    GP,
    GS,
    LDTR,
    NP,
    OK,
    RSP,
    SHADOW_MOV_SS,
    SS,
    SS_FAULT,
    TR,
    UD,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

# Bits of a descriptor's first eight bytes.
DESC_ACCESSED = 1 << 40
DESC_WRITABLE = 1 << 41
"""Of data segments: writable. Of code segments: readable."""
DESC_CONFORMING = 1 << 42
DESC_CODE = 1 << 43
DESC_S = 1 << 44
DESC_P = 1 << 47
DESC_L = 1 << 53
DESC_D = 1 << 54
DESC_G = 1 << 55
DESC_TYPE_SHIFT = 40
DESC_DPL_SHIFT = 45

TYPE_LDT, TYPE_TSS, TYPE_TSS_BUSY, TYPE_CALL_GATE = 2, 9, 11, 12
TYPE_TSS16, TYPE_TSS16_BUSY, TYPE_CALL_GATE16, TYPE_TASK_GATE = 1, 3, 4, 5
TSS_BUSY = 2
"""What a busy TSS's type has more."""
LSL_TYPES = 0xFFFF0000 | (1 << TYPE_LDT) | (1 << TYPE_TSS) | (1 << TYPE_TSS_BUSY)
"""Types, with S as their fifth bit, that LSL knows in long mode."""
LAR_TYPES = LSL_TYPES | (1 << TYPE_CALL_GATE)
LSL_TYPES_LEGACY = LSL_TYPES | (1 << TYPE_TSS16) | (1 << TYPE_TSS16_BUSY)
LAR_TYPES_LEGACY = LAR_TYPES | LSL_TYPES_LEGACY | (1 << TYPE_CALL_GATE16) | (1 << TYPE_TASK_GATE)
ATTR_V86 = 0xF3
"""Present, DPL 3, data, writable, accessed: what segment registers have in virtual-8086 mode."""
NOWHERE = (1 << 64) - 1


@native_inline
def descriptor_address(cpu: Cpu, selector: int, size: int) -> int:
    """Linear address of a selector's descriptor, NOWHERE if the table's limit excludes it."""
    at = selector & 0xFFF8
    if selector & 4:
        if (cpu.seg_selector[LDTR] & 0xFFFC) == 0 or at + size - 1 > cpu.seg_limit[LDTR]:
            return NOWHERE
        base: int = cpu.seg_base[LDTR]
        return base + at
    if at + size - 1 > cpu.gdtr_limit:
        return NOWHERE
    return cpu.gdtr_base + at


@native
def descriptor_read(cpu: Cpu, selector: int, vector: int, external_event: int) -> int:
    """Read a descriptor's first eight bytes into ``cpu.value``.

    A selector outside its table raises ``vector`` with the selector as its error code, which has
    the EXT bit if ``external_event`` is 1 (SDM vol. 3, 6.13).
    """
    address = descriptor_address(cpu, selector, 8)
    if address == NOWHERE:
        return raise_fault(cpu, vector, (selector & 0xFFFC) | external_event)
    return linear_read(cpu, address, 8, 0)


@native
def descriptor_read_high(cpu: Cpu, selector: int) -> int:
    """Read the second half of a 16-byte system descriptor into ``cpu.value``; #GP(selector)."""
    address = descriptor_address(cpu, selector, 16)
    if address == NOWHERE:
        return raise_fault(cpu, GP, selector & 0xFFFC)
    return linear_read(cpu, address + 8, 8, 0)


@native_inline
def descriptor_base(descriptor: int) -> int:
    """Base address, 32 bits of it, of a descriptor."""
    return ((descriptor >> 16) & 0xFFFFFF) | ((descriptor >> 32) & 0xFF000000)


@native_inline
def descriptor_limit(descriptor: int) -> int:
    """Limit in bytes of a descriptor."""
    limit = (descriptor & 0xFFFF) | ((descriptor >> 32) & 0xF0000)
    if descriptor & DESC_G:
        return (limit << 12) | 0xFFF
    return limit


@native_inline
def descriptor_attr(descriptor: int) -> int:
    """Attributes of a descriptor, as ATTR_* lays them out."""
    return ((descriptor >> 40) & 0xFF) | ((descriptor >> 44) & 0xF00)


@native_inline
def descriptor_dpl(descriptor: int) -> int:
    """Privilege level of a descriptor."""
    return (descriptor >> DESC_DPL_SHIFT) & 3


@native
def descriptor_mark(cpu: Cpu, selector: int, descriptor: int) -> int:
    """Set the accessed bit of a code or data descriptor in its table (SDM vol. 3, 3.4.5.1)."""
    if descriptor & DESC_ACCESSED:
        return OK
    address = descriptor_address(cpu, selector, 8)
    return linear_write(cpu, address + 5, 1, ((descriptor | DESC_ACCESSED) >> 40) & 0xFF, 0)


@native_inline
def segment_fill(cpu: Cpu, sreg: int, selector: int, descriptor: int) -> int:
    """Load a segment register, hidden parts too, from a checked descriptor."""
    accessed = descriptor | DESC_ACCESSED
    cpu.seg_selector[sreg] = selector
    cpu.seg_base[sreg] = descriptor_base(accessed)
    cpu.seg_limit[sreg] = descriptor_limit(accessed)
    cpu.seg_attr[sreg] = descriptor_attr(accessed)
    return OK


@native_inline
def segment_null(cpu: Cpu, sreg: int, selector: int, level: int) -> int:
    """Load a null selector; ``level`` is kept as DPL, which matters for SS only."""
    cpu.seg_selector[sreg] = selector
    cpu.seg_base[sreg] = 0
    cpu.seg_limit[sreg] = 0
    cpu.seg_attr[sreg] = level << ATTR_DPL_SHIFT
    return OK


@native_inline
def operand_store(cpu: Cpu, register: int, size: int, value: int) -> int:
    """Write a general register as an instruction of that operand size does (vol. 1, 3.4.1.1)."""
    if size == 8:
        cpu.gpr[register] = value
    elif size == 4:
        cpu.gpr[register] = value & 0xFFFFFFFF
    else:
        cpu.gpr[register] = (cpu.gpr[register] & ~0xFFFF) | (value & 0xFFFF)
    return OK


@native_inline
def segment_real(cpu: Cpu, sreg: int, selector: int) -> int:
    """Load a segment register in real or virtual-8086 mode (SDM vol. 3, 20.1.1 and 20.2.1).

    Real mode keeps limit and attributes as they are, from RESET or from protected mode.
    """
    cpu.seg_selector[sreg] = selector
    cpu.seg_base[sreg] = (selector & 0xFFFF) << 4
    if cpu.other_flags & FLAG_VM:
        cpu.seg_limit[sreg] = 0xFFFF
        cpu.seg_attr[sreg] = ATTR_V86
    return OK


@native
def load_segment(cpu: Cpu, sreg: int, selector: int) -> int:
    """Load ES, SS, DS, FS or GS (SDM vol. 2, MOV)."""
    selector = selector & 0xFFFF
    if not is_protected(cpu):
        segment_real(cpu, sreg, selector)
        return mode_changed(cpu)
    if load_checked(cpu, sreg, selector, GP):
        return FAULT
    if not in_64bit(cpu):
        mode_changed(cpu)
    return OK


@native
def load_checked(cpu: Cpu, sreg: int, selector: int, vector: int) -> int:
    """The same where selectors select descriptors; ``vector`` is #GP, or #TS for a new task."""
    level = cpu.cpl
    rpl = selector & 3
    error = selector & 0xFFFC
    if error == 0:
        if sreg == SS and (level == 3 or rpl != level or not in_64bit(cpu)):
            return raise_fault(cpu, vector, 0)
        return segment_null(cpu, sreg, selector, level if sreg == SS else 0)
    if descriptor_read(cpu, selector, vector, 0):
        return FAULT
    descriptor = cpu.value
    dpl = descriptor_dpl(descriptor)
    if not descriptor & DESC_S:
        return raise_fault(cpu, vector, error)
    if sreg == SS:
        if descriptor & DESC_CODE or not descriptor & DESC_WRITABLE:
            return raise_fault(cpu, vector, error)
        if rpl != level or dpl != level:
            return raise_fault(cpu, vector, error)
        if not descriptor & DESC_P:
            return raise_fault(cpu, SS_FAULT, error)
    else:
        if descriptor & DESC_CODE and not descriptor & DESC_WRITABLE:
            return raise_fault(cpu, vector, error)
        conforming = descriptor & DESC_CODE and descriptor & DESC_CONFORMING
        if not conforming and (rpl > dpl or level > dpl):
            return raise_fault(cpu, vector, error)
        if not descriptor & DESC_P:
            return raise_fault(cpu, NP, error)
    if descriptor_mark(cpu, selector, descriptor):
        return FAULT
    return segment_fill(cpu, sreg, selector, descriptor)


@native
def fx_mov_to_sreg(cpu: Cpu) -> int:
    """MOV Sreg, r/m16: op[0] the segment register, op[1] the selector (SDM vol. 2, MOV)."""
    sreg = cpu.op[0]
    if sreg == CS or sreg > GS:
        return raise_fault(cpu, UD, 0)
    if load_segment(cpu, sreg, cpu.op[1]):
        return FAULT
    if sreg == SS:
        cpu.interrupt_shadow = SHADOW_MOV_SS
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_pop_sreg(cpu: Cpu) -> int:
    """POP Sreg: op[0] the segment register, op[1] the operand size (SDM vol. 2, POP)."""
    sreg = cpu.op[0]
    top = cpu.gpr[RSP] + cpu.op[1]
    if stack_read(cpu, cpu.gpr[RSP], cpu.op[1], cpu.cpl == 3):
        return FAULT
    if sreg == SS:
        # The new SS's width is not the one that the stack pointer moves by.
        old = cpu.gpr[RSP]
        set_stack(cpu, top)
        if load_segment(cpu, SS, cpu.value):
            cpu.gpr[RSP] = old
            return FAULT
        cpu.interrupt_shadow = 1
    elif load_segment(cpu, sreg, cpu.value):
        return FAULT
    else:
        set_stack(cpu, top)
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_push_sreg(cpu: Cpu) -> int:
    """PUSH Sreg: op[0] the segment register, op[1] the operand size (SDM vol. 2, PUSH)."""
    if push(cpu, cpu.op[1], cpu.seg_selector[cpu.op[0]]):
        return FAULT
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_load_far_pointer(cpu: Cpu) -> int:
    """LDS … LGS: op[0] the segment register, op[1] the destination, op[2] its size; memory at ea.

    The offset comes first, then the 16-bit selector (SDM vol. 2, LDS/LES/LFS/LGS/LSS).
    """
    size = cpu.op[2]
    user = cpu.cpl == 3
    if linear_read(cpu, cpu.ea, size, user):
        return FAULT
    offset = cpu.value
    if linear_read(cpu, cpu.ea + size, 2, user):
        return FAULT
    if load_segment(cpu, cpu.op[0], cpu.value):
        return FAULT
    operand_store(cpu, cpu.op[1], size, offset)
    cpu.rip = cpu.next_rip
    return OK


@native
def system_segment_load(cpu: Cpu, sreg: int, selector: int) -> int:
    """Load LDTR or TR; descriptors have 16 bytes in long mode (SDM vol. 3, 8.2.2 and 8.2.3)."""
    error = selector & 0xFFFC
    if selector & 4:
        return raise_fault(cpu, GP, error)
    if descriptor_read(cpu, selector, GP, 0):
        return FAULT
    descriptor = cpu.value
    long = cpu.efer & EFER_LMA
    kind = (descriptor >> DESC_TYPE_SHIFT) & 0x1F
    if sreg == LDTR:
        if kind != TYPE_LDT:
            return raise_fault(cpu, GP, error)
    elif kind != TYPE_TSS and (kind != TYPE_TSS16 or long):
        return raise_fault(cpu, GP, error)
    if not descriptor & DESC_P:
        return raise_fault(cpu, NP, error)
    base = descriptor_base(descriptor)
    if long:
        if descriptor_read_high(cpu, selector):
            return FAULT
        high = cpu.value
        base = base | (high << 32)
        if (high >> 40) & 0x1F or not is_canonical(base):
            return raise_fault(cpu, GP, error)
    if sreg == TR:
        descriptor = descriptor | (TSS_BUSY << DESC_TYPE_SHIFT)
        at = cpu.gdtr_base + error + 5
        if linear_write(cpu, at, 1, (descriptor >> DESC_TYPE_SHIFT) & 0xFF, 0):
            return FAULT
    cpu.seg_selector[sreg] = selector
    cpu.seg_base[sreg] = base
    cpu.seg_limit[sreg] = descriptor_limit(descriptor)
    cpu.seg_attr[sreg] = descriptor_attr(descriptor)
    return OK


@native
def fx_lldt(cpu: Cpu) -> int:
    """LLDT: op[0] the selector (SDM vol. 2, LLDT)."""
    selector = cpu.op[0] & 0xFFFF
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    if cpu.cpl:
        return raise_fault(cpu, GP, 0)
    if (selector & 0xFFFC) == 0:
        segment_null(cpu, LDTR, selector, 0)
    elif system_segment_load(cpu, LDTR, selector):
        return FAULT
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_ltr(cpu: Cpu) -> int:
    """LTR: op[0] the selector; marks the TSS busy (SDM vol. 2, LTR)."""
    selector = cpu.op[0] & 0xFFFF
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    if cpu.cpl or (selector & 0xFFFC) == 0:
        return raise_fault(cpu, GP, 0)
    if system_segment_load(cpu, TR, selector):
        return FAULT
    cpu.rip = cpu.next_rip
    return OK


@native
def descriptor_visible(cpu: Cpu, selector: int) -> int:
    """Read a descriptor for LAR, LSL, VERR, VERW into ``cpu.value``; 0 there if it is not visible.

    A selector that is null, outside its table or too privileged is no fault here. Returns FAULT
    for page faults, and #UD where selectors select no descriptors (SDM vol. 2, LAR).
    """
    cpu.value = 0
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    if (selector & 0xFFFC) == 0:
        return OK
    address = descriptor_address(cpu, selector, 8)
    if address == NOWHERE:
        return OK
    if linear_read(cpu, address, 8, 0):
        return FAULT
    descriptor = cpu.value
    conforming = DESC_S | DESC_CODE | DESC_CONFORMING
    if (descriptor & conforming) != conforming:
        dpl = descriptor_dpl(descriptor)
        if cpu.cpl > dpl or (selector & 3) > dpl:
            cpu.value = 0
    return OK


@native_inline
def zero_flag_set(cpu: Cpu, zero: int) -> int:
    """Set or clear ZF and go on with the next instruction."""
    cpu.status = cpu.status | FLAG_ZF if zero else cpu.status & ~FLAG_ZF
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_lar(cpu: Cpu) -> int:
    """LAR: op[0] destination, op[1] operand size, op[2] selector; ZF tells success.

    Bits 16-19, of the limit, which Intel leaves undefined, are kept as processors do (APM vol. 3).
    """
    if descriptor_visible(cpu, cpu.op[2] & 0xFFFF):
        return FAULT
    descriptor = cpu.value
    types = LAR_TYPES if cpu.efer & EFER_LMA else LAR_TYPES_LEGACY
    if not (types >> ((descriptor >> DESC_TYPE_SHIFT) & 0x1F)) & 1:
        return zero_flag_set(cpu, 0)
    operand_store(cpu, cpu.op[0], cpu.op[1], (descriptor >> 32) & 0x00FFFF00)
    return zero_flag_set(cpu, 1)


@native
def fx_lsl(cpu: Cpu) -> int:
    """LSL: op[0] destination, op[1] operand size, op[2] selector; ZF tells success."""
    if descriptor_visible(cpu, cpu.op[2] & 0xFFFF):
        return FAULT
    descriptor = cpu.value
    types = LSL_TYPES if cpu.efer & EFER_LMA else LSL_TYPES_LEGACY
    if not (types >> ((descriptor >> DESC_TYPE_SHIFT) & 0x1F)) & 1:
        return zero_flag_set(cpu, 0)
    operand_store(cpu, cpu.op[0], cpu.op[1], descriptor_limit(descriptor))
    return zero_flag_set(cpu, 1)


@native
def fx_verr(cpu: Cpu) -> int:
    """VERR: op[0] the selector; ZF tells whether the segment can be read."""
    if descriptor_visible(cpu, cpu.op[0] & 0xFFFF):
        return FAULT
    data_or_readable = (cpu.value & DESC_CODE) == 0 or cpu.value & DESC_WRITABLE
    return zero_flag_set(cpu, cpu.value & DESC_S and data_or_readable)


@native
def fx_verw(cpu: Cpu) -> int:
    """VERW: op[0] the selector; ZF tells whether the segment can be written."""
    if descriptor_visible(cpu, cpu.op[0] & 0xFFFF):
        return FAULT
    kind = cpu.value & (DESC_S | DESC_CODE | DESC_WRITABLE)
    return zero_flag_set(cpu, kind == (DESC_S | DESC_WRITABLE))


@native
def fx_arpl(cpu: Cpu) -> int:
    """ARPL: op[0] general register plus 1, or 0 for memory at ea; op[1] the other selector.

    Raises the first selector's RPL to the second's; ZF tells whether it had to (SDM vol. 2, ARPL).
    """
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    user = cpu.cpl == 3
    target = cpu.op[0]
    rpl = cpu.gpr[cpu.op[1]] & 3
    if target:
        cpu.value = cpu.gpr[target - 1]
    elif linear_read(cpu, cpu.ea, 2, user):
        return FAULT
    selector = cpu.value & 0xFFFF
    if (selector & 3) >= rpl:
        return zero_flag_set(cpu, 0)
    selector = (selector & 0xFFFC) | rpl
    if target:
        operand_store(cpu, target - 1, 2, selector)
    elif linear_write(cpu, cpu.ea, 2, selector, user):
        return FAULT
    return zero_flag_set(cpu, 1)
