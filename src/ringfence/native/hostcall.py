"""System calls of the host's from native code: one routine, in assembly.

Who calls `host_call` adds `ASSEMBLY` to the unit that is compiled (see ``compiler.compile_image``).
"""

from __future__ import annotations

from ringfence.native.dialect import external

ASSEMBLY = """
.intel_syntax noprefix
.text
.p2align 4
.globl host_call
host_call:
    mov rax, rdi
    mov rdi, rsi
    mov rsi, rdx
    mov rdx, rcx
    mov r10, r8
    mov r8, r9
    mov r9, [rsp + 8]
    syscall
    ret
.att_syntax
"""


@external
def host_call(number: int, a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    """Do a system call; its result, errors as the kernel has them: -1 to -4095 (syscall(2))."""
    return 0
