"""A host process for user code: made from a program of a few hundred bytes, and empty but for that.

It is started with two descriptors, guest RAM and the stub's pages, by the thread that runs the
virtual CPU, which is its tracer; with that thread it ends, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ringfence.cpu.components import HEADER
from ringfence.cpu.cpuid import host_cpuid
from ringfence.engine.direct import ptrace, stub
from ringfence.engine.direct.space import COPIES, GENERAL_WORDS, Space
from ringfence.errors import HostError

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library

_SET_OPTIONS, _EXIT_KILL, _SYSTEM_CALL_BIT = 0x4200, 0x100000, 1
_XSTATE_MAX = 16384
_XSTATE_LEAF = 0xD
_GETPID = 39


_REQUESTS = {
    _SET_OPTIONS: "PTRACE_SETOPTIONS",
    ptrace.GET_REGISTERS: "PTRACE_GETREGSET",
    ptrace.SET_REGISTERS: "PTRACE_SETREGSET",
    ptrace.SYSTEM_CALLS: "PTRACE_SYSEMU",
}


@contextlib.contextmanager
def _memory_file(name: str) -> Iterator[int]:
    """A descriptor of an empty file in memory, open meanwhile."""
    number = os.memfd_create(f"ringfence-{name}", os.MFD_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


def _address(pages: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


class Process:
    """One process and its `Space`; made, used and closed by the virtual CPU's thread.

    Parameters
    ----------
    library : Library
        The engine's native code.
    memory : GuestMemory
        RAM with a descriptor.
    components : int
        Components of the vector state that guests know, as bits of XCR0.

    Raises
    ------
    HostError
        The host does not allow it, or lacks what it takes.
    """

    def __init__(self, library: Library, memory: GuestMemory, components: int) -> None:
        self._host_call = library.function("host_call", 7)
        self._pages = mmap.mmap(-1, -(-Space.size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._vector = mmap.mmap(-1, _XSTATE_MAX)
        self.address = _address(self._pages)
        self.space: Any = Space.at(self.address)
        self.pid = self.handle = -1
        start = library.address("rf_stub")
        code = ctypes.string_at(start, library.address("rf_stub_end") - start)
        try:
            with _memory_file("stub") as shared, _memory_file("copies") as copies:
                os.ftruncate(shared, stub.BYTES)
                os.ftruncate(copies, COPIES * mmap.PAGESIZE)
                os.pwrite(shared, code, 0)
                self._shared = mmap.mmap(shared, stub.BYTES)
                self._copies = mmap.mmap(copies, COPIES * mmap.PAGESIZE)
                self._start(code, (memory.fd, shared, copies))
            self._learn(components)
            self._try(library.address("rf_stub_call") - start)
        except OSError as error:
            self.close()
            raise HostError(f"no process for user code: {error}") from error
        except BaseException:
            self.close()
            raise
        self.space.own[ptrace.RIP] = stub.PLACE + library.address("rf_stub_orders") - start

    def _start(self, code: bytes, descriptors: tuple[int, int, int]) -> None:
        """Have the process at its first stop, where it is empty."""
        with _memory_file("user") as program:
            os.write(program, stub.program(code))
            # None may lie where another is to go.
            wanted = (stub.DESCRIPTOR_RAM, stub.DESCRIPTOR_STUB, stub.DESCRIPTOR_COPIES)
            spare = max(*descriptors, program, *wanted) + 1
            moves = list(zip(descriptors, range(spare, spare + 3), wanted, strict=True))
            actions = [
                *((os.POSIX_SPAWN_DUP2, given, aside) for given, aside, _ in moves),
                *((os.POSIX_SPAWN_DUP2, aside, target) for _, aside, target in moves),
                *((os.POSIX_SPAWN_CLOSE, aside) for _, aside, _ in moves),
                *((os.POSIX_SPAWN_CLOSE, number) for number in range(3)),
            ]
            self.pid = os.posix_spawn(
                f"/proc/self/fd/{program}",
                ["ringfence-user"],
                {},
                file_actions=actions,
                setsid=True,
            )
        self.handle = os.pidfd_open(self.pid)
        self._wait(signal.SIGTRAP)
        self._ask(_SET_OPTIONS, 0, _EXIT_KILL | _SYSTEM_CALL_BIT)

    def _learn(self, components: int) -> None:
        """Fill in the space; read registers, and how the host lays them out."""
        space = self.space
        space.process = self.pid
        space.stub = stub.PLACE
        space.orders = _address(self._shared) + stub.ORDERS_AT
        space.copies = _address(self._copies)
        own = self.address + Space.offset_of("own")
        self._registers(ptrace.GET_REGISTERS, ptrace.NT_PRSTATUS, own, GENERAL_WORDS * 8)
        space.vector = _address(self._vector)
        space.vector_bytes = self._registers(
            ptrace.GET_REGISTERS, ptrace.NT_X86_XSTATE, space.vector, _XSTATE_MAX
        )
        for number in range(2, 8):
            space.vector_offsets[number] = host_cpuid(_XSTATE_LEAF, number)[1]
        present = ctypes.c_uint64.from_address(space.vector + HEADER).value
        space.foreign = present & ~components

    def _try(self, call: int) -> None:
        """Whether system calls are ours to take: some hosts only say that they know ptrace."""
        space, own = self.space, self.address + Space.offset_of("own")
        space.own[ptrace.RIP] = stub.PLACE + call
        space.own[ptrace.RAX] = _GETPID
        space.own[ptrace.ORIGINAL_RAX] = (1 << 64) - 1
        self._registers(ptrace.SET_REGISTERS, ptrace.NT_PRSTATUS, own, GENERAL_WORDS * 8)
        self._ask(ptrace.SYSTEM_CALLS, 0, 0)
        self._wait(ptrace.SIGNAL_SYSTEM_CALL)

    def _ask(self, what: int, which: int, where: int) -> None:
        result = self._host_call(ptrace.PTRACE, what, self.pid, which, where, 0, 0)
        if result:
            error = (1 << 64) - result
            raise OSError(error, f"{_REQUESTS[what]}: {os.strerror(error)}")

    def _registers(self, what: int, which: int, where: int, size: int) -> int:
        self.space.request[:] = (where, size)
        self._ask(what, which, self.address + Space.offset_of("request"))
        return int(self.space.request[1])

    def _wait(self, expected: int) -> None:
        status = os.waitpid(self.pid, ptrace.WAIT_ALL)[1]
        if os.WIFSTOPPED(status) and os.WSTOPSIG(status) == expected:
            return
        refused = "ptrace doesn't stop processes as it should"
        if not os.WIFSTOPPED(status):
            self.pid = -1
            if os.WIFEXITED(status):
                refused = stub.REFUSALS.get(os.WEXITSTATUS(status), refused)
        raise HostError(f"no process for user code: on this host, {refused}")

    def kick(self) -> None:
        """Stop the process if it runs (any thread)."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.handle, signal.SIGURG)

    def close(self) -> None:
        """End the process."""
        if self.handle >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            os.close(self.handle)
            self.handle = -1
        elif self.pid >= 0:  # no descriptor was to be had, but nobody has waited for it either
            os.kill(self.pid, signal.SIGKILL)
        if self.pid >= 0:
            with contextlib.suppress(ChildProcessError):
                while os.WIFSTOPPED(os.waitpid(self.pid, ptrace.WAIT_ALL)[1]):
                    pass
            self.pid = -1
