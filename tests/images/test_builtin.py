"""The built-in guest: it loads like Linux, and does what it says when its code is run.

To run it without any engine, a forked child maps the code where the guest has it and jumps there
in user mode; each privileged instruction (IN, OUT, CLI, HLT) then stops the child, and the test,
as its tracer, plays the UART and the ACPI register (ptrace(2)).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ringfence.boot.elf import read_segments
from ringfence.boot.linux import load_linux
from ringfence.errors import HostError
from ringfence.images.builtin import (
    LOAD_ADDRESS,
    assemble,
    builtin_kernel,
    elf_kernel,
    store_builtin,
)
from ringfence.images.store import Store
from ringfence.memory.ram import GuestMemory

PTRACE_TRACEME, PTRACE_CONT, PTRACE_GETREGS, PTRACE_SETREGS = 0, 7, 12, 13
RAX, RDX, RIP = 10, 12, 16
"""Indices in ``struct user_regs_struct`` of x86-64, in words of 8 bytes."""


def test_it_loads_like_linux() -> None:
    memory = GuestMemory(2 << 20)
    state = load_linux(memory, kernel=builtin_kernel())
    assert state.rip == LOAD_ADDRESS
    assert memory.read(state.rip, 2) == b"\xfa\xfc"  # cli; cld
    memory.close()


def test_it_is_small() -> None:
    assert len(builtin_kernel()) < 1024
    assert builtin_kernel() == builtin_kernel()
    assert builtin_kernel(uart=0x2F8) != builtin_kernel()


def test_zeros_at_the_end_are_not_stored() -> None:
    image = read_segments(elf_kernel(b"\x90" + bytes(99), LOAD_ADDRESS))
    assert (image.segments[0].memsz, bytes(image.segments[0].data)) == (100, b"\x90")


def test_outside_references_are_refused() -> None:
    with pytest.raises(HostError, match="outside of itself"):
        assemble(".text\ncall elsewhere\n")


def test_store(tmp_path: object) -> None:
    store = Store(tmp_path)  # type: ignore[arg-type]
    image = store_builtin(store)
    assert store.find("builtin") == image == store_builtin(store)
    assert image.kernel.read_bytes() == builtin_kernel()
    assert image.initrd is None


@contextmanager
def traced(kernel: bytes) -> Iterator[int]:
    """A stopped child that is about to enter the kernel; killed at the end."""
    segment = read_segments(kernel).segments[0]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    number = ctypes.c_int
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        number,
        number,
        number,
        ctypes.c_long,
    ]
    contents = bytes(segment.data)
    entry = ctypes.CFUNCTYPE(None)(segment.paddr)
    child = os.fork()
    if child == 0:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        at = libc.mmap(segment.paddr, segment.memsz, protection, flags, -1, 0)
        if at != segment.paddr or libc.ptrace(PTRACE_TRACEME, 0, None, None):
            os._exit(1)
        ctypes.memmove(at, contents, len(contents))
        os.kill(os.getpid(), signal.SIGSTOP)
        entry()
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        pytest.skip("this host lets no process be traced")
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def converse(kernel: bytes, keys: bytes, uart: int) -> tuple[str, tuple[int, int]]:
    """Run a kernel, typing ``keys``: what it printed, and the (port, value) it ended with."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    registers = (ctypes.c_uint64 * 27)()
    printed, pending = bytearray(), bytearray(keys)
    with traced(kernel) as child:
        for _ in range(100_000):
            assert libc.ptrace(PTRACE_CONT, child, None, None) == 0
            _, status = os.waitpid(child, 0)
            assert os.WIFSTOPPED(status)
            assert os.WSTOPSIG(status) == signal.SIGSEGV
            libc.ptrace(PTRACE_GETREGS, child, None, ctypes.addressof(registers))
            with open(f"/proc/{child}/mem", "rb", 0) as file:  # noqa: PTH123
                file.seek(registers[RIP])
                code = file.read(3)
            port, length = registers[RDX] & 0xFFFF, 1
            if code[0] == 0xEC:  # in al, dx
                if port == uart + 5:
                    value = 0x60 | bool(pending)
                else:
                    assert port == uart
                    value = pending.pop(0)
                registers[RAX] = registers[RAX] & ~0xFF | value
            elif code[0] == 0xEE:  # out dx, al
                assert port == uart
                printed.append(registers[RAX] & 0xFF)
            elif code[:2] == b"\x66\xef":  # out dx, ax
                return printed.decode(), (port, registers[RAX] & 0xFFFF)
            else:
                assert code[0] == 0xFA, code.hex()  # cli
            registers[RIP] += length
            libc.ptrace(PTRACE_SETREGS, child, None, ctypes.addressof(registers))
    raise AssertionError(f"it never ended; it printed {printed.decode()!r}")


def cpu_vendor() -> str:
    """The host's vendor string, as CPUID leaf 0 gives it."""
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        return next(line.split(":")[1].strip() for line in file if line.startswith("vendor_id"))


def test_conversation() -> None:
    keys = (
        b"\r\nnonsense\rhelp\recho\recho  two words\recx\x7fho ab\x08c\recho-x\rcpuid\rpoweroff\r"
    )
    printed, end = converse(builtin_kernel(), keys, 0x3F8)
    assert end == (0x604, 0x3400)
    screen = printed.replace("c\x08 \x08", "").split("guest> ")
    assert screen[0].startswith("Hello from the guest")
    answers = [answer.splitlines()[1:] for answer in screen[1:]]
    assert answers[:2] == [[], []]
    assert answers[2] == ["No such command; try 'help'."]
    assert answers[3] == ["help, echo TEXT, cpuid, poweroff"]
    assert answers[4] == [""]
    assert answers[5] == [" two words"]
    assert answers[7] == ["No such command; try 'help'."]
    assert answers[8] == [cpu_vendor()]
    assert answers[9] == ["Goodbye."]


def test_parameters_and_a_long_line() -> None:
    kernel = builtin_kernel(uart=0x2F8, pm1a_control=0xB004, slp_typ=7)
    keys = b"echo " + b"x" * 500 + b"\r\x01\x7f\x7fpoweroff\r"
    printed, end = converse(kernel, keys, 0x2F8)
    assert end == (0xB004, 7 << 10 | 1 << 13)
    assert "\r\n" + "x" * 115 + "\r\n" in printed
