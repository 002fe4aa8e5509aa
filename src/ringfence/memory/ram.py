"""Guest RAM: mapped once, in at most two guest-physical regions; and firmware's ROM.

The physical map follows the PC: RAM from 0 up to 3 GiB, a hole for devices below 4 GiB, the rest
of RAM from 4 GiB on. A ROM ends at 4 GiB, where a CPU starts. The host mapping is contiguous, the
ROM behind RAM and read-only, and fenced on both sides by inaccessible guard pages, so that no
off-by-one of ours can reach other host memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ringfence.errors import HostError, UsageError
from ringfence.memory.dirty import PAGE as PAGE
from ringfence.memory.dirty import DirtyLog, Run

LOW_RAM_LIMIT = 3 << 30
"""Guest-physical end of low RAM; the device hole reaches from here to 4 GiB."""
HIGH_RAM_BASE = 4 << 30
MINIMUM_SIZE = 1 << 20
MAXIMUM_SIZE = 1 << 40
MAXIMUM_ROM = 8 << 20
"""Below 4 GiB less this are devices, and what KVM puts into guest-physical space."""
GUARD = 1 << 21
"""Inaccessible bytes on either side of the mapping."""
LARGE = 1 << 20
"""Bytes from which on it pays to call the host's kernel instead of copying."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_touch = _libc.strnlen
_touch.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MADV_REMOVE = 9
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class Region:
    """A run of memory: guest-physical ``base``, ``size`` in bytes, ``offset`` into the mapping."""

    base: int
    size: int
    offset: int


@dataclass(frozen=True)
class Layer:
    """A file whose pages become RAM, at the same offsets in both: all of it, or ``runs``."""

    fd: int
    runs: Sequence[Run]


def _check_memfd(fd: int, size: int) -> None:
    """Raise OSError unless ``fd`` has ``size`` bytes for ever: else accesses would fault."""
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != size:
        raise OSError(errno.EINVAL, f"no sealed memory of {size} bytes was handed over")


def _each_run(action: Callable[[int, int], None], table: int, count: int) -> None:
    """Call ``action(offset, length)`` for each pair of a table at a host address."""
    values = (ctypes.c_uint64 * (2 * count)).from_address(table)
    for at in range(0, 2 * count, 2):
        action(values[at], values[at + 1])


