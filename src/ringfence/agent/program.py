"""From the agent's Python source to the machine code that images carry.

The dialect's functions are compiled, a few lines of assembly are put before them, and what comes
out runs at any address: `images.guest_agent` makes a program file of it.
"""

from __future__ import annotations

import json
import struct
from functools import lru_cache

from ringfence.agent.guest import Session, agent_main

START = f"""\
.intel_syntax noprefix
.text
.globl agent_start
agent_start:
    sub rsp, {Session.size}
    and rsp, -16
    mov rdi, rsp
    call agent_main
    mov edi, eax
    mov eax, 60
    syscall
.globl system_call
system_call:
    mov rax, rdi
    mov rdi, rsi
    mov rsi, rdx
    mov rdx, rcx
    mov r10, r8
    mov r8, r9
    syscall
    ret
.att_syntax
"""
"""Where the kernel enters, and system calls: the number comes first, as in syscall(2)."""


@lru_cache(maxsize=1)
def agent_code() -> tuple[bytes, int]:
    """Position-independent machine code of the agent, and the offset of its entry."""
    from ringfence.native.compiler import compile_image

    image = compile_image([agent_main], START)
    (length,) = struct.unpack_from("<I", image)
    functions = json.loads(image[4 : 4 + length])
    return image[4 + length :], functions["agent_start"]
