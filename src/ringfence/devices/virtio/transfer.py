"""Reads and writes of a disk that is a file, done where they are asked for, in native code.

`serve` takes chains out of a queue and carries out those that are small, plainly laid out, inside
the disk, and that the host's page cache can do at once (RWF_NOWAIT); data move between it and guest
RAM by one system call. What was changed is noted in the queue's runs, which have to be told before
the queue is published. All other chains are handed to Python, which decides what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, cast

from ringfence.devices.virtio.beside import Lane, hand_over, is_brisk, is_lonely
from ringfence.devices.virtio.layouts import give, take
from ringfence.devices.virtio.queue import RUNS, Queue
from ringfence.devices.virtio.rules import MAX_CHAIN
from ringfence.native.dialect import address_of, load32, load64, native, store8
from ringfence.native.hostcall import host_call
from ringfence.native.layout import u64

NOTHING, _FOUND, BROKEN, OTHER, FULL, SPENT, BRISK = range(7)
"""Why `serve` ends: no more chains; one that breaks a rule (`layouts.take` says these two); one for
Python, taken; runs have to be told before it goes on; the budget is used up; no more chains for
now, but the queue will be looked at again when workers are done."""

SECTOR = 512
HEADER = 16
"""Bytes of struct virtio_blk_req in front of the data (5.2.6)."""
T_IN, T_OUT, OK = 0, 1, 0
"""Request types and a status (5.2.6)."""
SMALL, AT_ONCE = 16 << 10, 256 << 10
"""Bytes of a request that is done by the thread that asks, if that needs no waiting; of one that is
if it is lonely (`beside.is_lonely`)."""
MOVED, BESIDE = 1, 2
"""What became of a transfer."""
TURN = 2 << 20
"""Bytes that may be moved in one turn; what is beyond them is left to others."""

_PREADV2, _PWRITEV2 = 327, 328
"""System calls of x86-64 Linux."""
_RWF_NOWAIT = 8
_ENOSYS, _EINVAL, _EOPNOTSUPP = -38, -22, -95
"""What a kernel or a file system says that doesn't offer this."""


class BlockQueue(Queue):
    """A queue of a disk, and the disk."""

    fd: Annotated[int, u64]
    disk_size: Annotated[int, u64]
    """Bytes."""
    no_reads: Annotated[int, u64]
    no_writes: Annotated[int, u64]
    """Whether the host doesn't offer such transfers, as was found out by trying."""
    write_back: Annotated[int, u64]
    """Whether the disk may be written to, and writes may stay in the host's page cache."""
    budget: Annotated[int, u64]
    """Chains that may still be taken."""
    bytes_left: Annotated[int, u64]
    """Bytes that may still be moved."""
    length: Annotated[int, u64]
    """Bytes that the chain handed to Python asks to be moved, at ``offset`` of the disk; 0 where it
    is no plain request to read or to write inside the disk."""
    offset: Annotated[int, u64]
    lane: Annotated[int, u64]
    """Where its `beside.Lane` is."""
    beside: Annotated[int, u64]
    """Chains left to workers since Python last looked."""
    found: Annotated[int, u64]
    """Chains taken; bytes of the first one's parts."""
    first_bytes: Annotated[int, u64]


@native
def length_of(queue: BlockQueue, first: int, end: int) -> int:
    """Bytes of some of the chain's parts."""
    total = 0
    for number in range(first, end):
        total += queue.parts[2 * number + 1]
    return total


@native
def refused(result: int) -> int:
    """Whether a system call has said that it will never do this."""
    return 1 if result in (_ENOSYS, _EINVAL, _EOPNOTSUPP) else 0


@native
def move(queue: BlockQueue, call: int, first: int, end: int) -> int:
    """Move the data of parts of the chain to or from the disk: MOVED, BESIDE (a worker has it), or
    0 where neither is possible.
    """
    sector = load64(queue.parts[0] + 8)
    length = length_of(queue, first, end)
    if length % SECTOR or sector > queue.disk_size // SECTOR:
        return 0
    if length > queue.disk_size - sector * SECTOR:
        return 0
    if length == 0:
        return MOVED
    queue.length = length
    queue.offset = sector * SECTOR
    never = queue.no_reads if call == _PREADV2 else queue.no_writes
    lane: Lane = cast(Lane, queue.lane)
    here = 1 if length <= SMALL or (length <= AT_ONCE and is_lonely(lane)) else 0
    if here and length <= queue.bytes_left and never == 0:
        queue.bytes_left -= length
        parts = address_of(queue.parts[2 * first])
        done = host_call(call, queue.fd, parts, end - first, sector * SECTOR, 0, _RWF_NOWAIT)
        if done == length:
            return MOVED
        if refused(done):
            if call == _PREADV2:
                queue.no_reads = 1
            else:
                queue.no_writes = 1
    if hand_over(lane, queue, call, queue.fd, first, end, sector * SECTOR, length):
        queue.beside += 1
        return BESIDE
    return 0


@native
def carry_out(queue: BlockQueue) -> int:
    """Do the request of the chain taken last and give it back, or leave it to a worker; 0 if it
    isn't one for here.
    """
    queue.length = 0
    readable = queue.readable
    last = queue.parts_used - 1
    if readable == 0 or readable > last:
        return 0
    if queue.parts[1] != HEADER or queue.parts[2 * last + 1] != 1:
        return 0
    kind = load32(queue.parts[0])
    status = queue.runs_used + last - readable
    if kind == T_IN:
        moved = move(queue, _PREADV2, readable, last)
        if moved != MOVED:
            return moved
        store8(queue.parts[2 * last], OK)
        give(queue, queue.identifier, queue.count, length_of(queue, readable, last) + 1)
        queue.runs_used = status + 1
    elif kind == T_OUT and queue.write_back:
        moved = move(queue, _PWRITEV2, 1, readable)
        if moved != MOVED:
            return moved
        store8(queue.parts[2 * last], OK)
        give(queue, queue.identifier, queue.count, 1)
        queue.runs[2 * queue.runs_used] = queue.runs[2 * status]
        queue.runs[2 * queue.runs_used + 1] = 1
        queue.runs_used += 1
    else:
        return 0
    return 1


@native
def serve(queue: BlockQueue) -> int:
    """Take chains and do them, until something else is to be done."""
    while queue.budget:
        if queue.runs_used > RUNS - MAX_CHAIN:
            return FULL
        status = take(queue)
        if status == NOTHING and is_brisk(cast(Lane, queue.lane)):
            return BRISK
        if status != _FOUND:
            return status
        queue.budget -= 1
        if queue.found == 0:
            queue.first_bytes = length_of(queue, 0, queue.parts_used)
        queue.found += 1
        if carry_out(queue) == 0:
            return OTHER
    return SPENT
