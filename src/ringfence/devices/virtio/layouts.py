"""What devices do with a queue, whichever of the two layouts it has (2.7, 2.8): native code.

Five functions are all there is to know of a layout for who works on a queue: `take` a chain out of
it, `give` it back, `publish` what was given back, ask the driver for notifications or do without.
"""

from __future__ import annotations

from ringfence.devices.virtio.packed import (
    ask_packed,
    give_all_packed,
    give_packed,
    position_packed,
    publish_packed,
    refuse_packed,
    rewind_packed,
    take_packed,
)
from ringfence.devices.virtio.queue import CHAIN, Queue
from ringfence.devices.virtio.split import (
    ask_split,
    give_split,
    publish_split,
    refuse_split,
    take_split,
)
from ringfence.native.dialect import load64, native


@native
def take(queue: Queue) -> int:
    """Take the next chain that the driver has made available: NOTHING, FOUND or BROKEN."""
    return take_packed(queue) if queue.is_packed else take_split(queue)


@native
def position(queue: Queue) -> int:
    """How far chains were taken, for `rewind`."""
    return position_packed(queue) if queue.is_packed else queue.last_avail


@native
def rewind(queue: Queue, before: int) -> int:
    """Put back all chains that were taken since `position`, to be taken again."""
    if queue.is_packed:
        return rewind_packed(queue, before)
    queue.last_avail = before
    return 0


@native
def give(queue: Queue, identifier: int, count: int, written: int) -> int:
    """Give a chain of ``count`` descriptors back; `publish` tells the driver."""
    queue.given += 1
    if queue.is_packed:
        return give_packed(queue, identifier, count, written)
    return give_split(queue, identifier, written)


@native
def give_all(queue: Queue, chains: int, number: int) -> int:
    """Give back chains (`CHAIN` each) of which the driver is to see either none or all."""
    queue.given += number
    if queue.is_packed:
        return give_all_packed(queue, chains, number)
    for n in range(number):
        chain = chains + n * CHAIN
        give_split(queue, load64(chain), load64(chain + 16))
    return 0


@native
def publish(queue: Queue) -> int:
    """Show what was given back: whether the driver wants an INTERRUPT, or nothing is UNCHANGED."""
    return publish_packed(queue) if queue.is_packed else publish_split(queue)


@native
def ask_kicks(queue: Queue) -> int:
    """Ask for notifications; whether there are chains nevertheless."""
    return ask_packed(queue) if queue.is_packed else ask_split(queue)


@native
def refuse_kicks(queue: Queue) -> int:
    """Ask for none."""
    return refuse_packed(queue) if queue.is_packed else refuse_split(queue)
