"""Debug registers: when DR0 to DR3 fire, what #DB leaves in DR6, and MOV to and from them.

An engine asks `data_hits`, `execution_hits` and `port_hits` wherever something might fire; it asks
only while `armed` says so, and follows changes by the port ``debug_changed``. Breakpoints on
instructions are faults; those on data and ports, and single steps, are traps that are *noted*
(`debug_note`) and become one #DB behind the instruction, by `raise_debug`.

Sources: Intel SDM vol. 3, 18.2 (debug registers) and 18.3 (debug exceptions); AMD APM vol. 2, 13.1.
"""

from __future__ import annotations

from ringfence.cpu.control import advance, refused
from ringfence.cpu.flags import raise_fault
from ringfence.cpu.ports import debug_changed
from ringfence.cpu.state import (
    CR4_DE,
    DB,
    FAULT,
    FLAG_RF,
    OK,
    UD,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

# DR6, debug status (SDM vol. 3, 18.2.3); B0-B3 are bits 0-3.
DR6_B = 0xF
DR6_BD, DR6_BS, DR6_BT = 1 << 13, 1 << 14, 1 << 15
DR6_FIXED, DR6_BITS = 0xFFFF0FF0, DR6_B | DR6_BD | DR6_BS | DR6_BT
# DR7, debug control (SDM vol. 3, 18.2.4); L and G are bits 2n and 2n + 1.
DR7_ENABLE = 0xFF
DR7_GD = 1 << 13
DR7_RW_SHIFT, DR7_LEN_SHIFT = 16, 18
"""Of breakpoint 0; each further one has its fields 4 bits higher."""
DR7_FIXED, DR7_BITS = 0x00000400, 0xFFFF23FF
RW_EXECUTE, RW_WRITE, RW_PORT, RW_ACCESS = range(4)


@native_inline
def condition(cpu: Cpu, n: int) -> int:
    """R/W of breakpoint ``n``; without CR4.DE there are none on ports (SDM vol. 3, 18.2.4)."""
    return (cpu.dr[7] >> (DR7_RW_SHIFT + n * 4)) & 3


@native_inline
def enabled(cpu: Cpu, n: int) -> int:
    """Whether breakpoint ``n`` is enabled, locally or globally (there is no difference here)."""
    return (cpu.dr[7] >> (n * 2)) & 3


@native_inline
def length(cpu: Cpu, n: int) -> int:
    """LEN of breakpoint ``n`` in bytes: 1, 2, 8 or 4, as encoded in this order."""
    code = (cpu.dr[7] >> (DR7_LEN_SHIFT + n * 4)) & 3
    if code == 2:
        return 8
    return code + 1


@native
def armed(cpu: Cpu, kinds: int) -> int:
    """Mask of the enabled breakpoints whose R/W is in ``kinds``, a mask of ``1 << RW_…``."""
    found = 0
    if cpu.dr[7] & DR7_ENABLE:
        for n in range(4):
            if enabled(cpu, n) and kinds >> condition(cpu, n) & 1:
                found = found | 1 << n
    return found


@native
def hits(cpu: Cpu, kinds: int, address: int, size: int) -> int:
    """DR6's bits for an access to ``size`` bytes at ``address`` (SDM vol. 3, 18.2.5).

    A breakpoint watches LEN bytes from an address whose low bits are ignored.
    """
    found = armed(cpu, kinds)
    for n in range(4):
        if found >> n & 1:
            bytes_ = length(cpu, n)
            first = cpu.dr[n] & ~(bytes_ - 1)
            # One of the two begins inside the other, modulo 2**64.
            if address - first >= bytes_ and first - address >= size:
                found = found & ~(1 << n)
    return found


@native_inline
def execution_hits(cpu: Cpu, address: int) -> int:
    """DR6's bits for the instruction at ``address``."""
    return hits(cpu, 1 << RW_EXECUTE, address, 1)


@native_inline
def data_hits(cpu: Cpu, address: int, size: int, write: int) -> int:
    """DR6's bits for a read or a write of data."""
    kinds = 1 << RW_ACCESS
    if write:
        kinds = kinds | 1 << RW_WRITE
    return hits(cpu, kinds, address, size)


@native_inline
def port_hits(cpu: Cpu, port: int, size: int) -> int:
    """DR6's bits for an access to I/O ports."""
    return hits(cpu, 1 << RW_PORT, port, size) if cpu.cr4 & CR4_DE else 0


@native
def raise_debug(cpu: Cpu, bits: int) -> int:
    """Make a #DB pending for the reasons ``bits`` of DR6; delivery clears DR7.GD.

    B0 to B3 say which breakpoints this one is for, and no others; what else is set in DR6 stays set
    until software clears it (SDM vol. 3, 18.2.3).
    """
    cpu.dr[6] = (cpu.dr[6] & ~DR6_B) | bits
    cpu.dr[7] = cpu.dr[7] & ~DR7_GD
    return raise_fault(cpu, DB, 0)


# --- MOV to and from debug registers ------------------------------------------------------------


@native
def check_debug_access(cpu: Cpu, number: int) -> int:
    """Checks that both directions of MOV DRn share (SDM vol. 3, 18.2.2 and 18.2.4).

    With DR7.GD set the access is a #DB, and DR6.BD records it.
    """
    if number > 7 or (number & 6 == 4 and cpu.cr4 & CR4_DE):
        return raise_fault(cpu, UD, 0)
    if cpu.cpl:
        return refused(cpu)
    if cpu.dr[7] & DR7_GD:
        return raise_debug(cpu, DR6_BD)
    return OK


@native
def fx_mov_to_dr(cpu: Cpu) -> int:
    """MOV DRn, r64: ``op[0]`` general register, ``op[1]`` debug register."""
    number = cpu.op[1]
    value = cpu.gpr[cpu.op[0]]
    if check_debug_access(cpu, number):
        return FAULT
    if number >= 4 and value >> 32:
        return refused(cpu)
    if number == 6 or number == 4:
        cpu.dr[6] = (value & DR6_BITS) | DR6_FIXED
        return advance(cpu)
    if number == 5 or number == 7:
        number = 7
        value = (value & DR7_BITS) | DR7_FIXED
    if cpu.dr[number] != value:
        was = cpu.dr[7] & DR7_ENABLE
        cpu.dr[number] = value
        # Whatever set RF is over by now, though nobody looked as long as nothing was armed.
        cpu.other_flags = cpu.other_flags & ~FLAG_RF
        if was | cpu.dr[7] & DR7_ENABLE:
            debug_changed(cpu)
    return advance(cpu)


@native
def fx_mov_from_dr(cpu: Cpu) -> int:
    """MOV r64, DRn: ``op[0]`` general register, ``op[1]`` debug register."""
    number = cpu.op[1]
    if check_debug_access(cpu, number):
        return FAULT
    if number == 4 or number == 5:
        number += 2
    cpu.gpr[cpu.op[0]] = cpu.dr[number]
    return advance(cpu)
