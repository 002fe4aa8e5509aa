"""A virtqueue as Python sees it: chains of buffers, and distrust.

A ring lies in guest memory, where the guest may change it at any time. So a descriptor is read
once, checked, and turned into a part of RAM; the guest's copy is never looked at again. All that a
device gets is a `Chain`: readable buffers, then writable ones, all wholly inside RAM. Whatever
can't be made into that is a `RingError`, on which the transport asks the driver for a reset; the
ring is not looked at again before.

What is done for each chain and each descriptor is native code (`layouts`), the same five functions
for both layouts. Here a chain becomes an object, and the memory's observers hear of what was
written to the ring. `SplitRing` and `PackedRing` know what is left to tell them apart: where their
areas are, and which numbers say how far we are.

Work is bounded: a chain has at most `MAX_CHAIN` buffers, and a device takes a limited number of
chains per notification (see `device`).
"""

from __future__ import annotations

import ctypes
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from ringfence.chipset.state import Saved, State
from ringfence.devices.natives import Natives
from ringfence.devices.virtio.packed import EVENTS
from ringfence.devices.virtio.queue import (
    BROKEN,
    INTERRUPT,
    NOTHING,
    REASONS,
    UNCHANGED,
    Queue,
)
from ringfence.devices.virtio.rules import DESCRIPTOR_SIZE, EVENT_IDX, INDIRECT_DESC, MAX_QUEUE
from ringfence.devices.virtio.split import ELEMENT, ENTRIES
from ringfence.errors import ImageError, RingfenceError
from ringfence.memory.buffers import scatter, total
from ringfence.memory.ram import GuestMemory
from ringfence.memory.reach import set_reach

PART = struct.Struct("<QQ")
"""Host address and length."""


class RingError(RingfenceError):
    """The driver has broken a ring's rules."""


class Chain:
    """A request: buffers that the device reads, then buffers that it fills.

    Attributes
    ----------
    identifier : int
        What the driver calls it: its head's index, or its buffer ID.
    count : int
        Descriptors that it takes in the ring.
    parts : bytes
        Host address and length of each buffer, as readv takes them (struct iovec).
    runs : bytes
        Offset into RAM and length of the writable ones.
    boundary : int
        How many are readable; the others are writable.
    readable, writable : list[memoryview]
        Slices of guest RAM, made when somebody asks for them.
    """

    __slots__ = (
        "_memory", "boundary", "count", "identifier", "parts", "readable", "runs", "writable",
    )  # fmt: skip

    readable: list[memoryview]
    writable: list[memoryview]

    def __init__(
        self,
        memory: GuestMemory,
        identifier: int,
        count: int,
        parts: bytes,
        runs: bytes,
        boundary: int,
    ) -> None:
        self._memory = memory
        self.identifier = identifier
        self.count = count
        self.parts = parts
        self.runs = runs
        self.boundary = boundary

    def __getattr__(self, name: str) -> Any:
        """Make the lists; this is called for attributes that have no value yet."""
        if name not in ("readable", "writable"):
            raise AttributeError(name)
        base, part = self._memory.host_base, self._memory.part
        outward = PART.iter_unpack(self.parts[: PART.size * self.boundary])
        self.readable = [part(address - base, length) for address, length in outward]
        self.writable = [part(*place) for place in self.places]
        return getattr(self, name)

    def read(self) -> bytes:
        """Copy all that is readable."""
        return b"".join(self.readable)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Offset into RAM's mapping and length of each writable buffer."""
        return list(PART.iter_unpack(self.runs))

    @property
    def readable_length(self) -> int:
        """Bytes that the device may read."""
        return total(self.readable)

    @property
    def writable_length(self) -> int:
        """Bytes that the device may write."""
        return total(self.writable)

    def write(self, data: bytes | memoryview) -> int:
        """Store data at the start of the writable buffers; return how much found room."""
        return scatter(data, self.writable)


def _field(name: str, kind: Callable[[int], Any] = int) -> Any:
    """A property that is a field of the queue."""

    def read(ring: Ring) -> Any:
        return kind(getattr(ring.queue, name))

    def write(ring: Ring, value: int) -> None:
        setattr(ring.queue, name, value)

    return property(read, write)


