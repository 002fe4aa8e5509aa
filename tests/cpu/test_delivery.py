"""Delivery of exceptions and interrupts through the IDT."""

from __future__ import annotations

import pytest

from cpu.tables import (
    ABSENT_CODE,
    CODE,
    CODE32,
    CONFORMING,
    IST1,
    KCODE64,
    KDATA,
    KSTACK,
    NONCANONICAL,
    TSS,
    TSS_SEL,
    UCODE,
    UCODE64,
    UDATA,
    Rig,
)
from ringfence.cpu.state import (
    CS,
    DB,
    DE,
    DF,
    EXIT,
    EXIT_SHUTDOWN,
    FAULT,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    GP,
    NMI,
    NO_EXCEPTION,
    NP,
    OK,
    PF,
    RSP,
    SS,
    SS_FAULT,
    TR,
    TS,
    UD,
)


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
