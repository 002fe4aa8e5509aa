"""Segments, delivery of exceptions and interrupts, and far transfers."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from typing import Any

import iced_x86
import pytest

import ringfence.cpu
from ringfence.cpu import exceptions, flags, segments, sensitive, syscalls, transfer
from ringfence.cpu.state import (
    CS,
    DB,
    DE,
    DF,
    DS,
    ES,
    EXIT,
    EXIT_SHUTDOWN,
    FAULT,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FS,
    GP,
    GS,
    LDTR,
    NMI,
    NO_EXCEPTION,
    NP,
    OK,
    PF,
    RAX,
    RBP,
    RCX,
    RSP,
    SS,
    SS_FAULT,
    TR,
    TS,
    UD,
)

GDT, IDT, TSS, LDT, TABLE_END = 0x11000, 0x12000, 0x13000, 0x14000, 0x15000
KSTACK, USTACK, IST1, CODE, UCODE, DATA = 0x20000, 0x24000, 0x28000, 0x30000, 0x38000, 0x3C000
KCODE64, KDATA, UDATA, UCODE64 = 0x10, 0x18, 0x2B, 0x33
CODE32, CONFORMING, ABSENT, RODATA, TSS_SEL, LDT_SEL = 0x38, 0x40, 0x48, 0x50, 0x60, 0x70
GATE, GATE_UP, EXEC_ONLY, KCODE64_FRESH, ABSENT_CODE = 0x80, 0x90, 0xA0, 0xA8, 0xB0
NONCANONICAL = 0x8000_0000_0000


def flat_descriptor(access: int, nibble: int) -> int:
    """A descriptor with base 0 and the largest limit."""
    return 0x000F_0000_0000_FFFF | access << 40 | nibble << 52


def system_descriptor(kind: int, base: int, limit: int, present: int = 1) -> tuple[int, int]:
    """The two words of a 16-byte descriptor."""
    low = limit | (base & 0xFFFFFF) << 16 | (kind | present << 7) << 40 | (base >> 24 & 0xFF) << 56
    return low, base >> 32


def gate_descriptor(
    target: int, selector: int, kind: int, dpl: int = 0, ist: int = 0, present: int = 1
) -> tuple[int, int]:
    """The two words of an interrupt, trap or call gate."""
    low = target & 0xFFFF | selector << 16 | ist << 32
    low |= (kind | dpl << 5 | present << 7) << 40 | (target >> 16 & 0xFFFF) << 48
    return low, target >> 32


class Rig:
    """A machine with tables as a 64-bit kernel has them."""

    def __init__(self, machine: Any) -> None:
        self.m = machine
        self.cpu = cpu = machine.cpu
        entries = {
            KCODE64: flat_descriptor(0x9B, 0xA),
            KDATA: flat_descriptor(0x93, 0xC),
            UDATA & ~3: flat_descriptor(0xF3, 0xC),
            UCODE64 & ~3: flat_descriptor(0xFB, 0xA),
            CODE32: flat_descriptor(0x9B, 0xC),
            CONFORMING: flat_descriptor(0x9F, 0xA),
            ABSENT: flat_descriptor(0x13, 0xC),
            RODATA: flat_descriptor(0xF1, 0xC),
            EXEC_ONLY: flat_descriptor(0x99, 0xA),
            KCODE64_FRESH: flat_descriptor(0x9A, 0xA),
            ABSENT_CODE: flat_descriptor(0x1B, 0xA),
        }
        for selector, descriptor in entries.items():
            machine.write(GDT + selector, descriptor)
        self.system(TSS_SEL, *system_descriptor(9, TSS, 0x67))
        self.system(LDT_SEL, *system_descriptor(2, LDT, 0xF))
        self.system(GATE, *gate_descriptor(CODE, KCODE64, 12, dpl=3))
        self.system(GATE_UP, *gate_descriptor(CODE, CONFORMING, 12, dpl=0))
        machine.write(LDT + 8, flat_descriptor(0x93, 0xC))
        cpu.gdtr_base, cpu.gdtr_limit = GDT, 0xB7
        cpu.idtr_base, cpu.idtr_limit = IDT, 0xFFF
        machine.write(TSS + 4, KSTACK)
        machine.write(TSS + 0x24, IST1)
        cpu.seg_selector[TR], cpu.seg_base[TR], cpu.seg_limit[TR] = TSS_SEL, TSS, 0x67
        self.level(0)

    def system(self, selector: int, low: int, high: int) -> None:
        """Put a 16-byte descriptor into the GDT."""
        self.m.write(GDT + selector, low)
        self.m.write(GDT + selector + 8, high)

    def gate(self, vector: int, target: int = CODE, selector: int = KCODE64, **more: int) -> None:
        """Put a gate into the IDT; an interrupt gate unless ``kind`` says otherwise."""
        low, high = gate_descriptor(target, selector, more.pop("kind", 14), **more)
        self.m.write(IDT + vector * 16, low)
        self.m.write(IDT + vector * 16 + 8, high)

    def level(self, level: int) -> None:
        """Run at a privilege level with flat segments."""
        cpu = self.cpu
        cpu.cpl = level
        user = level == 3
        cpu.seg_selector[CS] = UCODE64 if user else KCODE64
        cpu.seg_selector[SS] = UDATA if user else KDATA
        cpu.seg_attr[CS] = 0xAFB if user else 0xA9B
        cpu.seg_attr[SS] = 0xCF3 if user else 0xC93
        cpu.gpr[RSP] = (USTACK if user else KSTACK) - 0x103
        cpu.rip = UCODE if user else CODE

    def raise_(self, vector: int, error: int = 0, address: int = 0) -> int:
        """Make an exception pending and deliver it."""
        self.cpu.exc_vector, self.cpu.exc_error = vector, error
        self.cpu.exc_address = address
        return self.m.run("deliver_exception")

    def frame(self, count: int) -> list[int]:
        """The topmost words of the stack."""
        return [self.m.read(self.cpu.gpr[RSP] + 8 * i) for i in range(count)]

    def push(self, *values: int, size: int = 8) -> int:
        """Push values, last one deepest; returns RSP."""
        for value in reversed(values):
            self.cpu.gpr[RSP] -= size
            self.m.write(self.cpu.gpr[RSP], value, size)
        return int(self.cpu.gpr[RSP])

    def faults(self, name: str, vector: int, error: int, *operands: int) -> None:
        """An effect must fault and leave the state alone."""
        cpu = self.cpu
        cpu.rip, cpu.next_rip = 0x1000, 0x1002
        before = self.m.snapshot()
        assert self.m.effect(name, *operands) == FAULT
        assert self.m.pending == (vector, error)
        assert self.m.snapshot() == before


@pytest.fixture
def rig(flat_machine: Callable[..., Any]) -> Rig:
    return Rig(flat_machine(flags, segments, exceptions, transfer, syscalls))


# --- segments -----------------------------------------------------------------------------------
def test_mov_to_sreg_loads_hidden_parts_and_marks_accessed(rig: Rig) -> None:
    rig.m.write(GDT + KDATA, 0x12CF_9234_5678_FFFF)
    assert rig.m.effect("fx_mov_to_sreg", GS, KDATA) == OK
    cpu = rig.cpu
    assert (cpu.seg_selector[GS], cpu.seg_base[GS]) == (KDATA, 0x12345678)
    assert (cpu.seg_limit[GS], cpu.seg_attr[GS]) == (0xFFFFFFFF, 0xC93)
    assert rig.m.read(GDT + KDATA) == 0x12CF_9334_5678_FFFF
    assert cpu.rip == 0x1002 and not cpu.interrupt_shadow


def test_mov_to_ss_shadows_interrupts_and_null_rules(rig: Rig) -> None:
    assert rig.m.effect("fx_mov_to_sreg", SS, 0) == OK
    assert rig.cpu.interrupt_shadow == 1 and rig.cpu.seg_selector[SS] == 0
    rig.faults("fx_mov_to_sreg", GP, 0, SS, 3)
    rig.level(3)
    rig.faults("fx_mov_to_sreg", GP, 0, SS, 3)
    assert rig.m.effect("fx_mov_to_sreg", SS, UDATA) == OK
    rig.cpu.seg_base[FS] = 77
    assert rig.m.effect("fx_mov_to_sreg", FS, 3) == OK
    assert rig.cpu.seg_base[FS] == 0 and rig.cpu.seg_selector[FS] == 3


@pytest.mark.parametrize(
    ("sreg", "selector", "vector", "error", "level"),
    [
        (CS, KCODE64, UD, 0, 0),
        (6, KDATA, UD, 0, 0),
        (DS, 0xB8, GP, 0xB8, 0),
        (DS, EXEC_ONLY, GP, EXEC_ONLY, 0),
        (DS, TSS_SEL, GP, TSS_SEL, 0),
        (DS, ABSENT, NP, ABSENT, 0),
        (SS, ABSENT, SS_FAULT, ABSENT, 0),
        (SS, RODATA | 3, GP, RODATA, 3),
        (SS, KCODE64, GP, KCODE64, 0),
        (SS, UDATA, GP, UDATA & ~3, 0),
        (ES, KDATA, GP, KDATA, 3),
        (ES, KDATA | 3, GP, KDATA, 0),
        (ES, 0xC, GP, 0xC, 0),
    ],
)
def test_segment_load_faults(
    rig: Rig, sreg: int, selector: int, vector: int, error: int, level: int
) -> None:
    rig.level(level)
    rig.faults("fx_mov_to_sreg", vector, error, sreg, selector)


def test_ldt_and_task_register(rig: Rig) -> None:
    assert rig.m.effect("fx_lldt", LDT_SEL) == OK
    assert (rig.cpu.seg_base[LDTR], rig.cpu.seg_limit[LDTR]) == (LDT, 0xF)
    assert rig.m.effect("fx_mov_to_sreg", ES, 0xC) == OK
    rig.faults("fx_mov_to_sreg", GP, 0x14, ES, 0x14)
    assert rig.m.effect("fx_lldt", 0) == OK
    rig.faults("fx_mov_to_sreg", GP, 0xC, ES, 0xC)
    assert rig.m.effect("fx_ltr", TSS_SEL) == OK
    assert rig.cpu.seg_base[TR] == TSS and rig.cpu.seg_attr[TR] & 0xF == 11
    rig.faults("fx_ltr", GP, TSS_SEL, TSS_SEL)
    rig.faults("fx_ltr", GP, 0, 0)
    rig.faults("fx_lldt", GP, KDATA, KDATA)
    rig.faults("fx_lldt", GP, LDT_SEL | 4, LDT_SEL | 4)
    rig.system(LDT_SEL, *system_descriptor(2, LDT, 0xF, present=0))
    rig.faults("fx_lldt", NP, LDT_SEL, LDT_SEL)
    rig.system(LDT_SEL, *system_descriptor(2, NONCANONICAL, 0xF))
    rig.faults("fx_lldt", GP, LDT_SEL, LDT_SEL)
    rig.level(3)
    rig.faults("fx_lldt", GP, 0, 0)
    rig.faults("fx_ltr", GP, 0, TSS_SEL)


@pytest.mark.parametrize(
    ("selector", "level", "rights", "limit", "readable", "writable"),
    [
        (KDATA, 0, 0xCF9300, 0xFFFFFFFF, 1, 1),
        (KCODE64, 0, 0xAF9B00, 0xFFFFFFFF, 1, 0),
        (RODATA, 3, 0xCFF100, 0xFFFFFFFF, 1, 0),
        (EXEC_ONLY, 0, 0xAF9900, 0xFFFFFFFF, 0, 0),
        (CONFORMING, 3, 0xAF9F00, 0xFFFFFFFF, 1, 0),
        (KDATA, 3, None, None, 0, 0),
        (KDATA | 3, 0, None, None, 0, 0),
        (TSS_SEL, 0, 0x8900, 0x67, 0, 0),
        (GATE, 3, 0x3EC00, None, 0, 0),
        (0, 0, None, None, 0, 0),
        (0xB8, 0, None, None, 0, 0),
    ],
)
def test_lar_lsl_verr_verw(
    rig: Rig,
    selector: int,
    level: int,
    rights: int | None,
    limit: int | None,
    readable: int,
    writable: int,
) -> None:
    cpu = rig.cpu
    rig.level(level)
    for name, wanted in (("fx_lar", rights), ("fx_lsl", limit)):
        cpu.gpr[RAX] = 0x1122334455667788
        cpu.status = 0x41 if wanted is None else 1
        assert rig.m.effect(name, RAX, 4, selector) == OK
        assert cpu.status == (1 if wanted is None else 0x41)
        assert cpu.gpr[RAX] == (0x1122334455667788 if wanted is None else wanted)
    for name, flag in (("fx_verr", readable), ("fx_verw", writable)):
        assert rig.m.effect(name, selector) == OK
        assert cpu.status >> 6 & 1 == flag
        assert cpu.rip == 0x1002


def test_lar_keeps_upper_bits_of_a_16_bit_register(rig: Rig) -> None:
    rig.cpu.gpr[RAX] = 0x1122334455667788
    assert rig.m.effect("fx_lar", RAX, 2, KDATA) == OK
    assert rig.cpu.gpr[RAX] == 0x1122334455669300
    rig.cpu.flat_hole = GDT >> 12
    assert rig.m.effect("fx_lar", RAX, 2, KDATA) == FAULT
    assert rig.m.pending[0] == PF


def test_push_pop_and_far_pointer(rig: Rig) -> None:
    cpu = rig.cpu
    top = cpu.gpr[RSP]
    cpu.seg_selector[FS] = KDATA
    assert rig.m.effect("fx_push_sreg", FS, 8) == OK
    assert cpu.gpr[RSP] == top - 8 and rig.m.read(top - 8) == KDATA
    assert rig.m.effect("fx_pop_sreg", GS, 8) == OK
    assert cpu.gpr[RSP] == top and cpu.seg_selector[GS] == KDATA
    assert rig.m.effect("fx_push_sreg", FS, 2) == OK and cpu.gpr[RSP] == top - 2
    cpu.gpr[RSP] = NONCANONICAL
    rig.faults("fx_pop_sreg", SS_FAULT, 0, FS, 8)
    cpu.gpr[RSP] = NONCANONICAL + 8
    rig.faults("fx_push_sreg", SS_FAULT, 0, FS, 8)
    cpu.ea = DATA
    rig.m.write(DATA, 0x1234567890ABCDEF)
    rig.m.write(DATA + 8, KDATA, 2)
    assert rig.m.effect("fx_load_far_pointer", SS, RAX, 8) == OK
    assert cpu.gpr[RAX] == 0x1234567890ABCDEF and cpu.seg_selector[SS] == KDATA
    rig.m.write(DATA + 4, RODATA, 2)
    assert rig.m.effect("fx_load_far_pointer", FS, RAX, 4) == OK
    assert cpu.gpr[RAX] == 0x90ABCDEF and cpu.seg_selector[FS] == RODATA
    cpu.ea = NONCANONICAL
    rig.faults("fx_load_far_pointer", GP, 0, FS, RAX, 8)


# --- delivery -----------------------------------------------------------------------------------
def test_exception_from_user_mode(rig: Rig) -> None:
    cpu = rig.cpu
    rig.gate(PF)
    rig.level(3)
    cpu.status, cpu.flag_if, cpu.other_flags, cpu.flag_df = 0x45, 1, FLAG_TF | FLAG_NT, 1
    user_rsp = cpu.gpr[RSP]
    assert rig.raise_(PF, 6, 0xABC) == OK
    assert cpu.cr2 == 0xABC and cpu.gpr[RSP] == KSTACK - 48
    flags_then = 0x2 | 0x45 | FLAG_IF | FLAG_TF | FLAG_NT | 0x400 | FLAG_RF
    assert rig.frame(6) == [6, UCODE, UCODE64, flags_then, user_rsp, UDATA]
    assert (cpu.cpl, cpu.rip, cpu.flag_if, cpu.other_flags) == (0, CODE, 0, 0)
    assert (cpu.seg_selector[CS], cpu.seg_selector[SS]) == (KCODE64, 0)
    assert cpu.seg_attr[CS] == 0xA9B and cpu.flag_df == 1
    assert cpu.exc_vector == cpu.delivering == NO_EXCEPTION
    assert cpu.exceptions[PF] == 1 and cpu.mode_changes


def test_exception_from_kernel_mode_aligns_and_keeps_ss(rig: Rig) -> None:
    cpu = rig.cpu
    rig.gate(UD, kind=15)
    cpu.flag_if = 1
    before = cpu.gpr[RSP]
    assert rig.raise_(UD) == OK
    assert cpu.gpr[RSP] == (before & ~15) - 40 and cpu.flag_if == 1
    assert rig.frame(5) == [CODE, KCODE64, 0x10202, before, KDATA]
    assert cpu.seg_selector[SS] == KDATA


def test_ist_interrupts_nmi_and_traps(rig: Rig) -> None:
    cpu = rig.cpu
    rig.gate(0x41, ist=1)
    rig.gate(NMI)
    rig.gate(DB)
    cpu.halted = 1
    assert rig.m.run("deliver_interrupt", 0x41) == OK
    assert cpu.gpr[RSP] == IST1 - 40 and not cpu.halted and cpu.interrupts[0x41] == 1
    assert rig.frame(3)[2] == 2
    assert rig.m.run("deliver_nmi") == OK
    assert cpu.nmi_blocked == 1 and cpu.exceptions[NMI] == 1
    assert rig.m.effect("fx_int1") == FAULT
    assert rig.m.pending == (DB, 0) and cpu.rip == 0x1002
    assert rig.m.run("deliver_exception") == OK
    assert not rig.frame(3)[2] & FLAG_RF


def test_software_interrupts(rig: Rig) -> None:
    cpu = rig.cpu
    rig.gate(0x80, dpl=3)
    rig.gate(0x81)
    rig.gate(0x82, dpl=3, present=0)
    rig.gate(0x83, dpl=3, kind=12)
    rig.level(3)
    rig.faults("fx_int", GP, 0x81 * 8 + 2, 0x81)
    rig.faults("fx_int", NP, 0x82 * 8 + 2, 0x82)
    rig.faults("fx_int", GP, 0x83 * 8 + 2, 0x83)
    assert rig.m.effect("fx_int", 0x80) == OK
    assert rig.frame(3) == [0x1002, UCODE64, 2] and cpu.software_interrupts == 1
    cpu.idtr_limit = 0x7FF
    rig.faults("fx_int", GP, 0x80 * 8 + 2, 0x80)


@pytest.mark.parametrize(
    ("selector", "target", "vector", "error"),
    [
        (0, CODE, GP, 1),
        (KDATA, CODE, GP, KDATA | 1),
        (CODE32, CODE, GP, CODE32 | 1),
        (0xF8, CODE, GP, 0xF9),
        (ABSENT_CODE, CODE, NP, ABSENT_CODE | 1),
        (UCODE64, CODE, GP, (UCODE64 & ~3) | 1),
        (KCODE64, NONCANONICAL, GP, 1),
    ],
)
def test_bad_gate_becomes_its_own_fault(
    rig: Rig, selector: int, target: int, vector: int, error: int
) -> None:
    rig.gate(UD, target, selector)
    rig.gate(vector)
    assert rig.raise_(UD) == OK
    assert rig.frame(2) == [error, CODE]
    assert rig.cpu.exceptions[vector] == 1 and not rig.cpu.exceptions[UD]


def test_kernel_stack_faults(rig: Rig) -> None:
    cpu = rig.cpu
    for vector in (DF, GP, SS_FAULT, TS):
        rig.gate(vector, ist=1)
    rig.gate(0x20)
    rig.level(3)
    cpu.seg_limit[TR] = 8
    rig.gate(TS, selector=CONFORMING)
    assert rig.m.run("deliver_interrupt", 0x20) == OK
    assert cpu.cpl == 3 and rig.frame(1) == [TSS_SEL | 1]
    cpu.seg_limit[TR] = 0x67
    rig.m.write(TSS + 4, NONCANONICAL)
    rig.level(3)
    assert rig.m.run("deliver_interrupt", 0x20) == OK
    assert cpu.gpr[RSP] == IST1 - 48 and rig.frame(1) == [1]
    assert cpu.exceptions[SS_FAULT] == 1


@pytest.mark.parametrize(
    ("first", "broken", "outcome"),
    [
        (UD, "absent", NP),
        (DE, "absent", DF),
        (GP, "absent", DF),
        (PF, "absent", DF),
        (GP, "stack", PF),
        (PF, "stack", DF),
        (UD, "stack", PF),
    ],
)
def test_double_fault_classes(rig: Rig, first: int, broken: str, outcome: int) -> None:
    cpu = rig.cpu
    for vector in (NP, PF, DF):
        rig.gate(vector, ist=1)
    rig.gate(first, present=int(broken != "absent"))
    if broken == "stack":
        cpu.gpr[RSP] = 0x9000
    assert rig.raise_(first, 0, 0x777) == OK
    assert cpu.exceptions[outcome] == 1 and sum(cpu.exceptions) == 1
    assert cpu.gpr[RSP] == IST1 - 48
    if outcome == DF:
        assert rig.frame(2) == [0, CODE]
    if broken == "stack":
        assert cpu.cr2 == 0x9000 - 8


def test_triple_fault(rig: Rig) -> None:
    cpu = rig.cpu
    cpu.idtr_limit = 0
    for start in (lambda: rig.raise_(PF), lambda: rig.m.run("deliver_interrupt", 0x30)):
        assert start() == EXIT
        assert cpu.exit_reason == EXIT_SHUTDOWN and cpu.rip == CODE
        assert cpu.exc_vector == cpu.delivering == NO_EXCEPTION


# --- returns ------------------------------------------------------------------------------------
def test_iret_undoes_delivery(rig: Rig) -> None:
    cpu = rig.cpu
    rig.gate(0x20)
    draw = random.Random(7)
    for _ in range(200):
        rig.level(draw.choice((0, 3)))
        cpu.gpr[RSP] = draw.randrange(KSTACK - 0x800, KSTACK)
        cpu.status = draw.getrandbits(64) & 0x8D5
        cpu.other_flags = draw.getrandbits(64) & 0x253100
        cpu.flag_if, cpu.flag_df = draw.getrandbits(1), draw.getrandbits(1)
        before = (*cpu.seg_selector, *cpu.seg_attr, *cpu.gpr, cpu.rip, cpu.cpl)
        flags_before = (cpu.status, cpu.other_flags, cpu.flag_if, cpu.flag_df)
        rig.m.write(TSS + 4, draw.randrange(IST1 - 0x100, IST1))
        assert rig.m.run("deliver_interrupt", 0x20) == OK
        assert cpu.gpr[RSP] % 16 == 8
        assert rig.m.effect("fx_iret", 8) == OK
        assert (*cpu.seg_selector, *cpu.seg_attr, *cpu.gpr, cpu.rip, cpu.cpl) == before
        assert (cpu.status, cpu.other_flags, cpu.flag_if, cpu.flag_df) == flags_before


def test_iret_flags_follow_privilege(rig: Rig) -> None:
    cpu = rig.cpu
    rig.level(3)
    rig.push(UCODE, UCODE64, 0xFFFFFFFF, USTACK, UDATA)
    assert rig.m.effect("fx_iret", 8) == OK
    assert cpu.flag_if == 0 and not cpu.other_flags & 0x3000 and not cpu.interrupt_checks
    cpu.other_flags = 0x3000
    rig.push(UCODE, UCODE64, 0x200, USTACK, UDATA)
    assert rig.m.effect("fx_iret", 8) == OK
    assert cpu.flag_if == 1 and cpu.other_flags == 0x3000 and cpu.interrupt_checks == 1
    cpu.other_flags = 0
    rig.level(0)
    cpu.nmi_blocked = 1
    rig.push(CODE, KCODE64, 0x3FD7, KSTACK, KDATA, size=4)
    assert rig.m.effect("fx_iret", 4) == OK
    assert cpu.other_flags == 0x3100 and cpu.nmi_blocked == 0 and cpu.gpr[RSP] == KSTACK
    cpu.other_flags = 0x200000
    rig.push(0x1234, KCODE64, 2, 0x5678, 0, size=2)
    assert rig.m.effect("fx_iret", 2) == OK
    assert (cpu.rip, cpu.gpr[RSP], cpu.other_flags) == (0x1234, 0x5678, 0x200000)


@pytest.mark.parametrize(
    ("frame", "vector", "error"),
    [
        ((CODE, 0, 2, KSTACK, KDATA), GP, 0),
        ((CODE, 0xB8, 2, KSTACK, KDATA), GP, 0xB8),
        ((CODE, KDATA, 2, KSTACK, KDATA), GP, KDATA),
        ((CODE, KCODE64 | 3, 2, KSTACK, KDATA), GP, KCODE64),
        ((CODE, UCODE64 & ~3, 2, KSTACK, KDATA), GP, UCODE64 & ~3),
        ((CODE, ABSENT_CODE, 2, KSTACK, KDATA), NP, ABSENT_CODE),
        ((NONCANONICAL, KCODE64, 2, KSTACK, KDATA), GP, 0),
        ((CODE, UCODE64, 2, KSTACK, 3), GP, 0),
        ((CODE, UCODE64, 2, KSTACK, KDATA), GP, KDATA),
        ((CODE, UCODE64, 2, KSTACK, RODATA | 3), GP, RODATA),
        ((CODE, KCODE64, 2, KSTACK, UDATA), GP, UDATA & ~3),
        ((CODE, KCODE64, 2, KSTACK, 0xB8), GP, 0xB8),
    ],
)
def test_iret_faults(rig: Rig, frame: tuple[int, ...], vector: int, error: int) -> None:
    rig.push(*frame)
    rig.faults("fx_iret", vector, error, 8)


def test_iret_with_nt_bad_stack_or_old_code(rig: Rig) -> None:
    cpu = rig.cpu
    cpu.gpr[RSP] = NONCANONICAL
    rig.faults("fx_iret", SS_FAULT, 0, 8)
    cpu.other_flags = FLAG_NT
    rig.faults("fx_iret", GP, 0, 8)
    rig.level(3)
    cpu.other_flags = 0
    rig.push(CODE, KCODE64, 2, KSTACK, KDATA)
    rig.faults("fx_iret", GP, KCODE64, 8)


def test_return_outward_revokes_kernel_segments(rig: Rig) -> None:
    cpu = rig.cpu
    for sreg, selector in ((ES, KDATA), (DS, UDATA), (FS, CONFORMING), (GS, 0)):
        assert rig.m.effect("fx_mov_to_sreg", sreg, selector) == OK
    cpu.seg_base[GS] = 0x1234
    rig.push(UCODE, UCODE64, 2, USTACK, UDATA)
    assert rig.m.effect("fx_iret", 8) == OK
    assert [cpu.seg_selector[s] for s in (ES, DS, FS, GS)] == [0, UDATA, CONFORMING, 0]
    assert cpu.seg_base[GS] == 0x1234 and cpu.cpl == 3 and cpu.seg_attr[SS] == 0xCF3


def test_syscall_and_sysret(rig: Rig) -> None:
    cpu = rig.cpu
    cpu.star = 0x0023_0010_0000_0000
    cpu.lstar, cpu.sfmask = 0xFFFF_FFFF_8100_0000, 0x47700
    rig.level(3)
    cpu.status, cpu.flag_if, cpu.other_flags = 0x41, 1, FLAG_TF | FLAG_RF | 0x200000
    assert rig.m.effect("fx_syscall") == OK
    assert (cpu.rip, cpu.gpr[RCX], cpu.gpr[11]) == (cpu.lstar, 0x1002, 0x200343)
    assert (cpu.cpl, cpu.flag_if, cpu.other_flags, cpu.status) == (0, 0, 0x200000, 0x41)
    assert (cpu.seg_selector[CS], cpu.seg_selector[SS]) == (KCODE64, KDATA)
    assert (cpu.seg_attr[CS], cpu.seg_attr[SS]) == (0xA9B, 0xC93)
    cpu.interrupt_checks = 0
    assert rig.m.effect("fx_sysret", 1) == OK
    assert (cpu.cpl, cpu.rip, cpu.flag_if, cpu.other_flags) == (3, 0x1002, 1, 0x200100)
    assert (cpu.seg_selector[CS], cpu.seg_selector[SS]) == (UCODE64, UDATA)
    assert (cpu.seg_attr[CS], cpu.seg_attr[SS], cpu.interrupt_checks) == (0xAFB, 0xCF3, 1)
    rig.faults("fx_sysret", GP, 0, 1)
    rig.faults("fx_sysenter", UD, 0)
    rig.faults("fx_sysexit", UD, 0)
    rig.level(0)
    assert rig.m.effect("fx_sysret", 0) == OK
    assert (cpu.cpl, cpu.rip, cpu.seg_attr[CS]) == (3, 0x1002, 0xCFB)
    cpu.efer &= ~1
    rig.faults("fx_syscall", UD, 0)
    rig.faults("fx_sysret", UD, 0, 1)


# --- far transfers ------------------------------------------------------------------------------
def far_pointer(rig: Rig, offset: int, selector: int, size: int = 8) -> None:
    rig.cpu.ea = DATA
    rig.m.write(DATA, offset, size)
    rig.m.write(DATA + size, selector, 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_far_call_and_return(rig: Rig, size: int) -> None:
    cpu = rig.cpu
    top = cpu.gpr[RSP]
    far_pointer(rig, 0x1234, KCODE64_FRESH, size)
    assert rig.m.effect("fx_call_far", size) == OK
    assert (cpu.rip, cpu.seg_selector[CS]) == (0x1234, KCODE64_FRESH)
    assert cpu.gpr[RSP] == top - 2 * size
    assert rig.m.read(GDT + KCODE64_FRESH) == flat_descriptor(0x9B, 0xA)
    assert rig.m.effect("fx_ret_far", size, 24) == OK
    assert (cpu.rip, cpu.seg_selector[CS], cpu.gpr[RSP]) == (0x1002, KCODE64, top + 24)


@pytest.mark.parametrize(
    ("selector", "offset", "level", "vector", "error"),
    [
        (0, CODE, 0, GP, 0),
        (0xB8, CODE, 0, GP, 0xB8),
        (KDATA, CODE, 0, GP, KDATA),
        (TSS_SEL, CODE, 0, GP, TSS_SEL),
        (KCODE64 | 3, CODE, 0, GP, KCODE64),
        (KCODE64, CODE, 3, GP, KCODE64),
        (UCODE64, CODE, 0, GP, UCODE64 & ~3),
        (ABSENT_CODE, CODE, 0, NP, ABSENT_CODE),
        (KCODE64, NONCANONICAL, 0, GP, 0),
        (GATE_UP, CODE, 3, GP, GATE_UP),
    ],
)
def test_far_transfer_faults(
    rig: Rig, selector: int, offset: int, level: int, vector: int, error: int
) -> None:
    rig.level(level)
    far_pointer(rig, offset, selector)
    rig.faults("fx_jmp_far", vector, error, 8)
    rig.faults("fx_call_far", vector, error, 8)


def test_far_jumps(rig: Rig) -> None:
    cpu = rig.cpu
    rig.level(3)
    far_pointer(rig, CODE + 4, CONFORMING | 3)
    assert rig.m.effect("fx_jmp_far", 8) == OK
    assert (cpu.rip, cpu.seg_selector[CS], cpu.cpl) == (CODE + 4, CONFORMING | 3, 3)
    far_pointer(rig, 0, GATE | 3)
    rig.faults("fx_jmp_far", GP, KCODE64, 8)
    rig.level(0)
    assert rig.m.effect("fx_jmp_far", 8) == OK
    assert (cpu.rip, cpu.seg_selector[CS]) == (CODE, KCODE64)
    far_pointer(rig, 0, GATE_UP)
    assert rig.m.effect("fx_jmp_far", 8) == OK
    assert (cpu.rip, cpu.seg_selector[CS]) == (CODE, CONFORMING)
    far_pointer(rig, CODE, CODE32)
    assert rig.m.effect("fx_jmp_far", 8) == OK
    assert (cpu.rip, cpu.seg_selector[CS], cpu.seg_attr[CS] & 0x600) == (CODE, CODE32, 0x400)


def test_call_gate_inward_and_back(rig: Rig) -> None:
    cpu = rig.cpu
    rig.level(3)
    user_rsp = cpu.gpr[RSP]
    far_pointer(rig, 0xDEAD, GATE | 3)
    assert rig.m.effect("fx_call_far", 8) == OK
    assert (cpu.rip, cpu.cpl, cpu.gpr[RSP]) == (CODE, 0, KSTACK - 32)
    assert (cpu.seg_selector[CS], cpu.seg_selector[SS]) == (KCODE64, 0)
    assert rig.frame(4) == [0x1002, UCODE64, user_rsp, UDATA]
    assert rig.m.effect("fx_ret_far", 8, 0) == OK
    assert (cpu.rip, cpu.cpl, cpu.gpr[RSP]) == (0x1002, 3, user_rsp)
    assert (cpu.seg_selector[CS], cpu.seg_selector[SS]) == (UCODE64, UDATA)
    rig.m.write(TSS + 4, NONCANONICAL + 16)
    rig.faults("fx_call_far", SS_FAULT, 0, 8)
    rig.push(CODE, KCODE64)
    rig.faults("fx_ret_far", GP, KCODE64, 8, 0)


def test_outward_return_releases_both_stacks(rig: Rig) -> None:
    rig.push(UCODE, UCODE64, 0, 0, USTACK, UDATA)
    assert rig.m.effect("fx_ret_far", 8, 16) == OK
    assert rig.cpu.gpr[RSP] == USTACK + 16 and rig.cpu.cpl == 3


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("depth", [0, 1, 2, 5, 31, 32])
def test_enter(rig: Rig, size: int, depth: int) -> None:
    cpu = rig.cpu
    top = KSTACK
    outer = KSTACK - 0x800
    for slot in range(1, 40):
        rig.m.write(outer - slot * size, 0x100 + slot, size)
    cpu.gpr[RSP], cpu.gpr[RBP] = top, outer
    assert rig.m.effect("fx_enter", size, 0x120, depth) == OK
    count = depth % 32
    frame = top - size
    mask = (1 << size * 8) - 1
    words = [outer, *(0x100 + slot for slot in range(1, count))]
    if count:
        words.append(frame)
    assert cpu.gpr[RSP] == top - len(words) * size - 0x120
    found = [rig.m.read(top - (i + 1) * size, size) for i in range(len(words))]
    assert found == [word & mask for word in words]
    assert cpu.gpr[RBP] == (outer & ~mask | frame & mask) & (2**64 - 1)


def test_enter_on_a_bad_stack(rig: Rig) -> None:
    rig.cpu.gpr[RSP] = NONCANONICAL + 8
    rig.faults("fx_enter", SS_FAULT, 0, 8, 0, 0)
    rig.level(0)
    rig.cpu.gpr[RBP] = NONCANONICAL + 8
    rig.faults("fx_enter", SS_FAULT, 0, 8, 0, 2)


# --- the table of sensitive instructions --------------------------------------------------------
def test_sensitive_table_names_real_instructions() -> None:
    assert len(sensitive.BY_NAME) == len(sensitive.TABLE)
    for row in sensitive.TABLE:
        assert hasattr(iced_x86.Mnemonic, row.mnemonic), row.name
        assert row.control or row.behaviour, row.name
        assert not (row.privileged and row.in_user is sensitive.SILENT), row.name


def test_robin_and_irvines_seventeen_are_critical() -> None:
    """Those of the paper that 64-bit mode still has."""
    critical = {row.mnemonic for row in sensitive.critical()}
    paper = "SGDT SIDT SLDT SMSW PUSHF POPF LAR LSL VERR VERW POP PUSH CALL JMP RETF STR MOV"
    assert critical >= set(paper.split())


def test_all_effects_exist_and_link_together(build_natives: Callable[..., Any]) -> None:
    modules = [
        importlib.import_module(f"ringfence.cpu.{found.name}")
        for found in pkgutil.iter_modules(ringfence.cpu.__path__)
    ]
    library = build_natives(*modules)
    for row in sensitive.TABLE:
        for effect in row.effects:
            assert library.address(effect), effect
