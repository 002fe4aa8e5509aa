"""Control registers, the machine status word, extended control and segment bases.

Each ``fx_*`` carries out one instruction (see ``cpu.system`` for the conventions); operands come
in ``cpu.op`` and ``cpu.ea``.

Sources: Intel SDM vol. 3, 2.5 (control registers), 4.10.4 (invalidation);
AMD APM vol. 2, 3.1 and 5.5; SDM vol. 2 for each instruction's checks.
"""

from __future__ import annotations

from ringfence.cpu.components import AVX512_STATE
from ringfence.cpu.cpuid import PHYSICAL_BITS, find_row
from ringfence.cpu.flags import is_canonical, raise_fault
from ringfence.cpu.ports import (
    linear_write,
    mode_changed,
    tlb_flush_all,
    tlb_flush_nonglobal,
)
from ringfence.cpu.stack import in_64bit
from ringfence.cpu.state import (
    ATTR_L,
    CR0_AM,
    CR0_CD,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_MCE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PSE,
    CR4_PVI,
    CR4_SMEP,
    CR4_TSD,
    CR4_UMIP,
    CR4_VME,
    CS,
    EFER_LMA,
    EFER_LME,
    EXIT,
    EXIT_CR8_READ,
    EXIT_CR8_WRITE,
    FAULT,
    GP,
    GS,
    OK,
    RAX,
    RCX,
    RDX,
    UD,
    Cpu,
)
from ringfence.native.dialect import load32, native, native_inline

LOW32 = 0xFFFFFFFF
CR0_BITS = (
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG
)
CR0_PAGING = CR0_PE | CR0_WP | CR0_PG
CR4_BITS = (
    CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE
    | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_UMIP | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP
)  # fmt: skip
CR4_PAGING = CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP
CR3_NOFLUSH = 1 << 63
CR3_RESERVED = (CR3_NOFLUSH - 1) & ~((1 << PHYSICAL_BITS) - 1)
PCID_MASK = 0xFFF


@native_inline
def leave(cpu: Cpu, reason: int) -> int:
    """Ask for the VMM; RIP stays at the instruction."""
    cpu.exit_reason = reason
    return EXIT


@native_inline
def advance(cpu: Cpu) -> int:
    """The instruction is done."""
    cpu.rip = cpu.next_rip
    return OK


@native_inline
def refused(cpu: Cpu) -> int:
    """#GP(0), what nearly every failed check comes to."""
    return raise_fault(cpu, GP, 0)


@native_inline
def set_gpr(cpu: Cpu, register: int, size: int, value: int) -> int:
    """Write a general register as an operand of 2, 4 or 8 bytes (SDM vol. 1, 3.4.1.1)."""
    if size == 2:
        cpu.gpr[register] = (cpu.gpr[register] & ~0xFFFF) | (value & 0xFFFF)
    elif size == 4:
        cpu.gpr[register] = value & LOW32
    else:
        cpu.gpr[register] = value
    return OK


@native_inline
def umip_refuses(cpu: Cpu) -> int:
    """Whether user-mode instruction prevention applies (SDM vol. 3, 2.5, CR4.UMIP)."""
    return cpu.cpl != 0 and cpu.cr4 & CR4_UMIP != 0


# --- control registers ------------------------------------------------------------------------


@native
def write_cr0(cpu: Cpu, value: int) -> int:
    """MOV to CR0. Undefined low bits are dropped, ET stays set (SDM vol. 3, 2.5)."""
    old = cpu.cr0
    if value >> 32 or (value & CR0_NW and not value & CR0_CD):
        return refused(cpu)
    if value & CR0_PG and not value & CR0_PE:
        return refused(cpu)
    value = (value & CR0_BITS) | CR0_ET
    if old & CR0_PG and not value & CR0_PG:
        # Paging can't be switched off under 64-bit code or with PCIDs; from compatibility mode
        # it can, and leads out of long mode.
        if in_64bit(cpu) or cpu.cr4 & CR4_PCIDE:
            return refused(cpu)
        cpu.efer = cpu.efer & ~EFER_LMA
    if value & CR0_PG and not old & CR0_PG and cpu.efer & EFER_LME:
        if not cpu.cr4 & CR4_PAE or cpu.seg_attr[CS] & ATTR_L:
            return refused(cpu)
        cpu.efer = cpu.efer | EFER_LMA
    cpu.cr0 = value
    if (old ^ value) & CR0_PAGING:
        tlb_flush_all(cpu)
    if old != value:
        mode_changed(cpu)
    return advance(cpu)


