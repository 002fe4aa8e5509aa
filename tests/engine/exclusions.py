"""Instruction forms that the comparison with the host leaves out, and why.

Read ``BY_MNEMONIC`` as a table: the reason, then the mnemonics that it holds for. Everything else
that 64-bit mode knows, that the virtual CPU offers and that the host has is compared.
"""

from __future__ import annotations

SYSTEM = "runs at CPL 0, or its result belongs to the virtual CPU: see tests/cpu"
CONTROL = "leaves the snippet by design: see test_exceptions and tests/cpu"
VIRTUAL = "gives what the virtual CPU shows, not the host"
RANDOM = "gives something else each time"
POINTERS = "stores x87 instruction pointers, which are host addresses under translation"
AREA = "needs a prepared memory area (not compared yet)"
HINT = "reserved for future hints: each processor knows others of them"
SHORT_BRANCH = "with an operand-size prefix AMD truncates RIP to 16 bits, Intel ignores the prefix"

BY_MNEMONIC: dict[str, tuple[str, ...]] = {
    SYSTEM: (
        "CLI", "STI", "CLTS", "HLT", "INVD", "WBINVD", "WBNOINVD", "INVLPG", "INVPCID", "LGDT",
        "LIDT", "LLDT", "LTR", "LMSW", "RDMSR", "WRMSR", "RDPMC", "RSM", "SWAPGS", "SYSEXIT",
        "SYSEXITQ", "SYSRET", "SYSRETQ", "XSETBV", "MONITOR", "MWAIT", "IN", "OUT", "INSB", "INSW",
        "INSD", "OUTSB", "OUTSW", "OUTSD", "CLAC", "STAC",
    ),
    CONTROL: (
        "INT", "INT3", "INT1", "IRET", "IRETD", "IRETQ", "RETF", "SYSCALL", "SYSENTER", "UD0",
        "UD1", "UD2", "VMCALL", "VMMCALL",
    ),
    VIRTUAL: (
        "CPUID", "XGETBV", "SGDT", "SIDT", "SLDT", "STR", "SMSW", "LAR", "LSL", "VERR", "VERW",
        "LFS", "LGS", "LSS", "PUSHF", "PUSHFQ", "POPF", "POPFQ", "RDPID", "RDTSCP",
        "RDFSBASE", "RDGSBASE", "WRFSBASE", "WRGSBASE",
    ),
    RANDOM: ("RDRAND", "RDSEED", "RDTSC", "RDTSCP"),
    POINTERS: ("FNSTENV", "FSTENV", "FNSAVE", "FSAVE", "FXSAVE", "FXSAVE64"),
    AREA: (
        "XSAVE", "XSAVE64", "XSAVEOPT", "XSAVEOPT64", "XSAVEC", "XSAVEC64", "XRSTOR", "XRSTOR64",
        "FLDENV", "FRSTOR", "FXRSTOR", "FXRSTOR64",
    ),
}  # fmt: skip
MNEMONICS = {name: reason for reason, names in BY_MNEMONIC.items() for name in names}

# Forms by name of iced-x86's ``Code`` (a prefix of it is enough).
BY_CODE: dict[str, str] = {
    "MOV_SREG_": SYSTEM, "MOV_RM16_SREG": VIRTUAL, "MOV_R32M16_SREG": VIRTUAL,
    "MOV_R64M16_SREG": VIRTUAL, "MOV_R32_CR": SYSTEM, "MOV_R64_CR": SYSTEM, "MOV_CR_": SYSTEM,
    "MOV_R64_DR": SYSTEM, "MOV_DR_": SYSTEM, "PUSHW_FS": VIRTUAL, "PUSHQ_FS": VIRTUAL,
    "PUSHW_GS": VIRTUAL, "PUSHQ_GS": VIRTUAL, "POPW_FS": SYSTEM, "POPQ_FS": SYSTEM,
    "POPW_GS": SYSTEM, "POPQ_GS": SYSTEM,
    "CALL_M16": "a far call: see tests/cpu", "JMP_M16": "a far jump: see tests/cpu",
    "MOVSXD_R16": "AMD reads four bytes of memory, Intel two",
    "CALL_RM16": SHORT_BRANCH, "JMP_RM16": SHORT_BRANCH, "RETNW": SHORT_BRANCH,
}  # fmt: skip
