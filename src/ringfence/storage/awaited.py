"""A disk whose image another machine still has.

A machine that is on its way gets its devices before it comes, and its disks when the sender has let
go of them. Until then this is in their place: it holds nothing, and nothing can be done with it.
"""

from __future__ import annotations

import errno
import os
from typing import NoReturn

from ringfence.memory.buffers import Buffers
from ringfence.storage.disk import Disk


class Awaited(Disk):
    """Stands in for a disk that will be ``read_only`` or not."""

    def __init__(self, *, read_only: bool) -> None:
        self.size = 0
        self.read_only = read_only

    def read(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.read`: it fails."""
        _absent()

    def write(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.write`: it fails."""
        _absent()

    def flush(self) -> None:
        """See `Disk.flush`."""

    def discard(self, offset: int, length: int) -> None:
        """See `Disk.discard`: it fails."""
        _absent()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """See `Disk.write_zeroes`: it fails."""
        _absent()

    def close(self) -> None:
        """See `Disk.close`."""


def _absent() -> NoReturn:
    raise OSError(errno.ENOMEDIUM, os.strerror(errno.ENOMEDIUM))
