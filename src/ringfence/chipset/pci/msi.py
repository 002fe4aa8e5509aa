"""Message-signalled interrupts: the MSI and the MSI-X capability (6.8).

Both hold, per vector, where to write what, whether it is masked, and whether it is pending. MSI
keeps that in configuration space; MSI-X keeps a table and the pending bits in a BAR of their own,
which the table object answers itself: nothing but the table can be reached through it.
A message is sent at most once per `signal`, and again when what was pending is unmasked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ringfence.chipset.pci.config import ConfigSpace, Register
from ringfence.chipset.state import Saved
from ringfence.errors import UsageError

SendMessage = Callable[[int, int], None]
"""Takes (address, data); drops it where the function may not master the bus."""


class Msi:
    """The MSI capability with 64-bit addresses and per-vector masking (6.8.1).

    Its state lies in configuration space. Vectors beyond those that the guest has enabled are sent
    as the last one that it has.
    """

    ID = 0x05
    # Message Control (6.8.1.3)
    ENABLE = 1 << 0
    MULTIPLE_MESSAGE_CAPABLE = 1
    """Shift of log2 of the vectors offered."""
    MULTIPLE_MESSAGE_ENABLE = 4
    """Shift of log2 of the vectors allowed."""
    ADDRESS_64 = 1 << 7
    PER_VECTOR_MASKING = 1 << 8

    def __init__(self, config: ConfigSpace, vectors: int, send: SendMessage) -> None:
        if vectors not in (1, 2, 4, 8, 16, 32):
            raise UsageError(f"{vectors} MSI vectors: expected a power of two up to 32")
        self._config = config
        self._send = send
        self._vectors = vectors
        capable = vectors.bit_length() - 1
        control = self.ADDRESS_64 | self.PER_VECTOR_MASKING
        control |= capable << self.MULTIPLE_MESSAGE_CAPABLE
        at = config.add_capability(self.ID, struct.pack("<HQHHII", control, 0, 0, 0, 0, 0))
        self.span = Register(at, 24)
        self.control = Register(at + 2, 2)
        self.address = Register(at + 4, 8)
        self.data = Register(at + 12, 2)
        self.mask = Register(at + 16, 4)
        self.pending = Register(at + 20, 4)
        config.allow(self.control, self.ENABLE | 7 << self.MULTIPLE_MESSAGE_ENABLE)
        config.allow(self.address, 0xFFFF_FFFF_FFFF_FFFC)
        config.allow(self.data, 0xFFFF)
        config.allow(self.mask, (1 << vectors) - 1)

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched MSI on (and thereby INTx off)."""
        return bool(self._config.get(self.control) & self.ENABLE)

    def signal(self, vector: int) -> None:
        """Send a vector's message, or remember that it is pending."""
        allowed = 1 << (self._config.get(self.control) >> self.MULTIPLE_MESSAGE_ENABLE & 7)
        count = min(allowed, self._vectors)
        vector = min(vector, count - 1)
        if self._config.get(self.mask) >> vector & 1:
            pending = self._config.get(self.pending) | 1 << vector
            self._config.set(self.pending, pending)
        else:
            data = self._config.get(self.data) & ~(count - 1) | vector
            self._send(self._config.get(self.address), data)

    def written(self) -> None:
        """After a write of the capability: what is no longer masked is sent."""
        if not self.enabled:
            return
        ready = self._config.get(self.pending) & ~self._config.get(self.mask)
        self._config.set(self.pending, self._config.get(self.pending) & ~ready)
        for vector in range(self._vectors):
            if ready >> vector & 1:
                self.signal(vector)


class MsiX(Saved):
    """The MSI-X capability (6.8.2), and the device behind the BAR with table and pending bits.

    Parameters
    ----------
    config : ConfigSpace
        Gets the capability.
    bar : int
        Number of the BAR; the table is at its start, the pending bits at its middle.
    vectors : int
        Entries of the table, 1 to 2048.
    send : SendMessage
        Takes messages.
    """

    FIELDS = ("table", "pending")
    ID = 0x11
    # Message Control (6.8.2.3), its upper byte
    FUNCTION_MASK = 1 << 6
    ENABLE = 1 << 7
    # A table entry (6.8.2.6 to 6.8.2.9): message address, upper address, data, vector control.
    ENTRY = struct.Struct("<QII")
    VECTOR_CONTROL_MASK = 1 << 0

    def __init__(self, config: ConfigSpace, bar: int, vectors: int, send: SendMessage) -> None:
        if not 1 <= vectors <= 2048:
            raise UsageError(f"{vectors} MSI-X vectors: expected 1 to 2048")
        self._config = config
        self._send = send
        self._vectors = vectors
        self.bar_size = 4096
        while self.bar_size < 2 * self.ENTRY.size * vectors:
            self.bar_size *= 2
        self._pba = self.bar_size // 2
        at = config.add_capability(self.ID, struct.pack("<HII", vectors - 1, bar, self._pba | bar))
        self.span = Register(at, 12)
        self._control = at + 3
        config.allow(Register(self._control, 1), self.FUNCTION_MASK | self.ENABLE)
        self.table = bytearray(self.ENTRY.pack(0, 0, self.VECTOR_CONTROL_MASK) * vectors)
        self.pending = 0
        """One bit per vector."""

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched MSI-X on (and thereby INTx off)."""
        return bool(self._config.raw[self._control] & self.ENABLE)

    def signal(self, vector: int) -> None:
        """Send a vector's message, or remember that it is pending; there may be no such vector."""
        if not 0 <= vector < self._vectors:
            return
        address, data, control = self.ENTRY.unpack_from(self.table, vector * self.ENTRY.size)
        masked = self._config.raw[self._control] & self.FUNCTION_MASK
        if masked or control & self.VECTOR_CONTROL_MASK:
            self.pending |= 1 << vector
        else:
            self.pending &= ~(1 << vector)
            self._send(address, data)

    def written(self) -> None:
        """After a write of the capability or the table: what is no longer masked is sent."""
        if not self.pending or not self.enabled:
            return
        for vector in range(self._vectors):
            if self.pending >> vector & 1:
                self.signal(vector)

    def read(self, offset: int, size: int) -> int:
        """Read the BAR."""
        if offset < len(self.table):
            return int.from_bytes(self.table[offset : offset + size], "little")
        if offset >= self._pba:
            return self.pending >> 8 * (offset - self._pba) & (1 << 8 * size) - 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the BAR; the table takes words of 32 or 64 bits, the pending bits nothing."""
        if offset + size > len(self.table) or size < 4:
            return
        if offset + size & 0xF == 0:
            value &= (self.VECTOR_CONTROL_MASK + 1 << 8 * (size - 4)) - 1
        self.table[offset : offset + size] = value.to_bytes(size, "little")
        self.written()
