"""I/O instructions: who may use a port, and the exits that carry the accesses to the VMM.

Sources: Intel SDM vol. 1, 19.5 (protected-mode I/O); vol. 3, 8.7 (the 64-bit TSS).
"""

from __future__ import annotations

from ringfence.cpu.control import leave, refused
from ringfence.cpu.debug import DR7_ENABLE, port_hits
from ringfence.cpu.ports import debug_note, linear_read
from ringfence.cpu.state import (
    EXIT_PORT_IN,
    EXIT_PORT_OUT,
    EXIT_PORT_STRING,
    FAULT,
    FLAG_IOPL,
    FLAG_VM,
    OK,
    RAX,
    RDX,
    TR,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

PORT_IN_DX = 0x10000
"""Operand of IN and OUT that stands for the port in DX."""
BITMAP_OFFSET = 0x66
"""Where a 64-bit TSS says at which of its bytes the I/O permission bitmap starts."""


@native_inline
def note_port(cpu: Cpu, port: int, size: int) -> int:
    """An access to ports is allowed: note the breakpoints that it hits."""
    if cpu.dr[7] & DR7_ENABLE:
        bits = port_hits(cpu, port, size)
        if bits:
            debug_note(cpu, bits)
    return OK


@native
def check_port(cpu: Cpu, port: int, size: int) -> int:
    """OK if the current privilege level may use these ports, else FAULT.

    Two bytes of the bitmap are always read, both must lie within the TSS's limit. Virtual-8086 mode
    asks the bitmap whatever IOPL says.
    """
    if cpu.cpl <= (cpu.other_flags & FLAG_IOPL) >> 12 and not cpu.other_flags & FLAG_VM:
        return note_port(cpu, port, size)
    limit = cpu.seg_limit[TR]
    if limit < BITMAP_OFFSET + 1:
        return refused(cpu)
    if linear_read(cpu, cpu.seg_base[TR] + BITMAP_OFFSET, 2, 0):
        return FAULT
    at = cpu.value + (port >> 3)
    if at + 1 > limit:
        return refused(cpu)
    if linear_read(cpu, cpu.seg_base[TR] + at, 2, 0):
        return FAULT
    if (cpu.value >> (port & 7)) & ((1 << size) - 1):
        return refused(cpu)
    return note_port(cpu, port, size)


@native_inline
def port_operand(cpu: Cpu) -> int:
    """The port of IN and OUT."""
    port: int = cpu.op[1]
    return cpu.gpr[RDX] & 0xFFFF if port == PORT_IN_DX else port


@native
def fx_in(cpu: Cpu) -> int:
    """IN: ``op[0]`` size, ``op[1]`` port or PORT_IN_DX; exits with port and size."""
    port = port_operand(cpu)
    if check_port(cpu, port, cpu.op[0]):
        return FAULT
    cpu.exit_data[0] = port
    cpu.exit_data[1] = cpu.op[0]
    return leave(cpu, EXIT_PORT_IN)


@native
def fx_out(cpu: Cpu) -> int:
    """OUT: ``op[0]`` size, ``op[1]`` port or PORT_IN_DX; exits with port, size and value."""
    port = port_operand(cpu)
    if check_port(cpu, port, cpu.op[0]):
        return FAULT
    cpu.exit_data[0] = port
    cpu.exit_data[1] = cpu.op[0]
    cpu.exit_data[2] = cpu.gpr[RAX] & ((1 << (cpu.op[0] * 8)) - 1)
    return leave(cpu, EXIT_PORT_OUT)


@native
def fx_port_string(cpu: Cpu) -> int:
    """INS and OUTS: ``op`` size, direction (1: OUTS), repeat, and one more for the VMM alone.

    The VMM moves the elements: it finds ``op`` untouched, and in ``exit_data`` the port, size,
    direction and repeat.
    """
    port = cpu.gpr[RDX] & 0xFFFF
    if check_port(cpu, port, cpu.op[0]):
        return FAULT
    cpu.exit_data[0] = port
    cpu.exit_data[1] = cpu.op[0]
    cpu.exit_data[2] = cpu.op[1]
    cpu.exit_data[3] = cpu.op[2]
    return leave(cpu, EXIT_PORT_STRING)
