"""A board with one device of each kind in its slots, and the guest's ways to reach them."""

from __future__ import annotations

import pytest

from chipset.conftest import Rig
from ringfence.chipset.pci.config import Identity
from ringfence.chipset.pci.device import PciDevice, Space


class Card(PciDevice):
    """A device with all kinds of BARs that records accesses."""

    FIELDS = (*PciDevice.FIELDS, "value")

    def __init__(self) -> None:
        super().__init__(Identity(0x1234, 0x5678, 0x020000, 3, 0x1AF4, 0x1100))
        self.value = 0
        self.log: list[tuple[int, ...]] = []
        self.add_bar(0, 0x1000)
        self.add_bar(1, 0x40, Space.IO)
        self.add_bar(2, 0x10000, Space.MEMORY_64, prefetchable=True)
        self.add_msix(4, 3)
        self.add_msi(4)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.log.append((bar, offset, size))
        return offset + 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.log.append((bar, offset, size, value))


class Bench(Rig):
    """A rig with a card in slot 1, and configuration accesses."""

    def __init__(self) -> None:
        super().__init__()
        self.card = Card()
        assert self.board.plug(self.card) == 1
        self.apic(0xF0, 0x1FF)

    def get(self, offset: int, size: int = 4, slot: int = 1) -> int:
        self.board.port_write(0xCF8, 4, 0x80000000 | slot << 11 | offset & 0xFC)
        return self.board.port_read(0xCFC + (offset & 3), size)

    def put(self, offset: int, value: int, size: int = 4, slot: int = 1) -> None:
        self.board.port_write(0xCF8, 4, 0x80000000 | slot << 11 | offset & 0xFC)
        self.board.port_write(0xCFC + (offset & 3), size, value)

    def capability(self, identifier: int, slot: int = 1) -> int:
        at = self.get(0x34, 1, slot)
        while at and self.get(at, 1, slot) != identifier:
            at = self.get(at + 1, 1, slot)
        return at

    def taken(self) -> int | None:
        """Take an interrupt and end it."""
        vector = self.take()
        self.apic(0xB0, 0)
        return vector

    def place(self) -> None:
        """Put the BARs somewhere and switch everything on."""
        self.put(0x10, 0xC0000000)
        self.put(0x14, 0xC000)
        self.put(0x18, 0xD0000000)
        self.put(0x20, 0xC0010000)
        self.put(0x04, 7, 2)


@pytest.fixture
def bench() -> Bench:
    return Bench()
