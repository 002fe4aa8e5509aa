"""The packed virtqueue (2.8): one ring of descriptors that both sides write.

Whether a descriptor is the driver's or the device's is told by two flags in it, compared with a
wrap counter that each side flips when it passes the ring's end. A chain takes consecutive
descriptors; the device gives it back by overwriting one of them with the chain's ID.
"""

from __future__ import annotations

from ringfence.devices.virtio.ring import DESCRIPTOR, Chain, Ring, RingError
from ringfence.devices.virtio.rules import DESCRIPTOR_SIZE, INDIRECT, MAX_QUEUE, NEXT, WRITE
from ringfence.memory.ram import GuestMemory

AVAIL, USED = 1 << 7, 1 << 15
"""Descriptor flags (2.8.1)."""
# Event suppression structures (2.8.14), in 16-bit items: offset and wrap counter, flags.
OFFSET, FLAGS = 0, 1
ENABLE, DISABLE, SPECIFIC = 0, 1, 2
WRAP = 1 << 15
FLAGS_ITEM = 7
"""Of the eight 16-bit items of a descriptor, its flags."""


class PackedRing(Ring):
    """A packed virtqueue; see `ring.Ring`."""

    FIELDS = ("next_avail", "avail_wrap", "next_used", "used_wrap", "unsignalled")

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: int,
        driver: int,
        device: int,
        features: int,
    ) -> None:
        super().__init__(memory, size, descriptors, driver, device, features)
        if not 0 < size <= MAX_QUEUE:
            raise RingError(f"a packed ring of {size} descriptors: expected 1 to {MAX_QUEUE}")
        self._descriptors = self._area(0, DESCRIPTOR_SIZE * size, 16)
        self._items = self._descriptors.cast("H")
        self._words = self._descriptors.cast("I")
        self._driver_events = self._area(1, 4, 4).cast("H")
        self._device_events = self._area(2, 4, 4).cast("H")
        self._given = 0
        self.next_avail = 0
        self.avail_wrap = True
        self.next_used = 0
        self.used_wrap = True
        self.unsignalled = 0
        """Used descriptors that `flush` has not told of yet."""

    @property
    def given(self) -> int:
        """See `Ring.given`."""
        return self._given

    def _available(self) -> bool:
        flags = self._items[8 * self.next_avail + FLAGS_ITEM]
        return bool(flags & AVAIL) == self.avail_wrap != bool(flags & USED)

    def pop(self) -> Chain | None:
        """See `Ring.pop`."""
        if not self._available():
            return None
        chain = Chain(0)
        chain.count = 0
        while True:
            if chain.count == self.size:
                raise RingError("a chain that is longer than its ring")
            at = self.next_avail
            address, length, identifier, flags = DESCRIPTOR.unpack_from(
                self._descriptors, at * DESCRIPTOR_SIZE
            )
            chain.count += 1
            self.next_avail = at + 1
            if self.next_avail == self.size:
                self.next_avail = 0
                self.avail_wrap = not self.avail_wrap
            if flags & INDIRECT:
                if flags & NEXT or chain.count > 1:
                    raise RingError("an indirect descriptor in a chain")
                table = self._table(address, length)
                for entry in range(0, length, DESCRIPTOR_SIZE):
                    inner, part, _, inner_flags = DESCRIPTOR.unpack_from(table, entry)
                    self._add(chain, inner, part, inner_flags)
            else:
                self._add(chain, address, length, flags)
            if not flags & NEXT:
                chain.identifier = identifier
                return chain

    def unpop(self, chain: Chain) -> None:
        """See `Ring.unpop`."""
        self.next_avail -= chain.count
        if self.next_avail < 0:
            self.next_avail += self.size
            self.avail_wrap = not self.avail_wrap

    def push(self, chain: Chain, written: int) -> None:
        """See `Ring.push`; the guest sees it at once, `flush` decides about the interrupt."""
        self._note_filled(chain, written)
        self._given += 1
        at = self.next_used
        self._words[4 * at + 2] = written
        self._items[8 * at + 6] = chain.identifier
        flags = (AVAIL | USED if self.used_wrap else 0) | (WRITE if written else 0)
        self._items[8 * at + FLAGS_ITEM] = flags
        self._tell(0, DESCRIPTOR_SIZE * at, DESCRIPTOR_SIZE)
        self.unsignalled += chain.count
        self.next_used += chain.count
        if self.next_used >= self.size:
            self.next_used -= self.size
            self.used_wrap = not self.used_wrap

    def flush(self) -> bool:
        """See `Ring.flush`."""
        count, self.unsignalled = self.unsignalled, 0
        if not count:
            return False
        self._fence()
        flags = self._driver_events[FLAGS]
        if flags == DISABLE:
            return False
        if flags != SPECIFIC or not self.event_idx:
            return True
        offset = self._driver_events[OFFSET]
        event = offset & ~WRAP
        if bool(offset & WRAP) != self.used_wrap:
            event -= self.size
        # The driver waits for the descriptor at `event`: was it among the last `count` used ones?
        return 0 <= self.next_used - event - 1 < count

    def want_kicks(self, wanted: bool) -> bool:
        """See `Ring.want_kicks`."""
        events = self._device_events
        if not wanted:
            events[FLAGS] = DISABLE
            self._tell(2, 0, 4)
            return False
        if self.event_idx:
            events[OFFSET] = self.next_avail | (WRAP if self.avail_wrap else 0)
            events[FLAGS] = SPECIFIC
        else:
            events[FLAGS] = ENABLE
        self._tell(2, 0, 4)
        self._fence()
        return self._available()
