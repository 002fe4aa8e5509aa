"""Checks that monitors tend to miss: reserved bits one by one, bases, an APIC that goes away."""

from __future__ import annotations

import pytest

from conformance.support import DATA, GDT, IDT, PAGE, WINDOW, A, Case, D, P, U, W, check, fault
from ringfence.cpu import state

FAR = 0x8000_0000_0000
"""The first address that is not canonical."""
RESERVED_CR4 = (12, 13, 14, 15, 19, *range(22, 64))
"""Bits of CR4 that stand for features that CPUID doesn't show: LA57, VMXE, SMXE, KL, PKE and on."""
APIC = "mov ebx, 0xfee00000\n"
BASE = "mov ecx, 0x1b\nrdmsr\n"
CPUID_APIC = "mov eax, 1\ncpuid\nshr edx, 9\nand edx, 1\nreport rdx\n"
PTE = 0x5000
"""Where the window's first page table entry is."""


def base_register(instruction: str, base: int) -> str:
    """LGDT or LIDT of a base, and where it was before."""
    return (
        f"mov rax, {base}\nmov word ptr [{DATA}], 0xfff\nmov [{DATA + 2}], rax\n"
        f"try\n{instruction} [{DATA}]\ncaught\n"
    )


def window(entry: int, access: str) -> str:
    """Set the window's entry, drop what is cached of it, and access it."""
    return (
        f"mov rax, {entry}\nmov [{PTE}], rax\ninvlpg [{WINDOW}]\nmov ebx, {WINDOW}\n"
        f"try\n{access}\ncaught\n"
    )


