"""CPUID: the model that guests see, and the instruction.

The virtual processor is one plain AMD part of family 1Ah. Privileged features are those that this
package models; unprivileged instruction sets are offered only when the host has them, because
translated guest code runs them as they are. Errata and side channels that kernels work around are
declared absent, as they concern hardware privilege levels, which translated code doesn't run on;
what speculation still reveals is another matter (docs/security.md).

Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeAlias

from ringfence.cpu.components import (
    AVX512_STATE,
    AVX_STATE,
    EXTENDED,
    LEGACY_BYTES,
    SSE_STATE,
    X87_STATE,
    area_bytes,
)
from ringfence.cpu.state import CR4_OSXSAVE, OK, RAX, RBX, RCX, RDX, Cpu
from ringfence.errors import HostError
from ringfence.native.dialect import load32, native
from ringfence.native.routine import routine

Row: TypeAlias = tuple[int, int, int, int, int, int]
Registers: TypeAlias = tuple[int, int, int, int]
HostCpuid: TypeAlias = Callable[[int, int], Registers]

ANY = 0xFFFFFFFF
"""Subleaf of rows that answer for any ECX."""
ROW_BYTES = 24
LINEAR_BITS, PHYSICAL_BITS = 48, 40
VENDOR = b"AuthenticAMD"
BRAND = b"Ringfence virtual CPU"
HYPERVISOR = b"KVMKVMKVM\0\0\0"
FAMILY, MODEL, STEPPING = 0x1A, 2, 1
SIGNATURE = (FAMILY - 0xF) << 20 | (MODEL >> 4) << 16 | 0xF00 | (MODEL & 15) << 4 | STEPPING
MAX_BASIC, MAX_EXTENDED, MAX_HYPERVISOR = 0xD, 0x80000021, 0x40000001
OSXSAVE_BIT = 27
OSXSAVE = 1 << OSXSAVE_BIT
APIC = 1 << 9
CACHE_LINE = 64

EAX, EBX, ECX, EDX = range(4)
Bit: TypeAlias = tuple[int, int, int]
"""Leaf (subleaf 0), register, bit number."""

# What is modelled here, whatever the host is.
MODELLED: dict[str, Bit] = {
    "FPU": (1, EDX, 0), "DE": (1, EDX, 2), "PSE": (1, EDX, 3), "TSC": (1, EDX, 4),
    "MSR": (1, EDX, 5), "PAE": (1, EDX, 6), "MCE": (1, EDX, 7), "CX8": (1, EDX, 8),
    "APIC": (1, EDX, 9), "SEP": (1, EDX, 11), "MTRR": (1, EDX, 12), "PGE": (1, EDX, 13),
    "MCA": (1, EDX, 14), "CMOV": (1, EDX, 15), "PAT": (1, EDX, 16), "PSE36": (1, EDX, 17),
    "CLFSH": (1, EDX, 19), "MMX": (1, EDX, 23), "FXSR": (1, EDX, 24), "SSE": (1, EDX, 25),
    "SSE2": (1, EDX, 26), "PCID": (1, ECX, 17), "X2APIC": (1, ECX, 21),
    "TSC_DEADLINE": (1, ECX, 24), "HYPERVISOR": (1, ECX, 31),
    "ARAT": (6, EAX, 2),
    "FSGSBASE": (7, EBX, 0), "TSC_ADJUST": (7, EBX, 1), "SMEP": (7, EBX, 7),
    "INVPCID": (7, EBX, 10),
    "UMIP": (7, ECX, 2), "RDPID": (7, ECX, 22),
    "SYSCALL": (0x80000001, EDX, 11), "NX": (0x80000001, EDX, 20),
    "PDPE1GB": (0x80000001, EDX, 26), "RDTSCP": (0x80000001, EDX, 27),
    "X64": (0x80000001, EDX, 29), "TOPOEXT": (0x80000001, ECX, 22),
    "SSB_NO": (0x80000008, EBX, 26),
    "LFENCE_SERIALIZING": (0x80000021, EAX, 2), "NULL_SEL_CLR_BASE": (0x80000021, EAX, 6),
    "AUTOIBRS": (0x80000021, EAX, 8), "SRSO_NO": (0x80000021, EAX, 29),
}  # fmt: skip

# What translated code takes from the host as it is.
FROM_HOST: dict[str, Bit] = {
    "SSE3": (1, ECX, 0), "PCLMULQDQ": (1, ECX, 1), "SSSE3": (1, ECX, 9),
    "CMPXCHG16B": (1, ECX, 13), "SSE4_1": (1, ECX, 19), "SSE4_2": (1, ECX, 20),
    "MOVBE": (1, ECX, 22), "POPCNT": (1, ECX, 23), "AES": (1, ECX, 25), "RDRAND": (1, ECX, 30),
    "BMI1": (7, EBX, 3), "BMI2": (7, EBX, 8), "ERMS": (7, EBX, 9), "RDSEED": (7, EBX, 18),
    "ADX": (7, EBX, 19), "CLFLUSHOPT": (7, EBX, 23), "CLWB": (7, EBX, 24), "SHA": (7, EBX, 29),
    "GFNI": (7, ECX, 8), "FSRM": (7, EDX, 4),
    "LAHF_LM": (0x80000001, ECX, 0), "LZCNT": (0x80000001, ECX, 5),
    "SSE4A": (0x80000001, ECX, 6), "PREFETCHW": (0x80000001, ECX, 8),
    "CLZERO": (0x80000008, EBX, 0), "XSAVEERPTR": (0x80000008, EBX, 2),
}  # fmt: skip
XSAVE_BIT: Bit = (1, ECX, 26)
# The same, but only when the host's system has enabled the AVX state.
FROM_HOST_AVX: dict[str, Bit] = {
    "AVX": (1, ECX, 28), "FMA": (1, ECX, 12), "F16C": (1, ECX, 29), "AVX2": (7, EBX, 5),
    "VAES": (7, ECX, 9), "VPCLMULQDQ": (7, ECX, 10),
}  # fmt: skip
# The same with the AVX-512 state.
FROM_HOST_AVX512: dict[str, Bit] = {
    "AVX512F": (7, EBX, 16), "AVX512DQ": (7, EBX, 17), "AVX512_IFMA": (7, EBX, 21),
    "AVX512CD": (7, EBX, 28), "AVX512BW": (7, EBX, 30), "AVX512VL": (7, EBX, 31),
    "AVX512_VBMI": (7, ECX, 1), "AVX512_VBMI2": (7, ECX, 6), "AVX512_VNNI": (7, ECX, 11),
    "AVX512_BITALG": (7, ECX, 12), "AVX512_VPOPCNTDQ": (7, ECX, 14),
    "AVX512_VP2INTERSECT": (7, EDX, 8), "AVX512_FP16": (7, EDX, 23),
}  # fmt: skip
AVX512_NEEDED = ("AVX512F", "AVX512DQ", "AVX512BW", "AVX512VL")
"""A host without one of these offers none: masks of 64 bits have to be moved."""
XSAVEOPT, XSAVEC = 1, 2
"""Leaf 0Dh, subleaf 1, EAX; both are carried out here, so that the host need not have them."""
MULTIPLE: dict[str, Bit] = {"HTT": (1, EDX, 28), "CMP_LEGACY": (0x80000001, ECX, 1)}

# Bits of leaf 1 EDX that AMD repeats in leaf 8000_0001h EDX.
REPEATED = 0x0183F3FF

# Names that iced-x86 gives to instructions which every x86-64 processor has.
BASELINE = frozenset(
    (
        *("INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "FPU287", "FPU387", "X64"),
        *("CPUID", "MULTIBYTENOP", "PAUSE", "RDPMC"),
    )
)


def host_cpuid(leaf: int, subleaf: int = 0) -> Registers:
    """What the host's CPUID says: EAX, EBX, ECX, EDX.

    Of the vector state's components (leaf 0Dh), those that the host's system has enabled.
    """
    result = (ctypes.c_uint32 * 4)()
    _host_routine()(leaf, subleaf, ctypes.addressof(result))
    if (leaf, subleaf) == (0xD, 0) and host_cpuid(1)[ECX] & OSXSAVE:
        result[EAX] &= _host_xcr0()
    return result[0], result[1], result[2], result[3]


# edi = leaf, esi = subleaf, rdx = where four 32-bit words go (System V calling convention).
HOST_CPUID_CODE = bytes.fromhex(
    "53"  # push rbx
    "4989d0"  # mov r8, rdx
    "89f8"  # mov eax, edi
    "89f1"  # mov ecx, esi
    "0fa2"  # cpuid
    "418900"  # mov [r8], eax
    "41895804"  # mov [r8+4], ebx
    "41894808"  # mov [r8+8], ecx
    "4189500c"  # mov [r8+12], edx
    "5b"  # pop rbx
    "c3"  # ret
)

# xor ecx, ecx; xgetbv; ret
HOST_XGETBV_CODE = bytes.fromhex("31c90f01d0c3")


@cache
def _host_xcr0() -> int:
    return routine(HOST_XGETBV_CODE)()


@cache
def _host_routine() -> Callable[..., int]:
    return routine(HOST_CPUID_CODE, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)


def _collect_bits(host: HostCpuid, cpus: int) -> dict[tuple[int, int], int]:
    """Feature words by (leaf, register)."""
    words: dict[tuple[int, int], int] = {}

    def offer(bits: Iterable[Bit]) -> None:
        for leaf, register, bit in bits:
            words[leaf, register] = words.get((leaf, register), 0) | 1 << bit

    def has(where: Bit) -> bool:
        leaf, register, bit = where
        return leaf <= host(leaf & 0x80000000, 0)[EAX] and bool(host(leaf, 0)[register] >> bit & 1)

    offer(MODELLED.values())
    offer(bit for bit in FROM_HOST.values() if has(bit))
    if has(XSAVE_BIT):
        offer([XSAVE_BIT])
        enabled = host(0xD, 0)[EAX] if has((1, ECX, OSXSAVE_BIT)) else 0
        if enabled & AVX_STATE and has(FROM_HOST_AVX["AVX"]):
            offer(bit for bit in FROM_HOST_AVX.values() if has(bit))
            whole = enabled & AVX512_STATE == AVX512_STATE and host(0xD, 1)[EAX] & XSAVEC
            if whole and all(has(FROM_HOST_AVX512[name]) for name in AVX512_NEEDED):
                offer(bit for bit in FROM_HOST_AVX512.values() if has(bit))
    if cpus > 1:
        offer(MULTIPLE.values())
    return words


def _cache(kind: int, level: int, kib: int, ways: int, sharing: int) -> Registers:
    """A row of leaf 8000_001Dh: EAX to EDX for one cache."""
    sets = kib * 1024 // (ways * CACHE_LINE)
    eax = kind | level << 5 | 1 << 8 | (sharing - 1) << 14
    return eax, CACHE_LINE - 1 | (ways - 1) << 22, sets - 1, 2 if level == 2 else 0


def build_cpuid(
    host: HostCpuid,
    *,
    cpu_index: int = 0,
    cpus: int = 1,
    paravirtual: int = 0,
    only: frozenset[str] | None = None,
) -> list[Row]:
    """The CPUID table of one virtual CPU; ``host`` answers for (leaf, subleaf).

    ``paravirtual`` is EAX of leaf 0x40000001: what KVM calls its features. ``only`` names the
    features to offer at most; by default all that there are.
    """
    words = _collect_bits(host, cpus)
    if only is not None:
        allowed = {name: where for name, where in _KNOWN.items() if name in only}
        for leaf, register in words:
            bits = sum(1 << b for at, r, b in allowed.values() if (at, r) == (leaf, register))
            words[leaf, register] &= bits
    words[0x80000001, EDX] |= words[1, EDX] & REPEATED
    bits = (cpus - 1).bit_length()
    rows: list[Row] = []

    def row(leaf: int, registers: Iterable[int], subleaf: int = ANY) -> None:
        eax, ebx, ecx, edx = registers
        rows.append((leaf, subleaf, eax, ebx, ecx, edx))

    def features(leaf: int, subleaf: int = ANY, **fixed: int) -> None:
        names = ("eax", "ebx", "ecx", "edx")
        row(leaf, (words.get((leaf, i), 0) | fixed.get(n, 0) for i, n in enumerate(names)), subleaf)

    ebx, edx, ecx = struct.unpack("<3I", VENDOR)
    row(0, (MAX_BASIC, ebx, ecx, edx))
    features(1, eax=SIGNATURE, ebx=cpu_index << 24 | cpus << 16 | CACHE_LINE // 8 << 8)
    features(6)
    features(7, 0)
    # Extended topology: one thread per core, then all cores in one package.
    row(0xB, (0, 1, 1 << 8, cpu_index), 0)
    row(0xB, (bits, cpus, 2 << 8 | 1, cpu_index), 1)
    row(0xB, (0, 0, 0, cpu_index))
    if words[1, ECX] >> XSAVE_BIT[2] & 1:
        state = X87_STATE | SSE_STATE
        if words[1, ECX] >> FROM_HOST_AVX["AVX"][2] & 1:
            state |= AVX_STATE
        if words[7, EBX] >> FROM_HOST_AVX512["AVX512F"][2] & 1:
            state |= AVX512_STATE
        ends = [c.offset + c.size for c in EXTENDED if state >> c.number & 1]
        size = max([LEGACY_BYTES, *ends])
        row(0xD, (state, size, size, 0), 0)
        row(0xD, (XSAVEOPT | XSAVEC, size, 0, 0), 1)
        for component in EXTENDED:
            if state >> component.number & 1:
                row(0xD, (component.size, component.offset, 0, 0), component.number)
    ebx, ecx, edx = struct.unpack("<3I", HYPERVISOR)
    row(0x40000000, (MAX_HYPERVISOR, ebx, ecx, edx))
    row(0x40000001, (paravirtual, 0, 0, 0))
    row(0x80000000, (MAX_EXTENDED, *(rows[0][i] for i in (3, 4, 5))))
    features(0x80000001, eax=SIGNATURE)
    brand = struct.unpack("<12I", BRAND.ljust(48, b"\0"))
    for part in range(3):
        row(0x80000002 + part, brand[part * 4 : part * 4 + 4])
    # First-level TLBs and caches (32 KiB, 8 ways); 1 MiB of L2 with 8 ways; 32 MiB of L3.
    row(0x80000005, (0xFF40FF40, 0xFF40FF40, 0x20080140, 0x20080140))
    row(0x80000006, (0, 0, 0x04006140, 0x01009140))
    features(0x80000007)
    features(0x80000008, eax=LINEAR_BITS << 8 | PHYSICAL_BITS, ecx=bits << 12 | cpus - 1)
    row(0x8000001D, _cache(1, 1, 32, 8, 1), 0)
    row(0x8000001D, _cache(2, 1, 32, 8, 1), 1)
    row(0x8000001D, _cache(3, 2, 1024, 8, 1), 2)
    row(0x8000001D, _cache(3, 3, 32768, 16, cpus), 3)
    row(0x8000001E, (cpu_index, cpu_index & 0xFF, 0, 0))
    features(0x80000021)
    return rows


def pack(rows: Iterable[Row]) -> bytes:
    """Rows as ``Cpu.cpuid_table`` wants them."""
    return b"".join(struct.pack("<6I", *row) for row in rows)


_KNOWN: dict[str, Bit] = {
    **MODELLED, **FROM_HOST, **FROM_HOST_AVX, **FROM_HOST_AVX512, **MULTIPLE, "XSAVE": XSAVE_BIT,
    "XSAVEOPT": XSAVE_BIT, "XSAVEC": XSAVE_BIT,
}  # fmt: skip


def offered(rows: Iterable[Row]) -> frozenset[str]:
    """Names of the features that a table offers."""
    rows = list(rows)
    return frozenset(name for name in _KNOWN if offers(name, rows))


def require(wanted: frozenset[str] | None, rows: Iterable[Row]) -> None:
    """Raise HostError unless a table offers what a guest, that goes on here, was promised."""
    missing = (wanted or frozenset()) - offered(rows)
    if missing:
        raise HostError(
            "the guest may use CPU features that this host or engine lacks:"
            f" {', '.join(sorted(missing))}"
        )


def offers(feature_name: str, rows: Iterable[Row]) -> bool:
    """Whether the table offers a feature, by the name iced-x86's ``CpuidFeature`` gives it."""
    if feature_name in BASELINE:
        return True
    where = _KNOWN.get(feature_name)
    if where is None:
        return False
    leaf, register, bit = where
    for row in rows:
        if row[0] == leaf and row[1] in (0, ANY):
            return bool(row[2 + register] >> bit & 1)
    return False


