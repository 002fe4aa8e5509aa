"""Every sensitive instruction of `cpu.sensitive`, in the kernel and in user code.

A row says what the instruction does at CPL 0 (a program and its log) and at CPL 3 (the exception,
or a program and its log). User code runs with IOPL 0 and all of CR4's protections off."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from conformance.support import (
    DATA,
    GDT,
    IDT,
    KCODE,
    KDATA,
    TSS_SELECTOR,
    UCODE,
    UDATA,
    Case,
    check,
    fault,
)
from ringfence.cpu import sensitive, state

GP, UD = fault(state.GP), fault(state.UD)


@dataclass(frozen=True)
class Row:
    """One instruction: ``setup`` runs at CPL 0 before, ``after`` at CPL 0 behind it."""

    code: str
    kernel: list[int]
    user: list[int]
    setup: str = ""
    needs: tuple[str, ...] = ()
    after: str = ""


def both(code: str, log: list[int], **rest: str) -> Row:
    """The same at both levels."""
    return Row(code, log, log, **rest)


FAR_KERNEL = f"push {KCODE}\nlea rax, [rip + 5f]\npush rax\n"
_MSR_PAT = "mov ecx, 0x277\n"
_SIX = 0x0007040600070406

ROWS: dict[str, Row] = {
    "MOV_CR": Row("mov rax, cr3\nmov cr3, rax\nreport rax", [0x1000], GP),
    "MOV_DR": Row("mov eax, 0x1234\nmov dr1, rax\nmov rbx, dr1\nreport rbx", [0x1234], GP),
    "CLTS": Row("clts\nmov rax, cr0\nand eax, 8\nreport rax", [0], GP,
                setup="mov rax, cr0\nor eax, 8\nmov cr0, rax\n"),
    "LMSW": Row("mov eax, 0x3b\nlmsw ax\nmov rax, cr0\nreport rax\nclts", [0x8001003B], GP),
    "SMSW": both("xor eax, eax\nsmsw ax\nreport rax", [0x33]),
    "XSETBV": Row("xor ecx, ecx\nmov eax, 1\nxor edx, edx\nxsetbv\nxgetbv\nreport rax", [1], GP,
                  setup="mov rax, cr4\nor eax, 1 << 18\nmov cr4, rax\n", needs=("XSAVE",)),
    "XGETBV": both("xor ecx, ecx\nxgetbv\nreport rax", [1],
                   setup="mov rax, cr4\nor eax, 1 << 18\nmov cr4, rax\n"),
    "RDMSR": Row(_MSR_PAT + "rdmsr\nreport rax\nreport rdx", [_SIX & 0xFFFFFFFF, _SIX >> 32], GP),
    "WRMSR": Row("mov ecx, 0xc0000102\nmov eax, 0x77\nxor edx, edx\nwrmsr\nrdmsr\nreport rax",
                 [0x77], GP),
    "SWAPGS": Row("swapgs\nmov ecx, 0xc0000101\nrdmsr\nreport rax", [0x4000], GP,
                  setup="mov ecx, 0xc0000102\nmov eax, 0x4000\nxor edx, edx\nwrmsr\n"),
    "RDFSBASE": both("rdfsbase rax\nreport rax", [0x5000],
                     setup="mov rax, cr4\nor eax, 1 << 16\nmov cr4, rax\n"
                     "mov eax, 0x5000\nwrfsbase rax\n"),
    "RDGSBASE": both("rdgsbase rax\nreport rax", UD),
    "WRFSBASE": both("mov eax, 0x6000\nwrfsbase rax\nrdfsbase rbx\nreport rbx", [0x6000],
                     setup="mov rax, cr4\nor eax, 1 << 16\nmov cr4, rax\n"),
    "WRGSBASE": both("mov eax, 0x6000\nwrgsbase rax\nrdgsbase rbx\nreport rbx", [0x6000],
                     setup="mov rax, cr4\nor eax, 1 << 16\nmov cr4, rax\n"),
    "LGDT": Row(f"lgdt [{DATA}]\nsgdt [{DATA + 16}]\nmov rax, [{DATA + 18}]\nreport rax",
                [GDT], GP, setup=f"sgdt [{DATA}]\n"),
    "LIDT": Row(f"lidt [{DATA}]\nsidt [{DATA + 16}]\nmov rax, [{DATA + 18}]\nreport rax",
                [IDT], GP, setup=f"sidt [{DATA}]\n"),
    "LLDT": Row("mov eax, 3\nlldt ax\nsldt eax\nreport rax", [3], GP),
    "LTR": Row("mov eax, TSS_SELECTOR\nltr ax\nstr eax\nreport rax", [TSS_SELECTOR], GP,
               setup=f"mov byte ptr [{GDT + TSS_SELECTOR + 5}], 0x89\n"),
    "SGDT": both(f"sgdt [{DATA}]\nmovzx eax, word ptr [{DATA}]\nreport rax\n"
                 f"mov rax, [{DATA + 2}]\nreport rax", [0x7F, GDT]),
    "SIDT": both(f"sidt [{DATA}]\nmovzx eax, word ptr [{DATA}]\nreport rax\n"
                 f"mov rax, [{DATA + 2}]\nreport rax", [0xFFF, IDT]),
    "SLDT": both("sldt eax\nreport rax", [0]),
    "STR": both("str eax\nreport rax", [TSS_SELECTOR]),
    "LAR": Row(f"mov ecx, {KCODE}\nlar eax, ecx\nsetz bl\nmovzx ebx, bl\nreport rbx\nreport rax",
               [1, 0xAF9B00], [0, 0], setup="xor eax, eax\n"),
    "LSL": Row(f"mov ecx, {TSS_SELECTOR}\nlsl eax, ecx\nsetz bl\nmovzx ebx, bl\nreport rbx\n"
               "report rax", [1, 103], [0, 0], setup="xor eax, eax\n"),
    "VERR": Row(f"mov ecx, {KDATA}\nverr cx\nsetz al\nmovzx eax, al\nreport rax", [1], [0]),
    "VERW": Row(f"mov ecx, {KDATA}\nverw cx\nsetz al\nmovzx eax, al\nreport rax", [1], [0]),
    "MOV_SREG": Row("mov eax, cs\nreport rax\nmov eax, UDATA\nmov ds, eax\nmov ebx, ds\nreport rbx",
                    [KCODE, UDATA], [UCODE, UDATA]),
    "PUSH_SREG": both("mov eax, UDATA\nmov fs, eax\npush fs\npop rax\nreport rax", [UDATA]),
    "POP_SREG": both("push UDATA\npop gs\nmov eax, gs\nreport rax", [UDATA]),
    "LSS": Row(f"lss ecx, [{DATA}]\nmov eax, ss\nreport rax\nreport rcx\n", [KDATA, 0x5555],
               fault(state.GP, KDATA),
               setup=f"mov dword ptr [{DATA}], 0x5555\nmov word ptr [{DATA + 4}], {KDATA}\n"),
    "LFS": both(f"lfs ecx, [{DATA}]\nmov eax, fs\nreport rax\nreport rcx\n", [UDATA, 0x5555],
                setup=f"mov dword ptr [{DATA}], 0x5555\nmov word ptr [{DATA + 4}], {UDATA}\n"),
    "LGS": both(f"lgs ecx, [{DATA}]\nmov eax, gs\nreport rax\nreport rcx\n", [UDATA, 0x5555],
                setup=f"mov dword ptr [{DATA}], 0x5555\nmov word ptr [{DATA + 4}], {UDATA}\n"),
    "CLI": Row("sti\ncli\npushfq\npop rax\nand eax, 0x200\nreport rax", [0], GP),
    "STI": Row("sti\npushfq\npop rax\ncli\nand eax, 0x200\nreport rax", [0x200], GP),
    "PUSHF": both("xor eax, eax\npushfw\npop ax\nand eax, 0x3202\nreport rax", [2]),
    "PUSHFQ": both("pushfq\npop rax\nand eax, 0x3202\nreport rax", [2]),
    "POPF": Row("push 0x3ed7\npopfw\npush 2\npop rbx\npushfq\npop rax\npush 2\npopfq\ncld\n"
                "and eax, 0x3f00\nreport rax", [0x3E00], [0x0C00]),
    "POPFQ": Row("push 0x3ed7\npopfq\npushfq\npop rax\npush 2\npopfq\nand eax, 0x3f00\nreport rax",
                 [0x3E00], [0x0C00]),
    "CLAC": Row("clac", UD, UD),
    "STAC": Row("stac", UD, UD),
    "INT": both("int SYSTEM_CALL\nmark 1", []),
    "INT3": both("int3", fault(state.BP)),
    "INT1": both(".byte 0xf1", fault(state.DB)),
    "INTO": both(".byte 0xce", UD),
    "IRET": both("push 0\npush 0\nmov word ptr [rsp + 2], 0x1000\n.byte 0x66, 0xcf",
                 fault(state.GP, 0x1000)),
    "IRETD": Row("sub rsp, 24\nmov dword ptr [rsp], 0\nlea eax, [rip + 5f]\nmov [rsp], eax\n"
                 "mov dword ptr [rsp + 8], 2\n"
                 "mov word ptr [rsp + 4], 0x1000\n.byte 0xcf\n5:", fault(state.GP, 0x1000),
                 fault(state.GP, 0x1000)),
    "IRETQ": Row(f"mov rbx, rsp\npush {KDATA}\npush rbx\npush 0x3202\npush {KCODE}\n"
                 "lea rax, [rip + 5f]\npush rax\niretq\n5: pushfq\npop rax\npush 2\npopfq\n"
                 "and eax, 0x3f00\nreport rax", [0x3200], fault(state.GP, KCODE)),
    "HLT": Row("sti\nhlt\ncli\nmark 1", [1], GP),
    "SYSCALL": both("syscall\n5: mark 7", [7],
                    setup="mov ecx, 0xc0000082\nlea rax, [rip + 6f]\nxor edx, edx\nwrmsr\n"
                    "mov ecx, 0xc0000081\nmov edx, 0x1b0010\nxor eax, eax\nwrmsr\n"
                    "jmp 7f\n6: mov rsp, KSTACK\njmp rcx\n7:\n"),
    "SYSRET": Row("lea rcx, [rip + 5f]\nmov r11d, 2\nsysretq\n5: mov eax, cs\nreport rax\n",
                  [UCODE], GP,
                  setup="mov ecx, 0xc0000081\nmov edx, 0x1b0010\nxor eax, eax\nwrmsr\n",
                  after="2: int SYSTEM_CALL\n"),
    "JMP_FAR": Row(f".byte 0xff, 0x2c, 0x25\n.long {DATA}\n5: mov eax, cs\nreport rax", [KCODE],
                   fault(state.GP, KCODE),
                   setup=f"lea rax, [rip + 5f]\nmov [{DATA}], eax\n"
                   f"mov word ptr [{DATA + 4}], {KCODE}\n"),
    "CALL_FAR": Row(f".byte 0xff, 0x1c, 0x25\n.long {DATA}\n5: mov eax, [rsp + 4]\nreport rax",
                    [KCODE],
                    fault(state.GP, KCODE),
                    setup=f"lea rax, [rip + 5f]\nmov [{DATA}], eax\n"
                    f"mov word ptr [{DATA + 4}], {KCODE}\n"),
    "RETF": Row(FAR_KERNEL + "retfq\n5: mov eax, cs\nreport rax", [KCODE], fault(state.GP, KCODE)),
    "INVLPG": Row(f"invlpg [{DATA}]\nmark 1", [1], GP),
    "INVPCID": Row(f"mov eax, 2\ninvpcid rax, [{DATA}]\nmark 1", [1], GP, needs=("INVPCID",)),
    "INVD": Row("invd\nmark 1", [1], GP),
    "WBINVD": Row("wbinvd\nmark 1", [1], GP),
    "IN": Row("mov edx, 0x5f0\nin al, dx\nmovzx eax, al\nreport rax", [0xFF], GP),
    "OUT": Row("mov edx, 0x5f0\nout dx, al\nmark 1", [1], GP),
    "INSB": Row(f"mov edx, 0x5f0\nmov edi, {DATA}\ninsb\nmovzx eax, byte ptr [{DATA}]\nreport rax",
                [0xFF], GP),
    "OUTSD": Row(f"mov edx, 0x5f0\nmov esi, {DATA}\noutsd\nreport rsi", [DATA + 4], GP),
    "CPUID": both("xor eax, eax\ncpuid\nreport rbx\nreport rcx\nreport rdx",
                  [0x68747541, 0x444D4163, 0x69746E65]),
    "RDTSC": Row("rdtsc\nmark 1", [1], GP, setup="mov rax, cr4\nor eax, 4\nmov cr4, rax\n"),
    "RDTSCP": Row("rdtscp\nreport rcx", [0x33], GP, needs=("RDTSCP",),
                  setup="mov rax, cr4\nor eax, 4\nmov cr4, rax\nmov ecx, 0xc0000103\n"
                  "mov eax, 0x33\nxor edx, edx\nwrmsr\n"),
    "RDPID": both("rdpid rax\nreport rax", [0x44],
                  setup="mov ecx, 0xc0000103\nmov eax, 0x44\nxor edx, edx\nwrmsr\n"),
    "RDPMC": Row("mov ecx, 0x4000\nrdpmc", GP, GP),
    "MONITOR": Row("monitor", UD, UD),
    "MWAIT": Row("mwait", UD, UD),
    "RSM": Row("rsm", UD, UD),
    "GETSEC": Row(".byte 0x0f, 0x37", UD, UD),
}  # fmt: skip
SAME_AS = {
    "PUSHFD": "PUSHF", "POPFD": "POPF", "INSW": "INSB", "INSD": "INSB", "OUTSB": "OUTSD",
    "OUTSW": "OUTSD", "WBNOINVD": "WBINVD", "SYSRETQ": "SYSRET",
}  # fmt: skip
"""Other sizes of the same instruction, or forms that 64-bit mode has no encoding for."""
ELSEWHERE = {
    "SYSENTER": "AMD and Intel CPUs differ in long mode",
    "SYSEXIT": "AMD and Intel CPUs differ in long mode",
    "SYSEXITQ": "AMD and Intel CPUs differ in long mode",
    "VMCALL": "what a hypervisor answers is its own matter",
    "VMMCALL": "what a hypervisor answers is its own matter",
}
NEEDS = {
    "XGETBV": ("XSAVE",), "RDFSBASE": ("FSGSBASE",), "RDGSBASE": ("FSGSBASE",),
    "WRFSBASE": ("FSGSBASE",), "WRGSBASE": ("FSGSBASE",), "RDPID": ("RDPID",),
}  # fmt: skip
HALT = (
    # One tick of the local APIC's timer, vector 0x40, through xAPIC registers.
    "gate 0x40, tick\nmov ebx, 0xfee00000\nmov dword ptr [rbx + 0xf0], 0x1ff\n"
    "mov dword ptr [rbx + 0x3e0], 0xb\nmov dword ptr [rbx + 0x320], 0x40\n"
    "mov dword ptr [rbx + 0x380], 1000\njmp 7f\n"
    "tick: mov dword ptr [rbx + 0xb0], 0\niretq\n7:\n"
)


def test_all_are_here() -> None:
    covered = set(ROWS) | set(SAME_AS) | set(ELSEWHERE)
    assert covered >= set(sensitive.BY_NAME)


@pytest.mark.parametrize("level", ["kernel", "user"])
@pytest.mark.parametrize("name", ROWS)
def test_sensitive(engine: str, name: str, level: str) -> None:
    row = ROWS[name]
    setup = row.setup + (HALT if name == "HLT" else "")
    if level == "kernel":
        source = f"{setup}try\n{row.code}\n{row.after}caught\n"
        log = row.kernel
    else:
        source = f"{setup}user\n{row.code}\nkernel\n"
        log = row.user
    needs = row.needs + NEEDS.get(name, ())
    check(engine, f"{name} in {level}", Case(source, log, needs=needs))