class Ring(Saved, ABC):
    """One queue in guest memory, of either layout.

    Parameters
    ----------
    memory : GuestMemory
        Guest RAM.
    size : int
        Descriptors.
    descriptors, driver, device : int
        Guest-physical addresses of the three areas.
    features : int
        What was negotiated.
    natives : Natives
        Where native code is found.
    layout : type[Queue]
        What the queue is to native code; a device may have one with fields of its own.

    Attributes
    ----------
    queue : Any
        A view of the `Queue`.
    at : int
        Its host address.

    Raises
    ------
    RingError
        An area is not in RAM or not aligned, or the size is impossible.
    """

    PACKED: ClassVar[bool]
    ALIGNMENTS: ClassVar[tuple[int, int, int]]
    """Of the three areas, in bytes."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: int,
        driver: int,
        device: int,
        features: int,
        natives: Natives,
        layout: type[Queue] = Queue,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = bool(features & EVENT_IDX)
        self._areas = (descriptors, driver, device)
        if not self._possible(size):
            raise RingError(f"a {self._name} of {size} descriptors")
        self._place = ctypes.create_string_buffer(layout.size)
        self.at = ctypes.addressof(self._place)
        self._parts, self._runs = (self.at + layout.offset_of(name) for name in ("parts", "runs"))
        queue = self.queue = layout.at(self.at)
        set_reach(queue, memory)
        queue.is_packed, queue.entries = self.PACKED, size
        queue.event_idx, queue.indirect = self.event_idx, bool(features & INDIRECT_DESC)
        places = map(self._host, self._areas, self.lengths(size), self.ALIGNMENTS)
        queue.descriptors, queue.driver, queue.device = places
        self._natives = natives
        self._give, self._publish, self._ask, self._refuse = map(
            natives, ("give", "publish", "ask_kicks", "refuse_kicks")
        )

    # ---- what devices call

    @property
    def given(self) -> int:
        """Chains given back so far."""
        return int(self.queue.given)

    def pop(self) -> Chain | None:
        """Take the next chain that the driver has made available, or None."""
        found = self.work("take")
        if found == NOTHING:
            return None
        if found == BROKEN:
            raise self.error()
        return self.taken()

    def work(self, name: str) -> int:
        """Have native code work on the queue; it may wait for pages of RAM that are to come."""
        incomplete = self.memory.incomplete
        if incomplete:
            self._await_areas()
        return int(self._natives(name, incomplete)(self.at))

    def taken(self) -> Chain:
        """The chain that was taken last, as an object."""
        queue = self.queue
        used, readable = queue.parts_used, queue.readable
        parts = ctypes.string_at(self._parts, PART.size * used)
        runs = ctypes.string_at(
            self._runs + PART.size * queue.runs_used, PART.size * (used - readable)
        )
        return Chain(self.memory, queue.identifier, queue.count, parts, runs, readable)

    def error(self) -> RingError:
        """What the driver has done wrong."""
        return RingError(f"{self._name}: {REASONS[self.queue.reason]}")

    def settle(self) -> None:
        """Have the memory's observers hear of what native code has filled."""
        queue = self.queue
        if queue.runs_used:
            self.memory.dma_written_runs(self._runs, queue.runs_used)
            queue.runs_used = 0

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back, its first ``written`` writable bytes filled; `flush` tells of it."""
        if written and chain.runs:
            runs = ctypes.cast(ctypes.c_char_p(chain.runs), ctypes.c_void_p)
            self.memory.dma_written_runs(runs.value or 0, len(chain.runs) // PART.size)
        self._give(self.at, chain.identifier, chain.count, written)

    def flush(self) -> bool:
        """Publish what was pushed; return whether the driver wants an interrupt for it."""
        told = self._publish(self.at)
        if told == UNCHANGED:
            return False
        self._tell_used()
        return bool(told == INTERRUPT)

    def want_kicks(self, wanted: bool) -> bool:
        """Ask the driver for notifications, or not to bother.

        Returns whether there are chains nevertheless: asked for too late, they come without one.
        """
        if self.memory.incomplete:
            self._await_areas()
        more = bool((self._ask if wanted else self._refuse)(self.at))
        self.tell_kicks(wanted)
        return more

    # ---- what layouts know

    @staticmethod
    @abstractmethod
    def lengths(size: int) -> tuple[int, int, int]:
        """Bytes of the three areas."""

    @staticmethod
    @abstractmethod
    def _possible(size: int) -> bool:
        """Whether a ring may have so many descriptors."""

    @abstractmethod
    def _limits(self) -> dict[str, int]:
        """What the numbers that say how far we are stay below."""

    @abstractmethod
    def _tell_used(self) -> None:
        """Have the memory's observers hear of chains that were given back."""

    @abstractmethod
    def tell_kicks(self, wanted: bool) -> None:
        """Have them hear that notifications were asked for, or not."""

    # ---- what they share

    @property
    def _name(self) -> str:
        return f"{'packed' if self.PACKED else 'split'} ring"

    def _host(self, address: int, length: int, alignment: int) -> int:
        """Host address of an area, checked."""
        if address % alignment:
            raise RingError(f"ring area at {address:#x}: expected a multiple of {alignment}")
        try:
            offset = self.memory.offset(address, length)
        except IndexError as error:
            raise RingError(str(error)) from error
        return self.memory.host_base + offset

    def _await_areas(self) -> None:
        """Where pages of RAM are to come, have the ring's; those of its tables come by use."""
        queue, base = self.queue, self.memory.host_base
        places = (queue.descriptors, queue.driver, queue.device)
        for place, length in zip(places, self.lengths(self.size), strict=True):
            self.memory.await_pages(place - base, length)

    def _tell(self, area: int, at: int, length: int) -> None:
        """Have the memory's observers hear of what we wrote ourselves to one of the areas."""
        self.memory.dma_written(self._areas[area] + at, length)

    def restore(self, state: State) -> None:
        """See `Saved.restore`; native code trusts these numbers, so they are looked at."""
        for name, limit in self._limits().items():
            value = state.get(name)
            if not isinstance(value, int) or not 0 <= value < limit:
                raise ImageError(f"saved {self._name}: {name} is {value!r}, expected 0 to {limit}")
        super().restore(state)


