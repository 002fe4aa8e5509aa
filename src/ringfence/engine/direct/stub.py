"""What is ours in a process of guest user code: a page of code, and pages of orders behind it.

`rf_stub` is where the program starts. It asks to be traced, promises to die with its tracer and to
make no system calls but those that change its memory, maps the stub's pages at their place, goes on
there, unmaps all else, and stops. `rf_stub_orders` carries out a list of system calls (RBX: where
it is, R12: how many) and stops. Guest code can read these pages and can't change them: nothing
there writes to memory, and all is position-independent.

The filter (seccomp, classic BPF) answers other system calls by SIGSYS. Guest code meets it only
where no tracer does: in the host's vsyscall page.
"""

from __future__ import annotations

import struct

PLACE = 0x6000_0000_0000
"""Address of the stub's pages: far from where Linux puts anything. A guest that has pages there is
translated."""
ORDERS_AT = 4096
"""Bytes from the page of code to the orders."""
ORDERS_BYTES = 4 * 4096
BYTES = ORDERS_AT + ORDERS_BYTES
END = (1 << 47) - 4096
"""Where user addresses end, for Linux."""
DESCRIPTOR_RAM, DESCRIPTOR_STUB, DESCRIPTOR_COPIES = 3, 4, 5
"""The process's descriptors: guest RAM, these pages, and copies of pages of code."""
MMAP, MUNMAP, KILL = 9, 11, 62
_PRCTL, _PTRACE, _EXIT = 157, 101, 60
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_TSC = 1, 38, 22, 26
_ARCH_X86_64 = 0xC000003E
_READ, _READ_EXECUTE, _SHARED_FIXED = 1, 5, 0x11
_LOADED = 0x200000
_HEADERS = 64 + 56
_TRACING, _COUNTER, _FILTER = 1, 2, 3
REFUSALS = {
    _TRACING: "tracing is not permitted (PTRACE_TRACEME)",
    _COUNTER: "the time-stamp counter can't be made to trap (PR_SET_TSC)",
    _FILTER: "system calls can't be filtered (PR_SET_SECCOMP)",
}
"""What the host refused, by the process's exit status."""


def _filter() -> list[tuple[int, int, int, int]]:
    """Instructions of the filter: code, jump if true, jump if false, value."""
    load, equal, give = 0x20, 0x15, 0x06
    allowed = (MMAP, MUNMAP)
    last = len(allowed)
    return [
        (load, 0, 0, 4),
        (equal, 0, last + 1, _ARCH_X86_64),
        (load, 0, 0, 0),
        *((equal, last - n, 0, number) for n, number in enumerate(allowed)),
        (give, 0, 0, 0x0003_0000),
        (give, 0, 0, 0x7FFF_0000),
    ]


def _call(number: int, *arguments: object) -> str:
    registers = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
    loads = [
        f"mov {register}, {value}" for register, value in zip(registers, arguments, strict=False)
    ]
    return "\n".join([*loads, f"mov eax, {number}", "syscall"])


def assembly() -> str:
    """Source of the stub, in Intel syntax."""
    rows = _filter()
    data = ", ".join(str(byte) for row in rows for byte in struct.pack("<HBBI", *row))
    fixed = (_SHARED_FIXED, DESCRIPTOR_STUB)
    return f"""
.intel_syntax noprefix
.text
.p2align 4
.globl rf_stub
rf_stub:
    {_call(_PRCTL, _PR_SET_PDEATHSIG, 9, 0, 0, 0)}
    mov r15d, {_TRACING}
    {_call(_PTRACE, 0, 0, 0, 0)}
    test eax, eax
    jnz 8f
    mov r15d, {_COUNTER}
    {_call(_PRCTL, _PR_SET_TSC, 2, 0, 0, 0)}
    test eax, eax
    jnz 8f
    {_call(_PRCTL, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)}
    {_call(MMAP, PLACE, ORDERS_AT, _READ_EXECUTE, *fixed, 0)}
    {_call(MMAP, PLACE + ORDERS_AT, ORDERS_BYTES, _READ, *fixed, ORDERS_AT)}
    lea rax, [rip + 7f]
    push rax
    push {len(rows)}
    mov r15d, {_FILTER}
    {_call(_PRCTL, _PR_SET_SECCOMP, 2, "rsp", 0, 0)}
    test eax, eax
    jnz 8f
    mov rax, {PLACE}
    lea rbx, [rip + 1f]
    lea rcx, [rip + rf_stub]
    sub rbx, rcx
    add rax, rbx
    jmp rax
1:  {_call(MUNMAP, 0, PLACE)}
    {_call(MUNMAP, PLACE + BYTES, END - PLACE - BYTES)}
    int3
8:  {_call(_EXIT, "r15")}
.globl rf_stub_orders
rf_stub_orders:
2:  mov rax, [rbx]
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    mov rdx, [rbx + 24]
    mov r10, [rbx + 32]
    mov r8, [rbx + 40]
    mov r9, [rbx + 48]
.globl rf_stub_call
rf_stub_call:
    syscall
    cmp rax, -4095
    jae 3f
    add rbx, 56
    dec r12
    jnz 2b
3:  int3
7:  .byte {data}
.globl rf_stub_end
rf_stub_end:
    int3
.att_syntax
"""


def program(code: bytes) -> bytes:
    """An ELF executable that is ``code`` and nothing else (System V ABI, ch. 4)."""
    size = _HEADERS + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, _LOADED + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOADED, _LOADED, size, size, 4096)
    return header + load + code
