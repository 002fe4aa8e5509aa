"""Whether user code can run directly on this host, and if not, why.

`lacking` is what can be seen: Python's calls, the CPU, the vector state that Linux has enabled.
Whether tracing is permitted, and the counter and system calls can be made to trap, is only found by
trying: `obstacle` makes a process of the stub alone, as `policy` does with each address space.
"""

from __future__ import annotations

import os
from collections.abc import Container
from functools import cache
from pathlib import Path

from ringfence.cpu.components import AVX512_STATE, AVX_STATE
from ringfence.cpu.cpuid import host_cpuid
from ringfence.engine.direct import ptrace, stub
from ringfence.engine.direct.process import Process
from ringfence.errors import HostError
from ringfence.memory.ram import GuestMemory
from ringfence.native import hostcall
from ringfence.native.library import Library

CPUINFO = Path("/proc/cpuinfo")
_FIRST_PROCESSOR = 8192
"""Bytes of `CPUINFO` with the first processor in them; a large host has hundreds."""
_RAM_BYTES = 1 << 20


@cache
def features() -> frozenset[str]:
    """Flags of the first processor, as far as Linux has them enabled; empty if it doesn't say."""
    try:
        with CPUINFO.open("rb") as file:
            text = file.read(_FIRST_PROCESSOR).decode(errors="replace")
    except OSError:
        return frozenset()
    return frozenset(text.partition("\nflags")[2].partition("\n")[0].partition(":")[2].split())


def lacking(enabled: int, offered: int, flags: Container[str]) -> str:
    """Why nothing can run directly, without a try; empty where nothing stands against it.

    Parameters
    ----------
    enabled : int
        Components of the vector state that the host's system has enabled, as bits of XCR0.
    offered : int
        Those that guests know.
    flags : container of str
        See `features`.
    """
    if not hasattr(os, "pidfd_open"):
        return "this Python knows no process descriptors (pidfd)"
    if "umip" not in flags:
        # SGDT and the like would show the host's tables, and nothing traps.
        return "the host's CPU has no user-mode instruction prevention (UMIP), or it is off"
    if not enabled & AVX_STATE:
        return "the host's vector state has no AVX (XCR0)"
    if enabled & AVX512_STATE & ~offered:
        return "the host's vector state has parts that the guest's has not (XCR0)"
    return ""


def enabled_components() -> int:
    """Components of the vector state that the host's system has enabled."""
    return host_cpuid(0xD, 0)[0]


def obstacle() -> str:
    """Why user code can't run directly on this host; empty if it can. Makes a process to try."""
    enabled = enabled_components()
    reason = lacking(enabled, enabled, features())
    if reason:
        return reason
    from ringfence.native.compiler import compile_image

    memory = GuestMemory(_RAM_BYTES)
    try:
        assembly = stub.assembly() + hostcall.ASSEMBLY
        library = Library(compile_image((ptrace.registers,), assembly, optimize=False))
        Process(library, memory, enabled).close()
    except HostError as error:
        return str(error)
    except OSError as error:
        return f"no executable memory: {error.strerror}"
    finally:
        memory.close()
    return ""
