"""The machine's virtual CPU as KVM is told of it: CPUID, and who serves which register.

The model is that of `cpu.cpuid`, the same for every engine. Of its feature bits, those stay that
KVM can give on this host, and those that are served outside of KVM: by the board (the local APIC in
both modes and its deadline timer) or by `cpu.msr` through exits (memory types, machine checks,
TSC_ADJUST). Where the components of an XSAVE area lie is the host's to say, as its CPU carries out
XSAVE.

Source: Linux, Documentation/virt/kvm/api.rst (KVM_GET_SUPPORTED_CPUID, KVM_X86_SET_MSR_FILTER).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from ringfence.cpu.components import EXTENDED, LEGACY_BYTES
from ringfence.cpu.cpuid import ANY, EAX, EBX, ECX, EDX, MODELLED, Row
from ringfence.engine.kvm import abi
from ringfence.engine.kvm.transfer import KVM_MSRS

FEATURE_WORDS = (
    (1, ECX), (1, EDX), (6, EAX), (7, EBX), (7, ECX), (7, EDX),
    (0x80000001, ECX), (0x80000001, EDX), (0x80000007, EDX), (0x80000008, EBX), (0x80000021, EAX),
)  # fmt: skip
"""Leaves (subleaf 0) and registers whose bits are features, all of them."""
SERVED_OUTSIDE = (
    "APIC", "X2APIC", "TSC_DEADLINE", "ARAT", "TSC_ADJUST", "MTRR", "MCE", "MCA", "HYPERVISOR",
    "TOPOEXT",
)  # fmt: skip
"""Features that don't need KVM's consent."""
XSAVE_LEAF = 0xD
_RANGES = ((0x174, 3), (0x277, 1), (0xC0000080, 5), (0xC0000100, 4))
"""First register and number of registers of the ranges that hold `KVM_MSRS`."""


def offered(rows: Iterable[Row], supported: Iterable[Row]) -> list[Row]:
    """The model's table without the features that KVM can't give here."""
    supported = list(supported)
    allowed: dict[tuple[int, int], int] = {}
    for row in supported:
        if row[1] == 0:
            for register in range(4):
                allowed[row[0], register] = row[2 + register]
    for name in SERVED_OUTSIDE:
        leaf, register, bit = MODELLED[name]
        allowed[leaf, register] = allowed.get((leaf, register), 0) | 1 << bit
    result: list[Row] = []
    areas = {row[1]: row for row in supported if row[0] == XSAVE_LEAF}
    for leaf, subleaf, *registers in rows:
        if leaf == XSAVE_LEAF:
            result += _vector_state(areas, subleaf, registers)
            continue
        for register in range(4):
            if (leaf, register) in FEATURE_WORDS and subleaf in (0, ANY):
                registers[register] &= allowed.get((leaf, register), 0)
        eax, ebx, ecx, edx = registers
        result.append((leaf, subleaf, eax, ebx, ecx, edx))
    return result


def _vector_state(areas: dict[int, Row], subleaf: int, registers: list[int]) -> list[Row]:
    """A row of the model's leaf 0Dh on this host; ``areas``: KVM's rows of it, by subleaf."""
    eax, ebx, ecx, edx = registers
    if subleaf not in areas:
        return []
    there = areas[subleaf]
    if subleaf > 1:
        return [(XSAVE_LEAF, subleaf, *there[2:4], 0, 0)]
    eax &= there[2]
    if subleaf == 0:
        ends = [sum(areas[c.number][2:4]) for c in EXTENDED if eax >> c.number & 1]
        ebx = ecx = max(LEGACY_BYTES, *ends, 0)
    return [(XSAVE_LEAF, subleaf, eax, ebx, ecx, edx)]


def cpuid_entries(rows: Iterable[Row]) -> list[abi.KvmCpuidEntry2]:
    """The table as KVM takes it.

    A leaf with subleaves has no row for all others there: KVM answers by the manual for them.
    """
    rows = list(rows)
    indexed = {row[0] for row in rows if row[1] != ANY}
    entries = []
    for leaf, subleaf, eax, ebx, ecx, edx in rows:
        if subleaf == ANY and leaf in indexed:
            continue
        flags = abi.CPUID_FLAG_SIGNIFCANT_INDEX if leaf in indexed else 0
        index = 0 if subleaf == ANY else subleaf
        entries.append(abi.KvmCpuidEntry2(leaf, index, flags, eax, ebx, ecx, edx))
    return entries


def _bitmap(base: int, count: int) -> ctypes.Array[ctypes.c_uint8]:
    """One bit per register from ``base`` on: whether it is KVM's own."""
    bits = sum(1 << n for n in range(count) if base + n in KVM_MSRS)
    return (ctypes.c_uint8 * 8)(*bits.to_bytes(8, "little"))


_BITMAPS = tuple(_bitmap(*each) for each in _RANGES)


def msr_filter() -> abi.KvmMsrFilter:
    """The filter that sends every register but KVM's own to us."""
    table = abi.KvmMsrFilter(flags=abi.MSR_FILTER_DEFAULT_DENY)
    for entry, (base, count), bitmap in zip(table.ranges, _RANGES, _BITMAPS, strict=False):
        entry.flags = abi.MSR_FILTER_READ | abi.MSR_FILTER_WRITE
        entry.base, entry.nmsrs, entry.bitmap = base, count, ctypes.addressof(bitmap)
    return table
