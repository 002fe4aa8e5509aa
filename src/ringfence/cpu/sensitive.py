"""The sensitive instructions of x86-64, and what carries each out under binary translation.

Popek and Goldberg (1974) call an instruction *privileged* if it traps in user mode and not in
supervisor mode. It is *control-sensitive* if it changes the machine's mode or the configuration of
its resources, *behaviour-sensitive* if its result depends on them. Trap-and-emulate needs every
sensitive instruction to be privileged; those with ``in_user`` SILENT break that on x86:
de-privileged, they run on with another result. A translator replaces them all alike.

Sources: Robin and Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual
Machine Monitor" (2000), brought to 64-bit mode; Intel SDM vol. 3, 5.9 (privileged instructions).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class InUser(Enum):
    """What the instruction does at CPL 3 on real hardware."""

    TRAPS = "traps"
    SILENT = "silently differs"
    DEPENDS = "traps or not, as the supervisor configured it"
    WORKS = "works as meant, through the operating system's own tables"


TRAPS, SILENT, DEPENDS, WORKS = InUser


@dataclass(frozen=True)
class Sensitive:
    """One sensitive instruction, or one sensitive form of it."""

    name: str
    """Its iced-x86 mnemonic; MOV's forms are MOV_CR, MOV_DR and MOV_SREG."""
    privileged: bool
    control: bool
    behaviour: bool
    in_user: InUser
    effects: tuple[str, ...]
    """The native functions that carry it out; empty where inline code does."""
    note: str = ""

    @property
    def mnemonic(self) -> str:
        """The iced-x86 mnemonic without the form."""
        return self.name.partition("_")[0]

    @property
    def breaks_trap_and_emulate(self) -> bool:
        """Sensitive, yet not sure to trap at CPL 3: de-privileging alone can't virtualize it."""
        return self.in_user in (SILENT, DEPENDS)


def _row(
    names: str, kind: str, in_user: InUser, effects: str, note: str = ""
) -> tuple[Sensitive, ...]:
    """Rows that differ in name only; ``kind``: p(rivileged), c(ontrol-), b(ehaviour-sensitive)."""
    return tuple(
        Sensitive(
            name, "p" in kind, "c" in kind, "b" in kind, in_user, tuple(effects.split()), note
        )
        for name in names.split()
    )


_UMIP = "traps at CPL 3 only with CR4.UMIP"
_TABLES = "shows where the real tables are; " + _UMIP
_IF = "at CPL > IOPL the change of IF is dropped without a trap"
_HIDDEN = "reads the descriptor tables and compares with CPL"
_FAR = "checks and exposes CPL, may go through gates"

