"""Debug exceptions: DR0-DR3 in each of their kinds, DR6, DR7, and single steps through TF.

Most cases install the same handler for #DB: it reports DR6's bits and where it returns to, relative
to label 5, clears DR6 and returns; `RESUME` has it set RF, which instruction breakpoints need.
"""

from __future__ import annotations

import pytest

from conformance.support import DATA, LARGE, USTACK, Case, check, fault
from ringfence.cpu import state

B0, B1, B2, B3, BD, BS = 1, 2, 4, 8, 1 << 13, 1 << 14


def handler(extra: str = "") -> str:
    """A #DB handler that reports DR6 and the return address minus R9, which is label 5."""
    return (
        "gate 1, hit\njmp 7f\n"
        "hit: push rax\nmov rax, dr6\nand eax, 0xe00f\nreport rax\nmov rax, [rsp + 8]\n"
        f"sub rax, r9\nreport rax\nxor eax, eax\nmov dr6, rax\n{extra}pop rax\niretq\n7:\n"
        "lea r9, [rip + 5f]\n"
    )


HIT = handler()
RESUME = handler("or dword ptr [rsp + 24], 0x10000\n")
CALM = handler("and dword ptr [rsp + 24], ~0x100\n")
"""A handler that ends single-stepping."""


def arm(control: int, **addresses: str) -> str:
    """Load DR0-DR3 (``dr0="rip + 5f"``: an effective address) and DR7."""
    loads = "".join(f"lea rax, [{at}]\nmov {name}, rax\n" for name, at in addresses.items())
    return f"{loads}mov eax, {control | 0x400:#x}\nmov dr7, rax\n"


def watch(n: int, kind: int, size: int) -> int:
    """DR7's bits that enable breakpoint ``n``: R/W ``kind``, LEN ``size``."""
    length = {1: 0, 2: 1, 8: 2, 4: 3}[size]
    return 2 << 2 * n | (kind | length << 2) << 16 + 4 * n


EXECUTE, WRITE, PORT, ACCESS = range(4)
STEP = "push 0x102\npopfq\n"
AT = {"dr0": f"{DATA}"}
DE = "mov rax, cr4\nor eax, 8\nmov cr4, rax\n"

