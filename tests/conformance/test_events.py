"""Interrupts and their shadows, single-step, debug registers, the console, time."""

from __future__ import annotations

import pytest

from conformance.support import DATA, KCODE, USTACK, Case, check, fault
from ringfence.cpu import state

APIC = 0xFEE00000
ENABLE = f"mov ebx, {APIC}\nmov dword ptr [rbx + 0xf0], 0x1ff\n"
SELF = "mov dword ptr [rbx + 0x300], 0x40041\n"
"""An interrupt to itself, vector 0x41 (SDM vol. 3, 11.6.1)."""
COUNTER = (
    "gate 0x41, counter\njmp 7f\n"
    "counter: mov [r15], rcx\nlea r15, [r15 + 8]\nmov dword ptr [rbx + 0xb0], 0\niretq\n7:\n"
)
"""The handler of vector 0x41 reports RCX."""
STEP = (
    "gate 1, stepped\njmp 7f\n"
    "stepped: push rax\nmov rax, [rsp + 8]\nsub rax, r9\nreport rax\npop rax\niretq\n7:\n"
    "lea r9, [rip + 5f]\n"
)
"""#DB's handler reports the address it returns to, relative to label 5."""

CASES: dict[str, Case] = {
    "an interrupt waits for IF": Case(
        COUNTER + ENABLE + "mov ecx, 1\n" + SELF + "mov ecx, 2\nnop\nmov ecx, 3\nsti\nnop\ncli\n"
        "mov ecx, 4\nreport rcx\n", [3, 4],
    ),
    "STI's shadow": Case(
        COUNTER + ENABLE + SELF + "mov ecx, 1\nsti\nmov ecx, 2\nmov ecx, 3\ncli\n", [2],
    ),
    "STI's shadow ends with CLI": Case(
        COUNTER + ENABLE + SELF + "mov ecx, 1\nsti\ncli\nmov ecx, 2\nsti\nnop\ncli\n", [2],
    ),
    "POPF has no shadow": Case(
        COUNTER + ENABLE + SELF + "mov ecx, 1\npush 0x202\npopfq\nmov ecx, 2\ncli\n", [1],
    ),
    "MOV SS's shadow": Case(
        STEP + "mov ecx, ss\npush 0x102\npopfq\n5: mov ss, ecx\nnop\nmov eax, 1\npush 2\npopfq\n"
        "nop\n", [3, 8, 10, 11],
    ),
    "priorities": Case(
        COUNTER + ENABLE + "gate 0x61, counter\n"
        + SELF + "mov dword ptr [rbx + 0x300], 0x40061\nmov ecx, 5\nsti\nnop\ncli\n", [5, 5],
    ),
    "CR8 holds an interrupt back": Case(
        COUNTER + ENABLE + "mov eax, 4\nmov cr8, rax\n" + SELF + "mov ecx, 1\nsti\nnop\nnop\n"
        "mov ecx, 2\ncli\nxor eax, eax\nmov cr8, rax\nmov eax, [rbx + 0x20]\nsti\nnop\ncli\n", [2],
    ),
    "CR8 and TPR are one": Case(
        ENABLE + "mov eax, 5\nmov cr8, rax\nmov eax, [rbx + 0x80]\nreport rax\n"
        "mov dword ptr [rbx + 0x80], 0x70\nmov rax, cr8\nreport rax\n", [0x50, 7],
    ),
    "CR8 takes four bits": Case("mov eax, 0x10\ntry\nmov cr8, rax\ncaught\n", fault(state.GP)),
    "an interrupt into user code": Case(
        COUNTER + ENABLE + "mov ecx, 1\n" + SELF + "user 0x202\nmov ecx, 2\nkernel\n", [1],
    ),
    "single-step in the kernel": Case(
        STEP + "push 0x102\npopfq\n5: nop\nmov eax, 1\nnop\npush 2\npopfq\nnop\n",
        # The trap comes behind each instruction; POPFQ that clears TF is the last stepped.
        [1, 6, 7, 9, 10],
    ),
    "single-step in user code": Case(
        STEP + "user 0x102\n5: nop\nmov eax, 1\nkernel\n", [1, 6, 12],
    ),
    "DR6.BS": Case(
        "gate 1, stepped\njmp 7f\nstepped: mov rax, dr6\nand eax, 0x4000\nreport rax\n"
        "and qword ptr [rsp + 16], ~0x100\niretq\n7: push 0x102\npopfq\nnop\nnop\n", [0x4000],
    ),
    "a breakpoint on an instruction": Case(
        "gate 1, hit\njmp 7f\nhit: mov rcx, dr6\nand ecx, 0xf\nreport rcx\n"
        "or dword ptr [rsp + 16], 0x10000\niretq\n"
        "7: lea rax, [rip + 5f]\nmov dr0, rax\nmov eax, 0x402\nmov dr7, rax\nmark 1\n5: nop\n"
        "mark 2\n", [1, 1, 2], capability="breakpoints",
    ),
    "a breakpoint on data": Case(
        "gate 1, hit\njmp 7f\nhit: mov rcx, dr6\nand ecx, 0xf\nreport rcx\niretq\n"
        f"7: mov eax, {DATA}\nmov dr1, rax\nmov eax, 0xd00408\nmov dr7, rax\nmark 1\n"
        f"mov dword ptr [{DATA}], 3\nmark 2\n", [1, 2, 2], capability="breakpoints",
    ),
    "DR7's fixed bits": Case(
        "mov eax, 0x400\nmov dr7, rax\nmov rax, dr7\nreport rax\nmov rax, 1 << 32\ntry\n"
        "mov dr7, rax\ncaught\n", [0x400, *fault(state.GP)],
    ),
    "console": Case(
        "mov edx, 0x3f8\nmov al, 'O'\nout dx, al\nmov al, 'K'\nout dx, al\n", console=b"OK",
    ),
    "console by OUTSB": Case(
        f"mov dword ptr [{DATA}], 0x21216948\nmov esi, {DATA}\nmov ecx, 4\nmov edx, 0x3f8\ncld\n"
        "rep outsb\nreport rsi\nreport rcx\n", [DATA + 4, 0], console=b"Hi!!",
    ),
    "INSD from a missing port": Case(
        f"mov edi, {DATA}\nmov ecx, 3\nmov edx, 0x5f0\ncld\nrep insd\nreport rdi\n", [DATA + 12],
        memory={DATA: b"\xff" * 12 + bytes(4)},
    ),
    "port sizes": Case(
        "mov rax, -1\nmov edx, 0xcf8\nmov eax, 0x80000000\nout dx, eax\nmov rax, -1\n"
        "in eax, dx\nreport rax\nmov rax, -1\nin al, 0x61\nor al, -1\nmov edx, 0x5f0\n"
        "mov rax, 0x1111111111111111\nin ax, dx\nreport rax\nin al, dx\n",
        [0x80000000, 0x111111111111FFFF], exits={"port_in": 4, "port_out": 2},
    ),
    "device memory by size": Case(
        ENABLE + "mov rax, -1\nmov eax, [rbx + 0xf0]\nreport rax\nmov rax, -1\n"
        "movzx eax, byte ptr [rbx + 0xf0]\nreport rax\nmov edi, 0xfec00000\n"
        "mov dword ptr [rdi], 1\nmov eax, [rdi + 0x10]\nand eax, 0xff\nreport rax\n",
        [0x1FF, 0xFF, 0x20],
    ),
    "read, modify and write a device's register": Case(
        ENABLE + "mov dword ptr [rbx + 0x80], 0x20\nadd dword ptr [rbx + 0x80], 0x10\n"
        "mov eax, [rbx + 0x80]\nreport rax\n", [0x30],
    ),
    "x2APIC": Case(
        "mov ecx, 0x1b\nrdmsr\nor eax, 0x400\nwrmsr\nmov ecx, 0x803\nrdmsr\nand eax, 0xff\n"
        "report rax\nmov ecx, 0x808\nmov eax, 0x30\nxor edx, edx\nwrmsr\nmov rax, cr8\nreport rax\n"
        "mov ecx, 0x803\ntry\nwrmsr\ncaught\n", [0x14, 3, *fault(state.GP)],
    ),
    "x2APIC registers without x2APIC": Case(
        "mov ecx, 0x803\ntry\nrdmsr\ncaught\n", fault(state.GP),
    ),
    "a TSC deadline wakes from HLT": Case(
        COUNTER.replace("0x41", "0x42") + ENABLE
        + "mov dword ptr [rbx + 0x320], 0x40042\nmov ecx, 0x10\nrdmsr\nshl rdx, 32\nor rax, rdx\n"
        "add rax, 2000000\nmov rdx, rax\nshr rdx, 32\nmov ecx, 0x6e0\nwrmsr\nmov ecx, 9\nsti\nhlt\n"
        "cli\n", [9], exits={"halt": 1},
    ),
    "RDTSC and its MSR agree": Case(
        "mov ecx, 0x10\nrdmsr\nshl rdx, 32\nlea r8, [rax + rdx]\nrdtsc\nshl rdx, 32\nor rax, rdx\n"
        "mov r9, rax\nmov ecx, 0x10\nrdmsr\nshl rdx, 32\nor rax, rdx\ncmp r8, r9\nsetbe cl\n"
        "cmp r9, rax\nsetbe dl\nmovzx ecx, cl\nmovzx edx, dl\nreport rcx\nreport rdx\n", [1, 1],
    ),
    "self-modifying code": Case(
        "mov ecx, 2\n5: mov eax, 1\nreport rax\nmov byte ptr [rip + 5b + 1], 7\ndec ecx\njnz 5b\n",
        [1, 7],
    ),
    "code that changes the next instruction": Case(
        "lea rdi, [rip + 5f]\nmov byte ptr [rdi + 1], 9\n5: mov eax, 1\nreport rax\n", [9],
    ),
    "code changed through another address": Case(
        "lea rdi, [rip + 5f]\nadd rdi, 0x400000\ncall 5f\nmov byte ptr [rdi + 1], 8\ncall 5f\n"
        "jmp 6f\n5: mov eax, 1\nreport rax\nret\n6:\n", [1, 8],
    ),
    "string moves and their registers": Case(
        f"mov esi, {DATA}\nmov edi, {DATA + 64}\nmov ecx, 8\nmov dword ptr [rsi], 0x04030201\ncld\n"
        "rep movsb\nreport rsi\nreport rdi\nreport rcx\nstd\nmov al, 0x55\nmov ecx, 2\nrep stosb\n"
        "report rdi\ncld\n",
        [DATA + 8, DATA + 72, 0, DATA + 70], memory={DATA + 64: b"\1\2\3\4\0\0\0\x55\x55"},
    ),
    "a string move stops at a fault, its registers right": Case(
        f"mov esi, {DATA}\nmov edi, 0x1ffffc\nmov ecx, 8\ncld\ntry\nrep movsb\ncaught\nreport rcx\n"
        "report rdi\n", [*fault(state.PF, 2, 0x200000), 4, 0x200000],
    ),
    "REPNE SCASB": Case(
        f"mov edi, {DATA}\nmov dword ptr [rdi], 0x00636261\nmov ecx, 9\nxor eax, eax\ncld\n"
        "repne scasb\nreport rcx\nreport rdi\n", [5, DATA + 4],
    ),
    "registers at the end": Case(
        "mov rbx, 0x123456789abcdef0\nmov rsi, -1\n",
        registers={"rbx": 0x123456789ABCDEF0, "rsi": (1 << 64) - 1, "cs": KCODE, "cpl": 0},
    ),
    "user stack and registers survive an exception": Case(
        "user\nmov ebx, 0x77\npush rbx\nud2\nkernel\nreport rbx\n"
        f"mov rax, [{USTACK - 8}]\nreport rax\n", [*fault(state.UD), 0x77, 0x77],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_events(engine: str, name: str) -> None:
    check(engine, name, CASES[name])
