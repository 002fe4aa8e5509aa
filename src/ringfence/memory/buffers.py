"""Lists of buffers: how devices and disks pass data on without copying it.

A transfer's data lie in several places of guest RAM; a list of memoryviews names them in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Buffers = Sequence[memoryview]


def total(buffers: Iterable[memoryview]) -> int:
    """Bytes in a list of buffers."""
    return sum(map(len, buffers))


def split(buffers: Iterable[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """Cut a list of buffers into its first ``at`` bytes and the rest."""
    head: list[memoryview] = []
    tail: list[memoryview] = []
    for view in buffers:
        if at >= len(view):
            head.append(view)
            at -= len(view)
        elif at:
            head.append(view[:at])
            tail.append(view[at:])
            at = 0
        else:
            tail.append(view)
    return head, tail


def scatter(data: bytes | memoryview, buffers: Iterable[memoryview]) -> int:
    """Store data at the start of a list of buffers; return how much found room."""
    done, left = 0, len(data)
    for view in buffers:
        if left <= len(view):
            view[:left] = data[done:]
            return done + left
        view[:] = data[done : done + len(view)]
        done += len(view)
        left -= len(view)
    return done
