"""RFLAGS as one value, and raising faults, for the effects of this room.

The flags live in four places of ``Cpu`` (see there); here they are put together and taken apart.
Sources: Intel SDM vol. 1, 3.4.3 (RFLAGS) and 3.3.7.1 (canonical addresses); vol. 3, 6.15.
"""

from __future__ import annotations

from ringfence.cpu.ports import interrupts_enabled, mode_changed
from ringfence.cpu.state import (
    FAULT,
    FLAG_TF,
    FLAG_VM,
    FLAGS_FIXED,
    OK,
    OTHER_FLAGS,
    STATUS_FLAGS,
    Cpu,
)
from ringfence.native.dialect import native_inline, sext


@native_inline
def get_rflags(cpu: Cpu) -> int:
    """RFLAGS as PUSHF and interrupt frames show them (SDM vol. 1, 3.4.3)."""
    flags = (cpu.status & STATUS_FLAGS) | (cpu.other_flags & OTHER_FLAGS)
    return flags | (cpu.flag_if << 9) | (cpu.flag_df << 10) | FLAGS_FIXED


@native_inline
def set_rflags(cpu: Cpu, value: int) -> int:
    """Take RFLAGS apart into their places; tell the engine what it must know."""
    had = cpu.other_flags
    had_if = cpu.flag_if
    cpu.status = value & STATUS_FLAGS
    cpu.other_flags = value & OTHER_FLAGS
    cpu.flag_if = (value >> 9) & 1
    cpu.flag_df = (value >> 10) & 1
    if cpu.flag_if and not had_if:
        interrupts_enabled(cpu)
    if (value ^ had) & (FLAG_TF | FLAG_VM):
        mode_changed(cpu)
    return OK


@native_inline
def raise_fault(cpu: Cpu, vector: int, error: int) -> int:
    """Make an exception pending; returns FAULT for the caller to pass on."""
    cpu.exc_vector = vector
    cpu.exc_error = error
    return FAULT


@native_inline
def is_canonical(address: int) -> int:
    """Whether bits 63-47 of an address are equal (SDM vol. 1, 3.3.7.1)."""
    return sext(address, 48) == address
