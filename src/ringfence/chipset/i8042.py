"""The keyboard controller (8042) with a keyboard that nobody types on, and no mouse.

ACPI says that there is none, so Linux doesn't look; a guest that does look finds a controller that
passes its self-test and a keyboard that answers, with interrupts if the guest wants them. What
matters most is the reset line, pulsed by command 0xfe, and port 0x92, which does the same on later
PCs. A20 is always open.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.bus import PortBus
from ringfence.chipset.keyboard import Keyboard
from ringfence.chipset.state import Saved, State

DATA, COMMAND, FAST_RESET = 0x60, 0x64, 0x92
IRQ = 1
STATUS_OBF, STATUS_SYS, STATUS_A2, STATUS_INH = 0x01, 0x04, 0x08, 0x10
COMMAND_INTERRUPT, COMMAND_DISABLE = 0x01, 0x10
"""Command byte bits of the keyboard's interface."""
OUTPUT_RESET, OUTPUT_A20 = 0x01, 0x02
"""Output port bits: the reset line is active low."""

READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
TEST_SECOND, SELF_TEST, TEST_FIRST = 0xA9, 0xAA, 0xAB
READ_INPUT, READ_OUTPUT, WRITE_OUTPUT, WRITE_BUFFER = 0xC0, 0xD0, 0xD1, 0xD2
_REPLIES = {SELF_TEST: 0x55, TEST_FIRST: 0x00, TEST_SECOND: 0x00, READ_INPUT: 0x80}
OUTPUT_ROOM = 16
"""Bytes that wait to be read, at most."""
_SWALLOW = {0xD3, 0xD4} | set(range(0x60, 0x80))
"""Commands whose next data byte belongs to them."""


class I8042(Saved):
    """Ports 0x60 and 0x64, and port 0x92.

    Parameters
    ----------
    on_reset : Callable[[], None]
        Called when the guest pulses the CPU's reset line.
    irq : Callable[[bool], None]
        Drives the keyboard's interrupt line (1).
    """

    FIELDS = ("command_byte", "output", "expecting", "after_command", "fast")

    def __init__(self, on_reset: Callable[[], None], irq: Callable[[bool], None]) -> None:
        self._on_reset = on_reset
        self._irq = irq
        self._keyboard = Keyboard()
        self.command_byte = 0x34
        """System flag set, both interfaces disabled."""
        self.output: list[int] = []
        self.expecting = 0
        self.after_command = False
        self.fast = OUTPUT_A20

    def attach(self, ports: PortBus) -> None:
        """Take the ports 0x60, 0x64 and 0x92."""
        ports.register(DATA, 1, _Port(self.read_data, self.write_data), widths=(1,))
        ports.register(COMMAND, 1, _Port(self.read_status, self.write_command), widths=(1,))
        ports.register(FAST_RESET, 1, _Port(self.read_fast, self.write_fast), widths=(1,))

    def read_status(self) -> int:
        """Read the status register."""
        return (
            STATUS_SYS | STATUS_INH
            | (STATUS_A2 if self.after_command else 0)
            | (STATUS_OBF if self.output else 0)
        )  # fmt: skip

    def read_data(self) -> int:
        """Read the output buffer; 0 where it is empty."""
        value = self.output.pop(0) if self.output else 0
        self._irq(False)  # an edge for each byte
        self._settle()
        return value

    def save(self) -> State:
        """Include the keyboard."""
        return super().save() | {"keyboard": self._keyboard.save()}

    def restore(self, state: State) -> None:
        """Take over the keyboard, too."""
        super().restore(state)
        self._keyboard.restore(state["keyboard"])

    def _settle(self) -> None:
        """Drive the interrupt line as output buffer and command byte say."""
        self._irq(bool(self.output and self.command_byte & COMMAND_INTERRUPT))

    def write_command(self, value: int) -> None:
        """Write a controller command."""
        self.after_command = True
        self.expecting = 0
        if value in _REPLIES:
            self.output = [_REPLIES[value]]
        elif value == READ_COMMAND_BYTE:
            self.output = [self.command_byte]
        elif value == READ_OUTPUT:
            self.output = [OUTPUT_RESET | OUTPUT_A20]
        elif value in (WRITE_OUTPUT, WRITE_BUFFER) or value in _SWALLOW:
            self.expecting = value
        elif value >= 0xF0 and not value & 1:  # pulse output lines: bit 0 low is reset
            self._on_reset()
        elif value == 0xA7:
            self.command_byte |= 0x20
        elif value == 0xA8:
            self.command_byte &= ~0x20
        elif value == 0xAD:
            self.command_byte |= COMMAND_DISABLE
        elif value == 0xAE:
            self.command_byte &= ~COMMAND_DISABLE
        self._settle()

    def write_data(self, value: int) -> None:
        """Write a command's data byte, or a byte for the keyboard; those for a mouse vanish."""
        self.after_command = False
        expecting, self.expecting = self.expecting, 0
        if expecting == WRITE_COMMAND_BYTE:
            self.command_byte = value
        elif expecting == WRITE_OUTPUT:
            if not value & OUTPUT_RESET:
                self._on_reset()
        elif expecting == WRITE_BUFFER:
            self.output = [value]
        elif not expecting:
            self.command_byte &= ~COMMAND_DISABLE
            self.output = [*self.output, *self._keyboard.receive(value)][:OUTPUT_ROOM]
        self._settle()

    def read_fast(self) -> int:
        """Read port 0x92."""
        return self.fast

    def write_fast(self, value: int) -> None:
        """Write port 0x92: bit 0 rising resets, bit 1 is A20."""
        rising = value & 1 and not self.fast & 1
        self.fast = value & 0x03
        if rising:
            self._on_reset()


class _Port:
    """One byte-wide port as a device."""

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        return self._read()

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(value)
