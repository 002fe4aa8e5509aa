"""The split virtqueue (2.7): descriptor table, available ring, used ring.

The driver's ring is a list of heads of chains through the table; the device's ring a list of the
heads it is done with, and how much it has written. Each ring's index counts modulo 65536.

What is done for each chain and each descriptor is native code (`queue`); here a chain becomes an
object, and the memory's observers hear of what was written to the used ring.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ringfence.devices.natives import Natives
from ringfence.devices.virtio.queue import (
    BROKEN,
    ELEMENT,
    ENTRIES,
    INTERRUPT,
    NOTHING,
    REASONS,
    UNCHANGED,
    SplitQueue,
)
from ringfence.devices.virtio.ring import Chain, Ring, RingError
from ringfence.devices.virtio.rules import DESCRIPTOR_SIZE, MAX_QUEUE
from ringfence.memory.ram import GuestMemory
from ringfence.memory.reach import set_reach


def _field(name: str) -> Any:
    """A property that is a field of the queue."""

    def read(ring: SplitRing) -> int:
        return int(getattr(ring.queue, name))

    def write(ring: SplitRing, value: int) -> None:
        setattr(ring.queue, name, value)

    return property(read, write)


class SplitRing(Ring):
    """A split virtqueue; see `ring.Ring`.

    Parameters
    ----------
    natives : Natives
        Where native code is found.
    layout : type[SplitQueue]
        What the queue is to native code; a device may have one with fields of its own.

    Attributes
    ----------
    last_avail : int
        Index of the next available entry to look at.
    used_index : int
        Index of the next used entry to fill.
    signalled : int
        The used index that `flush` has published.
    queue : Any
        A view of the `SplitQueue`, which has these three.
    at : int
        Its host address.
    """

    FIELDS = ("last_avail", "used_index", "signalled")

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: int,
        driver: int,
        device: int,
        features: int,
        natives: Natives,
        layout: type[SplitQueue] = SplitQueue,
    ) -> None:
        super().__init__(memory, size, descriptors, driver, device, features)
        if not 0 < size <= MAX_QUEUE or size & size - 1:
            raise RingError(f"a split ring of {size} descriptors: expected a power of two")
        self._place = ctypes.create_string_buffer(layout.size)
        self.at = ctypes.addressof(self._place)
        queue = self.queue = layout.at(self.at)
        set_reach(queue, memory)
        queue.entries, queue.event_idx, queue.indirect = size, self.event_idx, self.indirect
        queue.descriptors = self._host(0, DESCRIPTOR_SIZE * size, 16)
        queue.avail = self._host(1, 6 + 2 * size, 2)
        queue.used = self._host(2, 6 + ELEMENT * size, 4)
        self._take, self._give, self._publish, self._ask, self._refuse = map(
            natives, ("take", "give", "publish", "ask_kicks", "refuse_kicks")
        )

    last_avail: int = _field("last_avail")
    used_index: int = _field("used_index")
    signalled: int = _field("signalled")

    @property
    def given(self) -> int:
        """See `Ring.given`."""
        return int(self.queue.given)

    def _host(self, area: int, length: int, alignment: int) -> int:
        """Host address of an area, checked."""
        self._area(area, length, alignment)
        return self.memory.host_base + self.memory.offset(self._areas[area], length)

    def pop(self) -> Chain | None:
        """See `Ring.pop`."""
        found = self._take(self.at)
        if found == NOTHING:
            return None
        if found == BROKEN:
            raise self.error()
        return self.taken()

    def error(self) -> RingError:
        """What the driver has done wrong."""
        return RingError(f"split ring: {REASONS[self.queue.reason]}")

    def taken(self) -> Chain:
        """The chain that was taken last, as an object."""
        queue, part = self.queue, self.memory.part
        chain = Chain(queue.identifier)
        readable, base = queue.readable, self.memory.host_base
        values = queue.parts[: 2 * queue.parts_used]
        pairs = [(values[at] - base, values[at + 1]) for at in range(0, len(values), 2)]
        chain.readable = [part(*pair) for pair in pairs[:readable]]
        chain.places = pairs[readable:]
        chain.writable = [part(*pair) for pair in chain.places]
        return chain

    def settle(self) -> None:
        """Have the memory's observers hear of what native code has filled."""
        queue = self.queue
        if queue.runs_used:
            table = self.at + SplitQueue.offset_of("runs")
            self.memory.dma_written_runs(table, queue.runs_used)
            queue.runs_used = 0

    def unpop(self, chain: Chain) -> None:
        """See `Ring.unpop`."""
        del chain
        self.last_avail = self.last_avail - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """See `Ring.push`."""
        self._note_filled(chain, written)
        self._give(self.at, chain.identifier, written)

    def flush(self) -> bool:
        """See `Ring.flush`."""
        told = self._publish(self.at)
        if told == UNCHANGED:
            return False
        self._tell(2, 0, ENTRIES + ELEMENT * self.size)
        return bool(told == INTERRUPT)

    def want_kicks(self, wanted: bool) -> bool:
        """See `Ring.want_kicks`."""
        if not wanted:
            if not self.event_idx:
                self._refuse(self.at)
                self._tell(2, 0, 2)
            return False
        more = self._ask(self.at)
        self._tell(2, *((ENTRIES + ELEMENT * self.size, 2) if self.event_idx else (0, 2)))
        return bool(more)
