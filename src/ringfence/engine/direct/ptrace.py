"""Stopping, resuming and looking into a process: the host's calls (ptrace(2)).

All are made by the thread that seized it. Between two runs the process is in a ptrace stop.
"""

from __future__ import annotations

from ringfence.cpu.state import OK
from ringfence.engine.direct.space import GENERAL_WORDS, Space
from ringfence.native.dialect import address_of, native, native_inline
from ringfence.native.hostcall import host_call

PTRACE, WAIT4 = 101, 61
CONTINUE, GET_SIGNAL, GET_REGISTERS, SET_REGISTERS, SYSTEM_CALLS = 7, 0x4202, 0x4204, 0x4205, 31
"""PTRACE_CONT, _GETSIGINFO, _GETREGSET, _SETREGSET and _SYSEMU."""
NT_PRSTATUS, NT_X86_XSTATE = 1, 0x202
WAIT_ALL = 0x40000000
EINTR = -4
LOST = 1
"""Status: the process is gone, or does not do what it must."""
STOPPED = 0x7F
SIGTRAP, SIGURG, SIGSEGV, SIGSYS = 5, 23, 11, 31
SIGNAL_SYSTEM_CALL = SIGTRAP | 0x80

R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI, ORIGINAL_RAX = range(16)
RIP, CS, FLAGS, RSP, SS, FS_BASE, GS_BASE, DS, ES, FS, GS = range(16, 27)
"""Words of user_regs_struct."""


@native_inline
def ask(space: Space, what: int, which: int, where: int) -> int:
    """A ptrace request; a status."""
    return OK if host_call(PTRACE, what, space.process, which, where, 0, 0) == 0 else LOST


@native
def registers(space: Space, what: int, which: int, where: int, size: int) -> int:
    """Read or write a set of registers; a status."""
    space.request[0] = where
    space.request[1] = size
    return ask(space, what, which, address_of(space.request[0]))


@native
def wait(space: Space) -> int:
    """Wait until the process stops; the signal that it did so for, 0 where it has ended."""
    where = address_of(space.status)
    while 1:
        space.status = 0
        result = host_call(WAIT4, space.process, where, WAIT_ALL, 0, 0, 0)
        if result == space.process:
            return space.status >> 8 & 0xFF if space.status & 0xFF == STOPPED else 0
        if result != EINTR:
            return 0
    return 0


@native
def resume(space: Space, how: int) -> int:
    """Let the process run until its next stop; as `wait`."""
    if ask(space, how, 0, 0) != OK:
        return 0
    return wait(space)


@native
def carry_out(space: Space) -> int:
    """Have the process do the system calls that were ordered; a status.

    Its general registers are others then: write ``general`` before it runs guest code again.
    """
    if space.ordered == 0:
        return OK
    own = address_of(space.own[0])
    space.own[RBX] = space.stub + 4096
    space.own[R12] = space.ordered
    space.own[ORIGINAL_RAX] = 0xFFFFFFFFFFFFFFFF
    space.ordered = 0
    rip = space.own[RIP]
    if registers(space, SET_REGISTERS, NT_PRSTATUS, own, GENERAL_WORDS * 8) != OK:
        return LOST
    signal = resume(space, CONTINUE)
    while signal == SIGURG:
        signal = resume(space, CONTINUE)
    if signal != SIGTRAP:
        return LOST
    if registers(space, GET_REGISTERS, NT_PRSTATUS, own, GENERAL_WORDS * 8) != OK:
        return LOST
    space.own[RIP] = rip
    space.broken = 1 if space.own[R12] else 0
    return LOST if space.broken else OK