class GuestMemory:
    """Guest RAM of ``size`` bytes (a multiple of 4 KiB).

    Parameters
    ----------
    size : int
        Bytes of RAM.
    rom : bytes
        What the guest reads and executes, and can't write, below 4 GiB; a multiple of 4 KiB. RAM
        it is not: devices don't reach it, and `offset` doesn't find it.
    fd : int, optional
        A memfd with these contents, of another process, to go on with; it belongs to this object
        from now on.
    layers : sequence of Layer, optional
        Files that the contents come from instead, the last one's first, and zeroes where there is
        nothing. They are read when the guest gets there, and never written: what changes is ours
        alone (MAP_PRIVATE). The files must not change; their descriptors may be closed afterwards.

    Attributes
    ----------
    host_base : int
        Host address of the mapping's first byte.
    regions : tuple[Region, ...]
        Where the bytes are in guest-physical space, in ascending order.
    rom : Region or None
        Where the ROM is, if there is one; behind all RAM in the mapping.
    mapped : int
        Bytes of the mapping, RAM and ROM.
    fd : int
        The memfd behind the mapping; -1 where it is private.
    dirty : DirtyLog
        The pages of RAM written lately. What engines write is in it only after
        ``Engine.fetch_dirty``.
    """

    def __init__(
        self,
        size: int,
        rom: bytes = b"",
        *,
        fd: int | None = None,
        layers: Sequence[Layer] | None = None,
    ) -> None:
        if size < MINIMUM_SIZE or size > MAXIMUM_SIZE or size % PAGE:
            raise UsageError(
                f"memory of {size} bytes is out of range: expected a multiple of 4 KiB"
                f" from {MINIMUM_SIZE >> 20} MiB to {MAXIMUM_SIZE >> 40} TiB"
            )
        self.size = size
        low = min(size, LOW_RAM_LIMIT)
        regions = [Region(0, low, 0)]
        if size > low:
            regions.append(Region(HIGH_RAM_BASE, size - low, low))
        self.regions = tuple(regions)
        if len(rom) % PAGE or len(rom) > MAXIMUM_ROM:
            raise UsageError(
                f"a ROM of {len(rom)} bytes: expected a multiple of 4 KiB, at most"
                f" {MAXIMUM_ROM >> 20} MiB"
            )
        self.rom = Region(HIGH_RAM_BASE - len(rom), len(rom), size) if rom else None
        self.mapped = size + len(rom)
        self.dirty = DirtyLog(size // PAGE)
        self._anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.fd = -1
        try:
            if fd is not None:
                self.fd = fd
                _check_memfd(fd, self.mapped)
            elif layers is None:
                self.fd = os.memfd_create("ringfence-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self.fd, self.mapped)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            fence = _libc.mmap(
                None,
                self.mapped + 2 * GUARD,
                0,
                self._anonymous,
                -1,
                0,
            )
            if fence == _MAP_FAILED:
                raise OSError(ctypes.get_errno(), "mmap")
            self._fence = fence
            base = fence + GUARD
            shared = mmap.MAP_SHARED | _MAP_NORESERVE
            self._map(base, self.mapped, self._anonymous if self.fd < 0 else shared, self.fd, 0)
            for layer in layers or ():
                for run in layer.runs:
                    at = base + run.offset
                    self._map(at, run.length, mmap.MAP_PRIVATE, layer.fd, run.offset)
            ctypes.memmove(base + size, rom, len(rom))
            if rom and _libc.mprotect(base + size, len(rom), mmap.PROT_READ):
                raise OSError(ctypes.get_errno(), "mprotect")
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise HostError(
                f"the host can't give {size >> 20} MiB of guest memory: {error}"
            ) from error
        self.host_base: int = base
        self.incomplete = False
        """Whether pages of it are still to come from elsewhere (see `state.arrival`)."""
        self.before_close: Callable[[], None] | None = None
        """Called once when it is about to be unmapped."""
        self._observers: list[Callable[[int, int], None]] = []
        self._run_observers: list[Callable[[int, int], object]] = []
        self.view = memoryview((ctypes.c_char * size).from_address(base)).cast("B")

    @staticmethod
    def _map(at: int, length: int, flags: int, fd: int, offset: int) -> None:
        """Put pages, readable and writable, at a host address inside the fences."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mmap(at, length, access, flags | _MAP_FIXED, fd, offset) == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "mmap")

    def offset(self, address: int, length: int) -> int:
        """Offset into the mapping of ``length`` bytes at a guest-physical address.

        Raises IndexError where the range is not wholly inside one RAM region.
        """
        for region in self.regions:
            if region.base <= address and address + length <= region.base + region.size:
                return address - region.base + region.offset
        raise IndexError(f"guest-physical {address:#x}+{length:#x} is not RAM")

    def address(self, offset: int) -> int:
        """Guest-physical address of an offset into the mapping of RAM; see `offset`."""
        region = self.regions[-1]
        return region.base + offset - region.offset if offset >= region.offset else offset

    def read(self, address: int, length: int) -> bytes:
        """Bytes at a guest-physical address; IndexError outside RAM."""
        at = self.offset(address, length)
        self.await_pages(at, length)
        return bytes(self.view[at : at + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes at a guest-physical address; IndexError outside RAM."""
        at = self.offset(address, len(data))
        self.await_pages(at, len(data))
        if self.fd >= 0 and len(data) >= LARGE:
            self._write_through(at, memoryview(data).cast("B"))
        else:
            self.view[at : at + len(data)] = data
        self.dirty.mark(at, len(data))

    def _write_through(self, at: int, data: memoryview) -> None:
        """Store what is large by way of the memfd: no page fault for each page, others may run."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], at + done)

    # ---- devices

    def watch_dma(
        self,
        observer: Callable[[int, int], None],
        of_runs: Callable[[int, int], object] | None = None,
    ) -> None:
        """Have ``observer(offset, length)`` called behind each write of a device to RAM.

        ``offset`` counts from `host_base`. The call comes from whatever thread wrote, before the
        guest is told of the write; an engine forgets there what it has derived from these bytes.
        ``of_runs(table, count)`` is called in its place for many writes at once: the host address
        of a table of pairs, and how many there are.
        """
        self._observers.append(observer)
        self._run_observers.append(of_runs or partial(_each_run, observer))

    def slice(self, address: int, length: int) -> memoryview:
        """The bytes themselves, for a device to read or fill; IndexError outside RAM.

        What is filled has to be told by `dma_written`.
        """
        return self.part(self.offset(address, length), length)

    def part(self, offset: int, length: int) -> memoryview:
        """As `slice`, at an offset into the mapping that is known to be RAM."""
        self.await_pages(offset, length)
        return self.view[offset : offset + length]

    def dma_written(self, address: int, length: int) -> None:
        """Tell the observers that a device has changed these bytes; IndexError outside RAM."""
        self._changed(self.offset(address, length), length)

    def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes as a device does: `write`, and the observers hear of it."""
        at = self.offset(address, len(data))
        self.await_pages(at, len(data))
        self.view[at : at + len(data)] = data
        self._changed(at, len(data))

    def await_pages(self, at: int, length: int) -> None:
        """Sleep until these bytes, counted from `host_base`, are all there, if RAM is `incomplete`.

        Without Python's global lock, which whoever just touches a page that is to come holds in
        its sleep: nobody else in the process could do anything then. And from user mode, as the
        host may let no others wait (see `memory.missing`).
        """
        if self.incomplete:
            for page in range(at - at % PAGE, at + length, PAGE):
                _touch(self.host_base + page, 1)

    def dma_written_runs(self, table: int, count: int) -> None:
        """Tell the observers of many changes: pairs of offset and length at a host address."""
        if self.dirty.enabled:
            _each_run(self.dirty.mark, table, count)
        for observer in self._run_observers:
            observer(table, count)

    def discard(self, address: int, length: int) -> None:
        """Give whole pages back to the host: they read as zeroes; IndexError outside RAM."""
        at = self.offset(address, length)
        if at % PAGE or length % PAGE:
            raise ValueError(f"{address:#x}+{length:#x} are no whole pages")
        if length and self.fd < 0:
            self._map(self.host_base + at, length, self._anonymous, -1, 0)
        elif length and _libc.madvise(self.host_base + at, length, _MADV_REMOVE):
            raise OSError(ctypes.get_errno(), "madvise")
        self._changed(at, length)

    def discard_pages(self, run: Run) -> None:
        """Give pages of shared memory back, as if they had never been touched; nobody is told."""
        if _libc.madvise(self.host_base + run.offset, run.length, _MADV_REMOVE):
            raise HostError(f"RAM can't be given back ({os.strerror(ctypes.get_errno())})")

    def _changed(self, at: int, length: int) -> None:
        self.dirty.mark(at, length)
        for observer in self._observers:
            observer(at, length)

    def everything(self) -> memoryview:
        """RAM and the ROM behind it, to be read; for as long as the object lives."""
        return memoryview((ctypes.c_char * self.mapped).from_address(self.host_base)).cast("B")

    def close(self) -> None:
        """Unmap and free the RAM; the object is dead afterwards."""
        before, self.before_close = self.before_close, None
        if before is not None:
            before()
        if self._fence:
            self.view.release()
            _libc.munmap(self._fence, self.mapped + 2 * GUARD)
            self._fence = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
