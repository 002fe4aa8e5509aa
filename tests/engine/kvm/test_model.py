"""What KVM is told of the virtual CPU: features, registers, and its whole state there and back."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest

from engine.kvm.fake import FakeKernel
from ringfence.cpu import components, cpuid, msr, reset, state
from ringfence.engine.kvm import model, transfer
from ringfence.engine.kvm.device import HostKernel, Kernel, System

EVERYTHING = 0xFFFFFFFF


def rows(cpus: int = 1) -> list[cpuid.Row]:
    def host(leaf: int, subleaf: int = 0) -> cpuid.Registers:
        return EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING

    return cpuid.build_cpuid(host, cpus=cpus, paravirtual=8)


def all_supported() -> list[cpuid.Row]:
    layout = [row for row in rows() if row[0] == model.XSAVE_LEAF]
    leaves = {row[0] for row in rows()} - {model.XSAVE_LEAF}
    return [(leaf, 0, *[EVERYTHING] * 4) for leaf in leaves] + layout


def test_everything_supported_changes_nothing() -> None:
    assert model.offered(rows(), all_supported()) == rows()


def test_features_that_kvm_lacks_go_and_ours_stay() -> None:
    table = model.offered(rows(), [])
    assert not cpuid.offers("AES", table)
    assert not cpuid.offers("SMEP", table)
    for name in ("APIC", "X2APIC", "TSC_DEADLINE", "MTRR", "HYPERVISOR", "TSC_ADJUST"):
        assert cpuid.offers(name, table)
    kept = {row[:2]: row for row in table}
    for row in rows():
        if row[0] in (0, 0x40000000, 0x40000001, 0x80000000, 0x80000002, 0x80000006):
            assert kept[row[:2]] == row
    address_sizes = next(row for row in table if row[0] == 0x80000008)
    assert address_sizes[2] == cpuid.LINEAR_BITS << 8 | cpuid.PHYSICAL_BITS


def test_areas_lie_as_kvm_says() -> None:
    given = [(0xD, 0, 0xE7, 0, 2696, 0), (0xD, 1, 2, 0, 0, 0), (0xD, 2, 256, 576, 0, 0)]
    given += [(0xD, 5, 64, 1088, 0, 0), (0xD, 6, 512, 1152, 0, 0), (0xD, 7, 1024, 1664, 0, 0)]
    kept = {row[1]: row[2:] for row in model.offered(rows(), given) if row[0] == 0xD}
    assert kept[0] == (0xE7, 2688, 2688, 0)
    assert kept[1][0] == cpuid.XSAVEC
    assert [kept[n][:2] for n in (2, 5, 6, 7)] == [
        (256, 576),
        (64, 1088),
        (512, 1152),
        (1024, 1664),
    ]
    given = [(0xD, 0, 7, 0, 0, 0), given[2]]
    narrow = {row[1]: row[2:] for row in model.offered(rows(), given) if row[0] == 0xD}
    assert narrow == {0: (7, 832, 832, 0), 2: (256, 576, 0, 0)}


def test_every_feature_is_in_a_word_that_is_filtered() -> None:
    for leaf, register, _ in [*cpuid.MODELLED.values(), *cpuid.FROM_HOST.values()]:
        assert (leaf, register) in model.FEATURE_WORDS


def test_subleaves() -> None:
    entries = model.cpuid_entries(rows())
    assert len({(e.function, e.index) for e in entries}) == len(entries)
    assert {e.index for e in entries if e.function == 0xB} == {0, 1}
    assert all(e.flags == (e.function in (7, 0xB, 0xD, 0x8000001D)) for e in entries)


def test_the_filter_lets_kvm_s_own_registers_through() -> None:
    table = model.msr_filter()
    allowed = set()
    for entry in table.ranges:
        for n in range(entry.nmsrs):
            byte = ctypes.c_uint8.from_address(entry.bitmap + n // 8).value
            if byte >> n % 8 & 1:
                allowed.add(entry.base + n)
    assert allowed == transfer.KVM_MSRS
    assert msr.TSC not in allowed


def fresh() -> tuple[Any, Any]:
    room = ctypes.create_string_buffer(state.Cpu.size + 64)
    view = state.Cpu.at(ctypes.addressof(room) + 63 & ~63)
    reset.reset(view)
    return view, room


def kernels() -> list[Any]:
    there = Path("/dev/kvm").exists()
    skip = pytest.mark.skipif(not there, reason="this host has no /dev/kvm")
    return [FakeKernel(), pytest.param(HostKernel(), marks=skip)]


@pytest.mark.parametrize("kernel", kernels(), ids=["fake", "real"])
def test_state_there_and_back(kernel: Kernel) -> None:
    source = random.Random("state")
    system = System(kernel)
    vm = system.create_vm()
    vm.prepare(model.msr_filter())
    vcpu = vm.create_vcpu(0)
    given, _held = fresh()
    for n in range(16):
        given.gpr[n] = source.getrandbits(64)
    given.rip, given.status, given.other_flags, given.flag_if = 0x123456, 0x8D5, 0x3000, 1
    given.cr0, given.cr3, given.cr4, given.efer = 0x80050033, 0x5000, 0x620, 0xD01
    given.cr2 = 0x1234
    for n in range(6):
        given.seg_selector[n] = 8 * n
        given.seg_limit[n] = 0xFFFFFFFF
        given.seg_base[n] = 0x1000 * n if n >= state.FS else 0
        given.seg_attr[n] = 0xA9B if n == state.CS else 0xC93
    given.gdtr_base, given.gdtr_limit, given.idtr_base, given.idtr_limit = 0x7000, 127, 0x8000, 4095
    given.lstar, given.star, given.sfmask = 0xFFFF800000001000, 0x23001000000000, 0x700
    given.kernel_gs_base, given.sysenter_eip, given.pat = 0x9000, 0xA000, 0x0007010600070106
    given.dr[0], given.dr[6], given.dr[7] = 0x4000, 0xFFFF0FF1, 0x402
    given.interrupt_shadow = 1
    for n in range(160, 416):
        given.xsave[n] = source.getrandbits(8)
    given.xsave[components.HEADER] = 3
    transfer.load(vcpu, given)
    taken, _kept = fresh()
    transfer.store(vcpu, taken)
    for name in (
        *("gpr", "rip", "status", "other_flags", "flag_if", "flag_df", "cpl", "interrupt_shadow"),
        *("seg_base", "seg_selector", "seg_attr", "gdtr_base", "gdtr_limit", "idtr_base"),
        *("cr0", "cr2", "cr3", "cr4", "efer", "xcr0", "dr", "idtr_limit", "exc_vector"),
        *transfer.MSR_FIELDS.values(),
    ):
        want, got = getattr(given, name), getattr(taken, name)
        if isinstance(want, ctypes.Array):
            want, got = list(want), list(got)
        assert got == want, name
    assert bytes(taken.xsave[160:416]) == bytes(given.xsave[160:416])
    vcpu.close()
    vm.close()
    system.close()
