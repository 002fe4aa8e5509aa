"""PCI configuration mechanism #1, with a host bridge as device 0 of bus 0.

Ports 0xcf8-0xcff (PCI Local Bus 3.0, 3.2.2.3.2). CONFIG_ADDRESS answers only 32-bit accesses; a
byte at 0xcf9 is the chipset's reset control instead, as on every PC. Functions that are plugged
in answer for their own configuration space; where there is none, reads give all ones.
"""

from __future__ import annotations

from typing import Protocol

from ringfence.chipset.bus import Device, PortBus
from ringfence.chipset.state import Saved
from ringfence.errors import UsageError

BASE, LENGTH = 0xCF8, 8
ENABLE = 1 << 31
SLOTS = 32
FIRST_GSI = 16
"""PCI interrupts use GSI 16-19, level-triggered."""


class PciFunction(Protocol):
    """Something with a configuration space of 256 bytes."""

    def config_read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes at ``offset``."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Store ``size`` bytes at ``offset``."""


class HostBridge:
    """00:00.0, read-only: an Intel 82441FX by its identity, with nothing to configure."""

    def __init__(self) -> None:
        self._config = bytes.fromhex("86803712 00000000 02000006 00000000").ljust(256, b"\0")

    def config_read(self, offset: int, size: int) -> int:
        """See `PciFunction.config_read`."""
        return int.from_bytes(self._config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Ignore the write."""


def gsi_of(slot: int, pin: int) -> int:
    """Return the GSI of a slot's interrupt pin (0 = INTA#), as the DSDT's _PRT tells it."""
    return FIRST_GSI + (slot + pin) % 4


class PciHost(Saved):
    """CONFIG_ADDRESS and CONFIG_DATA.

    Parameters
    ----------
    reset_control : Device
        Answers byte accesses at 0xcf9.
    """

    FIELDS = ("address",)

    def __init__(self, reset_control: Device) -> None:
        self._reset_control = reset_control
        self.address = 0
        self._functions: dict[tuple[int, int], PciFunction] = {(0, 0): HostBridge()}

    def attach(self, ports: PortBus) -> None:
        """Take the ports 0xcf8-0xcff."""
        ports.register(BASE, LENGTH, self)

    def plug(self, slot: int, function: PciFunction, number: int = 0) -> None:
        """Put a function into a slot of bus 0."""
        if not 0 < slot < SLOTS or not 0 <= number < 8 or (slot, number) in self._functions:
            raise UsageError(f"PCI slot {slot:#x}.{number} is taken or absent: expected 1-31.0-7")
        self._functions[slot, number] = function

    def read(self, offset: int, size: int) -> int:
        """Read CONFIG_ADDRESS, CONFIG_DATA or the reset control."""
        if offset >= 4:
            function = self._selected()
            if function is not None:
                at = self.address & 0xFC | offset & 3
                return function.config_read(at, size) & (1 << 8 * size) - 1
        elif size == 4:
            return self.address
        elif (offset, size) == (1, 1):
            return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write CONFIG_ADDRESS, CONFIG_DATA or the reset control."""
        if offset >= 4:
            function = self._selected()
            if function is not None:
                function.config_write(self.address & 0xFC | offset & 3, size, value)
        elif size == 4:
            self.address = value & 0x80FF_FFFC
        elif (offset, size) == (1, 1):
            self._reset_control.write(0, 1, value)

    def _selected(self) -> PciFunction | None:
        """Return the function that CONFIG_ADDRESS names, if it is there."""
        if not self.address & ENABLE or self.address >> 16 & 0xFF:
            return None
        return self._functions.get((self.address >> 11 & 0x1F, self.address >> 8 & 7))
