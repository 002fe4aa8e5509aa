"""Model-specific registers: those that the CPU owns, and exits for those of the local APIC.

A register that neither this model nor the VMM knows is #GP(0), as on hardware. Registers of AMD's
chipset-like part of the processor, which kernels for family 1Ah read without asking CPUID, have
constant safe values here, and writes to them are dropped.

Sources: Intel SDM vol. 4, ch. 2 (architectural MSRs); vol. 3, 12.11 (MTRRs) and 12.12 (PAT);
AMD APM vol. 2, 3.1.7 (EFER), 3.2 and appendix A.
"""

# ruff: noqa: SIM109 - the dialect has no membership test

from __future__ import annotations

from ringfence.cpu.control import LOW32, advance, leave, refused
from ringfence.cpu.cpuid import PHYSICAL_BITS
from ringfence.cpu.flags import is_canonical
from ringfence.cpu.ports import mode_changed, tlb_flush_all
from ringfence.cpu.state import (
    CR0_PG,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    EXIT_MSR_READ,
    EXIT_MSR_WRITE,
    FS,
    GS,
    MTRR_COUNT,
    OK,
    RAX,
    RCX,
    RDX,
    Cpu,
)
from ringfence.cpu.tsc import MSR_TSC as TSC
from ringfence.cpu.tsc import MSR_TSC_ADJUST as TSC_ADJUST
from ringfence.cpu.tsc import guest_tsc
from ringfence.native.dialect import native, native_inline

UNKNOWN = 4
"""Status of a lookup that didn't find the register, or whose value is refused."""

PLATFORM_ID, APIC_BASE = 0x17, 0x1B
PATCH_LEVEL, MTRR_CAP = 0x8B, 0xFE
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
MCG_CAP, MCG_STATUS, MISC_ENABLE, DEBUG_CTL = 0x179, 0x17A, 0x1A0, 0x1D9
MTRR_BASE0, MTRR_DEF_TYPE, PAT = 0x200, 0x2FF, 0x277
MTRR_FIX64K, MTRR_FIX16K, MTRR_FIX4K = 0x250, 0x258, 0x268
TSC_DEADLINE, X2APIC = 0x6E0, 0x800
PARAVIRTUAL = 0x4B564D00
"""First of the 16 registers in which KVM put its services."""
EFER, STAR, LSTAR, CSTAR, SFMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103
SYSCFG, HWCR, NB_CFG = 0xC0010010, 0xC0010015, 0xC001001F
INT_PENDING, MMIO_CFG_BASE = 0xC0010055, 0xC0010058
PSTATE_FIRST, PSTATE_LAST = 0xC0010061, 0xC001006B
VM_CR, VM_HSAVE_PA = 0xC0010114, 0xC0010117
OSVW_LENGTH, OSVW_STATUS, RAPL_UNIT = 0xC0010140, 0xC0010141, 0xC0010299
CORE_CFG_FIRST, DE_CFG, CORE_CFG_LAST = 0xC0011020, 0xC0011029, 0xC001102D

EFER_AUTOIBRS = 1 << 21
EFER_BITS = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AUTOIBRS
HWCR_TSC_FREQ_SEL = 1 << 24
"""HWCR: the TSC counts at the P0 frequency."""
DE_CFG_LFENCE_SERIALIZE = 1 << 1
VM_CR_LOCKED_OFF = 0x18
"""VM_CR: SVM is disabled, and locked so."""
PATCH_VALUE = 0x0B00215A
"""A microcode level at which kernels know of no open errata."""
MTRR_CAP_VALUE = MTRR_COUNT | 1 << 8 | 1 << 10
MTRR_DEF_BITS = 0xCFF
MTRR_MASK_VALID = 1 << 11
PAGE_BITS = ((1 << PHYSICAL_BITS) - 1) & ~0xFFF
MTRR_TYPES = 0b1110011
"""Memory types of MTRRs, a bit each: UC, WC, WT, WP, WB."""
PAT_TYPES = 0b11110011
"""The same for the PAT, which has UC- too."""


@native_inline
def mtrr_fixed_index(index: int) -> int:
    """Place of a fixed-range MTRR in ``Cpu.mtrr_fixed``, or 11 if it is none."""
    if index == MTRR_FIX64K:
        return 0
    if index & ~1 == MTRR_FIX16K:
        return index - MTRR_FIX16K + 1
    if index & ~7 == MTRR_FIX4K:
        return index - MTRR_FIX4K + 3
    return 11


