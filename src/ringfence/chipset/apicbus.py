"""How interrupt messages travel: from the IOAPIC, an MSI or a local APIC to local APICs.

The bus resolves a destination (physical, logical, broadcast) to local APICs and hands them the
message by its delivery mode. It also carries EOI broadcasts back to the IOAPIC. INIT, SIPI and
NMI concern the CPU rather than its local APIC and leave through ``on_signal``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfence.chipset.lapic import Lapic

BROADCAST = 0xFFFF_FFFF
MSI_AREA = 0xFEE
"""Bits 20 and up of every message's address (SDM 3A 11.11.1)."""
ROUTES = 64
"""Addresses of messages whose targets are remembered."""
BROADCAST_8 = 0xFF
"""Everybody, as an 8-bit destination field says it (xAPIC ICR, IOAPIC, MSI)."""


class Delivery(IntEnum):
    """Delivery modes (SDM 3A 11.6.1, figure 11-12; 82093AA 3.2.4)."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    SIPI = 6
    EXTINT = 7


class ApicBus:
    """Connects the local APICs of one board.

    Attributes
    ----------
    lapics : list[Lapic]
        In order of CPU index.
    on_signal : Callable[[int, Delivery, int], None]
        Called with (cpu, NMI | INIT | SIPI | SMI, vector).
    on_eoi : Callable[[int], None]
        Called with the vector of each level-triggered interrupt that ends.
    """

    def __init__(self) -> None:
        self.lapics: list[Lapic] = []
        self.on_signal: Callable[[int, Delivery, int], None] = lambda cpu, mode, vector: None
        self.on_eoi: Callable[[int], None] = lambda vector: None
        self._routes: dict[int, list[Lapic]] = {}
        """By the address of messages, whom it means now."""

    def targets(self, destination: int, logical: bool) -> list[Lapic]:
        """Return the local APICs that a destination (`BROADCAST` for all) means."""
        if destination == BROADCAST:
            return list(self.lapics)
        return [lapic for lapic in self.lapics if lapic.matches(destination, logical)]

    def send(self, destination: int, *, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """Deliver a message with an 8-bit destination; return whether anybody took it."""
        if destination == BROADCAST_8:
            destination = BROADCAST
        return self.deliver(self.targets(destination, logical), mode, vector, level)

    def send_msi(self, address: int, data: int) -> None:
        """Deliver a message-signalled interrupt (SDM 3A 11.11); other addresses hear nothing."""
        if address >> 20 != MSI_AREA:
            return
        targets = self._routes.get(address)
        if targets is None:
            destination = address >> 12 & 0xFF
            if destination == BROADCAST_8:
                destination = BROADCAST
            if len(self._routes) == ROUTES:
                self._routes.clear()
            targets = self._routes[address] = self.targets(destination, bool(address & 4))
        self.deliver(targets, data >> 8 & 7, data & 0xFF, bool(data & 0x8000))

    def renamed(self) -> None:
        """Hear that a local APIC may answer to other destinations than before."""
        self._routes.clear()

    def deliver(self, targets: Iterable[Lapic], mode: int, vector: int, level: bool) -> bool:
        """Hand a message to ``targets``; return whether anybody took it."""
        if mode == Delivery.FIXED:
            taken = False
            for lapic in targets:
                if lapic.accepts_fixed:
                    lapic.accept(vector, level)
                    taken = True
            return taken
        if mode == Delivery.LOWEST_PRIORITY:
            able = [lapic for lapic in targets if lapic.accepts_fixed]
            if able:
                min(able, key=lambda lapic: lapic.ppr).accept(vector, level)
            return bool(able)
        if mode in (Delivery.SMI, Delivery.NMI, Delivery.INIT, Delivery.SIPI):
            taken = False
            for lapic in targets:
                if mode == Delivery.INIT:
                    lapic.reset_by_init()
                self.on_signal(lapic.cpu, Delivery(mode), vector)
                taken = True
            return taken
        return False
