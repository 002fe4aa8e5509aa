"""Every exception that a program can cause, with its error code, and what handlers find."""

from __future__ import annotations

import pytest

from conformance.support import (
    CODE32,
    DATA,
    IST1,
    KCODE,
    KDATA,
    KSTACK,
    TSS_SELECTOR,
    UCODE,
    UDATA,
    USTACK,
    WINDOW,
    Case,
    check,
    fault,
)
from ringfence.cpu import state
from ringfence.engine import StopReason

FAR = 0x8000_0000_0000
NOT_PRESENT_SELECTOR = 0x48


BOTH: dict[str, tuple[str, list[int]]] = {
    "#DE division by zero": ("xor ecx, ecx\ndiv ecx", fault(state.DE)),
    "#DE quotient too large": ("mov edx, 5\nmov ecx, 2\ndiv ecx", fault(state.DE)),
    "#UD": ("ud2", fault(state.UD)),
    "#UD lock": (".byte 0xf0\nadd eax, ecx", fault(state.UD)),
    "#BP": ("int3", fault(state.BP)),
    "#GP non-canonical": (f"mov rcx, {FAR}\nmov rax, [rcx]", fault(state.GP)),
    "#GP non-canonical write": (f"mov rcx, {FAR}\nmov [rcx], rax", fault(state.GP)),
    "#SS non-canonical": (f"mov rbp, {FAR}\nmov rax, [rbp]", fault(state.SS_FAULT)),
    "#SS non-canonical write": (
        f"mov rbp, {FAR}\nmov [rbp + 8], rax", fault(state.SS_FAULT),
    ),
    "#GP selector beyond the table": (
        "mov eax, 0x1000\nmov ds, eax", fault(state.GP, 0x1000),
    ),
    "#NP": (f"mov eax, {NOT_PRESENT_SELECTOR}\nmov ds, eax", fault(state.NP, 0x48)),
    "#GP code that can't be read into a data segment": (
        f"mov eax, {NOT_PRESENT_SELECTOR + 8}\nmov ds, eax", fault(state.GP, 0x50),
    ),
    "#GP interrupt through a missing gate": ("int 0xf0", fault(state.GP, 0xF0 << 3 | 2)),
}  # fmt: skip
SETUP = (
    # Selector 0x48: data, not present. 0x50: code, execute only. Vector 0xf0: no gate.
    "mov rax, 0x00cf73000000ffff\nmov [GDT + 0x48], rax\n"
    "mov rax, 0x00afd9000000ffff\nmov [GDT + 0x50], rax\n"
    "xor eax, eax\nmov [IDT + 0xf00], rax\nmov [IDT + 0xf08], rax\n"
)


@pytest.mark.parametrize("level", ["kernel", "user"])
@pytest.mark.parametrize("name", BOTH)
def test_exception(engine: str, name: str, level: str) -> None:
    body, log = BOTH[name]
    framed = f"user\n{body}\nkernel\n" if level == "user" else f"try\n{body}\ncaught\n"
    check(engine, f"{name} in {level}", Case(SETUP + framed, log))