@native
def types_valid(value: int, types: int) -> int:
    """Whether each byte is a memory type out of a set with one bit per type."""
    for byte in range(8):
        kind = (value >> (byte * 8)) & 0xFF
        if not (types >> kind) & 1:
            return 0
    return 1


@native_inline
def belongs_to_vmm(index: int) -> int:
    """Whether the local APIC owns the register, or a paravirtual service."""
    if index & ~0xF == PARAVIRTUAL:
        return 1
    return index == APIC_BASE or index == TSC_DEADLINE or index & ~0xFF == X2APIC


@native_inline
def is_written_by_vmm(index: int) -> int:
    """Whether a write concerns more than this CPU: the clocks know the time-stamp counter."""
    return index == TSC or index == TSC_ADJUST or belongs_to_vmm(index)


@native_inline
def is_constant_amd(index: int) -> int:
    """Whether the register reads as a constant and takes any write."""
    if index - PSTATE_FIRST <= PSTATE_LAST - PSTATE_FIRST:
        return 1
    if index - CORE_CFG_FIRST <= CORE_CFG_LAST - CORE_CFG_FIRST:
        return 1
    if index == SYSCFG or index == HWCR or index == NB_CFG or index == INT_PENDING:
        return 1
    if index == MMIO_CFG_BASE or index == VM_CR or index == VM_HSAVE_PA:
        return 1
    if index == OSVW_LENGTH or index == OSVW_STATUS or index == RAPL_UNIT:
        return 1
    return index == PATCH_LEVEL or index == PLATFORM_ID or index == DEBUG_CTL


@native
def read_constant(cpu: Cpu, index: int) -> int:
    """A register with a constant value, into ``cpu.value``."""
    if not is_constant_amd(index):
        return UNKNOWN
    cpu.value = 0
    if index == HWCR:
        cpu.value = HWCR_TSC_FREQ_SEL
    elif index == DE_CFG:
        cpu.value = DE_CFG_LFENCE_SERIALIZE
    elif index == VM_CR:
        cpu.value = VM_CR_LOCKED_OFF
    elif index == PATCH_LEVEL:
        cpu.value = PATCH_VALUE
    return OK


@native
def read_mtrr(cpu: Cpu, index: int) -> int:
    """A memory-type register, into ``cpu.value`` (SDM vol. 3, 12.11.2)."""
    at = index - MTRR_BASE0
    fixed = mtrr_fixed_index(index)
    if at < MTRR_COUNT * 2:
        cpu.value = cpu.mtrr_mask[at >> 1] if at & 1 else cpu.mtrr_base[at >> 1]
    elif fixed < 11:
        cpu.value = cpu.mtrr_fixed[fixed]
    elif index == MTRR_DEF_TYPE:
        cpu.value = cpu.mtrr_def_type
    elif index == MTRR_CAP:
        cpu.value = MTRR_CAP_VALUE
    elif index == PAT:
        cpu.value = cpu.pat
    else:
        return UNKNOWN
    return OK


@native
def write_mtrr(cpu: Cpu, index: int, value: int) -> int:
    """Write a memory-type register; reserved bits and types are refused."""
    at = index - MTRR_BASE0
    fixed = mtrr_fixed_index(index)
    known_type = value & 0xFF < 8 and (MTRR_TYPES >> (value & 7)) & 1
    if at < MTRR_COUNT * 2:
        if at & 1:
            if value & ~(PAGE_BITS | MTRR_MASK_VALID):
                return UNKNOWN
            cpu.mtrr_mask[at >> 1] = value
        else:
            if value & ~(PAGE_BITS | 0xFF) or not known_type:
                return UNKNOWN
            cpu.mtrr_base[at >> 1] = value
    elif fixed < 11:
        if not types_valid(value, MTRR_TYPES):
            return UNKNOWN
        cpu.mtrr_fixed[fixed] = value
    elif index == MTRR_DEF_TYPE:
        if value & ~MTRR_DEF_BITS or not known_type:
            return UNKNOWN
        cpu.mtrr_def_type = value
    elif index == PAT:
        if not types_valid(value, PAT_TYPES):
            return UNKNOWN
        cpu.pat = value
    else:
        return UNKNOWN
    return OK


