"""The card's EEPROM: 64 words on a Microwire bus (chapter 5), read in two ways.

EERD reads a word at a time. Through EECD software drives the chip's pins itself, as drivers of the
8254x do: chip select, clock and data in, one bit per rising clock edge; a start bit, two bits of
opcode and six of address lead to sixteen bits of data out, and on to the next word. The contents
are ours to say; writes are refused, as by a chip whose write-enable latch is never set.
"""

from __future__ import annotations

import struct

from ringfence.chipset.state import Saved
from ringfence.devices.e1000.registers import EECD, EERD

WORDS = 64
ADDRESS_BITS = 6
CHECKSUM = 0xBABA
"""What all words sum up to (5.6.35)."""
_COMMAND_BITS = 3 + ADDRESS_BITS
_READ = 0b110
"""Start bit and opcode."""

# Words that are not zero (table 5-2); 0 to 2 are the Ethernet address, 63 makes the checksum.
_CONTENTS = {
    0x05: 0x0100,  # EEPROM version
    0x0A: 0x4003,  # initialization control 1: signature, load the four identifiers
    0x0B: 0x001E,
    0x0C: 0x8086,
    0x0D: 0x100E,
    0x0E: 0x8086,
    0x0F: 0x3000,  # initialization control 2: PAUSE capability
}


class Eeprom(Saved):
    """The chip, its contents made from the card's Ethernet address."""

    FIELDS = ("eecd", "eerd", "command", "bits", "out")

    def __init__(self, mac: bytes) -> None:
        words = [0] * WORDS
        words[0:3] = struct.unpack("<3H", mac)
        for at, value in _CONTENTS.items():
            words[at] = value
        words[-1] = CHECKSUM - sum(words) & 0xFFFF
        self.words = tuple(words)
        self.reset()

    def reset(self) -> None:
        """Be as after power-on."""
        self.eecd = 0
        self.eerd = 0
        self.command = 0
        """Bits shifted in since chip select rose."""
        self.bits = 0
        """How many; counts on while data is shifted out."""
        self.out = 1
        """The data-out pin."""

    def read_eerd(self) -> int:
        """Read EERD."""
        return self.eerd

    def write_eerd(self, value: int) -> None:
        """Write EERD: START reads a word at once; beyond the last one there is nothing."""
        if value & EERD.START:
            address = value >> EERD.ADDR_SHIFT & 0xFF
            word = self.words[address] if address < WORDS else 0xFFFF
            self.eerd = word << EERD.DATA_SHIFT | address << EERD.ADDR_SHIFT | EERD.DONE

    def read_eecd(self) -> int:
        """Read EECD: the bus is granted to whoever asks."""
        granted = EECD.GNT if self.eecd & EECD.REQ else 0
        out = EECD.DO if self.out else 0
        return self.eecd | granted | out | EECD.PRES | EECD.FWE_DISABLED

    def write_eecd(self, value: int) -> None:
        """Drive the pins."""
        was, self.eecd = self.eecd, value & (EECD.SK | EECD.CS | EECD.DI | EECD.REQ)
        if not self.eecd & EECD.CS:
            self.command = self.bits = 0
            self.out = 1
        elif self.eecd & ~was & EECD.SK:
            self._clock(bool(value & EECD.DI))

    def _clock(self, bit: bool) -> None:
        """Do what a rising clock edge does."""
        if self.bits < _COMMAND_BITS:
            if not self.bits and not bit:
                return  # still waiting for the start bit
            self.command = self.command << 1 | bit
            self.bits += 1
            if self.bits == _COMMAND_BITS:
                self.out = 0
            return
        if self.command >> ADDRESS_BITS != _READ:
            return
        at = self.bits - _COMMAND_BITS
        word = self.words[(self.command + at // 16) % WORDS]
        self.out = word >> 15 - at % 16 & 1
        self.bits = _COMMAND_BITS + (at + 1) % (16 * WORDS)