class SplitRing(Ring):
    """A split virtqueue (2.7).

    Attributes
    ----------
    last_avail : int
        Index of the next available entry to look at.
    used_index : int
        Index of the next used entry to fill.
    signalled : int
        The used index that `flush` has published.
    """

    PACKED = False
    ALIGNMENTS = (16, 2, 4)
    FIELDS = ("last_avail", "used_index", "signalled")

    last_avail: int = _field("last_avail")
    used_index: int = _field("used_index")
    signalled: int = _field("signalled")

    @staticmethod
    def lengths(size: int) -> tuple[int, int, int]:
        """See `Ring.lengths`: the two rings end with an event each (2.7)."""
        return DESCRIPTOR_SIZE * size, ENTRIES + 2 * size + 2, ENTRIES + ELEMENT * size + 2

    @staticmethod
    def _possible(size: int) -> bool:
        return 0 < size <= MAX_QUEUE and not size & size - 1

    def _limits(self) -> dict[str, int]:
        return dict.fromkeys(self.FIELDS, 1 << 16)

    def _tell_used(self) -> None:
        self._tell(2, 0, ENTRIES + ELEMENT * self.size)

    def tell_kicks(self, wanted: bool) -> None:
        if not self.event_idx:
            self._tell(2, 0, 2)
        elif wanted:
            self._tell(2, ENTRIES + ELEMENT * self.size, 2)


class PackedRing(Ring):
    """A packed virtqueue (2.8).

    Attributes
    ----------
    next_avail, next_used : int
        Index of the descriptor to look at next, and of the one to overwrite next.
    avail_wrap, used_wrap : bool
        The wrap counters that belong to them.
    unsignalled : int
        Used descriptors that `flush` has not told of yet.
    """

    PACKED = True
    ALIGNMENTS = (16, 4, 4)
    FIELDS = ("next_avail", "avail_wrap", "next_used", "used_wrap", "unsignalled")

    next_avail: int = _field("next_avail")
    avail_wrap: bool = _field("avail_wrap", bool)
    next_used: int = _field("next_used")
    used_wrap: bool = _field("used_wrap", bool)
    unsignalled: int = _field("unsignalled")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.avail_wrap = self.used_wrap = True

    @staticmethod
    def lengths(size: int) -> tuple[int, int, int]:
        """See `Ring.lengths`."""
        return DESCRIPTOR_SIZE * size, EVENTS, EVENTS

    @staticmethod
    def _possible(size: int) -> bool:
        return 0 < size <= MAX_QUEUE

    def _limits(self) -> dict[str, int]:
        return {"next_avail": self.size, "next_used": self.size, "unsignalled": 1 << 64}

    def _tell_used(self) -> None:
        self._tell(0, 0, DESCRIPTOR_SIZE * self.size)

    def tell_kicks(self, wanted: bool) -> None:
        del wanted
        self._tell(2, 0, EVENTS)