@native
def write_cr3(cpu: Cpu, value: int) -> int:
    """MOV to CR3 (SDM vol. 3, 4.5 and 4.10.4.1).

    Bit 63 (with PCIDs: keep what is cached for the new one) is accepted, but the flush happens
    all the same: cached translations carry no PCID, so those of the old one have to go.
    """
    pcids = cpu.cr4 & CR4_PCIDE
    if value & CR3_RESERVED or (value & CR3_NOFLUSH and not pcids):
        return refused(cpu)
    cpu.cr3 = value & ~CR3_NOFLUSH
    tlb_flush_nonglobal(cpu)
    return advance(cpu)


@native
def write_cr4(cpu: Cpu, value: int) -> int:
    """MOV to CR4: features that CPUID doesn't offer are reserved bits (SDM vol. 3, 2.5)."""
    old = cpu.cr4
    if value & ~CR4_BITS:
        return refused(cpu)
    if cpu.efer & EFER_LMA and not value & CR4_PAE:
        return refused(cpu)
    new = value & ~old
    if new & CR4_PCIDE and (not cpu.efer & EFER_LMA or cpu.cr3 & PCID_MASK):
        return refused(cpu)
    cpu.cr4 = value
    if (old ^ value) & CR4_PAGING:
        tlb_flush_all(cpu)
    if old != value:
        mode_changed(cpu)
    return advance(cpu)


@native_inline
def has_control_register(number: int) -> int:
    """Whether CR ``number`` exists: 0, 2, 3, 4 and 8 do."""
    return number <= 8 and (0b100011101 >> number) & 1 != 0


@native
def fx_mov_to_cr(cpu: Cpu) -> int:
    """MOV CRn, r64: ``op[0]`` general register, ``op[1]`` control register."""
    number = cpu.op[1]
    value = cpu.gpr[cpu.op[0]]
    if not has_control_register(number):
        return raise_fault(cpu, UD, 0)
    if cpu.cpl:
        return refused(cpu)
    if number == 0:
        return write_cr0(cpu, value)
    if number == 3:
        return write_cr3(cpu, value)
    if number == 4:
        return write_cr4(cpu, value)
    if number == 8:
        if value >> 4:
            return refused(cpu)
        cpu.exit_data[0] = value
        return leave(cpu, EXIT_CR8_WRITE)
    cpu.cr2 = value
    return advance(cpu)


@native
def fx_mov_from_cr(cpu: Cpu) -> int:
    """MOV r64, CRn: ``op[0]`` general register, ``op[1]`` control register."""
    number = cpu.op[1]
    if not has_control_register(number):
        return raise_fault(cpu, UD, 0)
    if cpu.cpl:
        return refused(cpu)
    if number == 8:
        cpu.exit_data[0] = cpu.op[0]
        return leave(cpu, EXIT_CR8_READ)
    value = cpu.cr0
    if number == 2:
        value = cpu.cr2
    elif number == 3:
        value = cpu.cr3
    elif number == 4:
        value = cpu.cr4
    cpu.gpr[cpu.op[0]] = value
    return advance(cpu)


# --- machine status word ----------------------------------------------------------------------


@native
def fx_clts(cpu: Cpu) -> int:
    """CLTS: clear CR0.TS."""
    if cpu.cpl:
        return refused(cpu)
    if cpu.cr0 & CR0_TS:
        cpu.cr0 = cpu.cr0 & ~CR0_TS
        mode_changed(cpu)
    return advance(cpu)


