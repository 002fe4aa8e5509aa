"""A descriptor ring: base, length, head and tail (3.2.6, 3.4), and when they make no sense.

Software owns the tail, hardware the head; the ring is empty when they are equal. Software may write
anything into all of these registers at any time, the tail even while descriptors are worked on, as
native code stores to it (`memory.registers`): `ready`, `available` and `pending` say whether there
is work that can be done, each by one look at it.
"""

from __future__ import annotations

from typing import Any

from ringfence.chipset.state import Saved
from ringfence.devices.e1000.registers import ALL, Ring
from ringfence.memory.ram import GuestMemory

DESCRIPTOR = 16


class DescriptorRing(Saved):
    """One ring.

    Parameters
    ----------
    registers : int
        The offset of its registers.
    tail : view of `memory.registers.Register`
        The tail's.
    """

    FIELDS = ("base", "length", "head", "tail", "failed")

    def __init__(self, memory: GuestMemory, registers: int, tail: Any) -> None:
        self._memory = memory
        self._tail = tail
        self.registers = registers
        self.reset()

    def reset(self) -> None:
        """Be as after power-on."""
        self.base = self.length = self.head = 0
        self.tail = 0
        self.failed = False
        """A master abort has stopped the engine."""

    @property
    def tail(self) -> int:
        """Behind the last descriptor that is the card's, as software has it."""
        return int(self._tail.value)

    @tail.setter
    def tail(self, value: int) -> None:
        self._tail.value = value & Ring.INDEX

    @property
    def count(self) -> int:
        """Descriptors in the ring."""
        return self.length // DESCRIPTOR

    @property
    def ready(self) -> bool:
        """Whether there is something to do."""
        return bool(self.available)

    @property
    def available(self) -> int:
        """Descriptors from head to tail; 0 if either lies outside the ring, or it has failed."""
        head, tail, count = self.head, self.tail, self.count
        return (tail - head) % count if head < count > tail and not self.failed else 0

    def pending(self, most: int) -> int:
        """Return how many descriptors, up to ``most``, are there to be done in a row."""
        available = self.available
        return min(most, available, self.count - self.head) if available else 0

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
