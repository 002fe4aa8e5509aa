"""A PS/2 keyboard that nobody types on: it answers what drivers ask when they start.

Firmware and systems that look for a keyboard wait for its answers, some for minutes (U-Boot)
or for ever. The commands are those of the IBM PS/2 keyboard; scan codes never come.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-key)", commands.
"""

from __future__ import annotations

from ringfence.chipset.state import Saved

ACKNOWLEDGE, RESEND, PASSED = 0xFA, 0xFE, 0xAA
SET_LEDS, ECHO, SCAN_CODES, IDENTIFY, TYPEMATIC = 0xED, 0xEE, 0xF0, 0xF2, 0xF3
ENABLE, DISABLE, SET_DEFAULTS, ALL_TYPEMATIC, LAST_PLAIN = 0xF4, 0xF5, 0xF6, 0xF7, 0xFA
RESET = 0xFF
IDENTITY = bytes((0xAB, 0x83))
DEFAULT_CODES = 2
"""Set of scan codes after a reset."""


class Keyboard(Saved):
    """What a keyboard says to bytes from its controller."""

    FIELDS = ("expecting", "codes")

    def __init__(self) -> None:
        self.expecting = 0
        """The command whose argument comes next, or 0."""
        self.codes = DEFAULT_CODES

    def receive(self, value: int) -> bytes:
        """Take a command or its argument; the answer, at most three bytes."""
        expecting, self.expecting = self.expecting, 0
        if expecting and value < SET_LEDS:
            if expecting == SCAN_CODES and value == 0:
                return bytes((ACKNOWLEDGE, self.codes))
            if expecting == SCAN_CODES:
                self.codes = value & 3 or DEFAULT_CODES
            return bytes((ACKNOWLEDGE,))
        if value in (SET_LEDS, SCAN_CODES, TYPEMATIC):
            self.expecting = value
        elif value == ECHO:
            return bytes((ECHO,))
        elif value == IDENTIFY:
            return bytes((ACKNOWLEDGE, *IDENTITY))
        elif value == RESET:
            self.codes = DEFAULT_CODES
            return bytes((ACKNOWLEDGE, PASSED))
        elif value == SET_DEFAULTS:
            self.codes = DEFAULT_CODES
        elif value not in (ENABLE, DISABLE) and not ALL_TYPEMATIC <= value <= LAST_PLAIN:
            return bytes((RESEND,))
        return bytes((ACKNOWLEDGE,))
