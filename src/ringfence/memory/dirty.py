"""Which pages of RAM have been written since somebody last asked.

One byte per page, which is 1 once the page was written. A byte is stored without looking at it
first, so that vCPUs, devices and the VMM can all mark pages at the same time without a lock; native
code gets the address of the bytes, and 0 while nobody wants to know.

Who asks takes the marks *before* reading the pages: a write that comes in between is seen by the
reading, or marks its page anew, or both. Writers therefore write first and mark then. The other
order holds where a page is marked when it *becomes* writable (a TLB entry is filled): there the
vCPUs have to stand still while marks are taken, and start with no writable entry.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PAGE = 4096
_MARKED = re.compile(b"\x01+")


@dataclass(frozen=True, slots=True)
class Run:
    """Pages that follow each other in RAM: the first one's number, and how many."""

    first: int
    count: int

    @property
    def offset(self) -> int:
        """Bytes from the start of RAM."""
        return self.first * PAGE

    @property
    def length(self) -> int:
        """Bytes."""
        return self.count * PAGE


class DirtyLog:
    """The marks of ``pages`` pages; nothing is noted before `enabled` is set."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.enabled = False
        self._bytes = mmap.mmap(-1, max(pages, 1), flags=mmap.MAP_PRIVATE)
        self._view = memoryview(self._bytes)

    @property
    def address(self) -> int:
        """Host address of the first page's byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))

    def mark(self, offset: int, length: int) -> None:
        """Note a write of ``length`` bytes at an offset into RAM."""
        if self.enabled and length:
            first, last = offset // PAGE, (offset + length - 1) // PAGE
            self._view[first : last + 1] = b"\x01" * (last + 1 - first)

    def mark_bits(self, offset: int, bits: bytes) -> None:
        """Note the pages whose bit is set, lowest first, from ``offset`` into RAM on."""
        first = offset // PAGE
        for index, byte in enumerate(bits):
            while byte:
                low = byte & -byte
                self._view[first + 8 * index + low.bit_length() - 1] = 1
                byte ^= low

    def mark_runs(self, runs: Iterable[Run]) -> None:
        """Note that these pages were written."""
        for run in runs:
            self._view[run.first : run.first + run.count] = b"\x01" * run.count

    def take(self) -> list[Run]:
        """The pages marked, which are unmarked thereby."""
        runs = []
        for run in self._runs():
            # Only these: what is marked meanwhile, by a device, is for the next time.
            self._view[run.first : run.first + run.count] = bytes(run.count)
            runs.append(run)
        return runs

    def count(self) -> int:
        """How many pages are marked."""
        return self._bytes[:].count(1)

    def clear(self) -> None:
        """Forget all marks."""
        self._view[:] = bytes(self.pages)

    def _runs(self) -> Iterator[Run]:
        for match in _MARKED.finditer(self._bytes[: self.pages]):
            yield Run(match.start(), match.end() - match.start())
