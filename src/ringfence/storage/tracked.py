"""A disk that notes what is written to it, while it is copied elsewhere.

A write is noted when it is done. Who copies takes the notes first and reads then: what is written
in between is noted again, or was read already.
"""

from __future__ import annotations

import re

from ringfence.memory.buffers import Buffers, total
from ringfence.storage.disk import Disk

BLOCK = 1 << 16
"""Bytes that one note stands for."""
_WRITTEN = re.compile(b"\x01+")


class Tracked(Disk):
    """``disk``, whose owner closes and locks it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.size = disk.size
        self.read_only = disk.read_only
        self._notes = bytearray(-(-disk.size // BLOCK))

    @property
    def left(self) -> int:
        """Bytes in blocks that were written since `take`."""
        return self._notes.count(1) * BLOCK

    def take(self) -> list[tuple[int, int]]:
        """Offset and length of what was written since the last time."""
        taken = []
        for found in _WRITTEN.finditer(bytes(self._notes)):
            first, end = found.span()
            self._notes[first:end] = bytes(end - first)  # only these: others may come meanwhile
            taken.append((first * BLOCK, min(end * BLOCK, self.size) - first * BLOCK))
        return taken

    def read(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.read`."""
        self._disk.read(offset, buffers)

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.read_now`."""
        return self._disk.read_now(offset, buffers)

    def write(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.write`."""
        self._disk.write(offset, buffers)
        self._note(offset, total(buffers))

    def write_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.write_now`; one that would have to wait may have been done in part."""
        done = self._disk.write_now(offset, buffers)
        self._note(offset, total(buffers))
        return done

    def flush(self) -> None:
        """See `Disk.flush`."""
        self._disk.flush()

    def discard(self, offset: int, length: int) -> None:
        """See `Disk.discard`."""
        self._disk.discard(offset, length)
        self._note(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """See `Disk.write_zeroes`."""
        self._disk.write_zeroes(offset, length, unmap=unmap)
        self._note(offset, length)

    def close(self) -> None:
        """See `Disk.close`: nothing, the disk itself is its owner's."""

    def _note(self, offset: int, length: int) -> None:
        if length:
            first, last = offset // BLOCK, (offset + length - 1) // BLOCK
            self._notes[first : last + 1] = b"\x01" * (last + 1 - first)
