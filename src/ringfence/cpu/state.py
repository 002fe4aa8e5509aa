"""The architectural state of a virtual CPU, declared once.

Emitted code, compiled helpers, Python, snapshots and the debugger all take offsets and names from
``Cpu``. Sources: Intel SDM vol. 1 ch. 3 and vol. 3 ch. 2; AMD APM vol. 2 ch. 1-3.

Status flags live apart from the other flags: while guest code runs under binary translation, the
host's flags *are* the guest's, so ``status`` is filled only when control leaves guest code. IF and
DF have a byte each, so that emitted code can change them without touching the host's flags.
"""

from __future__ import annotations

from typing import Annotated

from ringfence.native.layout import Array, Struct, u8, u16, u32, u64

# --- status of an effect or a memory access -----------------------------------------------------
OK = 0
FAULT = 1
"""An exception is pending in ``exc_vector``, ``exc_error``, ``exc_address``."""
EXIT = 2
"""The VMM is needed; ``exit_reason`` says why."""

# --- general registers, in encoding order -------------------------------------------------------
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip

# --- segment registers, in encoding order, then the two system ones ------------------------------
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")

# Segment attributes: descriptor bits 40-47 and 52-55, as in a VMCB (AMD APM vol. 2, 15.5.1).
ATTR_TYPE = 0x00F
ATTR_S = 0x010
ATTR_DPL_SHIFT = 5
ATTR_P = 0x080
ATTR_AVL = 0x100
ATTR_L = 0x200
ATTR_DB = 0x400
ATTR_G = 0x800

# --- RFLAGS (SDM vol. 1, 3.4.3) -----------------------------------------------------------------
FLAG_CF, FLAG_PF, FLAG_AF, FLAG_ZF, FLAG_SF, FLAG_OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x800
FLAG_TF, FLAG_IF, FLAG_DF = 0x100, 0x200, 0x400
FLAG_IOPL, FLAG_NT, FLAG_RF, FLAG_VM = 0x3000, 0x4000, 0x10000, 0x20000
FLAG_AC, FLAG_VIF, FLAG_VIP, FLAG_ID = 0x40000, 0x80000, 0x100000, 0x200000
STATUS_FLAGS = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF
OTHER_FLAGS = FLAG_TF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_VM | FLAG_AC | FLAG_ID
FLAGS_FIXED = 0x2

# --- control registers (SDM vol. 3, 2.5) ----------------------------------------------------------
CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
CR0_WP, CR0_AM, CR0_NW, CR0_CD, CR0_PG = 1 << 16, 1 << 18, 1 << 29, 1 << 30, 1 << 31
CR4_VME, CR4_PVI, CR4_TSD, CR4_DE, CR4_PSE, CR4_PAE = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
CR4_MCE, CR4_PGE, CR4_PCE, CR4_OSFXSR, CR4_OSXMMEXCPT = 0x40, 0x80, 0x100, 0x200, 0x400
CR4_UMIP, CR4_LA57, CR4_FSGSBASE, CR4_PCIDE = 0x800, 0x1000, 0x10000, 0x20000
CR4_OSXSAVE, CR4_SMEP, CR4_SMAP = 0x40000, 0x100000, 0x200000
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 0x1, 0x100, 0x400, 0x800

# --- exceptions (SDM vol. 3, 6.15) ----------------------------------------------------------------
DE, DB, NMI, BP, OF, BR, UD, NM, DF = range(9)
TS, NP, SS_FAULT, GP, PF = 10, 11, 12, 13, 14
MF, AC, MC, XM = 16, 17, 18, 19
EXCEPTION_NAMES = {
    DE: "#DE", DB: "#DB", NMI: "NMI", BP: "#BP", OF: "#OF", BR: "#BR", UD: "#UD", NM: "#NM",
    DF: "#DF", TS: "#TS", NP: "#NP", SS_FAULT: "#SS", GP: "#GP", PF: "#PF", MF: "#MF", AC: "#AC",
    MC: "#MC", XM: "#XM",
}  # fmt: skip
HAS_ERROR_CODE = (
    (1 << DF) | (1 << TS) | (1 << NP) | (1 << SS_FAULT) | (1 << GP) | (1 << PF) | (1 << AC)
)
# Page-fault error code bits (SDM vol. 3, 4.7).
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16

NO_EXCEPTION = 0xFF

SHADOW_MOV_SS, SHADOW_STI = 1, 2
"""What casts an interrupt shadow; that of MOV SS is on debug exceptions, too (vol. 3, 6.8.3)."""

# --- exit reasons that effects report (engine.exits gives them their typed form) ------------------
(
    EXIT_NONE,
    EXIT_PORT_IN,
    EXIT_PORT_OUT,
    EXIT_HALT,
    EXIT_MSR_READ,
    EXIT_MSR_WRITE,
    EXIT_HYPERCALL,
    EXIT_SHUTDOWN,
    EXIT_CR8_WRITE,
    EXIT_CR8_READ,
    EXIT_PORT_STRING,
) = range(11)

MTRR_COUNT = 8
TSC_RATIO_BITS = 48
TSC_RATIO_ONE = 1 << TSC_RATIO_BITS
"""``Cpu.tsc_ratio`` of a guest whose counter has the host's rate."""
XSAVE_BYTES = 2432
"""XSAVE area with all components that exist here (see ``components``)."""


