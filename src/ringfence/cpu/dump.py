"""A virtual CPU as text, in the layout that emulators' "info registers" made usual.

Sources for the names: Intel SDM vol. 1, 3.4; vol. 3, 2.5 and 3.5.
"""

from __future__ import annotations

from typing import Any

from ringfence.cpu.state import (
    ATTR_DB,
    ATTR_DPL_SHIFT,
    ATTR_G,
    ATTR_L,
    ATTR_P,
    ATTR_S,
    ATTR_TYPE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    EXCEPTION_NAMES,
    FLAG_AC,
    FLAG_AF,
    FLAG_CF,
    FLAG_DF,
    FLAG_ID,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_OF,
    FLAG_PF,
    FLAG_RF,
    FLAG_SF,
    FLAG_TF,
    FLAG_ZF,
    FLAGS_FIXED,
    GPR_NAMES,
    NO_EXCEPTION,
    OTHER_FLAGS,
    SEGMENT_NAMES,
    STATUS_FLAGS,
)

_FLAG_NAMES = (
    (FLAG_ID, "ID"), (FLAG_AC, "AC"), (FLAG_RF, "RF"), (FLAG_NT, "NT"), (FLAG_OF, "OF"),
    (FLAG_DF, "DF"), (FLAG_IF, "IF"), (FLAG_TF, "TF"), (FLAG_SF, "SF"), (FLAG_ZF, "ZF"),
    (FLAG_AF, "AF"), (FLAG_PF, "PF"), (FLAG_CF, "CF"),
)  # fmt: skip
_EFER_NAMES = (
    (EFER_SCE, "SCE"), (EFER_LME, "LME"), (EFER_LMA, "LMA"), (EFER_NXE, "NXE"),
    (1 << 21, "AUTOIBRS"),
)  # fmt: skip
_CR0_NAMES = (
    (1 << 0, "PE"), (1 << 1, "MP"), (1 << 2, "EM"), (1 << 3, "TS"), (1 << 4, "ET"), (1 << 5, "NE"),
    (1 << 16, "WP"), (1 << 18, "AM"), (1 << 29, "NW"), (1 << 30, "CD"), (1 << 31, "PG"),
)  # fmt: skip
_CR4_NAMES = (
    (1 << 0, "VME"), (1 << 1, "PVI"), (1 << 2, "TSD"), (1 << 3, "DE"), (1 << 4, "PSE"),
    (1 << 5, "PAE"), (1 << 6, "MCE"), (1 << 7, "PGE"), (1 << 8, "PCE"), (1 << 9, "OSFXSR"),
    (1 << 10, "OSXMMEXCPT"), (1 << 11, "UMIP"), (1 << 16, "FSGSBASE"), (1 << 17, "PCIDE"),
    (1 << 18, "OSXSAVE"), (1 << 20, "SMEP"),
)  # fmt: skip
_SYSTEM_TYPES = {0x2: "LDT", 0x9: "TSS64-avl", 0xB: "TSS64-busy"}


def _names(value: int, table: tuple[tuple[int, str], ...]) -> str:
    return " ".join(name for bit, name in table if value & bit)


def rflags(cpu: Any) -> int:
    """RFLAGS put together from a view."""
    flags = cpu.status & STATUS_FLAGS | cpu.other_flags & OTHER_FLAGS | FLAGS_FIXED
    return int(flags | bool(cpu.flag_if) * FLAG_IF | bool(cpu.flag_df) * FLAG_DF)


def _attributes(attr: int) -> str:
    """A segment's attributes in words: presence, DPL, kind."""
    if not attr & ATTR_P:
        return "not present"
    words = [f"DPL={attr >> ATTR_DPL_SHIFT & 3}"]
    kind = attr & ATTR_TYPE
    if not attr & ATTR_S:
        words.append(_SYSTEM_TYPES.get(kind, f"system {kind:x}"))
    elif kind & 8:
        words.append("CS64" if attr & ATTR_L else "CS32" if attr & ATTR_DB else "CS16")
        words.append(f"[{'C' if kind & 4 else '-'}{'R' if kind & 2 else '-'}{'A' * (kind & 1)}]")
    else:
        words.append("DS")
        words.append(f"[{'E' if kind & 4 else '-'}{'W' if kind & 2 else '-'}{'A' * (kind & 1)}]")
    if attr & ATTR_G:
        words.append("G")
    return " ".join(words)


def dump(cpu: Any) -> str:
    """Several lines with the registers of a ``Cpu`` view, and its pending exception."""
    lines = []
    for first in range(0, 16, 4):
        lines.append(
            " ".join(
                f"{GPR_NAMES[i].upper():>3}={cpu.gpr[i]:016x}" for i in range(first, first + 4)
            )
        )
    flags = rflags(cpu)
    iopl = (flags & FLAG_IOPL) >> 12
    lines.append(
        f"RIP={cpu.rip:016x} RFL={flags:08x} [{_names(flags, _FLAG_NAMES)}] IOPL={iopl}"
        f" CPL={cpu.cpl} SHADOW={cpu.interrupt_shadow} NMI={cpu.nmi_blocked} HLT={cpu.halted}"
    )
    for i, name in enumerate(SEGMENT_NAMES):
        lines.append(
            f"{'LDT' if name == 'ldtr' else name.upper():<3}={cpu.seg_selector[i]:04x}"
            f" {cpu.seg_base[i]:016x} {cpu.seg_limit[i]:08x} {cpu.seg_attr[i]:04x}"
            f" {_attributes(cpu.seg_attr[i])}"
        )
    lines.append(f"GDT=     {cpu.gdtr_base:016x} {cpu.gdtr_limit:08x}")
    lines.append(f"IDT=     {cpu.idtr_base:016x} {cpu.idtr_limit:08x}")
    lines.append(f"CR0={cpu.cr0:08x} [{_names(cpu.cr0, _CR0_NAMES)}]")
    lines.append(f"CR2={cpu.cr2:016x} CR3={cpu.cr3:016x} CR8={cpu.cr8:x}")
    lines.append(f"CR4={cpu.cr4:08x} [{_names(cpu.cr4, _CR4_NAMES)}]")
    lines.append(f"EFER={cpu.efer:016x} [{_names(cpu.efer, _EFER_NAMES)}] XCR0={cpu.xcr0:x}")
    lines.append(" ".join(f"DR{i}={cpu.dr[i]:016x}" for i in range(4)))
    lines.append(f"DR6={cpu.dr[6]:016x} DR7={cpu.dr[7]:016x}")
    lines.append(f"KERNEL_GS={cpu.kernel_gs_base:016x} LSTAR={cpu.lstar:016x} STAR={cpu.star:016x}")
    if cpu.exc_vector != NO_EXCEPTION:
        name = EXCEPTION_NAMES.get(cpu.exc_vector, f"vector {cpu.exc_vector}")
        lines.append(f"PENDING {name} error={cpu.exc_error:x} address={cpu.exc_address:016x}")
    return "\n".join(lines)
