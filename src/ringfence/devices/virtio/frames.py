"""Frames between a network card's queues and our own memory, in native code.

`store` puts one frame into the buffers that the driver has offered for receiving; with mergeable
buffers (5.1.6.4) into several, or, where they don't suffice, into none. `fetch` takes frames out of
the buffers that the driver wants sent, several at once, as `RECORD` says. Neither looks at what a
frame is: headers are Python's business.
"""

from __future__ import annotations

import struct
from typing import Annotated

from ringfence.devices.virtio.layouts import ask_kicks, give, give_all, position, rewind, take
from ringfence.devices.virtio.queue import FOUND, NOTHING, RUNS, Queue
from ringfence.devices.virtio.rules import MAX_CHAIN
from ringfence.native.dialect import address_of, native, rep_movsb, store8, store64
from ringfence.native.layout import Array, u64

REFUSED, FULL, SPENT = 3, 4, 5
"""`store`: the frame doesn't fit what the driver offers. `fetch`: there is no more room for frames;
the budget is used up."""

QUEUE_SIZE = 256
HEADER = struct.Struct("<BBHHHHH")
"""What precedes each frame (struct virtio_net_hdr, 5.1.6): flags, gso_type, hdr_len, gso_size,
csum_start, csum_offset, num_buffers."""
HEADER_SIZE = HEADER.size
BUFFERS_AT = HEADER_SIZE - 2
"""Where in it num_buffers is."""
MAX_FRAME = 65535 + 14
"""The largest frame that either side may send."""
RECORD = 8
"""Bytes in front of each fetched frame: its length, header included. The next one begins at a
multiple of 8. One byte more than is allowed stands for all that are too long."""
LONGEST = HEADER_SIZE + MAX_FRAME + 1
ROOM = 4 * (RECORD + LONGEST + 7)
"""Bytes that frames are fetched into."""


class FrameQueue(Queue):
    """A queue of a network card, and what is on its way."""

    data: Annotated[int, u64]
    """Host address of a frame to store, its header in front; of room for `fetch`."""
    length: Annotated[int, u64]
    """Bytes of the former; bytes that were fetched."""
    mergeable: Annotated[int, u64]
    """Whether a frame may take several chains."""
    budget: Annotated[int, u64]
    """Chains that may still be fetched."""
    frames: Annotated[int, u64]
    """Frames that were fetched."""
    taken: Annotated[Array, u64, 3 * QUEUE_SIZE]
    """Of each chain that a frame is stored in: identifier, count, and bytes written."""


@native
def fill(queue: FrameQueue, source: int, left: int) -> int:
    """Copy to the chain that was taken last; how many bytes it had room for."""
    done = 0
    for number in range(queue.readable, queue.parts_used):
        length = queue.parts[2 * number + 1]
        if length > left - done:
            length = left - done
        rep_movsb(queue.parts[2 * number], source + done, length)
        done += length
    return done


@native
def place_of(queue: FrameQueue, at: int) -> int:
    """Host address of a byte of the chain's writable parts; 0 if it has fewer."""
    for number in range(queue.readable, queue.parts_used):
        length = queue.parts[2 * number + 1]
        if at < length:
            return queue.parts[2 * number] + at
        at -= length
    return 0


@native
def refuse(queue: FrameQueue, number: int) -> int:
    """Give the chains back as if nothing had been written."""
    for n in range(number):
        give(queue, queue.taken[3 * n], queue.taken[3 * n + 1], 0)
    return REFUSED


@native
def store(queue: FrameQueue) -> int:
    """Put a frame into the driver's buffers: FOUND, NOTHING (no room), REFUSED or BROKEN.

    What was changed is in the queue's runs, however it ends: they have to be told. Where there is
    no room, notifications are asked for from behind the last chain on.
    """
    before = position(queue)
    source = queue.data
    left = queue.length
    number = 0
    low = 0
    high = 0
    while left:
        if number == QUEUE_SIZE or queue.runs_used > RUNS - MAX_CHAIN:
            return refuse(queue, number)
        status = take(queue)
        if status == NOTHING and ask_kicks(queue):
            status = take(queue)
        if status != FOUND:
            rewind(queue, before)
            return status
        done = fill(queue, source, left)
        if number == 0:
            low = place_of(queue, BUFFERS_AT)
            high = place_of(queue, BUFFERS_AT + 1)
        queue.runs_used += queue.parts_used - queue.readable
        queue.taken[3 * number] = queue.identifier
        queue.taken[3 * number + 1] = queue.count
        queue.taken[3 * number + 2] = done
        number += 1
        source += done
        left -= done
        if high == 0 or (left and queue.mergeable == 0):
            return refuse(queue, number)
    store8(low, number)
    store8(high, number >> 8)
    give_all(queue, address_of(queue.taken[0]), number)
    return FOUND


@native
def collect(queue: FrameQueue, at: int) -> int:
    """Copy from the chain that was taken last, up to `LONGEST`; how many bytes."""
    done = 0
    for number in range(queue.readable):
        length = queue.parts[2 * number + 1]
        if length > LONGEST - done:
            length = LONGEST - done
        rep_movsb(at + done, queue.parts[2 * number], length)
        done += length
    return done


@native
def fetch(queue: FrameQueue) -> int:
    """Take frames that are to be sent, and give their chains back: NOTHING more, or why it ends."""
    queue.length = 0
    queue.frames = 0
    while queue.budget:
        if queue.length > ROOM - RECORD - LONGEST - 7:
            return FULL
        status = take(queue)
        if status != FOUND:
            return status
        at = queue.data + queue.length
        length = collect(queue, at + RECORD)
        store64(at, length)
        queue.length += (RECORD + length + 7) & ~7
        queue.frames += 1
        queue.budget -= 1
        give(queue, queue.identifier, queue.count, 0)
    return SPENT