CASES: dict[str, Case] = {
    "a breakpoint in a loop": Case(
        RESUME + arm(watch(2, EXECUTE, 1), dr2="rip + 5f")
        + "mov ecx, 3\n6: dec ecx\n5: nop\njnz 6b\nreport rcx\n", [B2, 0] * 3 + [0],
    ),
    "a breakpoint on code that has run": Case(
        RESUME + "mov ecx, 5\n6: mov eax, 1\n5: mov ebx, 2\ndec ecx\njz 8f\ncmp ecx, 1\njne 6b\n"
        + arm(watch(0, EXECUTE, 1), dr0="rip + 5b") + "jmp 6b\n8: report rcx\n", [B0, 0, 0],
    ),
    "a breakpoint that is taken away": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 5f") + "mov ecx, 2\n5: mov ebx, 1\n"
        "mov eax, 0x400\nmov dr7, rax\ndec ecx\njnz 5b\nreport rbx\n", [B0, 0, 1],
    ),
    "the handler decides by RF": Case(
        handler("dec ecx\njnz 6f\nor dword ptr [rsp + 24], 0x10000\n6:\n")
        + arm(watch(0, EXECUTE, 1), dr0="rip + 5f") + "mov ecx, 3\n5: nop\nreport rcx\n",
        [B0, 0] * 3 + [0],
    ),
    "RF counts for one instruction": Case(
        RESUME + arm(watch(0, EXECUTE, 1) | watch(1, EXECUTE, 1), dr0="rip + 5f", dr1="rip + 6f")
        + "5: nop\n6: nop\n", [B0, 0, B1, 1],
    ),
    "RF from IRET without a breakpoint there": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 5f")
        + "mov rcx, rsp\nmov eax, ss\npush rax\npush rcx\npush 0x10002\nmov eax, cs\npush rax\n"
        "lea rax, [rip + 6f]\npush rax\niretq\n6: nop\n5: nop\n", [B0, 0],
    ),
    "a breakpoint on a system instruction": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 5f") + "xor eax, eax\n5: cpuid\nmark 3\n",
        [B0, 0, 3],
    ),
    "a breakpoint on a string instruction": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 5f")
        + f"mov edi, {DATA}\nmov ecx, 100\nxor eax, eax\ncld\n5: rep stosb\nreport rcx\n",
        [B0, 0, 0],
    ),
    "a breakpoint on an instruction that faults": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 5f") + "try\n5: ud2\ncaught\n",
        [B0, 0, *fault(state.UD)],
    ),
    "a breakpoint across two pages": Case(
        f"mov edi, {DATA + 4094}\nmov word ptr [rdi], 0x7b8\nmov word ptr [rdi + 2], 0\n"
        f"mov word ptr [rdi + 4], 0xc300\n"
        + RESUME + "mov r9, rdi\n" + arm(watch(0, EXECUTE, 1), dr0="rdi")
        + "call rdi\nreport rax\n5:\n", [B0, 0, 7],
    ),
    "a breakpoint in user code": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 5f")
        + "user\nmov ebx, 1\n5: mov ebx, 2\nkernel\n"
        "report rbx\n", [B0, 0, 2],
    ),
    "a breakpoint by linear address only": Case(
        RESUME + f"lea rdi, [rip + 6f]\nadd rdi, {LARGE}\nlea rax, [rip + 6f]\nmov dr0, rax\n"
        f"mov eax, {watch(0, EXECUTE, 1) | 0x400:#x}\nmov dr7, rax\nlea r9, [rip + 6f]\n"
        "call rdi\nmark 1\ncall 6f\njmp 8f\n5: nop\n6: mov ebx, 3\nret\n8: report rbx\n",
        [1, B0, 0, 3],
    ),
    "a write": Case(
        HIT + arm(watch(0, WRITE, 4), **AT) + f"mov eax, [{DATA}]\nmov ecx, 2\n"
        f"mov [{DATA}], ecx\n5: mov [{DATA + 4}], ecx\nmark 1\n", [B0, 0, 1],
    ),
    "a read": Case(
        HIT + arm(watch(3, ACCESS, 4), dr3=f"{DATA}") + f"mov ecx, [{DATA}]\n5: nop\n", [B3, 0],
    ),
    "both breakpoints of one access": Case(
        HIT + arm(watch(0, ACCESS, 4) | watch(1, WRITE, 1), dr0=f"{DATA}", dr1=f"{DATA + 3}")
        + f"mov dword ptr [{DATA}], 9\n5: mov ecx, [{DATA}]\nnop\n",
        [B0 | B1, 0, B0, 7],
    ),
    "an access that overlaps from below": Case(
        HIT + arm(watch(0, WRITE, 8), dr0=f"{DATA + 16}") + f"mov qword ptr [{DATA + 9}], 1\n"
        f"5: mov qword ptr [{DATA + 8}], 1\nmov byte ptr [{DATA + 24}], 1\nnop\n", [B0, 0],
    ),
    "low bits of an address are ignored": Case(
        HIT + arm(watch(0, WRITE, 4), dr0=f"{DATA + 3}") + f"mov byte ptr [{DATA}], 1\n5: nop\n",
        [B0, 0],
    ),
    "read, modify, write is one trap": Case(
        HIT + arm(watch(0, ACCESS, 4), **AT) + f"add dword ptr [{DATA}], 1\n5: nop\n", [B0, 0],
    ),
    "pushes": Case(
        HIT + arm(watch(0, ACCESS, 8), dr0="rsp - 8") + "push 7\n5: mov ecx, [rsp]\nreport rcx\n",
        [B0, 0, B0, 3, 7],
    ),
    "a vector store": Case(
        "mov rax, cr4\nor eax, 0x200\nmov cr4, rax\n" + HIT
        + arm(watch(0, WRITE, 1), dr0=f"{DATA + 15}")
        + f"movups [{DATA}], xmm0\n5: nop\n", [B0, 0],
    ),
    "a watched word in a block move stops it there": Case(
        HIT + arm(watch(0, WRITE, 1), dr0=f"{DATA + 2}")
        + f"mov edi, {DATA}\nmov ecx, 5\nxor eax, eax\ncld\n5: rep stosb\nreport rcx\n",
        [B0, 0, 0],
    ),
    "a watched write that faults": Case(
        HIT + arm(watch(0, WRITE, 4), dr0="0x200000")
        + "try\nmov dword ptr [0x200000], 1\ncaught\n5:\n", fault(state.PF, 2, 0x200000),
    ),
    "a write of user code": Case(
        HIT + arm(watch(0, WRITE, 4), **AT) + f"user\nmov dword ptr [{DATA}], 1\n5: nop\nkernel\n",
        [B0, 0],
    ),
    "a port": Case(
        DE + HIT + arm(watch(0, PORT, 2), dr0="0x5f0")
        + "mov edx, 0x5f1\nin al, dx\n5: mov edx, 0x5f2\n"
        "in al, dx\nmov edx, 0x5ee\nin eax, dx\nnop\n", [B0, 0, B0, 12],
    ),
    "no port without CR4.DE": Case(
        HIT + arm(watch(0, PORT, 2), dr0="0x5f0") + "mov edx, 0x5f0\nin al, dx\n5: nop\nmark 1\n",
        [1],
    ),
    "a string from a port": Case(
        DE + HIT + arm(watch(0, PORT, 1), dr0="0x5f0")
        + f"mov edx, 0x5f0\nmov edi, {DATA}\nmov ecx, 2\ncld\n5: rep insb\nreport rcx\n",
        [B0, 0, B0, 2, 0],
    ),
    "general detect": Case(
        HIT + "mov eax, 0x2400\nmov dr7, rax\n5: mov rax, dr7\nand eax, 0x2000\nreport rax\n",
        [BD, 0, 0],
    ),
    "steps and data in one trap": Case(
        HIT + arm(watch(0, WRITE, 4), **AT) + STEP + f"5: mov [{DATA}], ecx\npush 2\npopfq\n",
        [B0 | BS, 7, BS, 9, BS, 10],
    ),
    "a step of each system instruction": Case(
        HIT + "xor eax, eax\n" + STEP
        + "5: cpuid\nmov rax, cr0\nin al, 0x61\nrdtsc\npush 2\npopfq\n",
        [BS, 2, BS, 5, BS, 7, BS, 9, BS, 11, BS, 12],
    ),
    "a step of each element": Case(
        HIT + f"mov edi, {DATA}\nmov ecx, 3\ncld\n" + STEP + "5: rep stosb\npush 2\npopfq\n",
        [BS, 0, BS, 0, BS, 2, BS, 4, BS, 5],
    ),
    "a step into a fault": Case(
        HIT + "lea r14, [rip + 6f]\n" + STEP + "5: nop\nud2\n6: mark 1\n", [BS, 1, *fault(6), 1],
    ),
    "a step over INT": Case(
        HIT + "lea r14, [rip + 6f]\n" + STEP + "5: int 0x80\n6: mark 1\n", [1],
    ),
    "a handler that ends stepping": Case(CALM + STEP + "5: nop\nnop\nmark 1\n", [BS, 1, 1]),
    "steps and a breakpoint": Case(
        handler("cmp ecx, 1\njne 6f\nor dword ptr [rsp + 24], 0x10000\n6: inc ecx\n")
        + arm(watch(0, EXECUTE, 1), dr0="rip + 6f") + "xor ecx, ecx\n" + STEP
        + "5: nop\n6: nop\npush 2\npopfq\n", [BS, 1, B0, 1, BS, 2, BS, 4, BS, 5],
    ),
    "a step's handler that sets RF": Case(
        RESUME + arm(watch(0, EXECUTE, 1), dr0="rip + 6f") + STEP
        + "5: nop\n6: nop\npush 2\npopfq\n",
        [BS, 1, BS, 2, BS, 4, BS, 5],
    ),
    "a step over SYSCALL": Case(
        "mov ecx, 0xc0000080\nrdmsr\nor eax, 1\nwrmsr\nmov ecx, 0xc0000082\nlea rax, [rip + 4f]\n"
        "mov rdx, rax\nshr rdx, 32\nwrmsr\nmov ecx, 0xc0000081\nxor eax, eax\n"
        "mov edx, 0x10\nwrmsr\n"
        "mov ecx, 0xc0000084\nmov eax, 0x100\nxor edx, edx\nwrmsr\n" + HIT + STEP
        + "5: nop\nsyscall\n4: mark 1\n", [BS, 1, 1],
    ),
    "a SYSRET that sets TF traps at once": Case(
        "mov ecx, 0xc0000080\nrdmsr\nor eax, 1\nwrmsr\nmov ecx, 0xc0000081\nxor eax, eax\n"
        "mov edx, 0x1b0010\nwrmsr\n" + CALM
        + "lea r14, [rip + 6f]\nlea rcx, [rip + 5f]\nmov r11d, 0x102\nsysretq\n"
        "5: nop\nmov r10d, LEAVE\nud2\n6: mov rsp, KSTACK\nmark 1\n", [BS, 0, 1],
    ),
    "B0 to B3 are of this trap alone": Case(
        "gate 1, hit\njmp 7f\nhit: push rax\nmov rax, dr6\nand eax, 0xe00f\nreport rax\n"
        "pop rax\niretq\n7:\n"
        + arm(watch(0, WRITE, 4) | watch(1, WRITE, 4), **AT, dr1=f"{DATA + 8}")
        + f"mov eax, 0x4008\nmov dr6, rax\nmov [{DATA}], eax\nmov [{DATA + 8}], eax\nnop\n",
        [BS | B0, BS | B1],
    ),
    "INT1 leaves DR6 alone": Case(HIT + ".byte 0xf1\n5: nop\n", [0, 0]),
    "user code's stack": Case(
        HIT + arm(watch(0, WRITE, 8), dr0=f"{USTACK - 8}") + "user\npush 5\n5: nop\nkernel\n",
        [B0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_debug(engine: str, name: str) -> None:
    check(engine, name, CASES[name])