TABLE: tuple[Sensitive, ...] = (
    # Control registers and modes.
    *_row("MOV_CR", "pcb", TRAPS, "fx_mov_to_cr fx_mov_from_cr"),
    *_row("MOV_DR", "pcb", TRAPS, "fx_mov_to_dr fx_mov_from_dr"),
    *_row("CLTS", "pc", TRAPS, "fx_clts"),
    *_row("LMSW", "pc", TRAPS, "fx_lmsw"),
    *_row("SMSW", "b", SILENT, "fx_smsw fx_smsw_mem", "shows CR0; " + _UMIP),
    *_row("XSETBV", "pc", TRAPS, "fx_xsetbv"),
    *_row("XGETBV", "b", SILENT, "fx_xgetbv", "shows XCR0"),
    *_row("RDMSR", "pb", TRAPS, "fx_rdmsr"),
    *_row("WRMSR", "pc", TRAPS, "fx_wrmsr"),
    *_row("SWAPGS", "pc", TRAPS, "fx_swapgs"),
    *_row(
        "RDFSBASE RDGSBASE WRFSBASE WRGSBASE", "cb", DEPENDS, "fx_fsgsbase", "#UD with FSGSBASE off"
    ),
    # Descriptor tables and segments.
    *_row("LGDT", "pc", TRAPS, "fx_lgdt"),
    *_row("LIDT", "pc", TRAPS, "fx_lidt"),
    *_row("LLDT", "pc", TRAPS, "fx_lldt"),
    *_row("LTR", "pc", TRAPS, "fx_ltr"),
    *_row("SGDT", "b", SILENT, "fx_sgdt", _TABLES),
    *_row("SIDT", "b", SILENT, "fx_sidt", _TABLES),
    *_row("SLDT", "b", SILENT, "fx_sldt fx_sldt_mem", _TABLES),
    *_row("STR", "b", SILENT, "fx_str fx_str_mem", _TABLES),
    *_row("LAR", "b", SILENT, "fx_lar", _HIDDEN),
    *_row("LSL", "b", SILENT, "fx_lsl", _HIDDEN),
    *_row("VERR", "b", SILENT, "fx_verr", _HIDDEN),
    *_row("VERW", "b", SILENT, "fx_verw", _HIDDEN),
    *_row("MOV_SREG", "cb", SILENT, "fx_mov_to_sreg", "selectors show the real CPL"),
    *_row("PUSH_SREG", "b", SILENT, "fx_push_sreg", "selectors show the real CPL"),
    *_row("POP_SREG", "cb", SILENT, "fx_pop_sreg", _HIDDEN),
    *_row("LSS LFS LGS", "cb", SILENT, "fx_load_far_pointer", _HIDDEN),
    # Flags and interrupts.
    *_row("CLI", "pc", DEPENDS, "fx_cli", "traps at CPL > IOPL"),
    *_row("STI", "pc", DEPENDS, "fx_sti", "traps at CPL > IOPL"),
    *_row("PUSHF PUSHFD PUSHFQ", "b", SILENT, "fx_pushf", "shows the real IF and IOPL"),
    *_row("POPF POPFD POPFQ", "cb", SILENT, "fx_popf", _IF),
    *_row("CLAC STAC", "pc", TRAPS, "fx_ud", "SMAP is not offered"),
    *_row("INT INT3 INT1 INTO", "cb", WORKS, "fx_int fx_int1 fx_ud", "goes through the IDT"),
    *_row("IRET IRETD IRETQ", "cb", SILENT, "fx_iret", _IF),
    *_row("HLT", "pc", TRAPS, "fx_hlt"),
    # Transfers between levels.
    *_row("SYSCALL", "c", WORKS, "fx_syscall", "would enter the host's kernel"),
    *_row("SYSRET SYSRETQ", "pc", TRAPS, "fx_sysret"),
    *_row("SYSENTER", "c", WORKS, "fx_sysenter", "#UD in long mode on AMD CPUs"),
    *_row("SYSEXIT SYSEXITQ", "pc", TRAPS, "fx_sysexit", "#UD in long mode on AMD CPUs"),
    *_row("JMP_FAR", "cb", SILENT, "fx_jmp_far", _FAR),
    *_row("CALL_FAR", "cb", SILENT, "fx_call_far", _FAR),
    *_row("RETF", "cb", SILENT, "fx_ret_far", _FAR),
    # Memory management and caches.
    *_row("INVLPG", "pc", TRAPS, "fx_invlpg"),
    *_row("INVPCID", "pc", TRAPS, "fx_invpcid"),
    *_row("INVD WBINVD WBNOINVD", "pc", TRAPS, "fx_wbinvd"),
    # Input and output.
    *_row("IN", "pcb", DEPENDS, "fx_in", "traps at CPL > IOPL unless the TSS allows the port"),
    *_row("OUT", "pc", DEPENDS, "fx_out", "traps at CPL > IOPL unless the TSS allows the port"),
    *_row("INSB INSW INSD", "pcb", DEPENDS, "fx_port_string", "as IN"),
    *_row("OUTSB OUTSW OUTSD", "pc", DEPENDS, "fx_port_string", "as OUT"),
    # Identification, time and counters.
    *_row("CPUID", "b", SILENT, "fx_cpuid", "shows the real CPU"),
    *_row("RDTSC", "b", DEPENDS, "fx_rdtsc", "traps with CR4.TSD; shows the real time"),
    *_row("RDTSCP", "b", DEPENDS, "fx_rdtscp", "traps with CR4.TSD; shows the real time and CPU"),
    *_row("RDPID", "b", SILENT, "fx_rdpid", "shows the real CPU's number"),
    *_row("RDPMC", "b", DEPENDS, "fx_rdpmc", "traps unless CR4.PCE"),
    *_row("MONITOR MWAIT", "pc", TRAPS, "fx_ud", "not offered"),
    *_row("RSM GETSEC", "pc", TRAPS, "fx_ud", "not offered"),
    *_row("VMCALL VMMCALL", "c", WORKS, "fx_vmcall", "would reach an outer hypervisor"),
)

BY_NAME: dict[str, Sensitive] = {row.name: row for row in TABLE}


def critical() -> tuple[Sensitive, ...]:
    """The instructions for which x86 isn't virtualizable by trap-and-emulate."""
    return tuple(row for row in TABLE if row.breaks_trap_and_emulate)
