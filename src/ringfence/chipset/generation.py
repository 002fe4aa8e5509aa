"""The VM generation ID: a number that the guest can see, and that changes when its past forks.

A guest that goes on from a snapshot, perhaps one of many, has the random state, keys and counters
of all others that do. The number, of 16 random bytes, is another one each time; it stays the same
over pauses, resets and migrations, where there is still one machine. An operating system that is
told of a change stirs its random number generator.

Source: Microsoft, "Virtual Machine Generation ID", August 2012. The number may be in RAM, ROM or a
device, in pages of its own. Here it is a device's read-only registers: nothing the guest or a
firmware does can move or change it, and no page of RAM is written when it changes.
"""

from __future__ import annotations

from ringfence.chipset.state import Saved, State
from ringfence.errors import ImageError

BASE, LENGTH = 0xFED5_0000, 0x1000
"""A page between the I/O APIC and the local APICs, where PCs have chipset devices."""
ID_BYTES = 16


class GenerationId(Saved):
    """The registers; the rest of the page reads as zeroes.

    Parameters
    ----------
    identity : bytes
        The 16 bytes that the machine has for all its life on this board.

    Raises
    ------
    ImageError
        They aren't 16: a machine's description was damaged.
    """

    FIELDS = ("identity",)

    def __init__(self, identity: bytes) -> None:
        if len(identity) != ID_BYTES:
            raise ImageError(f"a generation ID of {len(identity)} bytes: expected {ID_BYTES}")
        self.identity = identity
        self.changed = False
        """Whether the guest, when it was saved, knew another number."""

    def read(self, offset: int, size: int) -> int:
        """Read any part of the page."""
        return int.from_bytes(self.identity[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Do nothing: the registers are read-only."""

    def restore(self, state: State) -> None:
        """See `Saved.restore`: the machine keeps its own number, and notes whether it is new."""
        own = self.identity
        super().restore(state)
        self.changed = self.identity != own
        self.identity = own