class Cpu(Struct):
    """State of one virtual CPU."""

    # General registers, instruction pointer, flags.
    gpr: Annotated[Array, u64, 16]
    rip: Annotated[int, u64]
    next_rip: Annotated[int, u64]
    """Address after the instruction that an effect carries out."""
    status: Annotated[int, u64]
    """CF PF AF ZF SF OF, at their places in RFLAGS; valid outside guest code."""
    other_flags: Annotated[int, u64]
    """TF IOPL NT RF VM AC ID, at their places in RFLAGS."""
    flag_if: Annotated[int, u8]
    flag_df: Annotated[int, u8]
    cpl: Annotated[int, u8]
    interrupt_shadow: Annotated[int, u8]
    """SHADOW_STI or SHADOW_MOV_SS until the next instruction is done, else 0."""
    nmi_blocked: Annotated[int, u8]
    halted: Annotated[int, u8]
    kicked: Annotated[int, u8]
    """The next end of HLT needs no interrupt: another CPU has asked for it. Set by any thread."""
    apic_disabled: Annotated[int, u8]
    """IA32_APIC_BASE.EN is clear, so CPUID shows no local APIC (SDM vol. 3, 11.4.3)."""
    wait_for_sipi: Annotated[int, u8]
    """Since INIT: nothing but a start-up message is heard (SDM vol. 3, 9.4.4)."""
    nmi_pending: Annotated[int, u8]
    init_pending: Annotated[int, u8]
    sipi_pending: Annotated[int, u8]
    sipi_vector: Annotated[int, u8]
    """Messages that have come and are still to be seen to (see ``cpu.signals``)."""

    # Segment registers: selector, hidden base, limit (in bytes), attributes (ATTR_*).
    seg_base: Annotated[Array, u64, 8]
    seg_limit: Annotated[Array, u32, 8]
    seg_selector: Annotated[Array, u16, 8]
    seg_attr: Annotated[Array, u16, 8]
    gdtr_base: Annotated[int, u64]
    idtr_base: Annotated[int, u64]
    gdtr_limit: Annotated[int, u16]
    idtr_limit: Annotated[int, u16]

    # Control and debug registers.
    cr0: Annotated[int, u64]
    cr2: Annotated[int, u64]
    cr3: Annotated[int, u64]
    cr4: Annotated[int, u64]
    cr8: Annotated[int, u64]
    xcr0: Annotated[int, u64]
    dr: Annotated[Array, u64, 8]

    # Model-specific registers that the CPU itself owns.
    efer: Annotated[int, u64]
    star: Annotated[int, u64]
    lstar: Annotated[int, u64]
    cstar: Annotated[int, u64]
    sfmask: Annotated[int, u64]
    kernel_gs_base: Annotated[int, u64]
    sysenter_cs: Annotated[int, u64]
    sysenter_esp: Annotated[int, u64]
    sysenter_eip: Annotated[int, u64]
    pat: Annotated[int, u64]
    tsc_aux: Annotated[int, u64]
    tsc_offset: Annotated[int, u64]
    """Guest TSC minus scaled host TSC, modulo 2**64 (see cpu.tsc)."""
    tsc_ratio: Annotated[int, u64]
    """Guest ticks per host tick, with TSC_RATIO_BITS fraction bits."""
    tsc_adjust: Annotated[int, u64]
    misc_enable: Annotated[int, u64]
    mtrr_def_type: Annotated[int, u64]
    mtrr_fixed: Annotated[Array, u64, 11]
    mtrr_base: Annotated[Array, u64, 8]
    mtrr_mask: Annotated[Array, u64, 8]
    mcg_status: Annotated[int, u64]

    # The pending exception, and the vector being delivered (for double faults).
    exc_vector: Annotated[int, u8]
    exc_error: Annotated[int, u64]
    exc_address: Annotated[int, u64]
    delivering: Annotated[int, u8]
    """Vector whose delivery is under way, NO_EXCEPTION otherwise."""

    # Operands and results of effects and memory accesses.
    op: Annotated[Array, u64, 4]
    ea: Annotated[int, u64]
    """Linear address of an effect's memory operand."""
    linear: Annotated[int, u64]
    """Linear address of an offset that was checked against its segment (``cpu.stack``)."""
    value: Annotated[int, u64]
    """Result of a successful read."""
    exit_reason: Annotated[int, u64]
    exit_data: Annotated[Array, u64, 4]

    # CPUID leaves: the table and how many rows of it are used (see cpu.cpuid).
    cpuid_table: Annotated[int, u64]
    """Host address of rows of six 32-bit words: leaf, subleaf (~0 for any), eax, ebx, ecx, edx."""
    cpuid_rows: Annotated[int, u64]

    # Counters.
    exceptions: Annotated[Array, u64, 32]
    """Exceptions delivered, by vector."""
    software_interrupts: Annotated[int, u64]
    interrupts: Annotated[Array, u64, 256]
    """External interrupts delivered, by vector."""

    # Vector and x87 state while control is outside guest code.
    xsave: Annotated[Array, u8, 2432, 64]
    """An XSAVE area in standard format; see ``components``."""
