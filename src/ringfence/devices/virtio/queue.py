"""A virtqueue in native code: what its two layouts have in common (2.7, 2.8).

`Queue` is one queue: where its three areas are in the host, how far we are in them, and the chain
that was taken last, as a list of parts that a readv takes as it is. All of it is our own memory. A
descriptor is read once, its buffer checked against RAM, and the guest's copy never looked at again;
what breaks a rule ends in `BROKEN` and a reason.

What the layouts do with it is in `split` and `packed`, and `layouts` chooses between them.
`ring.Ring` is the same for who wants a chain as a Python object.
"""

from __future__ import annotations

from typing import Annotated

from ringfence.devices.virtio.rules import DESCRIPTOR_SIZE, MAX_CHAIN, MAX_QUEUE, WRITE
from ringfence.memory.reach import Reach, reached
from ringfence.native.dialect import address_of, atomic_or64, native, native_inline
from ringfence.native.layout import Array, u64

NOTHING, FOUND, BROKEN = 0, 1, 2
"""What `layouts.take` finds."""
SILENT, INTERRUPT, UNCHANGED = 0, 1, 2
"""What `layouts.publish` says."""
REASONS = (
    "no error",
    "more chains than descriptors",
    "a descriptor outside its table",
    "a chain that is longer than its table, or runs in a circle",
    "an indirect descriptor inside an indirect table, or not alone",
    "an indirect descriptor without that feature",
    "an indirect table of a wrong length",
    "a buffer or a table that is not in RAM",
    "a readable buffer behind a writable one",
    f"a chain of more than {MAX_CHAIN} buffers",
)
JUMP, OUTSIDE, CIRCLE, NESTED, FEATURE, TABLE, NO_RAM, ORDER, LONG = range(1, len(REASONS))
CHAIN = 24
"""Bytes of what is kept of a chain that is to be given back: identifier, count, bytes written."""
RUNS = 2 * MAX_CHAIN
"""Changes of RAM that may be noted before somebody is told."""


class Queue(Reach):
    """A queue, and the chain that was taken last."""

    is_packed: Annotated[int, u64]
    """Its layout: split or packed."""
    entries: Annotated[int, u64]
    """Descriptors; of a split queue a power of two, and entries in its two rings."""
    event_idx: Annotated[int, u64]
    indirect: Annotated[int, u64]
    """Whether the driver has accepted these features."""
    descriptors: Annotated[int, u64]
    driver: Annotated[int, u64]
    device: Annotated[int, u64]
    """Host addresses of the three areas (2.6), all of them wholly in RAM."""
    last_avail: Annotated[int, u64]
    used_index: Annotated[int, u64]
    signalled: Annotated[int, u64]
    """How far we are in a split queue; see `ring.SplitRing`."""
    next_avail: Annotated[int, u64]
    avail_wrap: Annotated[int, u64]
    next_used: Annotated[int, u64]
    used_wrap: Annotated[int, u64]
    unsignalled: Annotated[int, u64]
    """How far we are in a packed one; see `ring.PackedRing`."""
    given: Annotated[int, u64]
    """Chains given back so far."""
    reason: Annotated[int, u64]
    """Why the queue is `BROKEN`."""
    identifier: Annotated[int, u64]
    """What the driver calls the chain: index of its head, or its buffer ID."""
    count: Annotated[int, u64]
    """Descriptors that the chain takes in the ring; 1 in a split queue, whose ring has heads."""
    readable: Annotated[int, u64]
    """How many of its parts the device may read; the others it may write."""
    parts_used: Annotated[int, u64]
    runs_used: Annotated[int, u64]
    """Runs that are to be told; the chain's writable parts follow them."""
    parts: Annotated[Array, u64, 2 * MAX_CHAIN]
    """Host address and length of each (struct iovec)."""
    runs: Annotated[Array, u64, 2 * RUNS]
    """Offset into RAM and length of each."""


@native_inline
def fence(queue: Queue) -> int:
    """Make our stores seen before anything is loaded."""
    return atomic_or64(address_of(queue.given), 0)


@native_inline
def broken(queue: Queue, reason: int) -> int:
    """The driver has broken a rule."""
    queue.reason = reason
    return BROKEN


@native_inline
def begin_chain(queue: Queue) -> int:
    """Forget the chain that was taken last."""
    queue.readable = 0
    queue.parts_used = 0
    return 0


@native
def add_part(queue: Queue, address: int, length: int, flags: int) -> int:
    """Append a descriptor's buffer to the chain; a reason, or 0."""
    if length == 0:
        return 0
    host = reached(queue, address, length)
    number = queue.parts_used
    if host == 0:
        return NO_RAM
    if number >= MAX_CHAIN:
        return LONG
    if flags & WRITE:
        run = queue.runs_used + number - queue.readable
        queue.runs[2 * run] = host - queue.ram_host
        queue.runs[2 * run + 1] = length
    elif number != queue.readable:
        return ORDER
    else:
        queue.readable = number + 1
    queue.parts[2 * number] = host
    queue.parts[2 * number + 1] = length
    queue.parts_used = number + 1
    return 0


@native
def indirect_table(queue: Queue, address: int, length: int) -> int:
    """Host address of an indirect table (2.7.5.3, 2.8.7); 0 and a reason where it can't be one."""
    if queue.indirect == 0:
        queue.reason = FEATURE
        return 0
    if length == 0 or length % DESCRIPTOR_SIZE or length > MAX_QUEUE * DESCRIPTOR_SIZE:
        queue.reason = TABLE
        return 0
    table = reached(queue, address, length)
    if table == 0:
        queue.reason = NO_RAM
    return table
