"""Instructions that 64-bit mode has dropped: decimal arithmetic, PUSHA, POPA, SALC, LOOP by CX.

LOOP and JCXZ exist in 64-bit mode, too, but with other counters. Source: Intel SDM vol. 2, the
instructions' pages.
"""

from __future__ import annotations

from ringfence.cpu.flags import raise_fault
from ringfence.cpu.ports import linear_write
from ringfence.cpu.stack import set_stack, stack_read, stack_write
from ringfence.cpu.state import (
    CS,
    DE,
    FAULT,
    FLAG_AF,
    FLAG_CF,
    FLAG_PF,
    FLAG_SF,
    FLAG_ZF,
    GP,
    OK,
    RAX,
    RCX,
    RSP,
    Cpu,
)
from ringfence.native.dialect import native, native_inline, sext

LOW32 = 0xFFFFFFFF
LOOPNE, LOOPE, LOOP, JCXZ = range(4)
"""Kinds of counted jumps, as the low bits of their opcodes."""


@native_inline
def done(cpu: Cpu, al: int, ah: int, flags: int) -> int:
    """Store AX, and flags of which SF, ZF and PF are AL's."""
    al = al & 0xFF
    parity = al ^ (al >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    if not parity & 1:
        flags = flags | FLAG_PF
    if al == 0:
        flags = flags | FLAG_ZF
    if al & 0x80:
        flags = flags | FLAG_SF
    cpu.status = flags
    cpu.gpr[RAX] = (cpu.gpr[RAX] & ~0xFFFF) | ((ah & 0xFF) << 8) | al
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_daa(cpu: Cpu) -> int:
    """DAA and DAS: op[0] is 1 for DAS."""
    al = cpu.gpr[RAX] & 0xFF
    ah = (cpu.gpr[RAX] >> 8) & 0xFF
    old = al
    carry = cpu.status & FLAG_CF
    flags = 0
    if al & 15 > 9 or cpu.status & FLAG_AF:
        if cpu.op[0]:
            flags = FLAG_AF | (FLAG_CF if carry or al < 6 else 0)
            al = al - 6
        else:
            flags = FLAG_AF | (FLAG_CF if carry or al > 0xF9 else 0)
            al = al + 6
    if old > 0x99 or carry:
        al = al - 0x60 if cpu.op[0] else al + 0x60
        flags = flags | FLAG_CF
    return done(cpu, al, ah, flags)


@native
def fx_aaa(cpu: Cpu) -> int:
    """AAA and AAS: op[0] is 1 for AAS. SF, ZF, PF and OF, which are undefined, follow AL."""
    ax = cpu.gpr[RAX] & 0xFFFF
    flags = 0
    if ax & 15 > 9 or cpu.status & FLAG_AF:
        ax = ax - 0x106 if cpu.op[0] else ax + 0x106
        flags = FLAG_AF | FLAG_CF
    return done(cpu, ax & 15, ax >> 8, flags)


@native
def fx_aam(cpu: Cpu) -> int:
    """AAM: op[0] the base; #DE if it is 0."""
    base = cpu.op[0] & 0xFF
    if base == 0:
        return raise_fault(cpu, DE, 0)
    al = cpu.gpr[RAX] & 0xFF
    return done(cpu, al % base, al // base, 0)


@native
def fx_aad(cpu: Cpu) -> int:
    """AAD: op[0] the base."""
    ax = cpu.gpr[RAX]
    return done(cpu, (ax & 0xFF) + ((ax >> 8) & 0xFF) * (cpu.op[0] & 0xFF), 0, 0)


@native
def fx_salc(cpu: Cpu) -> int:
    """SALC: AL = CF ? FFh : 0 (AMD APM vol. 3 calls it undocumented; every processor has it)."""
    value = 0xFF if cpu.status & FLAG_CF else 0
    cpu.gpr[RAX] = (cpu.gpr[RAX] & ~0xFF) | value
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_pusha(cpu: Cpu) -> int:
    """PUSHA, PUSHAD: op[0] the operand size; SP as it was before."""
    size = cpu.op[0]
    at = cpu.gpr[RSP]
    user = cpu.cpl == 3
    for n in range(8):
        # The last one first, so that a fault comes before anything is written.
        if stack_write(cpu, at - (8 - n) * size, size, cpu.gpr[7 - n], user):
            return FAULT
    set_stack(cpu, at - 8 * size)
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_popa(cpu: Cpu) -> int:
    """POPA, POPAD: op[0] the operand size; the stack's SP is skipped."""
    size = cpu.op[0]
    at = cpu.gpr[RSP]
    user = cpu.cpl == 3
    if stack_read(cpu, at, size, user) or stack_read(cpu, at + 7 * size, size, user):
        return FAULT
    for n in range(8):
        if n != 3:
            if stack_read(cpu, at + n * size, size, user):
                return FAULT
            if size == 2:
                cpu.gpr[7 - n] = (cpu.gpr[7 - n] & ~0xFFFF) | cpu.value
            else:
                cpu.gpr[7 - n] = cpu.value
    set_stack(cpu, at + 8 * size)
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_pop_memory(cpu: Cpu) -> int:
    """POP m outside 64-bit mode: op[0] the operand size, op[1] 1 if ESP is the address's base.

    The address at ea was computed before ESP moved, but it counts from behind (SDM vol. 2, POP).
    """
    size = cpu.op[0]
    user = cpu.cpl == 3
    top = cpu.gpr[RSP]
    if stack_read(cpu, top, size, user):
        return FAULT
    address = (cpu.ea + size if cpu.op[1] else cpu.ea) & LOW32
    if linear_write(cpu, address, size, cpu.value, user):
        return FAULT
    set_stack(cpu, top + size)
    cpu.rip = cpu.next_rip
    return OK


@native
def fx_counted(cpu: Cpu) -> int:
    """LOOP and JCXZ outside 64-bit mode.

    ``op``: the kind, the counter's size, the displacement, and the operand size, which is the
    instruction pointer's.
    """
    kind = cpu.op[0]
    mask = 0xFFFF if cpu.op[1] == 2 else LOW32
    count = cpu.gpr[RCX] & mask
    taken = 1 if count == 0 else 0
    if kind != JCXZ:
        count = (count - 1) & mask
        taken = 1 if count else 0
        if kind == LOOPE and not cpu.status & FLAG_ZF:
            taken = 0
        if kind == LOOPNE and cpu.status & FLAG_ZF:
            taken = 0
    target = cpu.next_rip
    if taken:
        target = (target + sext(cpu.op[2], 8)) & (0xFFFF if cpu.op[3] == 2 else LOW32)
        if target > cpu.seg_limit[CS]:
            return raise_fault(cpu, GP, 0)
    if kind != JCXZ:
        cpu.gpr[RCX] = (cpu.gpr[RCX] & ~mask) | count
    cpu.rip = target
    return OK
