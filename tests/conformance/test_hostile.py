"""Programs that do their worst: under every engine they end, by themselves or when told to."""

from __future__ import annotations

import pytest

from conformance.support import (
    DATA,
    IDT,
    START,
    START_OPERAND,
    WINDOW,
    WINDOW_PT,
    is_software,
    run,
)
from ringfence.engine import StopReason

ENDLESS: dict[str, str] = {
    "a loop": "1: jmp 1b",
    "a halt that nothing ends": "cli\nhlt",
    "device reads without end": "mov ebx, 0xfee00000\n1: mov eax, [rbx + 0x30]\njmp 1b",
    "four billion port writes": f"mov ecx, -1\nmov edx, 0x80\nmov esi, {DATA}\nrep outsb",
    "port reads without end": "1: in al, 0x80\njmp 1b",
    "RAM to the local APIC, element by element": f"mov esi, {DATA}\nmov edi, 0xfee00000\n"
    "mov ecx, -1\nrep movsb",
    "a handler that faults": f"lea rax, [rip + 5f]\nmov [{IDT + 16 * 6}], ax\nmov r14, rax\nud2\n"
    "5: mov rsp, KSTACK\nud2",
    "a breakpoint on #DB's own handler": f"mov byte ptr [{IDT + 16 + 4}], 1\ngate 1, 5f\n"
    "lea rax, [rip + 5f]\nmov dr0, rax\nmov eax, 0x402\nmov dr7, rax\n5: iretq",
    "a watched stack of #DB": f"mov byte ptr [{IDT + 16 + 4}], 1\ngate 1, 5f\n"
    "lea rax, [IST1 - 16]\nmov dr0, rax\nmov eax, 0xb0402\nmov dr7, rax\n"
    "1: mov [IST1 - 16], rax\njmp 1b\n5: nop\niretq",
    "a step that never ends": "gate 1, 5f\npush 0x102\npopfq\n1: jmp 1b\n5: iretq",
    "user code in a loop": "user 0x202\n1: jmp 1b\nkernel",
    "interrupts to itself": "gate 0x41, 5f\nmov ebx, 0xfee00000\n"
    "mov dword ptr [rbx + 0xf0], 0x1ff\nsti\n1: mov dword ptr [rbx + 0x300], 0x40041\njmp 1b\n"
    "5: mov dword ptr [rbx + 0xb0], 0\niretq",
    "a timer of one tick": "gate 0x41, 5f\nmov ebx, 0xfee00000\nmov dword ptr [rbx + 0xf0], 0x1ff\n"
    "mov dword ptr [rbx + 0x320], 0x20041\nmov dword ptr [rbx + 0x380], 1\nsti\n1: jmp 1b\n"
    "5: mov dword ptr [rbx + 0xb0], 0\niretq",
}  # fmt: skip
DEADLY: dict[str, str] = {
    "an interrupt table in nowhere": f"mov qword ptr [{DATA}], 0\nlidt [{DATA}]\nud2",
    "an interrupt table in a device": f"mov eax, 0xfee00000\nmov [{DATA + 2}], rax\n"
    f"mov word ptr [{DATA}], 0xfff\nlidt [{DATA}]\nud2",
    "a stack in nowhere": "mov rsp, 0x3ff8\nshl rsp, 24\npush rax",
    "page tables in a device": "mov eax, 0xfee00000\nmov cr3, rax",
    "page tables beyond RAM": "mov eax, 0x7ffff000\nmov cr3, rax",
    "page tables that are no tables": f"mov eax, {DATA}\nmov cr3, rax",
}

SEND = "mov dword ptr [rbx + 0x310], {0:#x}\nmov dword ptr [rbx + 0x300], {1:#x}\n"
"""A message from the local APIC whose page is in RBX: destination, command."""
ENABLE = f"lidt [{START_OPERAND}]\nmov ebx, 0xfee00000\nmov dword ptr [rbx + 0xf0], 0x1ff\n"
EMPTY = "gate 0x41, 5f\ngate 2, 6f\njmp 7f\n5: mov dword ptr [rbx + 0xb0], 0\n6: iretq\n7:\n"
"""Handlers that do nothing, of vector 0x41 and of NMIs."""
READY = f"lock inc qword ptr [{DATA + 128}]\n8: pause\ncmp qword ptr [{DATA + 128}], 4\njb 8b\n"
"""All four begin at once, with their tables loaded."""
STORMS: dict[str, str] = {
    "interrupts from all to all": ENABLE + EMPTY + "sti\n1: " + SEND.format(0, 0x80041) + "jmp 1b",
    "NMIs from all to all others": ENABLE + EMPTY + READY
    + "1: " + SEND.format(0, 0xC0400) + "jmp 1b",
    "INIT from all to all others": ENABLE + "1: " + SEND.format(0, 0xC0500) + "jmp 1b",
    "CPUs that are started again and again": ENABLE + "test edi, edi\n2: jnz 2b\n"
    "mov dword ptr [0x20000], 0xfdebf4fa\n"  # cli; hlt; jmp
    "1: " + SEND.format(0, 0xC0500) + SEND.format(0, 0xC0620) + "jmp 1b",
    "CPUs that are started anywhere": ENABLE + "test edi, edi\n2: jnz 2b\nmov ecx, 0xc0600\n"
    "1: " + SEND.format(0, 0xC0500) + "mov [rbx + 0x300], ecx\ninc cl\njmp 1b",
    "code that all rewrite and run": f"1: mov byte ptr [{DATA}], 0xb8\n"
    f"mov [{DATA + 1}], edi\nmov byte ptr [{DATA + 5}], 0xc3\nmov eax, {DATA}\ncall rax\njmp 1b",
    "page tables that one rewrites and all use": ENABLE + "gate 14, 5f\ntest edi, edi\njnz 2f\n"
    f"1: xor byte ptr [{WINDOW_PT}], 1\nand byte ptr [{WINDOW_PT}], ~0x60\n"
    f"mov rax, cr3\nmov cr3, rax\nmov [{WINDOW}], eax\njmp 1b\n"
    f"2: mov rax, cr3\nmov cr3, rax\nlock inc qword ptr [{WINDOW}]\njmp 2b\n"
    "5: add rsp, 8\niretq",
    "locks across lines and pages": f"1: lock inc qword ptr [{DATA + 60}]\n"
    f"lock inc qword ptr [{DATA + 4092}]\njmp 1b",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_endless(engine: str, name: str) -> None:
    got = run(engine, START + ENDLESS[name], timeout=0.2)
    assert got.ending is StopReason.STOPPED, got.report


@pytest.mark.parametrize("name", STORMS)
def test_storm(engine: str, name: str) -> None:
    """It goes on until it is told to end; a CPU that is started in the void may end it before."""
    got = run(engine, STORMS[name], timeout=0.4, cpus=4)
    if "anywhere" in name or is_software(engine):
        assert got.ending in (StopReason.STOPPED, StopReason.CRASH), got.report
    else:
        assert got.ending is StopReason.STOPPED, got.report


@pytest.mark.parametrize("name", DEADLY)
def test_deadly(engine: str, name: str) -> None:
    got = run(engine, START + DEADLY[name])
    assert got.ending is StopReason.CRASH, got.report
    assert "RIP=" in got.report
