"""The split virtqueue (2.7): descriptor table, available ring, used ring.

The driver's ring is a list of heads of chains through the table; the device's ring a list of the
heads it is done with, and how much it has written. Each ring's index counts modulo 65536.
"""

from __future__ import annotations

from ringfence.devices.virtio.ring import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    INDIRECT,
    MAX_QUEUE,
    NEXT,
    Chain,
    Ring,
    RingError,
)
from ringfence.memory.ram import GuestMemory

# Available ring (2.7.6) and used ring (2.7.8), in 16-bit items: flags, index, entries.
FLAGS, INDEX, ENTRIES = 0, 1, 2
NO_INTERRUPT, NO_NOTIFY = 1, 1


class SplitRing(Ring):
    """A split virtqueue; see `ring.Ring`."""

    FIELDS = ("last_avail", "used_index", "signalled")

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
        if not 0 < size <= MAX_QUEUE or size & size - 1:
            raise RingError(f"a split ring of {size} descriptors: expected a power of two")
        self._descriptors = self._area(0, DESCRIPTOR_SIZE * size, 16)
        self._avail = self._area(1, 6 + 2 * size, 2).cast("H")
        self._used = self._area(2, 6 + 8 * size, 4).cast("H")
        self._elements = self._area(2, 4 + 8 * size, 4)[4:].cast("I")
        self.last_avail = 0
        """Index of the next available entry to look at."""
        self.used_index = 0
        """Index of the next used entry to fill."""
        self.signalled = 0
        """The used index that `flush` has published."""

    def pop(self) -> Chain | None:
        """See `Ring.pop`."""
        waiting = self._avail[INDEX] - self.last_avail & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise RingError(f"{waiting} chains in a ring of {self.size}")
        head = self._avail[ENTRIES + (self.last_avail & self.size - 1)]
        self.last_avail = self.last_avail + 1 & 0xFFFF
        return self._walk(head)

    def _walk(self, head: int) -> Chain:
        chain = Chain(head)
        table: bytes | memoryview = self._descriptors
        size, index, left = self.size, head, self.size
        while True:
            if index >= size:
                raise RingError(f"descriptor {index} of a table of {size}")
            if not left:
                raise RingError("a chain that runs in a circle")
            left -= 1
            address, length, flags, following = DESCRIPTOR.unpack_from(
                table, index * DESCRIPTOR_SIZE
            )
            if flags & INDIRECT:
                if table is not self._descriptors or flags & NEXT:
                    raise RingError("an indirect descriptor inside an indirect table, or not last")
                table = self._table(address, length)
                size = left = length // DESCRIPTOR_SIZE
                index = 0
                continue
            self._add(chain, address, length, flags)
            if not flags & NEXT:
                return chain
            index = following

    def unpop(self, chain: Chain) -> None:
        """See `Ring.unpop`."""
        del chain
        self.last_avail = self.last_avail - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """See `Ring.push`."""
        self._note_given(chain, written)
        at = 2 * (self.used_index & self.size - 1)
        self._elements[at] = chain.identifier
        self._elements[at + 1] = written
        self.used_index = self.used_index + 1 & 0xFFFF

    def flush(self) -> bool:
        """See `Ring.flush`."""
        old, new = self.signalled, self.used_index
        if old == new:
            return False
        self._used[INDEX] = new
        self.signalled = new
        self._tell(2, 0, 4 + 8 * self.size)
        self._fence()
        if not self.event_idx:
            return not self._avail[FLAGS] & NO_INTERRUPT
        event = self._avail[ENTRIES + self.size]
        return new - event - 1 & 0xFFFF < new - old & 0xFFFF

    def want_kicks(self, wanted: bool) -> bool:
        """See `Ring.want_kicks`."""
        if not self.event_idx:
            self._used[FLAGS] = 0 if wanted else NO_NOTIFY
            self._tell(2, 0, 2)
        elif wanted:
            self._used[ENTRIES + 4 * self.size] = self.last_avail
            self._tell(2, 4 + 8 * self.size, 2)
        if not wanted:
            return False
        self._fence()
        return self._avail[INDEX] != self.last_avail
