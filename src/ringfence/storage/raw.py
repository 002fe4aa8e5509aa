"""Raw disks: a file or block device whose bytes are the disk's.

With ``direct`` the host's page cache is passed by (O_DIRECT). That wants addresses, offsets and
lengths in multiples of the host's block size; buffers of guest RAM that are not so aligned go
through an aligned buffer of our own, a piece at a time. Where the host's blocks are larger than a
sector, that means to read, change and write a block, and writes wait for each other.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ringfence.errors import ImageError
from ringfence.memory.buffers import Buffers, scatter, split, total
from ringfence.storage.disk import (
    SECTOR,
    Disk,
    Immediate,
    open_file,
    read_full,
    write_full,
)

BLOCK = 4096
"""What O_DIRECT is content with on every host."""
BOUNCE = 1 << 20
"""Bytes that a direct transfer of unaligned buffers moves at once."""
ZEROES = bytes(1 << 16)

IOVEC = 16
"""Bytes of struct iovec."""
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
"""fallocate(2) modes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
for _call in (_libc.preadv, _libc.pwritev):
    _call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64]
    _call.restype = ctypes.c_ssize_t


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Manipulate a file's space; False where the file system can't."""
    if _libc.fallocate(fd, mode, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code))


def write_zero_bytes(fd: int, offset: int, length: int) -> None:
    """Write zeroes the plain way."""
    while length:
        part = min(length, len(ZEROES))
        write_full(fd, offset, [memoryview(ZEROES)[:part]])
        offset += part
        length -= part


class RawDisk(Disk):
    """A disk that is a file; a size that is no multiple of 512 is rounded down.

    Parameters
    ----------
    path : Path
        File or block device.
    read_only : bool
        Refuse to write.
    direct : bool
        Pass by the host's page cache.

    Raises
    ------
    ImageError, HostError
        See `disk.open_file`; or the file is shorter than a sector.
    """

    def __init__(self, path: Path, *, read_only: bool = False, direct: bool = False) -> None:
        self.read_only = read_only
        self._direct = direct
        self._fd = open_file(path, read_only=read_only, direct=direct)
        self._now = Immediate(self._fd)
        self._block = _direct_block(self._fd) if direct else 1
        self._turn: AbstractContextManager[object] = (
            threading.Lock() if self._block > SECTOR else nullcontext()
        )
        self.size = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR * SECTOR
        if not self.size:
            os.close(self._fd)
            raise ImageError(f"disk image {path} is empty: expected at least {SECTOR} bytes")

    @property
    def file(self) -> int:
        """See `Disk.file`."""
        return -1 if self._direct else self._fd

    def read(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.read`."""
        if self._direct and not self._aligned(offset, buffers):
            self._bounce(offset, buffers, write=False)
        else:
            read_full(self._fd, offset, buffers)

    def write(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.write`."""
        with self._turn:
            if self._direct and not self._aligned(offset, buffers):
                self._bounce(offset, buffers, write=True)
            else:
                write_full(self._fd, offset, buffers)

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.read_now`: what the page cache has."""
        return not self._direct and self._now.read(offset, buffers)

    def write_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.write_now`: where the file system takes it into the page cache at once."""
        return not self._direct and self._now.write(offset, buffers)

    def transfer(self, offset: int, vector: bytes, *, write: bool) -> int:
        """See `Disk.transfer`: one system call, without Python's lock."""
        call = _libc.pwritev if write else _libc.preadv
        done = int(call(self._fd, vector, len(vector) // IOVEC, offset))
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return done

    def flush(self) -> None:
        """See `Disk.flush`."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """See `Disk.discard`: punch a hole."""
        fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """See `Disk.write_zeroes`."""
        modes = [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE] if unmap else [ZERO_RANGE]
        if any(fallocate(self._fd, mode, offset, length) for mode in modes):
            return
        if self._direct:
            self.write(offset, [memoryview(bytes(length))])
        else:
            write_zero_bytes(self._fd, offset, length)

    @property
    def locked(self) -> int | None:
        """See `Disk.locked`."""
        return self._fd

    def close(self) -> None:
        """See `Disk.close`."""
        if self._fd >= 0:
            try:
                self.flush()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _aligned(self, offset: int, buffers: Buffers) -> bool:
        block = self._block
        return offset % block == 0 and not any(
            view.readonly
            or len(view) % block
            or ctypes.addressof(ctypes.c_char.from_buffer(view)) % block
            for view in buffers
        )

    def _bounce(self, offset: int, buffers: Buffers, *, write: bool) -> None:
        """Move unaligned buffers through an aligned one, whole blocks at a time."""
        views: list[memoryview] = list(buffers)
        left = total(views)
        with mmap.mmap(-1, BOUNCE) as pages, memoryview(pages) as room:
            while left:
                skip = offset % self._block
                length = min(left, BOUNCE - skip)
                span = -(-(skip + length) // self._block) * self._block
                with room[:span] as blocks, blocks[skip : skip + length] as part:
                    if not write or span != length:
                        read_full(self._fd, offset - skip, [blocks])
                    now, views = split(views, length)
                    if write:
                        part[:] = b"".join(now)
                        write_full(self._fd, offset - skip, [blocks])
                    else:
                        scatter(part, now)
                offset += length
                left -= length


def _direct_block(fd: int) -> int:
    """The block size that O_DIRECT wants of this file, found by trying."""
    with (
        mmap.mmap(-1, BLOCK) as pages,
        memoryview(pages) as room,
        room[SECTOR : 2 * SECTOR] as part,
    ):
        try:
            os.preadv(fd, [part], SECTOR)
        except OSError:
            return BLOCK
    return SECTOR
