"""CPUID: the table for hosts with much and with little, and the instruction that reads it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import iced_x86
import pytest

from ringfence.cpu import components, control, cpuid, state
from ringfence.cpu.state import CR4_OSXSAVE, FAULT, OK, RAX, RBX, RCX, RDX

ALL = 0xFFFFFFFF


def rich(leaf: int, subleaf: int) -> cpuid.Registers:
    """A host with every feature bit set and AVX enabled."""
    return ALL, ALL, ALL, ALL


def poor(leaf: int, subleaf: int) -> cpuid.Registers:
    """A host of the first generation: no leaf beyond 1 and 8000_0008h."""
    return {0: (1, 0, 0, 0), 0x80000000: (0x80000008, 0, 0, 0)}.get(leaf, (0, 0, 0, 0))


def without_avx_state(leaf: int, subleaf: int) -> cpuid.Registers:
    """A host whose system hasn't enabled the AVX state."""
    return (3, 576, 2696, 0) if leaf == 0xD else (ALL, ALL, ALL, ALL)


def row(rows: list[cpuid.Row], leaf: int, subleaf: int = cpuid.ANY) -> cpuid.Registers:
    (found,) = [r for r in rows if r[:2] == (leaf, subleaf)]
    return found[2:]


@pytest.fixture
def machine(flat_machine: Callable[..., Any]) -> Any:
    made = flat_machine(cpuid, control)
    rows = cpuid.build_cpuid(rich, cpu_index=1, cpus=4)
    made.table = ctypes.create_string_buffer(cpuid.pack(rows))
    made.cpu.cpuid_table = ctypes.addressof(made.table)
    made.cpu.cpuid_rows = len(rows)
    return made


def ask(machine: Any, leaf: int, subleaf: int = 0) -> tuple[int, ...]:
    gpr = machine.cpu.gpr
    gpr[RAX], gpr[RCX] = leaf | 0xDEAD << 32, subleaf | 0xBEEF << 32
    machine.cpu.cpl = 3
    assert machine.effect("fx_cpuid") == OK
    assert machine.cpu.rip == machine.cpu.next_rip
    return gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX]


def test_identity(machine: Any) -> None:
    eax, ebx, ecx, edx = ask(machine, 0)
    assert (eax, struct.pack("<3I", ebx, edx, ecx)) == (0xD, b"AuthenticAMD")
    assert ask(machine, 0x80000000)[1:] == (ebx, ecx, edx)
    signature = ask(machine, 1)[0]
    assert (signature >> 8 & 15) + (signature >> 20 & 0xFF) == 0x1A
    assert (signature >> 4 & 15, signature >> 16 & 15, signature & 15) == (2, 0, 1)
    assert ask(machine, 0x80000001)[0] == signature
    name = b"".join(struct.pack("<4I", *ask(machine, 0x80000002 + i)) for i in range(3))
    assert name.rstrip(b"\0") == b"Ringfence virtual CPU"
    eax, *rest = ask(machine, 0x40000000)
    assert (eax, struct.pack("<3I", *rest)) == (0x40000001, b"KVMKVMKVM\0\0\0")


@pytest.mark.parametrize("leaf", [0xE, 0x20, 0x40000001, 0x40000002, 0x80000022, 0xC0000000, ALL])
def test_leaves_beyond_the_maximum_are_zero(machine: Any, leaf: int) -> None:
    assert ask(machine, leaf) == (0, 0, 0, 0)


def test_osxsave_mirrors_cr4(machine: Any) -> None:
    assert not ask(machine, 1)[2] & cpuid.OSXSAVE
    machine.cpu.cr4 |= CR4_OSXSAVE
    assert ask(machine, 1)[2] & cpuid.OSXSAVE


def test_xsave_size_follows_xcr0(machine: Any) -> None:
    for xcr0, size in ((1, 576), (3, 576), (7, 832), (0xE7, 2432)):
        machine.cpu.xcr0 = xcr0
        assert ask(machine, 0xD) == (0xE7, size, 2432, 0)
        assert ask(machine, 0xD, 1) == (cpuid.XSAVEOPT | cpuid.XSAVEC, size, 0, 0)
    end = 576
    for component in components.EXTENDED:
        assert ask(machine, 0xD, component.number) == (component.size, end, 0, 0)
        end += component.size
    assert ask(machine, 0xD, 3) == (0, 0, 0, 0)
    assert end == state.XSAVE_BYTES


def test_topology(machine: Any) -> None:
    eax, ebx, _, _ = ask(machine, 1)
    assert (ebx >> 24, ebx >> 16 & 0xFF, ebx >> 8 & 0xFF) == (1, 4, 8)
    assert ask(machine, 0xB, 0) == (0, 1, 0x100, 1)
    assert ask(machine, 0xB, 1) == (2, 4, 0x201, 1)
    assert ask(machine, 0xB, 2) == (0, 0, 2, 1)
    assert ask(machine, 0xB, 0x105) == (0, 0, 5, 1)
    assert ask(machine, 0x80000008)[2] == 2 << 12 | 3
    assert ask(machine, 0x8000001E) == (1, 1, 0, 0)
    for subleaf, (size, shared) in enumerate([(32, 1), (32, 1), (1024, 1), (32768, 4)]):
        eax, ebx, ecx, _ = ask(machine, 0x8000001D, subleaf)
        assert ((ebx >> 22) + 1) * ((ebx & 0xFFF) + 1) * (ecx + 1) == size << 10
        assert (eax >> 14 & 0xFFF) + 1 == shared
    assert ask(machine, 0x8000001D, 4) == (0, 0, 0, 0)


def test_one_cpu_has_no_multiprocessor_bits() -> None:
    rows = cpuid.build_cpuid(rich)
    assert not row(rows, 1)[3] >> 28 & 1
    assert not row(rows, 0x80000001)[2] >> 1 & 1
    assert row(rows, 0x80000008)[2] == 0


def test_absent_features_stay_absent_on_a_rich_host() -> None:
    rows = cpuid.build_cpuid(rich)
    # MONITOR, VMX, SMX, OSXSAVE
    assert not row(rows, 1)[2] & (1 << 3 | 1 << 5 | 1 << 6 | 1 << 27)
    # HLE, RTM, MPX, AVX-512 PF and ER, SMAP
    assert not row(rows, 7, 0)[1] & 0x0C10_4810
    # PKU, OSPKE, CET, LA57, waitpkg
    assert not row(rows, 7, 0)[2] & (3 << 3 | 1 << 5 | 1 << 7 | 1 << 16)
    assert row(rows, 7, 0)[3] == 1 << 4 | 1 << 8 | 1 << 23
    # SVM, XOP, FMA4, TBM, MONITORX, OSVW
    assert not row(rows, 0x80000001)[2] & (1 << 2 | 1 << 9 | 1 << 11 | 1 << 16 | 1 << 21 | 1 << 29)
    assert row(rows, 0x80000021)[0] == 1 << 2 | 1 << 6 | 1 << 8 | 1 << 29
    assert row(rows, 0x80000007)[3] == 0  # what the counter keeps to, paravirtual clocks say
    assert row(rows, 0x80000008)[:2] == (48 << 8 | cpuid.PHYSICAL_BITS, 1 << 26 | 1 << 2 | 1)


def test_poor_host_offers_no_more_than_it_has() -> None:
    rows = cpuid.build_cpuid(poor)
    absent = ["SSE3", "SSSE3", "SSE4_1", "AVX", "AVX2", "FMA", "XSAVE", "AES", "SHA", "RDRAND"]
    assert not [name for name in absent if cpuid.offers(name, rows)]
    present = ["SSE", "SSE2", "FXSR", "SYSCALL", "FSGSBASE", "INVPCID", "RDPID", "RDTSCP", "X64"]
    assert all(cpuid.offers(name, rows) for name in present)
    assert not [r for r in rows if r[0] == 0xD]


def test_avx_needs_its_state_enabled_on_the_host() -> None:
    rows = cpuid.build_cpuid(without_avx_state)
    assert cpuid.offers("XSAVE", rows)
    assert cpuid.offers("AES", rows)
    for name in cpuid.FROM_HOST_AVX:
        assert not cpuid.offers(name, rows)
    assert row(rows, 0xD, 0) == (3, 576, 576, 0)


