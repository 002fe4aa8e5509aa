"""The I/O APIC: 82093AA registers, 24 pins, version 0x20 (with an EOI register).

Each pin's redirection entry is a 64-bit int. ``lines`` holds the pins' levels as a bit mask.
Polarity is kept but not acted upon: `set_irq` says "asserted", whatever voltage that is.
An edge on a masked pin is lost, as on the chip (82093AA 3.4.2).
"""

from __future__ import annotations

from ringfence.chipset.apicbus import ApicBus, Delivery
from ringfence.chipset.state import Saved

BASE = 0xFEC0_0000
LENGTH = 0x1000
PINS = 24
VERSION = 0x20 | (PINS - 1) << 16

IOREGSEL, IOWIN, IOEOI = 0x00, 0x10, 0x40
"""Register offsets (82093AA 3.1; EOI register: ICH9 13.5.4)."""

# Redirection table entry (82093AA 3.2.4).
LOGICAL = 1 << 11
DELIVERY_STATUS = 1 << 12
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
_READ_ONLY = DELIVERY_STATUS | REMOTE_IRR
_DEFINED = 0xFF00_0000_0001_FFFF


class IoApic(Saved):
    """The board's only I/O APIC, at GSI 0.

    Parameters
    ----------
    bus : ApicBus
        Takes the messages.
    """

    FIELDS = ("identifier", "select", "entries", "lines")

    def __init__(self, bus: ApicBus) -> None:
        self._bus = bus
        self.identifier = 0
        self.select = 0
        self.entries = [MASKED] * PINS
        self.lines = 0

    def set_irq(self, pin: int, asserted: bool) -> None:
        """Drive an input pin."""
        bit = 1 << pin
        if not asserted:
            self.lines &= ~bit
        elif not self.lines & bit:
            self.lines |= bit
            self._deliver(pin)

    def end_of_interrupt(self, vector: int) -> None:
        """Hear an EOI: level-triggered pins of that vector may interrupt again."""
        for pin, entry in enumerate(self.entries):
            if entry & 0xFF == vector and entry & REMOTE_IRR:
                self.entries[pin] = entry & ~REMOTE_IRR
                if self.lines >> pin & 1:
                    self._deliver(pin)

    def routes_extint(self, cpu: int) -> bool:
        """Tell whether pin 0, wired to the 8259, passes its interrupts on to ``cpu``."""
        entry = self.entries[0]
        if entry & (MASKED | 0x700) != Delivery.EXTINT << 8:
            return False
        destination = entry >> 56
        lapic = self._bus.lapics[cpu]
        return destination == 0xFF or lapic.matches(destination, bool(entry & LOGICAL))

    def _deliver(self, pin: int) -> None:
        entry = self.entries[pin]
        if entry & (MASKED | REMOTE_IRR):
            return
        level = bool(entry & LEVEL)
        taken = self._bus.send(
            entry >> 56,
            logical=bool(entry & LOGICAL),
            mode=entry >> 8 & 7,
            vector=entry & 0xFF,
            level=level,
        )
        if level and taken and entry >> 8 & 7 in (Delivery.FIXED, Delivery.LOWEST_PRIORITY):
            self.entries[pin] |= REMOTE_IRR

    def read(self, offset: int, size: int) -> int:
        """Read the register page."""
        if offset & ~3 == IOREGSEL:
            value = self.select
        elif offset & ~3 == IOWIN:
            value = self._read_selected()
        else:
            value = 0
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the register page; only IOREGSEL and EOI may be written as a byte."""
        if offset == IOREGSEL:
            self.select = value & 0xFF
        elif offset == IOEOI:
            self.end_of_interrupt(value & 0xFF)
        elif offset == IOWIN and size >= 4:
            self._write_selected(value & 0xFFFF_FFFF)

    def _read_selected(self) -> int:
        pin, high = divmod(self.select - 0x10, 2)
        if 0 <= pin < PINS:
            return self.entries[pin] >> 32 * high & 0xFFFF_FFFF
        if self.select in (0, 2):  # IOAPICID, IOAPICARB
            return self.identifier << 24
        return VERSION if self.select == 1 else 0

    def _write_selected(self, value: int) -> None:
        pin, high = divmod(self.select - 0x10, 2)
        if self.select == 0:
            self.identifier = value >> 24 & 0xF
        if not 0 <= pin < PINS:
            return
        entry = self.entries[pin]
        if high:
            self.entries[pin] = entry & 0xFFFF_FFFF | (value << 32 & _DEFINED)
            return
        entry = entry & ~0xFFFF_FFFF | value & _DEFINED & ~_READ_ONLY | entry & _READ_ONLY
        if not entry & LEVEL:
            entry &= ~REMOTE_IRR
        self.entries[pin] = entry
        if entry & LEVEL and self.lines >> pin & 1:
            self._deliver(pin)
