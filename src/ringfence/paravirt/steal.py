"""Steal time: how long a vCPU was ready to run and the host ran something else.

The host's scheduler counts this for each thread (run delay, /proc/PID/task/TID/schedstat). A vCPU
is a thread, and the processes of user code that runs directly, one at a time; so what was added
while it ran the guest is what the guest was robbed of; a pause doesn't count. The sum is written to
the guest's structure before an interrupt is delivered, which is when guests look at it, but not
oftener than once in `INTERVAL_NS`.

The structure's ``preempted`` byte stays 0: at the moment when a thread is preempted, user space
doesn't run and can't say so.

Source: Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_STEAL_TIME); Documentation/scheduler/
sched-stats.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from contextlib import suppress
from pathlib import Path

from ringfence.chipset.state import Saved
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.tsc import MASK64
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory

MSR_STEAL_TIME = 0x4B564D03
FEATURE_STEAL_TIME = 1 << 5
"""CPUID 0x40000001 EAX: the MSR exists (KVM_FEATURE_STEAL_TIME)."""
INTERVAL_NS = 1_000_000
"""The least time between two looks at the host's accounting."""

_ENABLED, _RESERVED = 1, 0x3E
_STEAL = struct.Struct("<QI")  # struct kvm_steal_time: steal, version; flags, preempted, padding
_BYTES = 64
_libc = ctypes.PyDLL(None)
_libc.pread.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pread.restype = ctypes.c_ssize_t
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def available() -> bool:
    """Whether the host's kernel counts run delays."""
    try:
        return int(_SCHEDSTAT.read_bytes().split()[0]) > 0
    except (OSError, ValueError, IndexError):
        return False


class RunDelay:
    """What the host's scheduler says about one thread, the one that makes the object.

    And about processes that run in turn with it: a vCPU's user code may run in them.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(64)
        self._waited: dict[int, int] = {}
        """By the file's descriptor, as last read."""
        self._ended = 0
        self._open(_SCHEDSTAT)

    def _open(self, path: Path) -> None:
        self._waited[os.open(path, os.O_RDONLY | os.O_CLOEXEC)] = 0

    def add(self, process: int) -> None:
        """Count a process, too."""
        self._open(Path(f"/proc/{process}/schedstat"))

    def read(self) -> int:
        """Nanoseconds that they have waited for a CPU since each began."""
        for file in list(self._waited):
            # Python's lock is kept: others would take it, and an interrupt's delivery wait.
            length = _libc.pread(file, self._buffer, len(self._buffer), 0)
            if length > 0:
                self._waited[file] = int(self._buffer.raw[:length].split()[1])
            else:  # it has ended
                self._ended += self._waited.pop(file)
                os.close(file)
        return self._ended + sum(self._waited.values())

    def close(self) -> None:
        """Close the files; a second time nothing happens."""
        while self._waited:
            os.close(self._waited.popitem()[0])


class StealTime(Saved):
    """The steal time of one vCPU.

    Parameters
    ----------
    memory : GuestMemory
        Where the guest's structure is.
    counted : bool
        Whether the host counts run delays; if not, nothing is ever stolen.
    """

    FIELDS = ("register", "stolen", "sequence")

    def __init__(self, memory: GuestMemory, counted: bool) -> None:
        self._memory = memory
        self._counted = counted
        self._delay: RunDelay | None = None
        self._seen = 0
        self._looked = 0
        self.register = 0
        """What the guest last wrote."""
        self.stolen = 0
        """Nanoseconds, since the machine began."""
        self.sequence = 0

    def msr_read(self, index: int) -> int:
        """What the guest last wrote."""
        return self.register

    def msr_write(self, index: int, value: int) -> None:
        """Tell where the structure is; GeneralProtection for reserved bits, or outside RAM."""
        if value & _RESERVED:
            raise GeneralProtection(f"steal time {value:#x}: reserved bits")
        if value & _ENABLED:
            try:
                self._memory.offset(value & ~_ENABLED, _BYTES)
            except IndexError as error:
                raise GeneralProtection(f"steal time is outside RAM: {error}") from error
        self.register = value
        self._publish()

    def restored(self) -> None:
        """Refuse what no guest could have set up."""
        if self.register & _ENABLED:
            try:
                self._memory.offset(self.register & ~_ENABLED, _BYTES)
            except IndexError as error:
                raise ImageError(f"saved steal time is outside RAM: {error}") from error
        self.stolen &= MASK64

    def begin(self) -> None:
        """Count from here on for the calling thread, which runs the vCPU."""
        self.end()
        if self._counted:
            with suppress(OSError):  # without a descriptor for it nothing is seen as stolen
                self._delay = RunDelay()
                self._seen = self._delay.read()

    def helped(self, process: int) -> None:
        """Count from here on for a process, too, which runs in turn with the thread."""
        if self._delay is not None:
            with suppress(OSError):
                self._delay.add(process)

    def end(self) -> None:
        """The thread runs the vCPU no more."""
        if self._delay is not None:
            self._take(self._delay)
            self._delay.close()
            self._delay = None

    def refresh(self) -> None:
        """Tell the guest what has been stolen (from the vCPU's thread)."""
        now = time.monotonic_ns()
        if self._delay is None or now - self._looked < INTERVAL_NS:
            return
        self._looked = now
        if self._take(self._delay):
            self._publish()

    def _take(self, delay: RunDelay) -> int:
        """Add what was stolen since the last look."""
        total = delay.read()
        more, self._seen = total - self._seen, total
        self.stolen += more
        return more

    def _publish(self) -> None:
        """Write the structure, with an odd version while it is not whole."""
        if not self.register & _ENABLED:
            return
        address = self.register & ~_ENABLED
        self.sequence = self.sequence + 2 & 0xFFFFFFFE
        odd = self.sequence - 1 & 0xFFFFFFFF
        self._memory.dma_write(address, _STEAL.pack(self.stolen, odd))
        self._memory.dma_write(address + 8, self.sequence.to_bytes(4, "little"))
