"""Offsets in segments and on the stack, in every mode: limits, widths and bases.

64-bit mode has flat segments and a 64-bit stack pointer. In the other modes an offset is checked
against its segment's type and limit and the base is added; the stack pointer is as wide as SS's
B flag says. The functions here are what effects use, so that one effect serves all modes.
Sources: Intel SDM vol. 3, 5.3 (limit checking), 3.4.5 (expand-down segments), vol. 1, 6.2.3.
"""

from __future__ import annotations

from ringfence.cpu.flags import raise_fault
from ringfence.cpu.ports import linear_read, linear_write
from ringfence.cpu.state import (
    ATTR_DB,
    ATTR_L,
    ATTR_P,
    CR0_PE,
    CS,
    EFER_LMA,
    FAULT,
    FLAG_VM,
    GP,
    OK,
    RSP,
    SS,
    SS_FAULT,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

LOW32 = 0xFFFFFFFF
TYPE_CODE, TYPE_DOWN, TYPE_WRITABLE = 8, 4, 2
"""Bits of a segment's type; WRITABLE means readable for code (SDM vol. 3, 3.4.5.1)."""


@native_inline
def in_64bit(cpu: Cpu) -> int:
    """Whether the CPU is in 64-bit mode."""
    return 1 if cpu.seg_attr[CS] & ATTR_L and cpu.efer & EFER_LMA else 0


@native_inline
def is_protected(cpu: Cpu) -> int:
    """Whether selectors select descriptors: neither real nor virtual-8086 mode."""
    return 1 if cpu.cr0 & CR0_PE and not cpu.other_flags & FLAG_VM else 0


@native
def within_segment(cpu: Cpu, sreg: int, offset: int, size: int, write: int) -> int:
    """Whether a segment allows an access, outside 64-bit mode (SDM vol. 3, 5.3 and 5.5)."""
    attr = cpu.seg_attr[sreg]
    last = offset + size - 1
    limit = cpu.seg_limit[sreg]
    if not is_protected(cpu):
        return last <= limit
    if not attr & ATTR_P:
        return 0
    if attr & TYPE_CODE:
        if write or not attr & TYPE_WRITABLE:
            return 0
        return last <= limit
    if write and not attr & TYPE_WRITABLE:
        return 0
    if attr & TYPE_DOWN:
        return offset > limit and last <= (LOW32 if attr & ATTR_DB else 0xFFFF)
    return last <= limit


@native
def segment_linear(cpu: Cpu, sreg: int, offset: int, size: int, write: int) -> int:
    """``cpu.linear`` = address of an offset outside 64-bit mode; else #GP(0) or #SS(0)."""
    if not within_segment(cpu, sreg, offset, size, write):
        return raise_fault(cpu, SS_FAULT if sreg == SS else GP, 0)
    cpu.linear = (cpu.seg_base[sreg] + offset) & LOW32
    return OK


@native_inline
def stack_mask(cpu: Cpu) -> int:
    """The bits of RSP that address the stack."""
    if in_64bit(cpu):
        return 0xFFFFFFFFFFFFFFFF
    return LOW32 if cpu.seg_attr[SS] & ATTR_DB else 0xFFFF


@native_inline
def set_stack(cpu: Cpu, value: int) -> int:
    """Move the stack pointer; bits that don't address the stack stay."""
    mask = stack_mask(cpu)
    cpu.gpr[RSP] = (cpu.gpr[RSP] & ~mask) | (value & mask)
    return OK


@native
def stack_failed(cpu: Cpu) -> int:
    """A stack access failed: what was #GP elsewhere is #SS on the stack (SDM vol. 3, 6.15)."""
    if cpu.exc_vector == GP:
        cpu.exc_vector = SS_FAULT
        cpu.exc_error = 0
    return FAULT


@native
def stack_read(cpu: Cpu, offset: int, size: int, user: int) -> int:
    """Read the stack at an offset into ``cpu.value``; #SS(0) where it can't be."""
    if not in_64bit(cpu):
        if segment_linear(cpu, SS, offset & stack_mask(cpu), size, 0):
            return FAULT
        offset = cpu.linear
    if linear_read(cpu, offset, size, user):
        return stack_failed(cpu)
    return OK


@native
def stack_write(cpu: Cpu, offset: int, size: int, value: int, user: int) -> int:
    """Write the stack at an offset; #SS(0) where it can't be."""
    if not in_64bit(cpu):
        if segment_linear(cpu, SS, offset & stack_mask(cpu), size, 1):
            return FAULT
        offset = cpu.linear
    if linear_write(cpu, offset, size, value, user):
        return stack_failed(cpu)
    return OK


@native
def push(cpu: Cpu, size: int, value: int) -> int:
    """Push at the present privilege level."""
    at = cpu.gpr[RSP] - size
    if stack_write(cpu, at, size, value, cpu.cpl == 3):
        return FAULT
    return set_stack(cpu, at)
