"""Hardware task switches: the whole state of a task is saved in one TSS and loaded from another.

Segment registers of the new task are loaded after the switch, so what is wrong with them is an
exception *in* the new task. Sources: Intel SDM vol. 3, 7.2 (TSS), 7.3 (task switching), 7.6 (the
16-bit TSS); AMD APM vol. 2, 12.4.
"""

from __future__ import annotations

from ringfence.cpu.flags import get_rflags, raise_fault, set_rflags
from ringfence.cpu.ports import linear_read, linear_write, mode_changed, tlb_flush_nonglobal
from ringfence.cpu.segments import (
    ATTR_V86,
    DESC_CODE,
    DESC_CONFORMING,
    DESC_P,
    DESC_S,
    DESC_TYPE_SHIFT,
    TSS_BUSY,
    TYPE_LDT,
    TYPE_TSS,
    TYPE_TSS16,
    descriptor_attr,
    descriptor_base,
    descriptor_dpl,
    descriptor_limit,
    descriptor_mark,
    descriptor_read,
    load_checked,
    segment_fill,
    segment_null,
)
from ringfence.cpu.state import (
    ATTR_TYPE,
    CR0_PG,
    CR0_TS,
    CS,
    DS,
    ES,
    FAULT,
    FLAG_NT,
    FLAG_VM,
    FS,
    GP,
    GS,
    LDTR,
    NP,
    OK,
    SS,
    TR,
    TS,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

FROM_JMP, FROM_CALL, FROM_GATE, FROM_IRET = range(4)
"""How a task switch came about: by JMP, by CALL, by an interrupt's task gate, by IRET with NT."""
LIMIT, LIMIT16 = 103, 43
"""Least limits of a TSS."""
CR3_AT, EIP_AT, EFLAGS_AT, GPR_AT, SEG_AT, LDT_AT = 28, 32, 36, 40, 72, 96
IP16_AT, FLAGS16_AT, GPR16_AT, SEG16_AT, LDT16_AT = 14, 16, 18, 34, 42
LOW32 = 0xFFFFFFFF


@native
def tss_put(cpu: Cpu, at: int, size: int, value: int) -> int:
    """Write to the running task's TSS."""
    return linear_write(cpu, cpu.seg_base[TR] + at, size, value, 0)


@native
def task_save(cpu: Cpu, flags: int, return_rip: int) -> int:
    """Save the state of the running task in its TSS."""
    failed = 0
    if (cpu.seg_attr[TR] & ATTR_TYPE) == TYPE_TSS16 | TSS_BUSY:
        failed = tss_put(cpu, IP16_AT, 2, return_rip) | tss_put(cpu, FLAGS16_AT, 2, flags)
        for n in range(8):
            failed = failed | tss_put(cpu, GPR16_AT + n * 2, 2, cpu.gpr[n])
        for n in range(4):
            failed = failed | tss_put(cpu, SEG16_AT + n * 2, 2, cpu.seg_selector[n])
        return failed
    failed = tss_put(cpu, EIP_AT, 4, return_rip) | tss_put(cpu, EFLAGS_AT, 4, flags)
    for n in range(8):
        failed = failed | tss_put(cpu, GPR_AT + n * 4, 4, cpu.gpr[n])
    for n in range(6):
        failed = failed | tss_put(cpu, SEG_AT + n * 4, 2, cpu.seg_selector[n])
    return failed


@native
def task_busy(cpu: Cpu, selector: int, busy: int) -> int:
    """Mark a TSS in the GDT as busy or available."""
    at = cpu.gdtr_base + (selector & 0xFFF8) + 5
    if linear_read(cpu, at, 1, 0):
        return FAULT
    value = cpu.value | TSS_BUSY if busy else cpu.value & ~TSS_BUSY
    return linear_write(cpu, at, 1, value, 0)


@native_inline
def tss_get(cpu: Cpu, base: int, at: int, size: int) -> int:
    """Read from the new TSS, which is known to be there."""
    linear_read(cpu, base + at, size, 0)
    return cpu.value


@native
def task_switch(cpu: Cpu, selector: int, source: int, return_rip: int) -> int:
    """Switch to the task of a TSS selector (SDM vol. 3, 7.3)."""
    vector = TS if source == FROM_IRET else GP
    error = selector & 0xFFFC
    if selector & 4 or error == 0:
        return raise_fault(cpu, vector, error)
    if descriptor_read(cpu, selector, vector, 0):
        return FAULT
    descriptor = cpu.value
    kind = (descriptor >> DESC_TYPE_SHIFT) & 0x1F
    wanted = TSS_BUSY if source == FROM_IRET else 0
    narrow = kind & ~TSS_BUSY == TYPE_TSS16
    if (kind & ~TSS_BUSY != TYPE_TSS and not narrow) or kind & TSS_BUSY != wanted:
        return raise_fault(cpu, vector, error)
    if not descriptor & DESC_P:
        return raise_fault(cpu, NP, error)
    limit = LIMIT16 if narrow else LIMIT
    if descriptor_limit(descriptor) < limit:
        return raise_fault(cpu, TS, error)
    base = descriptor_base(descriptor)
    # Both ends of the new TSS must be there before anything changes.
    if linear_read(cpu, base, 1, 0) or linear_read(cpu, base + limit, 1, 0):
        return FAULT

    flags = get_rflags(cpu)
    old = cpu.seg_selector[TR]
    if (source in (FROM_JMP, FROM_IRET)) and task_busy(cpu, old, 0):
        return FAULT
    if source == FROM_IRET:
        flags = flags & ~FLAG_NT
    if task_save(cpu, flags, return_rip):
        return FAULT
    if source != FROM_IRET and task_busy(cpu, selector, 1):
        return FAULT
    if (source in (FROM_CALL, FROM_GATE)) and linear_write(cpu, base, 2, old, 0):
        return FAULT
    cpu.seg_selector[TR] = selector
    cpu.seg_base[TR] = base
    cpu.seg_limit[TR] = descriptor_limit(descriptor)
    cpu.seg_attr[TR] = descriptor_attr(descriptor) | TSS_BUSY
    cpu.cr0 = cpu.cr0 | CR0_TS
    return task_load(cpu, base, narrow, source in (FROM_CALL, FROM_GATE))


@native
def task_load(cpu: Cpu, base: int, narrow: int, nested: int) -> int:
    """Load the state of the task whose TSS is at ``base``."""
    size = 2 if narrow else 4
    gpr_at = GPR16_AT if narrow else GPR_AT
    seg_at = SEG16_AT if narrow else SEG_AT
    step = 2 if narrow else 4
    flags = tss_get(cpu, base, FLAGS16_AT if narrow else EFLAGS_AT, size)
    rip = tss_get(cpu, base, IP16_AT if narrow else EIP_AT, size)
    ldt = tss_get(cpu, base, LDT16_AT if narrow else LDT_AT, 2)
    root = cpu.cr3
    if not narrow and cpu.cr0 & CR0_PG:
        root = tss_get(cpu, base, CR3_AT, 4)
    for n in range(8):
        cpu.gpr[n] = tss_get(cpu, base, gpr_at + n * step, size)
    for n in range(6):
        cpu.seg_selector[n] = 0
        if n < 4 or not narrow:
            cpu.seg_selector[n] = tss_get(cpu, base, seg_at + n * step, 2)
    if root != cpu.cr3:
        cpu.cr3 = root
        tlb_flush_nonglobal(cpu)
    if nested:
        flags = flags | FLAG_NT
    cpu.rip = rip
    set_rflags(cpu, flags)
    cpu.interrupt_shadow = 0
    # Until its segments are checked the task has none.
    for n in range(6):
        cpu.seg_base[n] = 0
        cpu.seg_limit[n] = 0
        cpu.seg_attr[n] = 0
    failed = task_segments(cpu, ldt)
    mode_changed(cpu)
    return failed


@native
def task_segments(cpu: Cpu, ldt: int) -> int:
    """Load LDTR and the segment registers of a new task from their selectors; else #TS and co."""
    segment_null(cpu, LDTR, ldt, 0)
    if ldt & 0xFFFC:
        if ldt & 4 or descriptor_read(cpu, ldt, TS, 0):
            return raise_fault(cpu, TS, ldt & 0xFFFC)
        if (cpu.value >> DESC_TYPE_SHIFT) & 0x1F != TYPE_LDT or not cpu.value & DESC_P:
            return raise_fault(cpu, TS, ldt & 0xFFFC)
        segment_fill(cpu, LDTR, ldt, cpu.value)
        cpu.seg_attr[LDTR] = descriptor_attr(cpu.value)
    if cpu.other_flags & FLAG_VM:
        cpu.cpl = 3
        for n in range(6):
            cpu.seg_base[n] = cpu.seg_selector[n] << 4
            cpu.seg_limit[n] = 0xFFFF
            cpu.seg_attr[n] = ATTR_V86
        return OK
    level = cpu.seg_selector[CS] & 3
    cpu.cpl = level
    if task_code(cpu, cpu.seg_selector[CS], level):
        return FAULT
    if task_segment(cpu, SS) or task_segment(cpu, ES) or task_segment(cpu, DS):
        return FAULT
    if task_segment(cpu, FS) or task_segment(cpu, GS):
        return FAULT
    if cpu.rip > cpu.seg_limit[CS]:
        return raise_fault(cpu, GP, 0)
    return OK


@native_inline
def task_segment(cpu: Cpu, sreg: int) -> int:
    """SS or a data segment register of a new task."""
    return load_checked(cpu, sreg, cpu.seg_selector[sreg], TS)


@native
def task_code(cpu: Cpu, selector: int, level: int) -> int:
    """CS of a new task."""
    error = selector & 0xFFFC
    if error == 0:
        return raise_fault(cpu, TS, 0)
    if descriptor_read(cpu, selector, TS, 0):
        return FAULT
    code = cpu.value
    dpl = descriptor_dpl(code)
    if (code & (DESC_S | DESC_CODE)) != DESC_S | DESC_CODE:
        return raise_fault(cpu, TS, error)
    if dpl > level or (dpl != level and not code & DESC_CONFORMING):
        return raise_fault(cpu, TS, error)
    if not code & DESC_P:
        return raise_fault(cpu, NP, error)
    if descriptor_mark(cpu, selector, code):
        return FAULT
    return segment_fill(cpu, CS, selector, code)


@native
def task_return(cpu: Cpu) -> int:
    """IRET with NT set: back to the task that the TSS's link names (SDM vol. 3, 7.4)."""
    if linear_read(cpu, cpu.seg_base[TR], 2, 0):
        return FAULT
    return task_switch(cpu, cpu.value & 0xFFFF, FROM_IRET, cpu.next_rip)
