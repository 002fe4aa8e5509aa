"""The split virtqueue (2.7): descriptor table, available ring, used ring.

The driver's ring is a list of heads of chains through the table; the device's ring a list of the
heads it is done with, and how much it has written. Each ring's index counts modulo 65536.

What is done for each chain and each descriptor is native code (`queue`); here a chain becomes an
object, and the memory's observers hear of what was written to the used ring.
"""

from __future__ import annotations

import ctypes
import struct
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

PART = struct.Struct("<QQ")
"""Host address and length."""


def _field(name: str) -> Any:
    """A property that is a field of the queue."""

    def read(ring: SplitRing) -> int:
        return int(getattr(ring.queue, name))

    def write(ring: SplitRing, value: int) -> None:
        setattr(ring.queue, name, value)

    return property(read, write)


class SplitChain(Chain):
    """A chain whose lists of buffers are made when somebody asks for them.

    Attributes
    ----------
    parts : bytes
        Host address and length of each buffer, as readv takes them (struct iovec).
    runs : bytes
        Offset into RAM and length of the writable ones.
    boundary : int
        How many are readable; the others are writable.
    """

    __slots__ = ("_memory", "boundary", "parts", "runs")

    def __init__(
        self, memory: GuestMemory, identifier: int, parts: bytes, runs: bytes, boundary: int
    ) -> None:
        self._memory = memory
        self.identifier = identifier
        self.count = 1
        self.parts = parts
        self.runs = runs
        self.boundary = boundary

    def __getattr__(self, name: str) -> Any:
        """Make the lists; this is called for attributes that have no value yet."""
        if name not in ("readable", "writable", "places"):
            raise AttributeError(name)
        base, part = self._memory.host_base, self._memory.part
        outward = PART.iter_unpack(self.parts[: PART.size * self.boundary])
        self.readable = [part(address - base, length) for address, length in outward]
        self.places = list(PART.iter_unpack(self.runs))
        self.writable = [part(*place) for place in self.places]
        return getattr(self, name)


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
        self._parts, self._runs = (self.at + layout.offset_of(name) for name in ("parts", "runs"))
        queue = self.queue = layout.at(self.at)
        set_reach(queue, memory)
        queue.entries, queue.event_idx, queue.indirect = size, self.event_idx, self.indirect
        queue.descriptors = self._host(0, DESCRIPTOR_SIZE * size, 16)
        queue.avail = self._host(1, 6 + 2 * size, 2)
        queue.used = self._host(2, 6 + ELEMENT * size, 4)
        self._take_slowly = natives("take", True)
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
        found = self._take_of_incomplete() if self.memory.incomplete else self._take(self.at)
        if found == NOTHING:
            return None
        if found == BROKEN:
            raise self.error()
        return self.taken()

    def _take_of_incomplete(self) -> int:
        """Where pages of RAM are to come: the ring's first, then those of its tables."""
        queue, base = self.queue, self.memory.host_base
        for area, length in (
            (queue.descriptors, DESCRIPTOR_SIZE * self.size),
            (queue.avail, 6 + 2 * self.size),
            (queue.used, 6 + ELEMENT * self.size),
        ):
            self.memory.await_pages(area - base, length)
        return int(self._take_slowly(self.at))

    def error(self) -> RingError:
        """What the driver has done wrong."""
        return RingError(f"split ring: {REASONS[self.queue.reason]}")

    def taken(self) -> SplitChain:
        """The chain that was taken last, as an object."""
        queue = self.queue
        used, readable = queue.parts_used, queue.readable
        parts = ctypes.string_at(self._parts, PART.size * used)
        runs = ctypes.string_at(
            self._runs + PART.size * queue.runs_used, PART.size * (used - readable)
        )
        return SplitChain(self.memory, queue.identifier, parts, runs, readable)

    def settle(self) -> None:
        """Have the memory's observers hear of what native code has filled."""
        queue = self.queue
        if queue.runs_used:
            self.memory.dma_written_runs(self._runs, queue.runs_used)
            queue.runs_used = 0

    def unpop(self, chain: Chain) -> None:
        """See `Ring.unpop`."""
        del chain
        self.last_avail = self.last_avail - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """See `Ring.push`."""
        assert isinstance(chain, SplitChain)
        if written and chain.runs:
            runs = ctypes.cast(ctypes.c_char_p(chain.runs), ctypes.c_void_p)
            self.memory.dma_written_runs(runs.value or 0, len(chain.runs) // PART.size)
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
