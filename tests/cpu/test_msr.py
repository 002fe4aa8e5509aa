"""RDMSR and WRMSR: what registers hold, what they refuse, and which are the VMM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ringfence.cpu import msr, tsc
from ringfence.cpu.state import (
    EXIT,
    EXIT_MSR_READ,
    EXIT_MSR_WRITE,
    FAULT,
    FS,
    GP,
    GS,
    OK,
    RAX,
    RCX,
    RDX,
    TSC_RATIO_BITS,
    TSC_RATIO_ONE,
)
from ringfence.cpu.tsc import read_host_tsc

BAD = 0x8000_0000_0000
HIGH = 0xFFFF_8000_1234_5678


@pytest.fixture
def machine(flat_machine: Callable[..., Any]) -> Any:
    return flat_machine(msr)


def write(machine: Any, index: int, value: int) -> int:
    gpr = machine.cpu.gpr
    # The upper halves of all three registers don't count.
    gpr[RCX], gpr[RAX], gpr[RDX] = (
        part | 0xDEAD << 32 for part in (index, value & 0xFFFFFFFF, value >> 32)
    )
    return int(machine.effect("fx_wrmsr"))


def read(machine: Any, index: int) -> int:
    cpu = machine.cpu
    cpu.gpr[RCX] = index
    assert machine.effect("fx_rdmsr") == OK
    assert cpu.rip == cpu.next_rip
    assert cpu.gpr[RAX] >> 32 == cpu.gpr[RDX] >> 32 == 0
    return int(cpu.gpr[RDX] << 32 | cpu.gpr[RAX])


def keeps(machine: Any, index: int, value: int) -> None:
    assert write(machine, index, value) == OK
    assert machine.cpu.rip == machine.cpu.next_rip
    assert read(machine, index) == value


def refuses(machine: Any, index: int, value: int) -> None:
    kept = read(machine, index)
    assert write(machine, index, value) == FAULT
    assert machine.pending == (GP, 0)
    assert machine.cpu.rip == 0x1000
    assert read(machine, index) == kept


def test_user_mode_may_not(machine: Any) -> None:
    machine.cpu.cpl = 3
    machine.cpu.gpr[RCX] = 0x10
    for name in ("fx_rdmsr", "fx_wrmsr"):
        assert machine.effect(name) == FAULT
        assert machine.pending == (GP, 0)


@pytest.mark.parametrize("index", [0, 0x48, 0x277 + 1, 0x900, 0xC0000105, 0xC0010030])
def test_unknown_registers(machine: Any, index: int) -> None:
    cpu = machine.cpu
    for name in ("fx_rdmsr", "fx_wrmsr"):
        cpu.rip, cpu.next_rip, cpu.gpr[RCX] = 0x1000, 0x1002, index
        before = machine.snapshot()
        assert machine.effect(name) == FAULT
        assert machine.pending == (GP, 0)
        assert machine.snapshot() == before


@pytest.mark.parametrize("index", [0x1B, 0x6E0, 0x800, 0x80B, 0x8FF, 0x4B564D00])
def test_local_apic_is_for_the_vmm(machine: Any, index: int) -> None:
    cpu = machine.cpu
    assert write(machine, index, 0x1_0000_0002) == EXIT
    assert (cpu.exit_reason, *cpu.exit_data[:2]) == (EXIT_MSR_WRITE, index, 0x1_0000_0002)
    assert machine.effect("fx_rdmsr") == EXIT
    assert (cpu.exit_reason, cpu.exit_data[0], cpu.rip) == (EXIT_MSR_READ, index, 0x1000)


def test_efer(machine: Any) -> None:
    cpu = machine.cpu
    keeps(machine, msr.EFER, 0xD01 | 1 << 21)
    assert (cpu.mode_changes, cpu.flushes_all) == (1, 0)
    keeps(machine, msr.EFER, 0x501)
    assert (cpu.mode_changes, cpu.flushes_all) == (2, 1)
    for bit in (8, 12, 13, 14, 15, 1, 32):  # LME, SVME, LMSLE, FFXSR, TCE, reserved ones
        refuses(machine, msr.EFER, 0x501 ^ 1 << bit)
    # LMA belongs to the processor.
    assert write(machine, msr.EFER, 0x101) == OK
    assert read(machine, msr.EFER) == 0x501
    assert cpu.mode_changes == 2


@pytest.mark.parametrize(
    ("index", "field"),
    [
        *[(0xC0000082, "lstar"), (0xC0000083, "cstar"), (0xC0000102, "kernel_gs_base")],
        *[(0x175, "sysenter_esp"), (0x176, "sysenter_eip")],
    ],
)
def test_addresses(machine: Any, index: int, field: str) -> None:
    keeps(machine, index, HIGH)
    assert getattr(machine.cpu, field) == HIGH
    refuses(machine, index, BAD)


@pytest.mark.parametrize(("index", "segment"), [(0xC0000100, FS), (0xC0000101, GS)])
def test_segment_bases(machine: Any, index: int, segment: int) -> None:
    keeps(machine, index, HIGH)
    assert machine.cpu.seg_base[segment] == HIGH
    refuses(machine, index, BAD)


def test_plain_registers(machine: Any) -> None:
    keeps(machine, msr.STAR, 0x0023_0010_1234_5678)
    keeps(machine, msr.SFMASK, 0x47700)
    keeps(machine, msr.TSC_AUX, 0xFFFF_FFFF)
    keeps(machine, msr.SYSENTER_CS, 0x10)
    keeps(machine, msr.MISC_ENABLE, 1)
    keeps(machine, msr.MCG_STATUS, 5)
    for index in (msr.SFMASK, msr.TSC_AUX):
        assert write(machine, index, 0x1_0000_0007) == OK
        assert read(machine, index) == 7


def test_tsc_and_its_adjustment(machine: Any) -> None:
    """Reads are the CPU's, writes the VMM's, as clocks depend on them."""
    cpu = machine.cpu
    cpu.tsc_ratio, cpu.tsc_adjust = TSC_RATIO_ONE, 77
    cpu.tsc_offset = (1 << 62) - read_host_tsc() & (1 << 64) - 1
    assert 1 << 62 <= read(machine, tsc.MSR_TSC) < (1 << 62) + (1 << 40)
    assert read(machine, tsc.MSR_TSC_ADJUST) == 77
    for index in tsc.MSRS:
        assert write(machine, index, 5 << 32 | 6) == EXIT
        assert cpu.exit_reason == EXIT_MSR_WRITE
        assert list(cpu.exit_data[:2]) == [index, 5 << 32 | 6]


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7, 60000.5])
def test_a_scaled_tsc(machine: Any, ratio: float) -> None:
    cpu = machine.cpu
    cpu.tsc_ratio, cpu.tsc_offset = int(ratio * TSC_RATIO_ONE), 0
    before = read_host_tsc()
    seen = read(machine, tsc.MSR_TSC)
    after = read_host_tsc()
    low, high = (ticks * cpu.tsc_ratio >> TSC_RATIO_BITS for ticks in (before, after))
    assert low <= seen <= high


def test_pat(machine: Any) -> None:
    keeps(machine, msr.PAT, 0x0007040600070406)
    keeps(machine, msr.PAT, 0x0107050600070401)
    for kind in (2, 3, 8, 0x40, 0x46, 0xFF):
        for byte in (0, 7):
            refuses(machine, msr.PAT, kind << byte * 8)


def test_variable_mtrrs(machine: Any) -> None:
    cpu = machine.cpu
    assert read(machine, msr.MTRR_CAP) == 0x508
    refuses(machine, msr.MTRR_CAP, 0)
    for i in range(8):
        keeps(machine, 0x200 + 2 * i, 0x1000 * i | 6)
        keeps(machine, 0x201 + 2 * i, 0xFF_8000_0800)
        assert (cpu.mtrr_base[i], cpu.mtrr_mask[i]) == (0x1000 * i | 6, 0xFF_8000_0800)
    for value in (2, 7, 0x106, 1 << 40 | 6):
        refuses(machine, 0x200, value)
    for value in (1, 0x400, 1 << 40):
        refuses(machine, 0x201, value)
    machine.cpu.gpr[RCX] = 0x210
    assert machine.effect("fx_rdmsr") == FAULT


def test_fixed_mtrrs(machine: Any) -> None:
    indices = [0x250, 0x258, 0x259, *range(0x268, 0x270)]
    for place, index in enumerate(indices):
        keeps(machine, index, 0x0600_0504_0106_0000 + place % 2)
    assert list(machine.cpu.mtrr_fixed) == [0x0600_0504_0106_0000 + i % 2 for i in range(11)]
    refuses(machine, 0x250, 7)
    refuses(machine, 0x26F, 2 << 56)
    for index in (0x24F, 0x251, 0x25A, 0x267, 0x270):
        machine.cpu.gpr[RCX] = index
        assert machine.effect("fx_rdmsr") == FAULT


def test_default_memory_type(machine: Any) -> None:
    keeps(machine, msr.MTRR_DEF_TYPE, 0xC06)
    for value in (0xC02, 0x1C06, 0x206, 0xC16):
        refuses(machine, msr.MTRR_DEF_TYPE, value)


def test_machine_check_has_no_banks(machine: Any) -> None:
    assert read(machine, msr.MCG_CAP) == 0
    refuses(machine, msr.MCG_CAP, 1)


CONSTANT = {
    0xC0010015: 1 << 24, 0xC0011029: 2, 0xC0010010: 0, 0xC001001F: 0, 0xC0010055: 0,
    0xC0010058: 0, 0xC0010114: 0x18, 0xC0010117: 0, 0x8B: 0x0B00215A, 0xC0011020: 0,
    0xC001102D: 0, 0xC0010061: 0, 0xC001006B: 0, 0xC0010140: 0, 0xC0010141: 0, 0xC0010299: 0,
    0x17: 0, 0x1D9: 0,
}  # fmt: skip


@pytest.mark.parametrize("index", CONSTANT)
def test_constant_registers(machine: Any, index: int) -> None:
    assert read(machine, index) == CONSTANT[index]
    assert write(machine, index, (1 << 64) - 1) == OK
    assert read(machine, index) == CONSTANT[index]


@pytest.mark.parametrize("index", [0xC0010060, 0xC001006C, 0xC001101F, 0xC001102E])
def test_neighbours_of_constant_ranges(machine: Any, index: int) -> None:
    machine.cpu.gpr[RCX] = index
    assert machine.effect("fx_rdmsr") == FAULT
