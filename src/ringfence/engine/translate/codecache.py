"""The code cache: one memfd, mapped twice.

The executable mapping is never writable and the writable one never executable (W^X). Space is
handed out from the front; when it runs out, everything is dropped at once, between two runs of
guest code, so nothing is ever freed under a running trace.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from ringfence.errors import HostError
from ringfence.memory.ram import _MAP_FAILED, _libc

DEFAULT_SIZE = 64 << 20
"""About 130,000 traces; making them anew after a flush takes a quarter of a second."""


class CodeCache:
    """``size`` bytes of executable memory; ``base`` is its executable address."""

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        self.size = size
        fd = os.memfd_create("ringfence-code", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self.base = self._map(fd, mmap.PROT_READ | mmap.PROT_EXEC)
            self.alias = self._map(fd, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise HostError(f"the host can't map an executable code cache: {error}") from error
        finally:
            os.close(fd)
        self.view = memoryview((ctypes.c_char * size).from_address(self.alias)).cast("B")
        self.used = 0

    def _map(self, fd: int, protection: int) -> int:
        found = _libc.mmap(None, self.size, protection, mmap.MAP_SHARED, fd, 0)
        if found == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(found)

    def room(self, length: int) -> bool:
        """Whether ``length`` more bytes fit."""
        return self.used + length + 16 <= self.size

    def add(self, code: bytes | bytearray) -> int:
        """Copy code in; its executable address."""
        at = self.used
        self.view[at : at + len(code)] = code
        self.used = (at + len(code) + 15) & ~15
        return self.base + at

    def patch(self, address: int, code: bytes) -> None:
        """Overwrite code at an executable address."""
        at = address - self.base
        self.view[at : at + len(code)] = code

    def reset(self) -> None:
        """Forget all code."""
        self.used = 0

    def close(self) -> None:
        """Unmap."""
        if self.size:
            self.view.release()
            _libc.munmap(self.base, self.size)
            _libc.munmap(self.alias, self.size)
            self.size = 0