@native
def find_row(cpu: Cpu, leaf: int, subleaf: int) -> int:
    """Host address of the first row that answers for a leaf and subleaf, 0 if there's none."""
    row = cpu.cpuid_table
    for _ in range(cpu.cpuid_rows):
        if load32(row) == leaf and (load32(row + 4) == ANY or load32(row + 4) == subleaf):
            return row
        row += ROW_BYTES
    return 0


@native
def fx_cpuid(cpu: Cpu) -> int:
    """CPUID; leaves that the table lacks, beyond the maximum too, are all zero (as on AMD)."""
    leaf = cpu.gpr[RAX] & 0xFFFFFFFF
    subleaf = cpu.gpr[RCX] & 0xFFFFFFFF
    row = find_row(cpu, leaf, subleaf)
    cpu.gpr[RAX] = load32(row + 8) if row else 0
    cpu.gpr[RBX] = load32(row + 12) if row else 0
    cpu.gpr[RCX] = load32(row + 16) if row else 0
    cpu.gpr[RDX] = load32(row + 20) if row else 0
    if leaf == 1 and cpu.cr4 & CR4_OSXSAVE:
        cpu.gpr[RCX] = cpu.gpr[RCX] | OSXSAVE
    if leaf == 1 and cpu.apic_disabled:
        cpu.gpr[RDX] = cpu.gpr[RDX] & ~APIC
    if leaf == 0xB and not cpu.gpr[RCX]:
        cpu.gpr[RCX] = subleaf & 0xFF
    if leaf == 0xD and subleaf < 2 and row:
        cpu.gpr[RBX] = area_bytes(cpu.xcr0)  # in either format, as offsets leave no gaps
    cpu.rip = cpu.next_rip
    return OK
