"""A /dev/kvm that does what a script says: to test what a real one does once in a blue moon."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from ringfence.cpu import msr
from ringfence.cpu.tsc import read_host_tsc
from ringfence.engine.kvm import abi
from ringfence.engine.kvm.abi import Cap, Exit, Request

Step: TypeAlias = "int | Callable[[Any], None]"
"""One KVM_RUN: an error number, or what fills in ``struct kvm_run``."""
SYSTEM, VM, VCPU = 103, 104, 105
RUN_BYTES = 3 * 4096
DATA = 4096
"""Where port data is in the shared area."""


class FakeKernel:
    """See ``device.Kernel``.

    Parameters
    ----------
    script : Iterable[Step]
        What each KVM_RUN does, in order.
    missing : set[Cap]
        Capabilities that the kernel lacks.
    refused : dict[Request, int]
        Requests that fail, with the error number.
    open_error : int
        Error number of opening the device, 0 to succeed.
    movable_tsc : bool
        Whether the guest's counter follows its offset.
    """

    def __init__(
        self,
        script: Iterable[Step] = (),
        *,
        missing: set[Cap] | None = None,
        refused: dict[Request, int] | None = None,
        open_error: int = 0,
        movable_tsc: bool = True,
        version: int = abi.API_VERSION,
    ) -> None:
        self.script = list(script)
        self.pending: list[Step] = []
        """What KVM_RUN does while it only completes an access (``immediate_exit``)."""
        self.missing = missing or set()
        self.refused = refused or {}
        self.open_error = open_error
        self.movable_tsc = movable_tsc
        self.version = version
        self.shared = bytearray(RUN_BYTES)
        self.run = abi.KvmRun.from_buffer(self.shared)
        self.calls: list[Request] = []
        self.interrupts: list[int] = []
        self.windows: list[int] = []
        """``request_interrupt_window`` at each KVM_RUN."""
        self.state: dict[int, bytes] = {}
        self.msrs: dict[int, int] = {}
        self.tsc_offset = 0
        self.closed: list[int] = []

    def open(self, path: str) -> int:
        if self.open_error:
            raise OSError(self.open_error, os.strerror(self.open_error))
        return SYSTEM

    def mmap(self, fd: int, size: int) -> Any:
        assert (fd, size) == (VCPU, RUN_BYTES)
        return self.shared

    def close(self, fd: int) -> None:
        self.closed.append(fd)

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        kind = Request(request)
        self.calls.append(kind)
        if kind in self.refused:
            raise OSError(self.refused[kind], os.strerror(self.refused[kind]))
        answer = getattr(self, f"_{kind.name.lower()}", None)
        if answer is not None:
            return int(answer(argument))
        if kind.name.startswith("SET_") and not isinstance(argument, int):
            self.state[request & 0xFF] = bytes(argument)
        elif request & 0xFF in self._twins:
            saved = self.state.get(self._twins[request & 0xFF])
            if saved is not None:
                ctypes.memmove(ctypes.addressof(argument), saved, len(saved))
        return 0

    _twins = {
        get & 0xFF: put & 0xFF
        for get, put in (
            (Request.GET_REGS, Request.SET_REGS),
            (Request.GET_SREGS, Request.SET_SREGS),
            (Request.GET_XSAVE, Request.SET_XSAVE),
            (Request.GET_XCRS, Request.SET_XCRS),
            (Request.GET_DEBUGREGS, Request.SET_DEBUGREGS),
            (Request.GET_VCPU_EVENTS, Request.SET_VCPU_EVENTS),
        )
    }

    def _get_api_version(self, argument: int) -> int:
        return self.version

    def _check_extension(self, cap: int) -> int:
        return int(cap not in self.missing)

    def _get_vcpu_mmap_size(self, argument: int) -> int:
        return RUN_BYTES

    def _create_vm(self, argument: int) -> int:
        return VM

    def _create_vcpu(self, argument: int) -> int:
        return VCPU

    def _get_supported_cpuid(self, table: Any) -> int:
        table.nent = 0
        return 0

    def _set_device_attr(self, attribute: Any) -> int:
        self.tsc_offset = ctypes.c_uint64.from_address(attribute.addr).value
        return 0

    def _get_msrs(self, table: Any) -> int:
        for entry in table.entries:
            entry.data = self.msrs.get(entry.index, 0)
            if entry.index == msr.TSC:
                offset = self.tsc_offset if self.movable_tsc else 0
                entry.data = (read_host_tsc() + offset) & (1 << 64) - 1
        return int(table.nmsrs)

    def _set_msrs(self, table: Any) -> int:
        self.msrs.update((entry.index, entry.data) for entry in table.entries)
        return int(table.nmsrs)

    def _translate(self, found: Any) -> int:
        found.physical_address, found.valid = found.linear_address, found.linear_address < 1 << 32
        return 0

    def _interrupt(self, argument: Any) -> int:
        self.interrupts.append(argument.irq)
        return 0

    def _run(self, argument: int) -> int:
        if self.run.immediate_exit:
            step: Step = self.pending.pop(0) if self.pending else errno.EINTR
        else:
            self.windows.append(self.run.request_interrupt_window)
            assert self.script, "the script is over, but the engine goes on"
            step = self.script.pop(0)
        if callable(step):
            step(self.run)
            return 0
        raise OSError(step, os.strerror(step))


def leave(reason: int, *, ready: bool = False, **fields: Any) -> Callable[[Any], None]:
    """An exit; ``fields`` are ``part__field`` of the union, such as ``io__port``."""

    def step(run: Any) -> None:
        run.exit_reason = reason
        run.ready_for_interrupt_injection = run.if_flag = ready
        for name, value in fields.items():
            part, _, member = name.partition("__")
            setattr(getattr(run, part), member, value)

    return step


def port(number: int, data: bytes, *, size: int = 1, out: bool = True) -> Callable[[Any], None]:
    """An access to a port; ``data`` is what the guest writes, or room for what it reads."""
    fill = leave(
        Exit.IO, io__port=number, io__size=size, io__count=len(data) // size,
        io__direction=int(out), io__data_offset=DATA,
    )  # fmt: skip

    def step(run: Any) -> None:
        fill(run)
        ctypes.memmove(ctypes.addressof(run) + DATA, data, len(data))

    return step


POWER_OFF = port(0x604, (5 << 10 | 1 << 13).to_bytes(2, "little"), size=2)
"""What a guest does to switch itself off."""
