"""The way to /dev/kvm: the seam that tests replace, and the three kinds of file behind it.

`Kernel` is all that this room wants from the host: open, ioctl, mmap, close. `System`, `Vm` and
`VcpuFile` put types around the three kinds of file descriptor; none of them decides anything. An
ioctl that fails raises OSError with the request's name, so that no caller has to look at errno but
for the few that mean something to it.

Source: Linux, Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from ringfence.engine.kvm import abi
from ringfence.engine.kvm.abi import Cap, Request
from ringfence.errors import HostError

PATH = "/dev/kvm"
NEEDED = (
    Cap.USER_MEMORY, Cap.SET_TSS_ADDR, Cap.EXT_CPUID, Cap.SYNC_MMU, Cap.VCPU_EVENTS, Cap.DEBUGREGS,
    Cap.USER_NMI, Cap.XSAVE, Cap.XCRS, Cap.IMMEDIATE_EXIT, Cap.X86_USER_SPACE_MSR,
    Cap.X86_MSR_FILTER, Cap.VCPU_ATTRIBUTES,
)  # fmt: skip
"""Capabilities without which the engine can't work; the newest came with Linux 5.16."""
TSS_ADDRESS, IDENTITY_MAP_ADDRESS = 0xFF7F1000, 0xFF7F0000
"""Four pages that VT-x needs inside the hole below 4 GiB, where no device of ours is."""
CPUID_ROOM = 256

S = TypeVar("S", bound=ctypes.Structure)


class Kernel(Protocol):
    """What the engine asks of the host's kernel; errors are OSError."""

    def open(self, path: str) -> int:
        """A file descriptor, for reading and writing."""

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        """The result of a request; ``argument`` is a number or a ctypes object."""

    def mmap(self, fd: int, size: int) -> Any:
        """A writable buffer that is shared with the kernel."""

    def close(self, fd: int) -> None:
        """Close a file descriptor."""


class HostKernel:
    """The real one. An ioctl runs without Python's global lock."""

    def __init__(self) -> None:
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        self._ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

    def open(self, path: str) -> int:
        """See ``Kernel``."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        """See ``Kernel``."""
        where = argument if isinstance(argument, int) else ctypes.addressof(argument)
        result = int(self._ioctl(fd, request, where))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def mmap(self, fd: int, size: int) -> Any:
        """See ``Kernel``."""
        return mmap.mmap(fd, size)

    def close(self, fd: int) -> None:
        """See ``Kernel``."""
        os.close(fd)


class _File:
    """A file descriptor and the requests that it takes."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self.kernel = kernel
        self.fd = fd

    def ask(self, request: Request, argument: Any = 0) -> int:
        """Do an ioctl; HostError with its name if the host refuses."""
        try:
            return self.kernel.ioctl(self.fd, request, argument)
        except OSError as error:
            raise HostError(f"KVM refused KVM_{request.name}: {error.strerror}") from error

    def get(self, request: Request, kind: type[S]) -> S:
        """Have the kernel fill in a structure."""
        structure = kind()
        self.ask(request, structure)
        return structure

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        if self.fd >= 0:
            self.kernel.close(self.fd)
            self.fd = -1


