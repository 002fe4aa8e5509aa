"""Returns, system calls and far transfers."""

from __future__ import annotations

import random

import pytest

from cpu.tables import (
    ABSENT_CODE,
    CODE,
    CODE32,
    CONFORMING,
    DATA,
    GATE,
    GATE_UP,
    GDT,
    IST1,
    KCODE64,
    KCODE64_FRESH,
    KDATA,
    KSTACK,
    NONCANONICAL,
    RODATA,
    TSS,
    TSS_SEL,
    UCODE,
    UCODE64,
    UDATA,
    USTACK,
    Rig,
    flat_descriptor,
)
from ringfence.cpu.state import (
    CS,
    DS,
    ES,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FS,
    GP,
    GS,
    NP,
    OK,
    RBP,
    RCX,
    RSP,
    SS,
    SS_FAULT,
    UD,
)


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
