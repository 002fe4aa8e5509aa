"""Device memory as an operand of instructions that are rarely used on it: strings, page crossings.

The devices are the local APIC and the I/O APIC, whose registers read back what was written.
"""

from __future__ import annotations

import pytest

from conformance.support import DATA, PAGE, WINDOW, WINDOW_PT, Case, P, W, check, fault

APIC, IOAPIC = 0xFEE00000, 0xFEC00000
TPR, VERSION, ICR_HIGH = 0x80, 0x30, 0x310
FLAGS = "pushfq\npop rax\nand eax, 0x41\nreport rax\n"
"""ZF and CF to the log."""
SEAM = (
    f"mov eax, {DATA | P | W:#x}\nmov [{WINDOW_PT}], rax\n"
    f"mov eax, {IOAPIC | P | W:#x}\nmov [{WINDOW_PT + 8}], rax\nmov rax, cr3\nmov cr3, rax\n"
    f"mov edi, {WINDOW + PAGE - 1}\n"
)
"""A page of RAM and behind it the I/O APIC, whose register select is its first byte; RDI points at
the last byte of RAM."""

CASES: dict[str, Case] = {
    "CMPS of a device with RAM": Case(
        f"mov ebx, {APIC}\nmov dword ptr [rbx + {TPR}], 0x30\nmov dword ptr [{DATA}], 0x31\n"
        f"lea esi, [rbx + {TPR}]\nmov edi, {DATA}\ncld\ncmpsd\n" + FLAGS
        + f"sub esi, ebx\nreport rsi\nmov dword ptr [rbx + {TPR}], 0x31\n"
        f"lea esi, [rbx + {TPR}]\nmov edi, {DATA}\ncmpsd\n" + FLAGS,
        [1, TPR + 4, 0x40],
    ),
    "CMPS of two devices": Case(
        f"mov ebx, {APIC}\nmov dword ptr [rbx + {TPR}], 0x40\n"
        f"mov dword ptr [rbx + {ICR_HIGH}], 0x1000000\n"
        f"lea esi, [rbx + {TPR}]\nlea edi, [rbx + {ICR_HIGH}]\ncld\ncmpsd\n" + FLAGS
        + f"lea esi, [rbx + {ICR_HIGH}]\nlea edi, [rbx + {TPR}]\ncmpsd\n" + FLAGS,
        [1, 0],
    ),
    "SCAS of a device": Case(
        f"mov ebx, {APIC}\nmov dword ptr [rbx + {TPR}], 0x50\nlea edi, [rbx + {TPR}]\n"
        "mov eax, 0x50\ncld\nscasd\n" + FLAGS, [0x40],
    ),
    "INS to a device": Case(
        f"mov ebx, {APIC}\nlea edi, [rbx + {TPR}]\nmov edx, 0x5f0\ncld\ninsd\n"
        f"mov eax, [rbx + {TPR}]\nreport rax\n", [0xFF],
    ),
    "OUTS from a device": Case(
        f"mov ebx, {APIC}\nmov dword ptr [rbx + {ICR_HIGH}], 0x80000000\n"
        f"lea esi, [rbx + {ICR_HIGH}]\nmov edx, 0xcf8\ncld\noutsd\nin eax, dx\nreport rax\n",
        [0x80000000],
    ),
    "a write to RAM and a device": Case(
        SEAM + "mov word ptr [rdi], 0x0155\nmov eax, [rdi + 0x11]\nand eax, 0xff\nreport rax\n"
        f"movzx eax, byte ptr [{DATA + PAGE - 1}]\nreport rax\n", [0x20, 0x55],
    ),
    "a read from RAM and a device": Case(
        SEAM + f"mov byte ptr [{DATA + PAGE - 1}], 0x66\nmov byte ptr [rdi + 1], 2\n"
        "movzx eax, word ptr [rdi]\nreport rax\n", [0x0266],
    ),
    "a change in RAM and a device": Case(
        SEAM + f"mov byte ptr [{DATA + PAGE - 1}], 0xff\nmov byte ptr [rdi + 1], 1\n"
        "add word ptr [rdi], 1\nmovzx eax, word ptr [rdi]\nreport rax\n", [0x0200],
    ),
    "PUSH and POP on a device, by ENTER and LEAVE": Case(
        f"mov ebx, {APIC}\nmov r9, rsp\nmov ebp, 0x60\nlea rsp, [rbx + {TPR + 8}]\n"
        "enter 0, 0\nxchg r9, rsp\nsub r9, rbx\nreport r9\n"
        f"mov eax, [rbx + {TPR}]\nreport rax\n", [TPR, 0x60],
    ),
    "SMSW to a device": Case(
        f"mov ebx, {IOAPIC}\nmov byte ptr [rbx], 1\nsmsw word ptr [rbx]\n"
        "mov eax, [rbx]\nreport rax\n", [0x33],
    ),
    "LMSW from a device": Case(
        f"mov ebx, {APIC}\nmov dword ptr [rbx + {TPR}], 0x3b\nlmsw [rbx + {TPR}]\nsmsw eax\n"
        "and eax, 0xf\nreport rax\nclts\n", [0xB],
    ),
    "a far jump through a device": Case(
        f"mov ebx, {APIC}\nmov dword ptr [rbx + {ICR_HIGH}], 0x10000000\n"
        f"lea rsi, [rbx + {ICR_HIGH - 4}]\ntry\njmp fword ptr [rsi]\ncaught\n",
        fault(13),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_devices(engine: str, name: str) -> None:
    check(engine, name, CASES[name])