class System(_File):
    """/dev/kvm itself.

    Raises
    ------
    HostError
        It is missing, not permitted, too old, or lacks a capability; the message says what to do.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, _open(kernel))
        try:
            version = self.ask(Request.GET_API_VERSION)
            if version != abi.API_VERSION:
                raise HostError(f"{PATH} speaks version {version}, expected {abi.API_VERSION}")
            missing = [cap.name for cap in NEEDED if not self.check(cap)]
            if missing:
                raise HostError(
                    f"{PATH} lacks {', '.join(missing)}: use Linux 5.16 or later, or"
                    " --engine translate"
                )
        except BaseException:
            self.close()
            raise

    def check(self, cap: Cap) -> int:
        """What KVM_CHECK_EXTENSION says, 0 for no."""
        return self.ask(Request.CHECK_EXTENSION, int(cap))

    def supported_cpuid(self) -> list[tuple[int, int, int, int, int, int]]:
        """Rows of leaf, subleaf, EAX, EBX, ECX, EDX that KVM and this host can offer."""
        table = abi.cpuid2((), CPUID_ROOM)
        self.ask(Request.GET_SUPPORTED_CPUID, table)
        return [
            (e.function, e.index, e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[: table.nent]
        ]

    def create_vm(self) -> Vm:
        """A virtual machine without memory and CPUs."""
        while True:
            try:
                fd = self.kernel.ioctl(self.fd, Request.CREATE_VM, 0)
            except InterruptedError:
                continue
            except OSError as error:
                raise HostError(f"KVM can't create a machine: {error.strerror}") from error
            return Vm(self.kernel, fd, self.ask(Request.GET_VCPU_MMAP_SIZE))


def _open(kernel: Kernel) -> int:
    try:
        return kernel.open(PATH)
    except OSError as error:
        advice = {
            errno.ENOENT: "load the host's module kvm_amd or kvm_intel",
            errno.ENODEV: "load the host's module kvm_amd or kvm_intel",
            errno.EACCES: "join the group that owns it (often 'kvm')",
            errno.EPERM: "allow this container or sandbox to use the device",
        }.get(error.errno or 0, "see what the host's kernel log says")
        raise HostError(
            f"{PATH} can't be opened ({error.strerror}): {advice}, or use --engine translate"
        ) from error


class Vm(_File):
    """A virtual machine; ``run_bytes`` is the size of what each vCPU shares with us."""

    def __init__(self, kernel: Kernel, fd: int, run_bytes: int) -> None:
        super().__init__(kernel, fd)
        self.run_bytes = run_bytes

    def prepare(self, filtered: abi.KvmMsrFilter) -> None:
        """Say where VT-x may put its pages, and which registers come to us."""
        self.ask(Request.SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(IDENTITY_MAP_ADDRESS))
        self.ask(Request.SET_TSS_ADDR, TSS_ADDRESS)
        enable = abi.KvmEnableCap(cap=Cap.X86_USER_SPACE_MSR)
        enable.args[0] = (
            abi.MSR_EXIT_REASON_INVAL | abi.MSR_EXIT_REASON_UNKNOWN | abi.MSR_EXIT_REASON_FILTER
        )
        self.ask(Request.ENABLE_CAP, enable)
        self.ask(Request.X86_SET_MSR_FILTER, filtered)

    def set_memory(self, slot: int, address: int, size: int, host: int, *, log: bool) -> None:
        """Put ``size`` bytes at host address ``host`` into guest-physical space."""
        flags = abi.MEM_LOG_DIRTY_PAGES if log else 0
        region = abi.KvmUserspaceMemoryRegion(slot, flags, address, size, host)
        self.ask(Request.SET_USER_MEMORY_REGION, region)

    def set_rom(self, slot: int, address: int, size: int, host: int) -> None:
        """The same for memory that is read and executed; writes come out as device accesses."""
        region = abi.KvmUserspaceMemoryRegion(slot, abi.MEM_READONLY, address, size, host)
        self.ask(Request.SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int, size: int) -> bytes:
        """One bit per page of a slot of ``size`` bytes: written since the last call."""
        words = (ctypes.c_uint64 * -(-(size >> 12) // 64))()
        self.ask(Request.GET_DIRTY_LOG, abi.KvmDirtyLog(slot, 0, ctypes.addressof(words)))
        return bytes(words)

    def create_vcpu(self, number: int) -> VcpuFile:
        """A virtual CPU."""
        fd = self.ask(Request.CREATE_VCPU, number)
        return VcpuFile(self.kernel, fd, number, self.run_bytes)


class VcpuFile(_File):
    """A virtual CPU; ``run`` is a live view of what it shares with us."""

    def __init__(self, kernel: Kernel, fd: int, number: int, run_bytes: int) -> None:
        super().__init__(kernel, fd)
        self.number = number
        self.shared = kernel.mmap(fd, run_bytes)
        self.run: Any = abi.KvmRun.from_buffer(self.shared)
        self.run_bytes = run_bytes

    def enter(self) -> int:
        """Let the guest run: 0 for an exit to look at, or the number of an error (errno)."""
        try:
            self.kernel.ioctl(self.fd, Request.RUN, 0)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def data(self, offset: int, size: int) -> Any:
        """A live array of bytes of the shared area; HostError outside it."""
        if offset + size > self.run_bytes:
            raise HostError(f"KVM points outside its shared area ({offset:#x}+{size:#x})")
        return (ctypes.c_uint8 * size).from_buffer(self.shared, offset)

    def set_cpuid(self, entries: Sequence[abi.KvmCpuidEntry2]) -> None:
        """Say what CPUID answers."""
        self.ask(Request.SET_CPUID2, abi.cpuid2(entries))

    def set_signal_mask(self, blocked: int) -> None:
        """Signals that stay blocked while the guest runs, bit n-1 for signal n."""
        self.ask(Request.SET_SIGNAL_MASK, abi.signal_mask(blocked))

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; the guest must be ready for it."""
        self.ask(Request.INTERRUPT, abi.KvmInterrupt(vector))

    def nmi(self) -> None:
        """Queue a non-maskable interrupt."""
        self.ask(Request.NMI)

    def translate(self, address: int) -> int | None:
        """Guest-physical address of a guest-linear one; None where nothing is mapped."""
        found = abi.KvmTranslation(linear_address=address)
        self.ask(Request.TRANSLATE, found)
        return found.physical_address if found.valid else None

    def get_msrs(self, indexes: Iterable[int]) -> list[int]:
        """Values of model-specific registers; HostError if KVM lacks one."""
        table = abi.msrs([(index, 0) for index in indexes])
        self._all(Request.GET_MSRS, table)
        return [entry.data for entry in table.entries]

    def set_msrs(self, values: Sequence[tuple[int, int]]) -> None:
        """Set model-specific registers; HostError if KVM lacks one or refuses its value."""
        self._all(Request.SET_MSRS, abi.msrs(values))

    def _all(self, request: Request, table: Any) -> None:
        """KVM stops at the first register that it can't serve and says how many it did."""
        done = self.ask(request, table)
        if done != table.nmsrs:
            raise HostError(f"KVM_{request.name} stopped at MSR {table.entries[done].index:#x}")

    def set_tsc_offset(self, offset: int) -> None:
        """Make the guest's time-stamp counter the host's plus ``offset``, modulo 2**64."""
        value = ctypes.c_uint64(offset)
        attribute = abi.KvmDeviceAttr(
            0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, ctypes.addressof(value)
        )
        self.ask(Request.SET_DEVICE_ATTR, attribute)

    def close(self) -> None:
        """See ``_File``."""
        self.run = None
        self.shared = None
        super().close()
