"""The transceiver (PHY) behind MDIC: 32 registers of 16 bits (13.4.7.1), a Marvell 88E1011.

The link is always at 1000 Mb/s, full duplex, and negotiation takes no time. What the owner may
change is whether the cable is plugged in.
"""

from __future__ import annotations

from ringfence.chipset.state import Saved
from ringfence.devices.e1000.registers import MDIC

ADDRESS = 1

# Registers of IEEE 802.3 clause 22, and the chip's own from 16 on.
PCTRL, PSTATUS, PID1, PID2, ANA, LPA, ANE = range(7)
GCON, GSTATUS, EPSTATUS, PSCON, PSSTAT = 9, 10, 15, 16, 17
IDENTIFIER = (0x0141, 0x0C20)


class PCTRLBits:
    """PHY control."""

    RESET = 1 << 15
    LOOPBACK = 1 << 14
    AUTO_NEGOTIATION = 1 << 12
    POWER_DOWN = 1 << 11
    RESTART = 1 << 9
    FULL_DUPLEX = 1 << 8
    SPEED_1000 = 1 << 6


class PSTATUSBits:
    """PHY status: abilities, and what the link is."""

    ABILITIES = 0x7949
    NEGOTIATED = 1 << 5
    LINK = 1 << 2


class PSSTATBits:
    """PHY-specific status."""

    SPEED_1000 = 2 << 14
    FULL_DUPLEX = 1 << 13
    RESOLVED = 1 << 11
    LINK = 1 << 10


_DEFAULTS = {
    PCTRL: PCTRLBits.AUTO_NEGOTIATION | PCTRLBits.FULL_DUPLEX | PCTRLBits.SPEED_1000,
    PID1: IDENTIFIER[0],
    PID2: IDENTIFIER[1],
    ANA: 0x0DE1,
    LPA: 0x41E1,  # the partner: 10 and 100 Mb/s, no pause frames
    ANE: 0x0001,
    GCON: 0x0300,
    GSTATUS: 0x3C00,  # the partner: 1000 Mb/s; both receivers fine
    EPSTATUS: 0x3000,
    PSCON: 0x0068,
}
_WRITABLE = {PCTRL: 0x7DC0, ANA: 0xFFFF, GCON: 0xFFFF, PSCON: 0xFFFF, 18: 0xFFFF, 20: 0xFFFF,
             29: 0xFFFF, 30: 0xFFFF}  # fmt: skip


class Phy(Saved):
    """The transceiver."""

    FIELDS = ("mdic", "registers", "link")

    def __init__(self) -> None:
        self.link = True
        """Whether the cable is plugged in."""
        self.mdic = MDIC.R
        self.registers = [0] * 32
        self.reset()

    def reset(self) -> None:
        """Be as after power-on, but for the cable."""
        self.registers = [_DEFAULTS.get(at, 0) for at in range(32)]

    @property
    def loopback(self) -> bool:
        """Whether what is sent comes back instead of going out."""
        return bool(self.registers[PCTRL] & PCTRLBits.LOOPBACK)

    def read_mdic(self) -> int:
        """Read MDIC."""
        return self.mdic

    def write_mdic(self, value: int) -> bool:
        """Write MDIC: does the access at once; True if it asks for an interrupt."""
        operation = value >> MDIC.OP_SHIFT & 3
        at = value >> MDIC.REGADD_SHIFT & 31
        present = value >> MDIC.PHYADD_SHIFT & 31 == ADDRESS
        self.mdic = value & ~(MDIC.R | MDIC.E) | MDIC.R
        if not present or operation not in (MDIC.OP_READ, MDIC.OP_WRITE):
            self.mdic |= MDIC.E
        elif operation == MDIC.OP_READ:
            self.mdic = self.mdic & ~MDIC.DATA | self._read(at)
        else:
            self._write(at, value & MDIC.DATA)
        return bool(value & MDIC.I)

    def _read(self, at: int) -> int:
        if at == PSTATUS:
            found = PSTATUSBits.NEGOTIATED | PSTATUSBits.LINK if self.link else 0
            return PSTATUSBits.ABILITIES | found
        if at == PSSTAT:
            link = PSSTATBits.LINK | PSSTATBits.RESOLVED if self.link else 0
            return PSSTATBits.SPEED_1000 | PSSTATBits.FULL_DUPLEX | link
        return self.registers[at]

    def _write(self, at: int, value: int) -> None:
        if at == PCTRL and value & PCTRLBits.RESET:
            self.reset()
            return
        mask = _WRITABLE.get(at, 0)
        if at == PCTRL:
            mask &= ~PCTRLBits.RESTART  # negotiation is done before it can be seen
        self.registers[at] = self.registers[at] & ~mask | value & mask
