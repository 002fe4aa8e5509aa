"""The packed virtqueue (2.8) in native code: one ring of descriptors that both sides write.

Whether a descriptor is the driver's or the device's is told by two flags in it, compared with a
wrap counter that each side flips when it passes the ring's end. A chain takes consecutive
descriptors; the device gives it back by overwriting one of them with the chain's ID.

A descriptor's second half (length, buffer ID, flags) is one aligned word: it is read in one piece,
so that what the flags make ours is what was read, and written in one, so that the driver sees all
of it or nothing. The same holds for the event suppression structures.
"""

from __future__ import annotations

from ringfence.devices.virtio.queue import (
    CHAIN,
    CIRCLE,
    FOUND,
    INTERRUPT,
    NESTED,
    NOTHING,
    SILENT,
    UNCHANGED,
    Queue,
    add_part,
    begin_chain,
    broken,
    fence,
    indirect_table,
)
from ringfence.devices.virtio.rules import DESCRIPTOR_SIZE, INDIRECT, NEXT, WRITE
from ringfence.native.dialect import load32, load64, native, native_inline, store32, store64

AVAIL, USED = 1 << 7, 1 << 15
"""Descriptor flags (2.8.1)."""
SECOND = 8
"""Offset of a descriptor's second half (2.8.13): length, buffer ID, flags."""
ID_SHIFT, FLAGS_SHIFT = 32, 48
LENGTH_MASK, ID_MASK = 0xFFFFFFFF, 0xFFFF
# Event suppression structures (2.8.14): offset and wrap counter, flags.
EVENTS = 4
"""Bytes of one."""
WRAP = 1 << 15
EVENT_FLAGS_SHIFT = 16
ENABLE, DISABLE, SPECIFIC = 0, 1, 2


@native_inline
def next_half(queue: Queue) -> int:
    """The second half of the descriptor that is looked at next."""
    return load64(queue.descriptors + queue.next_avail * DESCRIPTOR_SIZE + SECOND)


@native_inline
def is_available(queue: Queue, half: int) -> int:
    """Whether a descriptor with this second half is the driver's offer (2.8.1)."""
    flags = (half >> FLAGS_SHIFT) & (AVAIL | USED)
    return 1 if flags == (AVAIL if queue.avail_wrap else USED) else 0


@native
def add_table(queue: Queue, address: int, length: int) -> int:
    """Append all buffers of an indirect table (2.8.7), which has no links; a reason, or 0."""
    table = indirect_table(queue, address, length)
    if table == 0:
        return queue.reason
    for entry in range(length // DESCRIPTOR_SIZE):
        at = table + entry * DESCRIPTOR_SIZE
        half = load64(at + SECOND)
        reason = add_part(queue, load64(at), half & LENGTH_MASK, half >> FLAGS_SHIFT)
        if reason:
            return reason
    return 0


@native
def take_packed(queue: Queue) -> int:
    """See `layouts.take`."""
    half = next_half(queue)
    if is_available(queue, half) == 0:
        return NOTHING
    fence(queue)
    queue.count = 0
    begin_chain(queue)
    while queue.count < queue.entries:
        address = load64(queue.descriptors + queue.next_avail * DESCRIPTOR_SIZE)
        length = half & LENGTH_MASK
        flags = half >> FLAGS_SHIFT
        queue.count += 1
        queue.next_avail += 1
        if queue.next_avail == queue.entries:
            queue.next_avail = 0
            queue.avail_wrap ^= 1
        reason = 0
        if not flags & INDIRECT:
            reason = add_part(queue, address, length, flags)
        elif flags & NEXT or queue.count > 1:
            reason = NESTED
        else:
            reason = add_table(queue, address, length)
        if reason:
            return broken(queue, reason)
        if not flags & NEXT:
            queue.identifier = (half >> ID_SHIFT) & ID_MASK
            return FOUND
        half = next_half(queue)
    return broken(queue, CIRCLE)


@native_inline
def position_packed(queue: Queue) -> int:
    """See `layouts.position`."""
    return queue.next_avail << 1 | queue.avail_wrap


@native_inline
def rewind_packed(queue: Queue, before: int) -> int:
    """See `layouts.rewind`."""
    queue.next_avail = before >> 1
    queue.avail_wrap = before & 1
    return 0


@native_inline
def pass_used(queue: Queue, count: int) -> int:
    """Go on behind the descriptors of a chain that is given back."""
    queue.unsignalled += count
    queue.next_used += count
    if queue.next_used >= queue.entries:
        queue.next_used -= queue.entries
        queue.used_wrap ^= 1
    return 0


@native
def write_used(queue: Queue, at: int, wrap: int, identifier: int, written: int) -> int:
    """Mark a chain as used in its first descriptor."""
    flags = (AVAIL | USED if wrap else 0) | (WRITE if written else 0)
    half = written & LENGTH_MASK | identifier << ID_SHIFT | flags << FLAGS_SHIFT
    fence(queue)
    store64(queue.descriptors + at * DESCRIPTOR_SIZE + SECOND, half)
    return 0


@native
def give_packed(queue: Queue, identifier: int, count: int, written: int) -> int:
    """See `layouts.give`; the driver sees it at once (2.8.8)."""
    at = queue.next_used
    wrap = queue.used_wrap
    pass_used(queue, count)
    return write_used(queue, at, wrap, identifier, written)


@native_inline
def give_all_packed(queue: Queue, chains: int, number: int) -> int:
    """See `layouts.give_all`: the driver goes on from the first, which comes last."""
    at = queue.next_used
    wrap = queue.used_wrap
    pass_used(queue, load64(chains + 8))
    for n in range(1, number):
        chain = chains + n * CHAIN
        give_packed(queue, load64(chain), load64(chain + 8), load64(chain + 16))
    return write_used(queue, at, wrap, load64(chains), load64(chains + 16))


@native_inline
def publish_packed(queue: Queue) -> int:
    """See `layouts.publish` (2.8.10)."""
    count = queue.unsignalled
    if count == 0:
        return UNCHANGED
    queue.unsignalled = 0
    fence(queue)
    events = load32(queue.driver)
    flags = events >> EVENT_FLAGS_SHIFT
    if flags == DISABLE:
        return SILENT
    if flags != SPECIFIC or queue.event_idx == 0:
        return INTERRUPT
    event = events & (WRAP - 1)
    if (1 if events & WRAP else 0) != queue.used_wrap:
        event -= queue.entries
    # The driver waits for the descriptor at `event`: was it among the last `count` used ones?
    return INTERRUPT if queue.next_used - event - 1 < count else SILENT


@native_inline
def ask_packed(queue: Queue) -> int:
    """See `layouts.ask_kicks` (2.8.14)."""
    events = ENABLE << EVENT_FLAGS_SHIFT
    if queue.event_idx:
        wrap = WRAP if queue.avail_wrap else 0
        events = SPECIFIC << EVENT_FLAGS_SHIFT | wrap | queue.next_avail
    store32(queue.device, events)
    fence(queue)
    return is_available(queue, next_half(queue))


@native_inline
def refuse_packed(queue: Queue) -> int:
    """See `layouts.refuse_kicks`."""
    store32(queue.device, DISABLE << EVENT_FLAGS_SHIFT)
    return 0
