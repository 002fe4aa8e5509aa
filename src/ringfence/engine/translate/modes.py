"""Which mode the CPU is in, as far as translations depend on it, and what follows from a change.

`mode_changed` is called whenever CPL, a control register or, outside 64-bit mode, a segment
register may have become another: it makes the mode word, chooses the jump table, and drops what
other modes left in it.
"""

from __future__ import annotations

from ringfence.cpu.components import AVX512_STATE
from ringfence.cpu.stack import (
    TYPE_CODE,
    TYPE_DOWN,
    TYPE_WRITABLE,
    in_64bit,
    is_protected,
)
from ringfence.cpu.state import (
    ATTR_DB,
    ATTR_P,
    CR0_EM,
    CR0_TS,
    CR4_OSFXSR,
    CR4_OSXSAVE,
    CR4_TSD,
    CS,
    DS,
    ES,
    FLAG_RF,
    OK,
    SS,
)
from ringfence.engine.direct.run import direct_space
from ringfence.engine.translate.block import (
    JUMP_ENTRIES,
    MODE_AVX,
    MODE_AVX512,
    MODE_BASED,
    MODE_CODE32,
    MODE_CPL,
    MODE_FLAT,
    MODE_LONG,
    MODE_NO_FPU,
    MODE_SSE,
    MODE_STACK32,
    MODE_STEP,
    MODE_TSD,
    SLOW_MASKED,
    SLOW_READ,
    SLOW_WRITE,
    Vcpu,
)
from ringfence.engine.translate.debugging import wants_step
from ringfence.engine.translate.pages import (
    LOW32,
)
from ringfence.engine.translate.thunks import THUNKS
from ringfence.memory.mmu import (
    ITLB_ENTRIES,
    PENDING_DIRECT,
    PENDING_LOOK,
)
from ringfence.native.dialect import (
    address_of,
    native,
    native_inline,
)

SLOW_CHANGE = SLOW_READ | SLOW_WRITE
SLOW_RIGHTS = SLOW_CHANGE | SLOW_MASKED
T_INDIRECT_MISS = THUNKS.index("indirect_miss")


@native
def jump_forget(vcpu: Vcpu) -> int:
    """Point every entry of both jump tables at the miss thunk."""
    miss = vcpu.thunks[T_INDIRECT_MISS]
    for i in range(JUMP_ENTRIES):
        vcpu.jump_kernel[i] = miss
    for i in range(JUMP_ENTRIES):
        vcpu.jump_user[i] = miss
    return 0


@native
def segment_top(vcpu: Vcpu, sreg: int, write: int) -> int:
    """One more than the last byte of a segment that may be accessed without another look."""
    attr = vcpu.seg_attr[sreg]
    top = vcpu.seg_limit[sreg] + 1
    if not is_protected(vcpu):
        return top
    if not attr & ATTR_P:
        return 0
    if attr & TYPE_CODE:
        return 0 if write or not attr & TYPE_WRITABLE else top
    if attr & TYPE_DOWN or (write and not attr & TYPE_WRITABLE):
        return 0
    return top


@native_inline
def is_flat(vcpu: Vcpu, sreg: int, write: int) -> int:
    """Whether a segment is all of the linear address space."""
    return vcpu.seg_top[sreg + write * 8] == 1 << 32 and vcpu.seg_base[sreg] == 0


@native
def segment_mode(vcpu: Vcpu) -> int:
    """What segments add to the mode outside 64-bit mode; fills ``seg_top``."""
    for n in range(6):
        vcpu.seg_top[n] = segment_top(vcpu, n, 0)
        vcpu.seg_top[n + 8] = segment_top(vcpu, n, 1)
    mode = MODE_CODE32 if vcpu.seg_attr[CS] & ATTR_DB else 0
    if vcpu.seg_attr[SS] & ATTR_DB:
        mode = mode | MODE_STACK32
    if vcpu.seg_base[CS] or vcpu.seg_limit[CS] != LOW32:
        mode = mode | MODE_BASED
    flat = is_flat(vcpu, ES, 1) and is_flat(vcpu, SS, 1) and is_flat(vcpu, DS, 1)
    return mode | MODE_FLAT if flat and is_flat(vcpu, CS, 0) else mode


@native_inline
def current_mode(vcpu: Vcpu) -> int:
    """The mode word of the CPU's present state."""
    mode = vcpu.cpl & MODE_CPL
    if in_64bit(vcpu):
        mode = mode | MODE_LONG
    else:
        mode = mode | segment_mode(vcpu)
    if vcpu.cr0 & (CR0_TS | CR0_EM):
        mode = mode | MODE_NO_FPU
    if vcpu.cr4 & CR4_OSFXSR:
        mode = mode | MODE_SSE
    if vcpu.cr4 & CR4_OSXSAVE and vcpu.xcr0 & 6 == 6 and is_protected(vcpu):
        mode = mode | MODE_AVX
        if vcpu.xcr0 & AVX512_STATE == AVX512_STATE:
            mode = mode | MODE_AVX512
    if wants_step(vcpu):
        mode = mode | MODE_STEP
    if vcpu.cr4 & CR4_TSD and vcpu.cpl:
        mode = mode | MODE_TSD
    return mode


@native
def mode_changed(cpu: Vcpu) -> int:
    """See ``cpu.ports.mode_changed``: choose the jump table, drop what other modes left in it.

    MODE_STEP doesn't use the tables, so they are kept over it.
    """
    mode = current_mode(cpu)
    if cpu.mode & MODE_LONG and not mode & MODE_LONG:
        # Code that is not 64-bit never sees the upper halves, and translated so counts on zeros.
        for i in range(8):
            cpu.gpr[i] = cpu.gpr[i] & LOW32
    cpu.mode = mode
    step = mode & MODE_STEP
    if step or (cpu.other_flags & FLAG_RF and cpu.break_count):
        cpu.debug_pending = cpu.debug_pending | PENDING_LOOK
    cpu.debug_pending = cpu.debug_pending & ~PENDING_DIRECT
    if cpu.cpl == 3:
        cpu.user_entries += 1
        if direct_space(cpu):
            cpu.debug_pending = cpu.debug_pending | PENDING_DIRECT
    cpu.unknown_targets = 1 if mode & MODE_BASED else 0
    if mode & MODE_BASED:
        return OK
    if cpu.cpl == 3:
        cpu.jump_current = address_of(cpu.jump_user[0])
        if cpu.mode_user != mode and not step:
            cpu.mode_user = mode
            miss = cpu.thunks[T_INDIRECT_MISS]
            for i in range(JUMP_ENTRIES):
                cpu.jump_user[i] = miss
            for i in range(ITLB_ENTRIES):
                cpu.itlb_user[i] = 0
    else:
        cpu.jump_current = address_of(cpu.jump_kernel[0])
        if cpu.mode_kernel != mode and not step:
            cpu.mode_kernel = mode
            miss = cpu.thunks[T_INDIRECT_MISS]
            for i in range(JUMP_ENTRIES):
                cpu.jump_kernel[i] = miss
            for i in range(ITLB_ENTRIES):
                cpu.itlb_kernel[i] = 0
    return 0


@native
def interrupts_enabled(cpu: Vcpu) -> int:
    """See ``cpu.ports.interrupts_enabled``."""
    if cpu.irq_request or cpu.nmi_pending:
        cpu.attention = 1
    return 0
