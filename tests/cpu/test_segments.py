"""Loading segment registers, and what LAR, LSL, VERR and VERW say."""

from __future__ import annotations

import pytest

from cpu.tables import (
    ABSENT,
    CONFORMING,
    DATA,
    EXEC_ONLY,
    GATE,
    GDT,
    KCODE64,
    KDATA,
    LDT,
    LDT_SEL,
    NONCANONICAL,
    RODATA,
    TSS,
    TSS_SEL,
    UDATA,
    Rig,
    system_descriptor,
)
from ringfence.cpu.state import (
    CS,
    DS,
    ES,
    FAULT,
    FS,
    GP,
    GS,
    LDTR,
    NP,
    OK,
    PF,
    RAX,
    RSP,
    SS,
    SS_FAULT,
    TR,
    UD,
)


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
