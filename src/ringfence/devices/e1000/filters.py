"""Which frames the card takes from the wire (3.2.1, 9.3): receive addresses, hashes, VLANs.

The tables are kept as the words that software writes; the exact addresses are taken out of them at
each write, so that a look-up is one in a set.
"""

from __future__ import annotations

from ringfence.chipset.state import Saved
from ringfence.devices.e1000.registers import (
    ALL,
    MTA_WORDS,
    RA_WORDS,
    RAH,
    RCTL,
    VFTA_WORDS,
)

BROADCAST = b"\xff" * 6
_HASH_SHIFTS = (4, 3, 2, 0)
"""By RCTL.MO: the lowest of the twelve bits of an address's last 16 that select (13.5.1)."""


class Filters(Saved):
    """The tables RAL/RAH (``ra``), MTA and VFTA."""

    FIELDS = ("ra", "mta", "vfta")

    def __init__(self) -> None:
        self.reset(bytes(6))

    def reset(self, mac: bytes) -> None:
        """Empty all tables; the first address comes from the EEPROM."""
        self.mta = [0] * MTA_WORDS
        self.vfta = [0] * VFTA_WORDS
        self.ra = [0] * RA_WORDS
        self.ra[0] = int.from_bytes(mac[:4], "little")
        self.ra[1] = int.from_bytes(mac[4:], "little") | RAH.AV
        self.restored()

    def restored(self) -> None:
        """Derive the exact addresses."""
        self._exact = {
            self.ra[at].to_bytes(4, "little") + (self.ra[at + 1] & 0xFFFF).to_bytes(2, "little")
            for at in range(0, RA_WORDS, 2)
            if self.ra[at + 1] & RAH.AV and not self.ra[at + 1] & RAH.AS
        }

    def read(self, table: str, index: int) -> int:
        """Read a word of ``ra``, ``mta`` or ``vfta``."""
        words: list[int] = getattr(self, table)
        return words[index]

    def write(self, table: str, index: int, value: int) -> None:
        """Write a word of ``ra``, ``mta`` or ``vfta``."""
        mask = RAH.WRITABLE if table == "ra" and index & 1 else ALL
        getattr(self, table)[index] = value & mask
        self.restored()

    def accepts(self, frame: bytes, rctl: int) -> bool:
        """Tell whether a frame's destination is ours."""
        destination = frame[:6]
        if destination in self._exact:
            return True
        if not frame[0] & 1:
            return bool(rctl & RCTL.UPE)
        if rctl & RCTL.MPE or (rctl & RCTL.BAM and destination == BROADCAST):
            return True
        last = int.from_bytes(frame[4:6], "little")
        bit = last >> _HASH_SHIFTS[rctl >> RCTL.MO_SHIFT & 3] & 0xFFF
        return bool(self.mta[bit >> 5] >> (bit & 31) & 1)

    def accepts_vlan(self, tag: int, rctl: int) -> bool:
        """Tell whether a tag's VLAN is ours; only asked if RCTL.VFE is set."""
        if rctl & RCTL.CFIEN and bool(tag & 0x1000) != bool(rctl & RCTL.CFI):
            return False
        identifier = tag & 0xFFF
        return bool(self.vfta[identifier >> 5] >> (identifier & 31) & 1)