@native
def read_msr(cpu: Cpu, index: int) -> int:
    """A register that the CPU owns, into ``cpu.value``; UNKNOWN for every other."""
    if index == EFER:
        cpu.value = cpu.efer
    elif index == STAR:
        cpu.value = cpu.star
    elif index == LSTAR:
        cpu.value = cpu.lstar
    elif index == CSTAR:
        cpu.value = cpu.cstar
    elif index == SFMASK:
        cpu.value = cpu.sfmask
    elif index == FS_BASE:
        cpu.value = cpu.seg_base[FS]
    elif index == GS_BASE:
        cpu.value = cpu.seg_base[GS]
    elif index == KERNEL_GS_BASE:
        cpu.value = cpu.kernel_gs_base
    elif index == TSC:
        cpu.value = guest_tsc(cpu)
    elif index == TSC_ADJUST:
        cpu.value = cpu.tsc_adjust
    elif index == TSC_AUX:
        cpu.value = cpu.tsc_aux
    elif index == SYSENTER_CS:
        cpu.value = cpu.sysenter_cs
    elif index == SYSENTER_ESP:
        cpu.value = cpu.sysenter_esp
    elif index == SYSENTER_EIP:
        cpu.value = cpu.sysenter_eip
    elif index == MISC_ENABLE:
        cpu.value = cpu.misc_enable
    elif index == MCG_CAP:
        cpu.value = 0
    elif index == MCG_STATUS:
        cpu.value = cpu.mcg_status
    elif read_mtrr(cpu, index):
        return read_constant(cpu, index)
    return OK


@native
def write_efer(cpu: Cpu, value: int) -> int:
    """EFER: LMA is the processor's, LME stays while paging is on (APM vol. 2, 3.1.7)."""
    old = cpu.efer
    if value & ~EFER_BITS or ((value ^ old) & EFER_LME and cpu.cr0 & CR0_PG):
        return UNKNOWN
    value = (value & ~EFER_LMA) | (old & EFER_LMA)
    cpu.efer = value
    if (value ^ old) & EFER_NXE:
        tlb_flush_all(cpu)
    if value != old:
        mode_changed(cpu)
    return OK


@native_inline
def holds_address(index: int) -> int:
    """Whether the register takes canonical addresses only."""
    if index == LSTAR or index == CSTAR or index == SYSENTER_ESP or index == SYSENTER_EIP:
        return 1
    return index - FS_BASE <= KERNEL_GS_BASE - FS_BASE


@native
def write_msr(cpu: Cpu, index: int, value: int) -> int:
    """Write a register that the CPU owns; UNKNOWN if it doesn't, or refuses the value."""
    if holds_address(index) and not is_canonical(value):
        return UNKNOWN
    if index == EFER:
        return write_efer(cpu, value)
    if index == STAR:
        cpu.star = value
    elif index == LSTAR:
        cpu.lstar = value
    elif index == CSTAR:
        cpu.cstar = value
    elif index == SFMASK:
        cpu.sfmask = value & LOW32
    elif index == FS_BASE:
        cpu.seg_base[FS] = value
    elif index == GS_BASE:
        cpu.seg_base[GS] = value
    elif index == KERNEL_GS_BASE:
        cpu.kernel_gs_base = value
    elif index == TSC_AUX:
        cpu.tsc_aux = value & LOW32
    elif index == SYSENTER_CS:
        cpu.sysenter_cs = value & LOW32
    elif index == SYSENTER_ESP:
        cpu.sysenter_esp = value
    elif index == SYSENTER_EIP:
        cpu.sysenter_eip = value
    elif index == MISC_ENABLE:
        cpu.misc_enable = value
    elif index == MCG_STATUS:
        cpu.mcg_status = value & 7
    elif write_mtrr(cpu, index, value) and not is_constant_amd(index):
        return UNKNOWN
    return OK


@native
def fx_rdmsr(cpu: Cpu) -> int:
    """RDMSR: ECX to EDX:EAX; exits with the index for registers of the local APIC."""
    index = cpu.gpr[RCX] & LOW32
    if cpu.cpl:
        return refused(cpu)
    if belongs_to_vmm(index):
        cpu.exit_data[0] = index
        return leave(cpu, EXIT_MSR_READ)
    if read_msr(cpu, index):
        return refused(cpu)
    cpu.gpr[RAX] = cpu.value & LOW32
    cpu.gpr[RDX] = cpu.value >> 32
    return advance(cpu)


@native
def fx_wrmsr(cpu: Cpu) -> int:
    """WRMSR: EDX:EAX to ECX; exits with index and value for registers that are the VMM's."""
    index = cpu.gpr[RCX] & LOW32
    value = (cpu.gpr[RAX] & LOW32) | (cpu.gpr[RDX] << 32)
    if cpu.cpl:
        return refused(cpu)
    if is_written_by_vmm(index):
        cpu.exit_data[0] = index
        cpu.exit_data[1] = value
        return leave(cpu, EXIT_MSR_WRITE)
    if write_msr(cpu, index, value):
        return refused(cpu)
    return advance(cpu)
