"""What the virtual CPU asks of the rooms around it, declared for the native linker.

The effects in this room read and write guest-linear memory and drop cached translations, but how
that is done belongs to ``memory`` and to the engine. These declarations are resolved by name when
a native library is built.
"""

from __future__ import annotations

from ringfence.cpu.state import Cpu
from ringfence.native.dialect import external


@external
def linear_read(cpu: Cpu, address: int, size: int, user: int) -> int:
    """Read 1 to 8 bytes of guest-linear memory into ``cpu.value`` (zero-extended).

    ``user`` 1 checks as a CPL-3 access, 0 as a supervisor access (descriptor tables, the TSS).
    Returns OK, or FAULT with the exception pending. Reads outside RAM give all ones.
    """
    return 0


@external
def linear_write(cpu: Cpu, address: int, size: int, value: int, user: int) -> int:
    """Write 1 to 8 bytes of guest-linear memory; nothing is written unless OK is returned."""
    return 0


@external
def tlb_flush_all(cpu: Cpu) -> int:
    """Drop all cached translations, global ones too (MOV CR0/CR4, EFER, INVPCID 2)."""
    return 0


@external
def tlb_flush_nonglobal(cpu: Cpu) -> int:
    """Drop the translations of non-global pages (MOV CR3)."""
    return 0


@external
def tlb_flush_page(cpu: Cpu, address: int) -> int:
    """Drop the translations of one linear page, global or not (INVLPG)."""
    return 0


@external
def mode_changed(cpu: Cpu) -> int:
    """CPL, CS, CR0, CR4, EFER, XCR0 or TF changed: let the engine follow what it keyed on them."""
    return 0


@external
def interrupts_enabled(cpu: Cpu) -> int:
    """IF was just set (STI, POPF, IRET, SYSRET …): let the engine look for pending interrupts."""
    return 0


@external
def debug_changed(cpu: Cpu) -> int:
    """What DR0-DR3 and DR7 watch changed: let the engine follow."""
    return 0


@external
def step_masked(cpu: Cpu) -> int:
    """The present instruction enters a handler with TF clear: no single-step trap follows it."""
    return 0


@external
def debug_note(cpu: Cpu, bits: int) -> int:
    """Breakpoints fired that trap: ``bits`` of DR6 are due behind the present instruction."""
    return 0


@external
def code_is_stale(cpu: Cpu) -> int:
    """Memory that this CPU has translated code from was written by another one, or a device."""
    return 0