SYSTEM: dict[str, Case] = {
    "frame from user code": Case(
        "user 0x246\n1: ud2\nkernel\n"
        f"mov rsp, {KSTACK - 40}\nlea rax, [rip + 1b]\nsub rax, [rsp]\nreport rax\n"
        "mov rax, [rsp + 8]\nreport rax\nmov rax, [rsp + 16]\nreport rax\n"
        "mov rax, [rsp + 24]\nreport rax\nmov rax, [rsp + 32]\nreport rax\n",
        [*fault(state.UD), 0, UCODE, 0x10246, USTACK, UDATA],
    ),
    "frame from the kernel is aligned": Case(
        "try\nmov rsp, KSTACK - 0x108\nud2\n9: report rsp\nmov rax, [rsp + 24]\nreport rax\n"
        "mov rsp, KSTACK\n",
        [*fault(state.UD), KSTACK - 0x110 - 40, KSTACK - 0x108],
    ),
    "IST": Case(
        f"mov byte ptr [IDT + 16 * 6 + 4], 1\ntry\nud2\n9: report rsp\nmov rsp, {KSTACK}\n",
        [*fault(state.UD), IST1 - 40],
    ),
    **{
        f"#NM {name}": Case(
            f"mov rax, cr0\nor eax, 8\nmov cr0, rax\ntry\n{code}\ncaught\nclts\n{code}\n",
            fault(state.NM),
        )
        for name, code in (
            ("fninit", "fninit"), ("fwait", "fwait"), ("fxsave", f"fxsave [{DATA}]"),
            ("movaps", "movaps xmm0, xmm1"), ("fld1", "fld1"),
        )
    },
    "#DF": Case(
        # #GP, whose gate is not present: #NP on top of a contributory exception (SDM table 6-5).
        "mov byte ptr [IDT + 16 * 13 + 5], 0\ntry\nmov rcx, 0x800000000000\nmov rax, [rcx]\n"
        "caught\n",
        fault(state.DF),
    ),
    "#NP gate": Case(
        "mov byte ptr [IDT + 16 * 6 + 5], 0x0e\ntry\nud2\ncaught\n",
        fault(state.NP, 6 << 3 | 2 | 1),
    ),
    "triple fault": Case(
        "mov byte ptr [IDT + 16 * 13 + 5], 0\nmov byte ptr [IDT + 16 * 8 + 5], 0\n"
        "mov rcx, 0x800000000000\nmov rax, [rcx]\n",
        ending=StopReason.CRASH, exits={"shutdown": 1},
    ),
    "iretq to a bad selector": Case(
        f"try\npush {KDATA}\npush KSTACK\npush 2\npush 0x1000\nlea rax, [rip + 9f]\npush rax\n"
        "iretq\ncaught\n",
        fault(state.GP, 0x1000),
    ),
    "LAR of a 32-bit code segment": Case(
        f"mov eax, {CODE32}\nlar ecx, eax\nsetz al\nmovzx eax, al\nreport rax\n", [1],
    ),
    "syscall and sysret": Case(
        "mov ecx, 0xc0000081\nmov edx, 0x1b0010\nxor eax, eax\nwrmsr\n"
        "mov ecx, 0xc0000082\nlea rax, [rip + 1f]\nxor edx, edx\nwrmsr\n"
        "mov ecx, 0xc0000084\nmov eax, 0x700\nwrmsr\n"
        "user 0x246\nsyscall\n2: mov ax, cs\nmovzx eax, ax\nreport rax\nkernel\njmp 3f\n"
        "1: lea rax, [rip + 2b]\nsub rax, rcx\nreport rax\nreport r11\nmov ax, cs\nmovzx eax, ax\n"
        "report rax\npushfq\npop rax\nreport rax\nmov r11, 0x202\nsysretq\n3:\n",
        [0, 0x246, 0x10, 0x46, UCODE],
    ),
    "LTR of a busy TSS": Case(
        "try\nmov eax, TSS_SELECTOR\nltr ax\ncaught\n", fault(state.GP, TSS_SELECTOR),
    ),
    "null SS in the kernel": Case("xor eax, eax\nmov ss, eax\nmov eax, ss\nreport rax\n", [0]),
    "null SS in user code": Case("user\nxor eax, eax\nmov ss, eax\nkernel\n", fault(state.GP)),
    "SS of another level": Case(
        "try\nmov eax, UDATA\nmov ss, eax\ncaught\n", fault(state.GP, UDATA & ~3),
    ),
    "INT through a gate of the kernel's": Case(
        "user\nint 0x81\nkernel\n", fault(state.GP, 0x81 << 3 | 2),
    ),
    "a call gate, and back": Case(
        "lea rax, [rip + 6f]\nmov [GDT + 0x50], ax\nmov word ptr [GDT + 0x52], KCODE\n"
        "mov word ptr [GDT + 0x54], 0xec00\nshr rax, 16\nmov [GDT + 0x56], ax\n"
        "mov qword ptr [GDT + 0x58], 0\nmov dword ptr [DATA], 0\nmov word ptr [DATA + 4], 0x53\n"
        "user\n.byte 0xff, 0x1c, 0x25\n.long DATA\nmov eax, cs\nreport rax\nkernel\njmp 7f\n"
        "6: mov eax, cs\nreport rax\nmov rax, [rsp + 8]\nreport rax\nmov rax, [rsp + 24]\n"
        "report rax\nreport rsp\nretfq\n7:\n",
        [KCODE, UCODE, UDATA, KSTACK - 32, UCODE],
    ),
    "the I/O permission map": Case(
        # The TSS grows by a map of zeros (SDM vol. 1, 19.5.2); one bit in it is set.
        "mov word ptr [GDT + TSS_SELECTOR], 0x200\nmov byte ptr [GDT + TSS_SELECTOR + 5], 0x89\n"
        "mov eax, TSS_SELECTOR\nltr ax\nmov byte ptr [TSS + 104 + 0x80 / 8], 1\nuser\n"
        "mov edx, 0x5f0\nin al, dx\nmovzx eax, al\nreport rax\nout 0x80, al\nkernel\n"
        "user\nmov edx, 0x1000\nin al, dx\nkernel\n",
        [0xFF, *fault(state.GP), *fault(state.GP)],
    ),
    "IOPL 3": Case(
        "user 0x3002\nmov edx, 0x5f0\nin al, dx\nmovzx eax, al\nreport rax\nsti\ncli\nmark 1\n"
        "kernel\n",
        [0xFF, 1],
    ),
    "FS and its base from a descriptor": Case(
        f"mov rax, 0x00cf92060000ffff\nmov [GDT + 0x50], rax\nmov dword ptr [{DATA + 8}], 0x1234\n"
        "mov eax, 0x50\nmov fs, eax\nmov eax, fs:[8]\nreport rax\nmov ecx, 0xc0000100\nrdmsr\n"
        "report rax\nxor eax, eax\nmov fs, eax\n",
        [0x1234, DATA],
    ),
    "segment limits don't count in 64-bit mode": Case(
        f"mov rax, 0x0000920000000001\nmov [GDT + 0x50], rax\nmov eax, 0x50\nmov ds, eax\n"
        f"mov dword ptr ds:[{DATA}], 7\nmov eax, [{DATA}]\nreport rax\n", [7],
    ),
    "#PF not present": Case(f"try\nmov rax, [{WINDOW + 0x123}]\ncaught\n",
                            fault(state.PF, 0, WINDOW + 0x123)),
    "#PF from user code": Case(f"user\nmov byte ptr [{WINDOW + 5}], al\nkernel\n",
                               fault(state.PF, 6, WINDOW + 5)),
    "#AC": Case(
        "mov rax, cr0\nor eax, 1 << 18\nmov cr0, rax\nuser 0x40202\n"
        f"mov eax, [{DATA + 1}]\nkernel\n",
        fault(state.AC), capability="alignment_checks",
    ),
    "#MF": Case(
        "fninit\nmov word ptr [DATA], 0x37b\nfldcw [DATA]\nfld1\nfldz\nuser\n"
        "fdivp st(1), st\nfwait\nkernel\n",
        fault(state.MF),
    ),
    "#XM": Case(
        "mov dword ptr [DATA], 0x1d80\nuser\nldmxcsr [DATA]\nmov eax, 0x3f800000\nmovd xmm0, eax\n"
        "xorps xmm1, xmm1\ndivss xmm0, xmm1\nkernel\n",
        fault(state.XM),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM)
def test_system(engine: str, name: str) -> None:
    check(engine, name, SYSTEM[name])