@pytest.mark.parametrize("missing", ["opmask", "zmm", "xsavec", "AVX512BW", "AVX512VL"])
def test_avx512_is_offered_whole_or_not(missing: str) -> None:
    def host(leaf: int, subleaf: int) -> cpuid.Registers:
        if (leaf, subleaf) == (0xD, 0):
            return {"opmask": 0xC7, "zmm": 0x27}.get(missing, 0xE7), ALL, ALL, ALL
        if (leaf, subleaf) == (0xD, 1):
            return 0xD if missing == "xsavec" else 0xF, ALL, ALL, ALL
        ebx = ALL & ~(1 << cpuid.FROM_HOST_AVX512[missing][2]) if missing[0] == "A" else ALL
        return ALL, ebx if leaf == 7 else ALL, ALL, ALL

    rows = cpuid.build_cpuid(host)
    assert cpuid.offers("AVX2", rows)
    assert not [name for name in cpuid.FROM_HOST_AVX512 if cpuid.offers(name, rows)]
    assert row(rows, 0xD, 0) == (7, 832, 832, 0)


OFFERED = (
    "ADX AES AVX AVX2 BMI1 BMI2 CLFLUSHOPT CLFSH CLWB CLZERO CMOV CMPXCHG16B CPUID CX8 F16C FMA"
    " FPU FPU287 FPU387 FSGSBASE FXSR GFNI INTEL186 INTEL286 INTEL386 INTEL486 INTEL8086 INVPCID"
    " LZCNT MMX MOVBE MSR MULTIBYTENOP PAUSE PCLMULQDQ POPCNT PREFETCHW RDPID RDPMC RDRAND RDSEED"
    " RDTSCP SEP SHA SSE SSE2 SSE3 SSE4A SSE4_1 SSE4_2 SSSE3 SYSCALL TSC VAES VPCLMULQDQ X64 XSAVE"
    " AVX512BW AVX512CD AVX512DQ AVX512F AVX512VL AVX512_BITALG AVX512_FP16 AVX512_IFMA"
    " AVX512_VBMI AVX512_VBMI2 AVX512_VNNI AVX512_VP2INTERSECT AVX512_VPOPCNTDQ XSAVEC XSAVEOPT"
)


def test_names_that_the_decoder_uses() -> None:
    names = [name for name in dir(iced_x86.CpuidFeature) if name.isupper()]
    rows = cpuid.build_cpuid(rich)
    assert [name for name in names if cpuid.offers(name, rows)] == sorted(OFFERED.split())
    assert not cpuid.offers("NO_SUCH_FEATURE", rows)


def test_pack() -> None:
    assert cpuid.pack([(1, cpuid.ANY, 2, 3, 4, 5)]) == struct.pack("<6I", 1, ALL, 2, 3, 4, 5)


def test_xsetbv_takes_only_what_is_offered(machine: Any) -> None:
    cpu = machine.cpu
    rows = cpuid.build_cpuid(without_avx_state)
    table = ctypes.create_string_buffer(cpuid.pack(rows))
    cpu.cpuid_table, cpu.cpuid_rows = ctypes.addressof(table), len(rows)
    cpu.cr4 |= CR4_OSXSAVE
    cpu.gpr[RAX] = 3
    assert machine.effect("fx_xsetbv") == OK
    cpu.gpr[RAX] = 7
    assert machine.effect("fx_xsetbv") == FAULT


def test_xsetbv_takes_avx512_whole(machine: Any) -> None:
    cpu = machine.cpu
    cpu.cr4 |= CR4_OSXSAVE
    for value, status in ((0xE7, OK), (0x27, FAULT), (0xC7, FAULT), (0xE3, FAULT), (0x1E7, FAULT)):
        cpu.gpr[RAX] = value
        assert machine.effect("fx_xsetbv") == status
    assert cpu.xcr0 == 0xE7


def test_host() -> None:
    highest, *vendor = cpuid.host_cpuid(0)
    assert highest >= 1
    assert any(vendor)
    assert cpuid.host_cpuid(1)[3] >> 26 & 1  # SSE2, as on every x86-64 processor
    assert cpuid.host_cpuid(0) == (highest, *vendor)
    assert cpuid.offers("SSE2", cpuid.build_cpuid(cpuid.host_cpuid))