CASES: dict[str, Case] = {
    "every reserved bit of CR4": Case(
        "".join(
            f"mov rax, cr4\nbts rax, {bit}\ntry\nmov cr4, rax\ncaught\n" for bit in RESERVED_CR4
        ),
        fault(state.GP) * len(RESERVED_CR4),
    ),
    "PCIDE with a PCID in CR3": Case(
        "mov rax, cr3\nmov rbx, rax\nor rax, 1\nmov cr3, rax\nmov rax, cr4\nbts rax, 17\n"
        "try\nmov cr4, rax\ncaught\nmov cr3, rbx\n",
        fault(state.GP), needs=("PCID",),
    ),
    "reserved bits of CR3": Case(
        "mov rax, cr3\nbts rax, 51\ntry\nmov cr3, rax\ncaught\n", fault(state.GP)
    ),
    "reserved bits of DR7": Case(
        "mov eax, 0x400\nbts rax, 32\ntry\nmov dr7, rax\ncaught\n", fault(state.GP)
    ),
    "reserved bits of DR6": Case(
        "mov eax, 0x400\nbts rax, 32\ntry\nmov dr6, rax\ncaught\n", fault(state.GP)
    ),
    "CR1 and CR5 are none": Case(
        "try\n.byte 0x0f, 0x20, 0xc8\ncaught\ntry\n.byte 0x0f, 0x22, 0xe8\ncaught\n",
        fault(state.UD) * 2,
    ),
    "non-canonical GDTR base": Case(base_register("lgdt", FAR), fault(state.GP)),
    "non-canonical IDTR base": Case(base_register("lidt", FAR), fault(state.GP)),
    "the last canonical GDTR base": Case(
        f"sgdt [{DATA + 32}]\n" + base_register("lgdt", FAR - PAGE)
        + f"sgdt [{DATA + 16}]\nmov rax, [{DATA + 18}]\nreport rax\nlgdt [{DATA + 32}]\n",
        [FAR - PAGE],
    ),
    "non-canonical GS bases": Case(
        "mov edx, 0x8000\nxor eax, eax\nmov ecx, 0xc0000101\ntry\nwrmsr\ncaught\n"
        "mov ecx, 0xc0000102\ntry\nwrmsr\ncaught\n",
        fault(state.GP) * 2,
    ),
    "non-canonical bases by WRFSBASE and WRGSBASE": Case(
        "mov rax, cr4\nbts rax, 16\nmov cr4, rax\n"
        f"mov rax, {FAR}\ntry\nwrfsbase rax\ncaught\ntry\nwrgsbase rax\ncaught\n",
        fault(state.GP) * 2, needs=("FSGSBASE",),
    ),
    "non-canonical CSTAR and SYSENTER_EIP": Case(
        "mov edx, 0x8000\nxor eax, eax\nmov ecx, 0xc0000083\ntry\nwrmsr\ncaught\n",
        fault(state.GP),
    ),
    "reserved bits make a fault with P set, whoever reads": Case(
        window(DATA | P | W | U | 1 << 51, "mov rax, [rbx]")
        + window(DATA | P | W | U | 1 << 51, "mov [rbx], rax")
        + f"mov rax, {DATA | P | W | U | 1 << 51}\nmov [{PTE}], rax\ninvlpg [{WINDOW}]\n"
        + f"user\nmov rax, [{WINDOW}]\nkernel\n",
        [*fault(14, 9, WINDOW), *fault(14, 0xB, WINDOW), *fault(14, 0xD, WINDOW)],
    ),
    "a missing entry's reserved bits don't count": Case(
        window((DATA | W | U | 1 << 51) & ~P, "mov rax, [rbx]"), fault(14, 0, WINDOW)
    ),
    "reserved bits set neither A nor D": Case(
        window(DATA | P | W | 1 << 51, "mov [rbx], rax")
        + f"mov rax, [{PTE}]\nand eax, {A | D}\nreport rax\n",
        [*fault(14, 0xB, WINDOW), 0],
    ),
    "#SS by RSP and RBP, #GP by the others": Case(
        f"user\nmov rsp, {FAR}\npop rax\nkernel\nuser\nmov rsp, {FAR + 8}\npush rax\nkernel\n"
        f"mov rbp, {FAR}\ntry\nmov eax, [rbp + 8]\ncaught\nuser\nmov rbp, {FAR}\nleave\nkernel\n"
        f"mov rcx, {FAR}\nxor ebp, ebp\ntry\nmov eax, [rcx + rbp]\ncaught\n"
        f"mov rbp, {FAR}\nxor ecx, ecx\ntry\nmov eax, [rbp + rcx]\ncaught\n"
        f"mov rbp, {FAR}\ntry\nmov eax, fs:[rbp]\ncaught\n",
        [*fault(state.SS_FAULT) * 4, *fault(state.GP), *fault(state.SS_FAULT), *fault(state.GP)],
    ),
    "VMCALL and VMMCALL are not #UD": Case(
        "mov eax, 0x7fffffff\ntry\nvmcall\nmark 1\ncaught\nmov eax, 0x7fffffff\n"
        "try\nvmmcall\nmark 2\ncaught\n",
        [1, 2], capability="hypercalls",
    ),
    "an xAPIC that is disabled, and enabled again": Case(
        APIC + CPUID_APIC
        + "mov ebx, 0xfee00000\nmov dword ptr [rbx + 0x80], 0x20\n"
        + BASE + "and eax, 0xfffff3ff\nwrmsr\n"
        + CPUID_APIC
        + "mov ebx, 0xfee00000\nmov eax, [rbx + 0x30]\nreport rax\n"
        + "mov dword ptr [rbx + 0x80], 0x40\n"
        + BASE + "or eax, 0x800\nwrmsr\n"
        + CPUID_APIC
        + "mov ebx, 0xfee00000\nmov eax, [rbx + 0x30]\nand eax, 0xff\nreport rax\n"
        + "mov eax, [rbx + 0x80]\nreport rax\nmov eax, [rbx + 0xf0]\nreport rax\n",
        [1, 0, 0xFFFF_FFFF, 1, 0x14, 0, 0xFF],
    ),
    "from x2APIC back to xAPIC by way of disabled": Case(
        BASE + "or eax, 0x400\nwrmsr\n"
        + BASE + "and eax, 0xfffffbff\ntry\nwrmsr\ncaught\n"
        + BASE + "and eax, 0xfffff3ff\nwrmsr\n"
        + BASE + "or eax, 0xc00\ntry\nwrmsr\ncaught\n"
        + BASE + "or eax, 0x800\nwrmsr\n" + APIC + "mov eax, [rbx + 0x30]\nand eax, 0xff\n"
        + "report rax\n",
        [*fault(state.GP), *fault(state.GP), 0x14],
    ),
    "reserved bits of the APIC's base": Case(
        BASE + "bts eax, 9\ntry\nwrmsr\ncaught\n" + BASE + "bts edx, 20\ntry\nwrmsr\ncaught\n",
        fault(state.GP) * 2,
    ),
    "an interrupt through a gate with a non-canonical target": Case(
        f"mov dword ptr [{IDT + 16 * 0x50 + 8}], 0x8000\ntry\nint 0x50\ncaught\n",
        fault(state.GP),
    ),
    "a TSS with a non-canonical base": Case(
        f"mov rax, [{GDT + 0x30}]\nbtr rax, 41\nmov [{GDT + 0x30}], rax\n"
        f"mov dword ptr [{GDT + 0x38}], 0x8000\nmov eax, 0x30\ntry\nltr ax\ncaught\n",
        fault(state.GP, 0x30),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_checks(engine: str, name: str) -> None:
    check(engine, name, CASES[name])
