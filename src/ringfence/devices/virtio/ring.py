"""What all rings have in common: chains of buffers, and distrust.

A ring lies in guest memory, where the guest may change it at any time. So a descriptor is read
once, into our own memory, checked there and turned into memoryview slices of RAM; the guest's copy
is never looked at again. All that a device gets is a `Chain`: readable buffers, then writable ones,
all wholly inside RAM. Whatever can't be made into that is a `RingError`, on which the transport
asks the driver for a reset; the ring is not looked at again before.

Indices that both sides see are read and written through memoryviews of 16-bit items, which CPython
accesses as a unit (``struct`` goes byte by byte, and the guest could see half of an index).

Work is bounded: a chain has at most `MAX_CHAIN` buffers, and a device takes a limited number of
chains per notification (see `device`).
"""

from __future__ import annotations

import ctypes
import struct
import threading
from abc import ABC, abstractmethod

from ringfence.chipset.state import Saved
from ringfence.devices.virtio.rules import (
    DESCRIPTOR_SIZE,
    EVENT_IDX,
    INDIRECT_DESC,
    MAX_CHAIN,
    MAX_QUEUE,
    WRITE,
)
from ringfence.errors import RingfenceError
from ringfence.memory.buffers import scatter, total
from ringfence.memory.ram import GuestMemory


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
    readable, writable : list[memoryview]
        Slices of guest RAM.
    places : list[tuple[int, int]]
        Offset into RAM's mapping and length of the writable ones.
    """

    __slots__ = ("count", "identifier", "places", "readable", "writable")

    def __init__(self, identifier: int) -> None:
        self.identifier = identifier
        self.count = 1
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.places: list[tuple[int, int]] = []

    def read(self) -> bytes:
        """Copy all that is readable."""
        return b"".join(self.readable)

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

    Raises
    ------
    RingError
        An area is not in RAM or not aligned, or the size is impossible.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: int,
        driver: int,
        device: int,
        features: int,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = bool(features & EVENT_IDX)
        self.indirect = bool(features & INDIRECT_DESC)
        self._areas = (descriptors, driver, device)
        self._fence_lock = threading.Lock()

    # ---- what devices call

    @property
    @abstractmethod
    def given(self) -> int:
        """Chains given back so far."""

    @abstractmethod
    def pop(self) -> Chain | None:
        """Take the next chain that the driver has made available, or None."""

    @abstractmethod
    def unpop(self, chain: Chain) -> None:
        """Put the chain that was popped last back, to be popped again."""

    @abstractmethod
    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back, its first ``written`` writable bytes filled; `flush` tells of it."""

    @abstractmethod
    def flush(self) -> bool:
        """Publish what was pushed; return whether the driver wants an interrupt for it."""

    @abstractmethod
    def want_kicks(self, wanted: bool) -> bool:
        """Ask the driver for notifications, or not to bother.

        Returns whether there are chains nevertheless: asked for too late, they come without one.
        """

    # ---- what layouts share

    def _area(self, number: int, length: int, alignment: int) -> memoryview:
        """One of the three areas, checked."""
        address = self._areas[number]
        if address % alignment:
            raise RingError(f"ring area at {address:#x}: expected a multiple of {alignment}")
        return self._slice(address, length)

    def _slice(self, address: int, length: int) -> memoryview:
        try:
            return self.memory.slice(address, length)
        except IndexError as error:
            raise RingError(str(error)) from error

    def _add(self, chain: Chain, address: int, length: int, flags: int) -> None:
        """Append one descriptor's buffer to a chain."""
        if not length:
            return
        if flags & WRITE:
            chain.writable.append(self._slice(address, length))
            chain.places.append((self.memory.offset(address, length), length))
        elif chain.writable:
            raise RingError("a readable buffer behind a writable one")
        else:
            chain.readable.append(self._slice(address, length))
        if len(chain.readable) + len(chain.writable) > MAX_CHAIN:
            raise RingError(f"a chain of more than {MAX_CHAIN} buffers")

    def _table(self, address: int, length: int) -> bytes:
        """Copy an indirect table (2.7.5.3, 2.8.7)."""
        if not self.indirect:
            raise RingError("an indirect descriptor without that feature")
        if not length or length % DESCRIPTOR_SIZE or length > MAX_QUEUE * DESCRIPTOR_SIZE:
            raise RingError(f"an indirect table of {length} bytes")
        return bytes(self._slice(address, length))

    def _note_filled(self, chain: Chain, written: int) -> None:
        """Have the memory's observers hear of what the device has filled."""
        runs: list[int] = []
        for offset, length in chain.places:
            if written <= 0:
                break
            runs += offset, min(length, written)
            written -= length
        if runs:
            table = (ctypes.c_uint64 * len(runs))(*runs)
            self.memory.dma_written_runs(ctypes.addressof(table), len(runs) // 2)

    def _tell(self, area: int, at: int, length: int) -> None:
        """Have the memory's observers hear of what we wrote ourselves to one of the areas."""
        self.memory.dma_written(self._areas[area] + at, length)

    def _fence(self) -> None:
        """Make our stores seen before anything is loaded: taking a lock is a full barrier."""
        with self._fence_lock:
            pass


DESCRIPTOR = struct.Struct("<QIHH")
"""Address, length, then flags and next (split, 2.7.5) or buffer ID and flags (packed, 2.8.13)."""
