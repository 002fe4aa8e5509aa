"""A split virtqueue in native code: chains taken out of it, given back, and told of (2.7).

`SplitQueue` is one queue: where its three areas are in the host, how far we are in them, and the
chain that was taken last, as a list of parts that a readv takes as it is. All of it is our own
memory. A descriptor is read once, its buffer checked against RAM, and the guest's copy never looked
at again; what breaks a rule ends in `BROKEN` and a reason. `split.SplitRing` is the same for who
wants a chain as a Python object.
"""

from __future__ import annotations

from typing import Annotated

from ringfence.devices.virtio.rules import (
    DESCRIPTOR_SIZE,
    INDIRECT,
    MAX_CHAIN,
    MAX_QUEUE,
    NEXT,
    WRITE,
)
from ringfence.memory.reach import Reach, reached
from ringfence.native.dialect import (
    address_of,
    atomic_or64,
    load16,
    load32,
    load64,
    native,
    native_inline,
    store16,
    store32,
)
from ringfence.native.layout import Array, u64

NOTHING, FOUND, BROKEN = 0, 1, 2
"""What `take` finds."""
SILENT, INTERRUPT, UNCHANGED = 0, 1, 2
"""What `publish` says."""
REASONS = (
    "no error",
    "more chains than descriptors",
    "a descriptor outside its table",
    "a chain that runs in a circle",
    "an indirect descriptor inside an indirect table, or not last",
    "an indirect descriptor without that feature",
    "an indirect table of a wrong length",
    "a buffer or a table that is not in RAM",
    "a readable buffer behind a writable one",
    f"a chain of more than {MAX_CHAIN} buffers",
)
JUMP, OUTSIDE, CIRCLE, NESTED, FEATURE, TABLE, NO_RAM, ORDER, LONG = range(1, len(REASONS))
RUNS = 2 * MAX_CHAIN
"""Changes of RAM that may be noted before somebody is told."""

FLAGS, INDEX, ENTRIES = 0, 2, 4
"""Offsets in the available ring (2.7.6) and the used ring (2.7.8)."""
ELEMENT = 8
"""Bytes of an entry of the used ring."""
NO_INTERRUPT, NO_NOTIFY = 1, 1


class SplitQueue(Reach):
    """A queue, and the chain that was taken last."""

    entries: Annotated[int, u64]
    """Descriptors in the table, entries in the rings: a power of two."""
    event_idx: Annotated[int, u64]
    indirect: Annotated[int, u64]
    """Whether the driver has accepted these features."""
    descriptors: Annotated[int, u64]
    avail: Annotated[int, u64]
    used: Annotated[int, u64]
    """Host addresses of the areas."""
    last_avail: Annotated[int, u64]
    used_index: Annotated[int, u64]
    signalled: Annotated[int, u64]
    """See `split.SplitRing`."""
    given: Annotated[int, u64]
    """Chains given back so far."""
    reason: Annotated[int, u64]
    """Why the queue is `BROKEN`."""
    identifier: Annotated[int, u64]
    """Index of the chain's head."""
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
def fence(queue: SplitQueue) -> int:
    """Make our stores seen before anything is loaded."""
    return atomic_or64(address_of(queue.signalled), 0)


@native_inline
def broken(queue: SplitQueue, reason: int) -> int:
    """The driver has broken a rule."""
    queue.reason = reason
    return BROKEN


@native
def add_part(queue: SplitQueue, address: int, length: int, flags: int) -> int:
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
def take(queue: SplitQueue) -> int:
    """Take the next chain that the driver has made available, if there is one."""
    waiting = (load16(queue.avail + INDEX) - queue.last_avail) & 0xFFFF
    if waiting == 0:
        return NOTHING
    if waiting > queue.entries:
        return broken(queue, JUMP)
    fence(queue)
    head = load16(queue.avail + ENTRIES + 2 * (queue.last_avail & (queue.entries - 1)))
    queue.last_avail = (queue.last_avail + 1) & 0xFFFF
    queue.identifier = head
    queue.readable = 0
    queue.parts_used = 0
    table = queue.descriptors
    size = queue.entries
    left = size
    index = head
    nested = 0
    while 1:
        if index >= size:
            return broken(queue, OUTSIDE)
        if left == 0:
            return broken(queue, CIRCLE)
        left -= 1
        at = table + index * DESCRIPTOR_SIZE
        address = load64(at)
        length = load32(at + 8)
        rest = load32(at + 12)
        flags = rest & 0xFFFF
        if flags & INDIRECT:
            if nested or flags & NEXT:
                return broken(queue, NESTED)
            if queue.indirect == 0:
                return broken(queue, FEATURE)
            if length == 0 or length % DESCRIPTOR_SIZE or length > MAX_QUEUE * DESCRIPTOR_SIZE:
                return broken(queue, TABLE)
            table = reached(queue, address, length)
            if table == 0:
                return broken(queue, NO_RAM)
            size = length // DESCRIPTOR_SIZE
            left = size
            index = 0
            nested = 1
        else:
            reason = add_part(queue, address, length, flags)
            if reason:
                return broken(queue, reason)
            if not flags & NEXT:
                return FOUND
            index = rest >> 16
    return BROKEN


@native
def give(queue: SplitQueue, identifier: int, written: int) -> int:
    """Put a chain into the used ring; `publish` tells the driver."""
    at = queue.used + ENTRIES + ELEMENT * (queue.used_index & (queue.entries - 1))
    store32(at, identifier)
    store32(at + 4, written)
    queue.used_index = (queue.used_index + 1) & 0xFFFF
    queue.given += 1
    return 0


@native
def publish(queue: SplitQueue) -> int:
    """Show what was given back, and say whether the driver wants an interrupt (2.7.7)."""
    old = queue.signalled
    new = queue.used_index
    if old == new:
        return UNCHANGED
    store16(queue.used + INDEX, new)
    queue.signalled = new
    fence(queue)
    if queue.event_idx == 0:
        return SILENT if load16(queue.avail + FLAGS) & NO_INTERRUPT else INTERRUPT
    event = load16(queue.avail + ENTRIES + 2 * queue.entries)
    passed = ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
    return INTERRUPT if passed else SILENT


@native
def ask_kicks(queue: SplitQueue) -> int:
    """Ask for notifications; whether there are chains nevertheless (2.7.10)."""
    if queue.event_idx:
        store16(queue.used + ENTRIES + ELEMENT * queue.entries, queue.last_avail)
    else:
        store16(queue.used + FLAGS, 0)
    fence(queue)
    return 1 if load16(queue.avail + INDEX) != queue.last_avail else 0


@native
def refuse_kicks(queue: SplitQueue) -> int:
    """Ask for none; with EVENT_IDX, not asking is enough."""
    if queue.event_idx == 0:
        store16(queue.used + FLAGS, NO_NOTIFY)
    return 0
