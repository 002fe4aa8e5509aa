"""A descriptor ring: base, length, head and tail (3.2.6, 3.4), and when they make no sense.

Software owns the tail, hardware the head; the ring is empty when they are equal. Software may write
anything into all of these registers at any time: `ready` and `pending` say whether there is work
that can be done, with the values as they are now.
"""

from __future__ import annotations

from ringfence.chipset.state import Saved
from ringfence.devices.e1000.registers import ALL, Ring
from ringfence.memory.ram import GuestMemory

DESCRIPTOR = 16


class DescriptorRing(Saved):
    """One ring; ``registers`` is the offset of its registers."""

    FIELDS = ("base", "length", "head", "tail", "failed")

    def __init__(self, memory: GuestMemory, registers: int) -> None:
        self._memory = memory
        self.registers = registers
        self.reset()

    def reset(self) -> None:
        """Be as after power-on."""
        self.base = self.length = self.head = self.tail = 0
        self.failed = False
        """A master abort has stopped the engine."""

    @property
    def count(self) -> int:
        """Descriptors in the ring."""
        return self.length // DESCRIPTOR

    @property
    def sound(self) -> bool:
        """Whether head and tail lie in the ring."""
        count = self.count
        return self.head < count and self.tail < count and not self.failed

    @property
    def ready(self) -> bool:
        """Whether there is something to do."""
        return self.head != self.tail and self.sound

    @property
    def available(self) -> int:
        """Descriptors from head to tail; 0 if head or tail lie outside the ring."""
        return (self.tail - self.head) % self.count if self.ready else 0

    def pending(self, most: int) -> int:
        """Return how many descriptors, up to ``most``, are there to be done in a row."""
        if not self.ready:
            return 0
        end = self.tail if self.tail > self.head else self.count
        return min(most, end - self.head)

    @property
    def address(self) -> int:
        """Guest-physical address of the descriptor at the head."""
        return self.base + self.head * DESCRIPTOR

    def advance(self, count: int) -> None:
        """Move the head on."""
        self.head += count
        if self.head >= self.count:
            self.head = 0

    # ---- registers

    def read(self, register: int) -> int:
        """Read the register at that offset from the ring's own base."""
        match register:
            case Ring.BAL:
                return self.base & ALL
            case Ring.BAH:
                return self.base >> 32
            case Ring.LEN:
                return self.length
            case Ring.HEAD:
                return self.head
            case _:
                return self.tail

    def write(self, register: int, value: int) -> None:
        """Write one of them, but the tail, which sets the engine going."""
        match register:
            case Ring.BAL:
                self.base = self.base & ~ALL | value & Ring.BAL_WRITABLE
            case Ring.BAH:
                self.base = self.base & ALL | (value & ALL) << 32
            case Ring.LEN:
                self.length = value & Ring.LEN_WRITABLE
            case _:
                self.head = value & Ring.INDEX
