"""A throw-away layer over a disk: writes go to an unnamed temporary file.

The file is as long as the disk and sparse; a byte per block of 64 KiB says whether it has that
block. A block that is written in part is copied first. Flushing costs nothing: nobody will read
this after the process is gone.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ringfence.errors import HostError
from ringfence.memory.buffers import Buffers, split, total
from ringfence.storage.disk import Disk, read_full, write_full
from ringfence.storage.raw import KEEP_SIZE, PUNCH_HOLE, fallocate, write_zero_bytes

BLOCK = 1 << 16


class Overlay(Disk):
    """``base`` with writable, forgetful contents; closes ``base``, too.

    Raises
    ------
    HostError
        There is no folder for temporary files (TMPDIR), or none that takes a file of that size;
        ``base`` is closed.
    """

    def __init__(self, base: Disk) -> None:
        self._base = base
        self.size = base.size
        self.read_only = False
        self._fd = -1
        try:
            self._fd, name = tempfile.mkstemp(prefix="ringfence-overlay-")
            Path(name).unlink()
            os.ftruncate(self._fd, self.size)
        except OSError as error:
            self.close()
            raise HostError(
                f"no room for what the guest writes to a disk ({error.strerror}): set TMPDIR to a"
                f" folder that takes files of {self.size} bytes"
            ) from error
        self._present = bytearray(-(-self.size // BLOCK))
        self._lock = threading.Lock()

    def read(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.read`."""
        views = list(buffers)
        for start, length, present in self._runs(offset, total(views)):
            part, views = split(views, length)
            if present:
                read_full(self._fd, start, part)
            else:
                self._base.read(start, part)

    def write(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.write`."""
        self._adopt(offset, total(buffers), lambda: write_full(self._fd, offset, buffers))

    def flush(self) -> None:
        """See `Disk.flush`: there is nothing that would outlive the process."""

    def discard(self, offset: int, length: int) -> None:
        """See `Disk.discard`."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """See `Disk.write_zeroes`."""

        def clear() -> None:
            if not fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
                write_zero_bytes(self._fd, offset, length)

        self._adopt(offset, length, clear)

    def close(self) -> None:
        """See `Disk.close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._base.close()

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cut a range into (offset, length, whether it is in the file)."""
        end = offset + length
        while offset < end:
            present = self._present[offset // BLOCK]
            stop = offset
            while stop < end and self._present[stop // BLOCK] == present:
                stop = (stop // BLOCK + 1) * BLOCK
            stop = min(stop, end)
            yield offset, stop - offset, bool(present)
            offset = stop

    def _adopt(self, offset: int, length: int, change: Callable[[], None]) -> None:
        """Make a change; blocks that it meets for the first time are copied if need be."""
        end = offset + length
        blocks = range(offset // BLOCK, -(-end // BLOCK))
        with self._lock:
            absent = [block for block in blocks if not self._present[block]]
            for block in absent:
                start, stop = block * BLOCK, min((block + 1) * BLOCK, self.size)
                if start < offset or end < stop:
                    old = memoryview(bytearray(stop - start))
                    self._base.read(start, [old])
                    write_full(self._fd, start, [old])
            if absent:
                change()
                for block in absent:
                    self._present[block] = 1
                return
        change()
