"""Slots whose devices come and go while the guest runs: the registers behind ACPI's methods.

The DSDT has a device for each such slot, with _EJ0, and a method for the general-purpose event that
is raised here (`chipset.acpi`). The method reads which slots were filled and which are to be
emptied, and tells the operating system, which looks at the slot, or lets go of its device and
evaluates _EJ0. That writes to EJECT, and the device is gone. The registers are ours: they matter to
the DSDT alone.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.state import Saved

BASE, LENGTH = 0x620, 12
FILLED, WANTED, EJECT = 0, 4, 8
"""Offsets: slots that were filled, slots that are to be emptied (reading clears either), and slots
that the guest has let go of (written). A bit per slot."""
SLOTS = range(24, 32)
"""The last ones: what is there from the start is in the first. A kernel looks at each of these."""


class HotPlug(Saved):
    """The registers.

    Parameters
    ----------
    tell : Callable[[], None]
        Raises the event.
    eject : Callable[[int], None]
        Called with a slot that the guest has let go of.
    """

    FIELDS = ("filled", "wanted")

    def __init__(self, tell: Callable[[], None], eject: Callable[[int], None]) -> None:
        self._tell = tell
        self._eject = eject
        self.filled = 0
        self.wanted = 0

    def tell_filled(self, slot: int) -> None:
        """Have the guest look at a slot."""
        self.filled |= 1 << slot
        self._tell()

    def ask_for(self, slot: int) -> None:
        """Ask the guest to let go of what is in a slot."""
        self.wanted |= 1 << slot
        self._tell()

    def read(self, offset: int, size: int) -> int:
        """Read a register, and clear it; anything else is 0."""
        value = 0
        if (offset, size) == (FILLED, 4):
            value, self.filled = self.filled, 0
        elif (offset, size) == (WANTED, 4):
            value, self.wanted = self.wanted, 0
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write EJECT; slots that are not of these are passed over."""
        if (offset, size) == (EJECT, 4):
            for slot in SLOTS:
                if value >> slot & 1:
                    self._eject(slot)
