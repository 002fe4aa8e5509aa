"""Which pages of RAM are worth keeping: those that hold something.

Pages of zeroes are most of a small guest's RAM. Where the host knows that there is nothing (holes
of the memfd) nothing is read; elsewhere a page is compared with zeroes, many at once first.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.ram import GuestMemory

CHUNK = 64
"""Pages that are compared at once."""
MAX_RUN = 256
"""Pages in a run that is handed out: what is moved at once."""
_ZEROES = bytes(CHUNK * PAGE)
_ZERO = bytes(PAGE)


def all_pages(memory: GuestMemory) -> list[Run]:
    """The runs of RAM, and of ROM behind it, that the host has pages for."""
    return _pages(memory, memory.mapped)


def ram_pages(memory: GuestMemory) -> list[Run]:
    """The runs of RAM alone that the host has pages for."""
    return _pages(memory, memory.size)


def _pages(memory: GuestMemory, size: int) -> list[Run]:
    return [Run(0, size // PAGE)] if memory.fd < 0 else with_data(memory.fd, size)


def with_data(fd: int, size: int) -> list[Run]:
    """The runs of the first ``size`` bytes of a file that are no holes."""
    runs = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # a hole up to the end
            raise
        if start >= size:
            break
        at = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        first, last = start // PAGE, -(-at // PAGE)
        runs.append(Run(first, last - first))
    return runs


def split(view: memoryview, runs: Iterable[Run]) -> Iterator[tuple[Run, bool]]:
    """Cut runs of ``view`` into shorter ones of one sort each: with contents, or of zeroes."""
    for run in runs:
        first, end = run.first, run.first + run.count
        start, filled = first, None
        while first < end:
            count = min(CHUNK, end - first)
            for at, number, holds in _chunk(view, first, count):
                if filled is not None and (holds != filled or at - start >= MAX_RUN):
                    yield Run(start, at - start), filled
                    start = at
                filled = holds
                first = at + number
        if filled is not None:
            yield Run(start, end - start), filled


def _chunk(view: memoryview, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """(page, how many, whether they hold something) for up to `CHUNK` pages."""
    data = bytes(view[first * PAGE : (first + count) * PAGE])
    if data == _ZEROES[: len(data)]:
        yield first, count, False
        return
    for index in range(count):
        at = index * PAGE
        yield first + index, 1, data[at : at + PAGE] != _ZERO
