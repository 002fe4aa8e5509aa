"""The state of a virtual CPU after power-up or RESET, and where a loader enters a kernel.

Source: Intel SDM vol. 3, table 9-1 (processor state following power-up, reset, INIT). The FPU
control word is the one that FNINIT gives, because an XSAVE area whose header says "initial" means
that one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ringfence.cpu.cpuid import SIGNATURE
from ringfence.cpu.state import (
    ATTR_DB,
    ATTR_G,
    ATTR_L,
    ATTR_P,
    ATTR_S,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CS,
    EFER_LMA,
    LDTR,
    NO_EXCEPTION,
    RAX,
    RBX,
    RDX,
    RSI,
    RSP,
    TR,
    TSC_RATIO_ONE,
    Cpu,
)

PAT_RESET = 0x0007040600070406
DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400
FCW_RESET, MXCSR_RESET, MXCSR_MASK = 0x37F, 0x1F80, 0xFFFF
FAST_STRINGS = 1
CODE, DATA, LDT, BUSY_TSS = 0xB, 0x3, 0x2, 0xB

# Fields that belong to the VMM rather than to the processor.
_KEPT = {
    "tsc_offset",
    "tsc_ratio",
    "cpuid_table",
    "cpuid_rows",
    "exceptions",
    "software_interrupts",
    "interrupts",
}
_CLEARED = [field for field in Cpu.fields.values() if field.name not in _KEPT]


def reset(cpu: Any) -> None:
    """Reset a ``Cpu`` view; its CPUID table, time-stamp counter and statistics stay."""
    for field in _CLEARED:
        if field.is_array:
            array = getattr(cpu, field.name)
            for i in range(field.count):
                array[i] = 0
        else:
            setattr(cpu, field.name, 0)
    for i in range(8):
        cpu.seg_selector[i] = 0
        cpu.seg_base[i] = 0
        cpu.seg_limit[i] = 0xFFFF
        cpu.seg_attr[i] = ATTR_P | ATTR_S | DATA
    cpu.seg_selector[CS] = 0xF000
    cpu.seg_base[CS] = 0xFFFF0000
    cpu.seg_attr[CS] = ATTR_P | ATTR_S | CODE
    cpu.seg_attr[LDTR] = ATTR_P | LDT
    cpu.seg_attr[TR] = ATTR_P | BUSY_TSS
    cpu.gdtr_limit = cpu.idtr_limit = 0xFFFF
    cpu.rip = cpu.next_rip = 0xFFF0
    cpu.gpr[RDX] = SIGNATURE
    cpu.cr0 = CR0_CD | CR0_NW | CR0_ET
    cpu.xcr0 = 1
    cpu.dr[6] = DR6_RESET
    cpu.dr[7] = DR7_RESET
    cpu.pat = PAT_RESET
    cpu.misc_enable = FAST_STRINGS
    cpu.tsc_ratio = cpu.tsc_ratio or TSC_RATIO_ONE
    cpu.exc_vector = cpu.delivering = NO_EXCEPTION
    struct.pack_into("<H", cpu.xsave, 0, FCW_RESET)
    struct.pack_into("<II", cpu.xsave, 24, MXCSR_RESET, MXCSR_MASK)


_KEPT_BY_INIT = {
    "cr0", "xcr0", "xsave", "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs",
    "sysenter_esp", "sysenter_eip", "pat", "tsc_aux", "tsc_adjust", "misc_enable", "mtrr_def_type",
    "mtrr_fixed", "mtrr_base", "mtrr_mask", "mcg_status",
}  # fmt: skip
"""What table 10-1 calls unchanged: vector state and registers that are no part of the mode."""


def initialize(cpu: Any) -> None:
    """Do what INIT does to a ``Cpu`` view: a reset, but for `_KEPT_BY_INIT` (CR0: CD and NW)."""
    kept: dict[str, Any] = {
        name: list(getattr(cpu, name)) if Cpu.fields[name].is_array else getattr(cpu, name)
        for name in _KEPT_BY_INIT
    }
    reset(cpu)
    kept["cr0"] = kept["cr0"] & (CR0_CD | CR0_NW) | CR0_ET
    for name, value in kept.items():
        if Cpu.fields[name].is_array:
            getattr(cpu, name)[:] = value
        else:
            setattr(cpu, name, value)


@dataclass(frozen=True, kw_only=True)
class EntryState:
    """The registers to enter a guest with: 64-bit mode if EFER.LMA is set, else protected mode.

    What is not named here is as after RESET, but general registers are zero. CS is a flat code
    segment called ``cs``, the others are flat data segments called ``ds``.
    """

    rip: int
    cr0: int
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    gdt_base: int = 0
    gdt_limit: int = 0
    cs: int
    ds: int
    rax: int = 0
    rbx: int = 0
    rsi: int = 0
    rsp: int = 0


def set_boot_state(cpu: Any, boot: EntryState | None) -> None:
    """Reset a ``Cpu`` view and enter a kernel, or without ``boot`` leave it at the reset vector."""
    reset(cpu)
    if boot is None:
        return
    for name in ("rip", "cr0", "cr3", "cr4", "efer"):
        setattr(cpu, name, getattr(boot, name))
    cpu.gpr[RDX] = 0
    for register, value in (
        (RAX, boot.rax),
        (RBX, boot.rbx),
        (RSI, boot.rsi),
        (RSP, boot.rsp),
    ):
        cpu.gpr[register] = value
    cpu.gdtr_base, cpu.gdtr_limit = boot.gdt_base, boot.gdt_limit
    flat = ATTR_P | ATTR_S | ATTR_G
    width = ATTR_L if boot.efer & EFER_LMA else ATTR_DB
    for segment in range(6):
        code = segment == CS
        cpu.seg_selector[segment] = boot.cs if code else boot.ds
        cpu.seg_base[segment] = 0
        cpu.seg_limit[segment] = 0xFFFFFFFF
        cpu.seg_attr[segment] = flat | (CODE | width if code else DATA | ATTR_DB)