@native
def fx_lmsw(cpu: Cpu) -> int:
    """LMSW: ``op[0]`` the source's value; PE, MP, EM, TS only, and PE can't be cleared."""
    if cpu.cpl:
        return refused(cpu)
    old = cpu.cr0
    value = (old & ~(CR0_MP | CR0_EM | CR0_TS)) | (cpu.op[0] & (CR0_PE | CR0_MP | CR0_EM | CR0_TS))
    if old != value:
        cpu.cr0 = value
        mode_changed(cpu)
    return advance(cpu)


@native
def fx_smsw(cpu: Cpu) -> int:
    """SMSW, register form: ``op[0]`` general register, ``op[1]`` operand size."""
    if umip_refuses(cpu):
        return refused(cpu)
    set_gpr(cpu, cpu.op[0], cpu.op[1], cpu.cr0)
    return advance(cpu)


@native
def fx_smsw_mem(cpu: Cpu) -> int:
    """SMSW, memory form: always 16 bits, at ``ea``."""
    if umip_refuses(cpu):
        return refused(cpu)
    if linear_write(cpu, cpu.ea, 2, cpu.cr0 & 0xFFFF, cpu.cpl == 3):
        return FAULT
    return advance(cpu)


# --- extended control register, segment bases ---------------------------------------------------


@native_inline
def xcr0_offered(cpu: Cpu) -> int:
    """State components that CPUID leaf 0Dh offers."""
    row = find_row(cpu, 0xD, 0)
    return load32(row + 8) if row else 7


@native
def fx_xsetbv(cpu: Cpu) -> int:
    """XSETBV: x87 always, AVX only with SSE, AVX-512 whole and with AVX (SDM vol. 1, 13.3)."""
    if not cpu.cr4 & CR4_OSXSAVE:
        return raise_fault(cpu, UD, 0)
    value = (cpu.gpr[RAX] & LOW32) | (cpu.gpr[RDX] << 32)
    if cpu.cpl or cpu.gpr[RCX] & LOW32:
        return refused(cpu)
    if not value & 1 or value & 6 == 4 or value & ~xcr0_offered(cpu):
        return refused(cpu)
    if value & AVX512_STATE and value & (AVX512_STATE | 6) != AVX512_STATE | 6:
        return refused(cpu)
    cpu.xcr0 = value
    mode_changed(cpu)
    return advance(cpu)


@native
def fx_xgetbv(cpu: Cpu) -> int:
    """XGETBV: only XCR0 exists (ECX 1, the components in use, has a feature bit of its own)."""
    if not cpu.cr4 & CR4_OSXSAVE:
        return raise_fault(cpu, UD, 0)
    if cpu.gpr[RCX] & LOW32:
        return refused(cpu)
    cpu.gpr[RAX] = cpu.xcr0 & LOW32
    cpu.gpr[RDX] = cpu.xcr0 >> 32
    return advance(cpu)


@native
def fx_swapgs(cpu: Cpu) -> int:
    """SWAPGS: exchange GS.base and IA32_KERNEL_GS_BASE."""
    if cpu.cpl:
        return refused(cpu)
    base = cpu.seg_base[GS]
    cpu.seg_base[GS] = cpu.kernel_gs_base
    cpu.kernel_gs_base = base
    return advance(cpu)


@native
def fx_fsgsbase(cpu: Cpu) -> int:
    """RDFSBASE … WRGSBASE: ``op`` general register, size (4 or 8), FS or GS, 1 to write."""
    register = cpu.op[0]
    segment = cpu.op[2]
    if not cpu.cr4 & CR4_FSGSBASE:
        return raise_fault(cpu, UD, 0)
    value = cpu.gpr[register] if cpu.op[3] else cpu.seg_base[segment]
    if cpu.op[1] == 4:
        value &= LOW32
    if not is_canonical(value):
        return refused(cpu)
    if cpu.op[3]:
        cpu.seg_base[segment] = value
    else:
        cpu.gpr[register] = value
    return advance(cpu)
