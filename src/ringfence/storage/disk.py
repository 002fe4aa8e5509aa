"""What a disk can do, whatever its format.

All methods may be called from several threads at once and block until the host is done; who must
not block uses a `pool.IoPool`. Data are moved to and from memoryviews without copies. ``offset``
and lengths are bytes; the caller keeps them inside the disk, and to whole sectors of 512 bytes.

**What is on disk.** A write is done when the host's kernel has the data: killing the process loses
nothing of it in a raw file. What has to outlive a power failure is on disk when a later `flush` has
returned. Formats with metadata promise to keep, whenever the process ends, all that was flushed.
"""

from __future__ import annotations

import fcntl
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from ringfence.errors import HostError, ImageError
from ringfence.memory.buffers import Buffers, split, total

SECTOR = 512
IOV_MAX = 1024
"""Buffers that one readv takes (POSIX, Linux's value)."""


class Disk(ABC):
    """A disk of ``size`` bytes.

    All methods raise OSError where the host fails, and ImageError where an image is damaged.
    """

    size: int
    read_only: bool

    @property
    def file(self) -> int:
        """The descriptor of a file with the disk's bytes at the same offsets, or -1.

        Transfers of it that need no waiting (RWF_NOWAIT) may pass this object by.
        """
        return -1

    def transfer(self, offset: int, vector: bytes, *, write: bool) -> int:
        """Read into, or write from, places of this process; return how many bytes were moved.

        ``vector`` is an array of struct iovec, `IOV_MAX` at most. Only a disk with a `file` does
        this; OSError where the host fails.
        """
        del offset, vector, write
        return 0

    @abstractmethod
    def read(self, offset: int, buffers: Buffers) -> None:
        """Fill ``buffers`` from ``offset`` on."""

    @abstractmethod
    def write(self, offset: int, buffers: Buffers) -> None:
        """Store ``buffers`` from ``offset`` on."""

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        """Do `read` if that needs no waiting; False, with ``buffers`` undefined, if it would."""
        del offset, buffers
        return False

    def write_now(self, offset: int, buffers: Buffers) -> bool:
        """Do `write` if that needs no waiting; False, with the range undefined, if it would."""
        del offset, buffers
        return False

    @abstractmethod
    def flush(self) -> None:
        """Return when all writes that are done are on stable storage."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Forget data that nobody needs any more; what they read as then is undefined."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeroes; with ``unmap`` its space may be given back."""

    def lend(self) -> None:
        """Flush, and let another process open the image; only `reclaim` or `close` may follow."""
        self.flush()
        fd = self.locked
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def reclaim(self) -> None:
        """Lock the image again, which nobody has changed meanwhile.

        Raises
        ------
        HostError
            Another process has it.
        """
        fd = self.locked
        if fd is not None:
            lock(fd, read_only=self.read_only)

    @property
    def locked(self) -> int | None:
        """The descriptor that holds the image's lock, if there is one to lend."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Flush and let go of files. No other call may be under way or follow."""

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes."""
        data = bytearray(length)
        self.read(offset, [memoryview(data)])
        return bytes(data)


def read_full(fd: int, offset: int, buffers: Buffers) -> None:
    """Read a file into ``buffers``; beyond its end there are zeroes."""
    views = list(buffers)
    while views:
        batch = views[:IOV_MAX]
        done = os.preadv(fd, batch, offset)
        if done == 0:
            for view in views:
                view[:] = bytes(len(view))
            return
        offset += done
        views = split(views, done)[1]


def write_full(fd: int, offset: int, buffers: Buffers) -> None:
    """Write all of ``buffers`` to a file."""
    views = list(buffers)
    while views:
        batch = views[:IOV_MAX]
        done = os.pwritev(fd, batch, offset)
        offset += done
        views = split(views, done)[1]


class Immediate:
    """Transfers of a file that need no waiting (RWF_NOWAIT, preadv2(2)).

    A file system that doesn't offer one kind of them is not asked for it again.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._refused: set[object] = set()

    def read(self, offset: int, buffers: Buffers) -> bool:
        """Read if the page cache has everything."""
        return self._try(os.preadv, offset, buffers)

    def write(self, offset: int, buffers: Buffers) -> bool:
        """Write if the page cache takes everything."""
        return self._try(os.pwritev, offset, buffers)

    def _try(
        self, transfer: Callable[[int, Buffers, int, int], int], offset: int, buffers: Buffers
    ) -> bool:
        if transfer in self._refused or len(buffers) > IOV_MAX:
            return False
        try:
            return transfer(self._fd, buffers, offset, os.RWF_NOWAIT) == total(buffers)
        except BlockingIOError:
            return False
        except OSError:
            self._refused.add(transfer)
            return False


def lock(fd: int, *, read_only: bool, name: str = "") -> None:
    """Lock an open image against other machines; HostError if one has it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HostError(
            f"disk image {name} is in use by another machine: stop that one, or share it read-only"
        ) from error


def open_file(path: Path, *, read_only: bool, direct: bool = False) -> int:
    """Open an image file and lock it against other machines; return its descriptor.

    A writer has the file alone, readers share it (``flock``).

    Raises
    ------
    ImageError
        The file can't be opened or is no file.
    HostError
        Another process uses it.
    """
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
    except OSError as error:
        raise ImageError(
            f"disk image {path} can't be opened ({error.strerror}): check the path and its"
            " permissions, or add ',readonly'"
        ) from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError(f"disk image {path} is no file: expected a file or a block device")
        lock(fd, read_only=read_only, name=str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd
