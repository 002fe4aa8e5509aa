"""Programs that do their worst: under every engine they end, by themselves or when told to."""

from __future__ import annotations

import pytest

from conformance.support import DATA, IDT, START, run
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


@pytest.mark.parametrize("name", ENDLESS)
def test_endless(engine: str, name: str) -> None:
    got = run(engine, START + ENDLESS[name], timeout=0.2)
    assert got.ending is StopReason.STOPPED, got.report


@pytest.mark.parametrize("name", DEADLY)
def test_deadly(engine: str, name: str) -> None:
    got = run(engine, START + DEADLY[name])
    assert got.ending is StopReason.CRASH, got.report
    assert "RIP=" in got.report
