"""ACPI hardware: PM1a event and control blocks, PM timer, general-purpose events, reset register.

A general-purpose event (4.8.4.1) says that one of the board's parts has something to tell, and the
DSDT has a method for each that tells the guest which. There is no SMI: the machine is always in
ACPI mode, so SCI_EN reads as set (ACPI 6.4, 4.8.3.2.1). The PM timer is computed from the clock.
Sections are the ACPI specification's, release 6.4.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from ringfence.chipset.bus import PortBus
from ringfence.chipset.clock import NS_PER_SECOND, Deadline, TimerQueue
from ringfence.chipset.state import Saved

PM1_EVENT, PM1_CONTROL, PM_TIMER, GPE0 = 0x600, 0x604, 0x608, 0x60C
"""Ports of the blocks."""
BASE, LENGTH = 0x600, 0x10
GPE0_LENGTH = 4
"""Bytes of the general-purpose event block: 16 status bits, 16 enable bits."""
RESET_CONTROL = 0xCF9
RESET_VALUE = 0x06
"""What the reset register is written with (FADT RESET_VALUE)."""
TIMER_HZ = 3_579_545
SCI_IRQ = 9
SLP_TYP_S5 = 5
"""SLP_TYP that the DSDT's _S5 names."""

# PM1 status and enable bits (4.8.3.1)
TMR, GBL, PWRBTN, SLPBTN, RTC, WAK = 0x0001, 0x0020, 0x0100, 0x0200, 0x0400, 0x8000
_ENABLE = TMR | GBL | PWRBTN | SLPBTN | RTC
# PM1 control bits (4.8.3.2)
SCI_EN, SLP_EN = 0x0001, 0x2000
_CONTROL = 0x1C07


class Gpe(IntEnum):
    """Who general-purpose events come from."""

    GENERATION = 0
    HOT_PLUG = 1


class PowerManagement(Saved):
    """The PM blocks at 0x600.

    Parameters
    ----------
    queue : TimerQueue
        The board's timers.
    sci : Callable[[bool], None]
        Drives the SCI.
    on_power_off : Callable[[], None]
        Called when the guest enters S5.
    """

    VERSION = 2
    FIELDS = ("status", "enable", "control", "carries", "gpe_status", "gpe_enable")

    def __init__(
        self, queue: TimerQueue, sci: Callable[[bool], None], on_power_off: Callable[[], None]
    ) -> None:
        self._clock = queue.clock
        self._timer = Deadline(queue, self._carry)
        self._sci = sci
        self._on_power_off = on_power_off
        self.status = 0
        self.enable = 0
        self.control = SCI_EN
        self.gpe_status = 0
        self.gpe_enable = 0
        self.off_types = {SLP_TYP_S5}
        """Values of SLP_TYP that turn the machine off."""
        self.carries = 0
        """Half turns of the 32-bit timer that TMR_STS has been set for."""

    def attach(self, ports: PortBus) -> None:
        """Take the ports 0x600-0x60f."""
        ports.register(BASE, LENGTH, self, widths=(1, 2, 4))

    def press_power_button(self) -> None:
        """Ask the guest's operating system to shut down."""
        self.status |= PWRBTN
        self._update()

    def raise_event(self, event: Gpe) -> None:
        """Set a general-purpose event's status; the guest hears of it when it has enabled it."""
        self.gpe_status |= 1 << event
        self._update()

    def timer(self) -> int:
        """Return the 32-bit PM timer."""
        return self._ticks() & 0xFFFF_FFFF

    def read(self, offset: int, size: int) -> int:
        """Read any part of the blocks; the second half of the control block is reserved."""
        if offset == 8 and size == 4:
            return self.timer()
        if offset < 4:
            self._note_carry()
        block = self.status | self.enable << 16 | self.control << 32 | self.timer() << 64
        block |= self.gpe_status << 96 | self.gpe_enable << 112
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write any part: ones clear status bits, the rest is stored."""
        for index in range(size):
            self._write_byte(offset + index, value >> 8 * index & 0xFF)
        self._update()

    def _write_byte(self, offset: int, value: int) -> None:
        shift = 8 * (offset & 1)
        keep = ~(0xFF << shift)
        if offset < 2:
            self._note_carry()
            self.status &= ~(value << shift)
        elif offset < 4:
            self.enable = (self.enable & keep | value << shift) & _ENABLE
        elif offset < 6:
            self.control = (self.control & keep | value << shift) & _CONTROL | SCI_EN
            if value << shift & SLP_EN and self.control >> 10 & 7 in self.off_types:
                self._on_power_off()
        elif 12 <= offset < 14:
            self.gpe_status &= ~(value << shift)
        elif offset >= 14:
            self.gpe_enable = self.gpe_enable & keep | value << shift

    def _ticks(self) -> int:
        return self._clock.now() * TIMER_HZ // NS_PER_SECOND

    def _note_carry(self) -> None:
        """TMR_STS is set whenever the timer's top bit changes (4.8.3.3)."""
        carries = self._ticks() >> 31
        if carries != self.carries:
            self.carries = carries
            self.status |= TMR

    def _carry(self) -> None:
        self._note_carry()
        self._update()

    def _update(self) -> None:
        """Drive the SCI, and have the timer's next carry told if it would interrupt."""
        self._sci(bool(self.status & self.enable or self.gpe_status & self.gpe_enable))
        if self.enable & TMR and not self.status & TMR:
            ticks = (self.carries + 1) << 31
            self._timer.set(-(-ticks * NS_PER_SECOND // TIMER_HZ))
        else:
            self._timer.set(None)

    def restored(self) -> None:
        """Arm again."""
        self._update()


class ResetControl(Saved):
    """The reset control register at 0xcf9 (PIIX3 4.1.3; FADT RESET_REG).

    Parameters
    ----------
    on_reset : Callable[[], None]
        Called when RST_CPU rises.
    """

    FIELDS = ("value",)
    RST_CPU = 0x04

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        """Read what was written last."""
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write; RST_CPU rising resets the machine."""
        rising = value & ~self.value & self.RST_CPU
        self.value = value & 0x0E & ~self.RST_CPU
        if rising:
            self._on_reset()
