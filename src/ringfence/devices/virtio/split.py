"""The split virtqueue (2.7) in native code: descriptor table, available ring, used ring.

The driver's ring is a list of heads of chains through the table; the device's ring a list of the
heads it is done with, and how much it has written. Each ring's index counts modulo 65536.
"""

from __future__ import annotations

from ringfence.devices.virtio.queue import (
    BROKEN,
    CIRCLE,
    FOUND,
    INTERRUPT,
    JUMP,
    NESTED,
    NOTHING,
    OUTSIDE,
    SILENT,
    UNCHANGED,
    Queue,
    add_part,
    begin_chain,
    broken,
    fence,
    indirect_table,
)
from ringfence.devices.virtio.rules import DESCRIPTOR_SIZE, INDIRECT, NEXT
from ringfence.native.dialect import load16, load32, load64, native, native_inline, store16, store32

FLAGS, INDEX, ENTRIES = 0, 2, 4
"""Offsets in the available ring (2.7.6) and the used ring (2.7.8)."""
ELEMENT = 8
"""Bytes of an entry of the used ring."""
NO_INTERRUPT, NO_NOTIFY = 1, 1


@native
def take_split(queue: Queue) -> int:
    """See `layouts.take`."""
    waiting = (load16(queue.driver + INDEX) - queue.last_avail) & 0xFFFF
    if waiting == 0:
        return NOTHING
    if waiting > queue.entries:
        return broken(queue, JUMP)
    fence(queue)
    head = load16(queue.driver + ENTRIES + 2 * (queue.last_avail & (queue.entries - 1)))
    queue.last_avail = (queue.last_avail + 1) & 0xFFFF
    queue.identifier = head
    queue.count = 1
    begin_chain(queue)
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
            table = indirect_table(queue, address, length)
            if table == 0:
                return BROKEN
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


@native_inline
def give_split(queue: Queue, identifier: int, written: int) -> int:
    """See `layouts.give`."""
    at = queue.device + ENTRIES + ELEMENT * (queue.used_index & (queue.entries - 1))
    store32(at, identifier)
    store32(at + 4, written)
    queue.used_index = (queue.used_index + 1) & 0xFFFF
    return 0


@native_inline
def publish_split(queue: Queue) -> int:
    """See `layouts.publish` (2.7.7)."""
    old = queue.signalled
    new = queue.used_index
    if old == new:
        return UNCHANGED
    fence(queue)
    store16(queue.device + INDEX, new)
    queue.signalled = new
    fence(queue)
    if queue.event_idx == 0:
        return SILENT if load16(queue.driver + FLAGS) & NO_INTERRUPT else INTERRUPT
    event = load16(queue.driver + ENTRIES + 2 * queue.entries)
    passed = ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
    return INTERRUPT if passed else SILENT


@native_inline
def ask_split(queue: Queue) -> int:
    """See `layouts.ask_kicks` (2.7.10)."""
    if queue.event_idx:
        store16(queue.device + ENTRIES + ELEMENT * queue.entries, queue.last_avail)
    else:
        store16(queue.device + FLAGS, 0)
    fence(queue)
    return 1 if load16(queue.driver + INDEX) != queue.last_avail else 0


@native_inline
def refuse_split(queue: Queue) -> int:
    """See `layouts.refuse_kicks`: with EVENT_IDX, not asking is enough."""
    if queue.event_idx == 0:
        store16(queue.device + FLAGS, NO_NOTIFY)
    return 0
