"""The 8254 programmable interval timer and the system control port 0x61.

Nothing counts: a channel remembers when its count was loaded, and computes count and OUT from the
clock when asked. Only channel 0's OUT, which is IRQ 0, needs a deadline in the timer queue. Names
and modes are the Intel 8254 data sheet's; port 0x61 is the PIIX's NMI status and control register.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.bus import PortBus
from ringfence.chipset.clock import NS_PER_SECOND, Clock, Deadline, TimerQueue
from ringfence.chipset.state import Saved, State, check_version

HZ = 1_193_182
"""Input frequency of all three channels: 14.31818 MHz / 12."""
BASE, CONTROL, SYSTEM_PORT = 0x40, 3, 0x61
MINIMUM_PERIOD_NS = 100_000
"""Channel 0 interrupts no oftener than this, whatever the guest asks: the host must live."""
REFRESH_NS = 15_085
"""The refresh-request toggle in port 0x61 bit 4 changes this often."""
LATCH, LOW, HIGH, BOTH = 0, 1, 2, 3
"""Read/write field of the control word."""


class Channel(Saved):
    """One counter. ``clock`` gives the time; ``gate`` is its GATE input."""

    FIELDS = (
        "mode", "access", "bcd", "reload", "start", "loaded", "gate", "held",
        "low_byte", "write_high", "read_high", "latched", "status",
    )  # fmt: skip

    def __init__(self, clock: Clock, gate: bool) -> None:
        self._clock = clock
        self.mode = 0
        self.access = BOTH
        self.bcd = False
        self.reload = 0x10000
        self.start = 0
        """Clock ns when the current count began."""
        self.loaded = False
        self.gate = gate
        self.held = -1
        """Ticks counted when GATE stopped the counter, or -1 while it runs."""
        self.low_byte = 0
        self.write_high = self.read_high = False
        self.latched: list[int] = []
        """Bytes of a latched count, still to be read."""
        self.status: list[int] = []
        """A latched status byte, still to be read."""

    @property
    def running(self) -> bool:
        """True if counting, rather than waiting for a count or for GATE."""
        return self.loaded and self.held < 0

    def ticks(self) -> int:
        """Input clocks since the count was loaded."""
        if self.held >= 0:
            return self.held
        return (self._clock.now() - self.start) * HZ // NS_PER_SECOND

    def tick_time(self, ticks: int) -> int:
        """Clock ns of the moment that is ``ticks`` after loading, rounded up."""
        return self.start - (-ticks * NS_PER_SECOND // HZ)

    def out(self) -> bool:
        """Return the OUT pin."""
        if not self.loaded:
            return self.mode != 0
        ticks, count = self.ticks(), self.reload
        if self.mode in (0, 1):
            return ticks >= count
        if self.mode == 2:
            return not self.gate or ticks % count != count - 1
        if self.mode == 3:
            return not self.gate or ticks % count < (count + 1) // 2
        return ticks != count

    def count(self) -> int:
        """Return the counting element as the guest reads it, BCD where so programmed."""
        modulus = 10_000 if self.bcd else 0x10000
        if not self.loaded:
            value = 0
        elif self.mode == 2:
            value = self.reload - self.ticks() % self.reload
        elif self.mode == 3:
            phase = self.ticks() % self.reload
            half = (self.reload + 1) // 2
            value = (self.reload & ~1) - 2 * (phase if phase < half else phase - half)
        else:
            value = self.reload - self.ticks()
        value %= modulus
        return int(f"{value:d}", 16) if self.bcd else value

    def program(self, control: int) -> None:
        """Take a control word other than latch and read-back."""
        self.access = control >> 4 & 3
        mode = control >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = bool(control & 1)
        self.loaded = False
        self.held = -1
        self.write_high = self.read_high = False
        self.latched, self.status = [], []

    def write(self, value: int) -> bool:
        """Write a byte of the count; return True if that loads it."""
        if self.access == LOW:
            count = value
        elif self.access == HIGH:
            count = value << 8
        elif not self.write_high:
            self.low_byte, self.write_high = value, True
            if self.mode == 0:
                self.loaded = False
            return False
        else:
            count, self.write_high = value << 8 | self.low_byte, False
        if self.bcd:
            digits = [min(9, count >> shift & 0xF) for shift in (12, 8, 4, 0)]
            count = int("".join(map(str, digits)))
        self.reload = count or (10_000 if self.bcd else 0x10000)
        self._load()
        return True

    def _load(self) -> None:
        """Start counting; modes 1 and 5 wait for GATE to rise."""
        self.start = self._clock.now()
        self.loaded = self.mode not in (1, 5)
        self.held = -1 if self.gate else 0

    def set_gate(self, gate: bool) -> None:
        """Drive GATE (8254 data sheet, figure 21)."""
        if gate == self.gate:
            return
        if not gate:
            if self.mode not in (1, 5):
                self.held = self.ticks() if self.loaded else 0
        elif self.mode in (0, 4):
            self.start = self.tick_start()
            self.held = -1
        else:
            self.start = self._clock.now()
            self.loaded = True
            self.held = -1
        self.gate = gate

    def tick_start(self) -> int:
        """Return the load time that makes the ticks held so far have just passed."""
        return self._clock.now() - max(0, self.held) * NS_PER_SECOND // HZ

    def latch_count(self) -> None:
        """Latch the count, unless one is latched already."""
        if not self.latched:
            count = self.count()
            both = [count & 0xFF, count >> 8]
            self.latched = {LOW: both[:1], HIGH: both[1:]}.get(self.access, both)

    def latch_status(self) -> None:
        """Latch the status byte, unless one is latched already."""
        if not self.status:
            self.status = [
                self.out() << 7 | (not self.loaded) << 6 | self.access << 4 | self.mode << 1
                | self.bcd
            ]  # fmt: skip

    def read(self) -> int:
        """Read what comes next: latched status, latched count, or the live count."""
        if self.status:
            return self.status.pop(0)
        if self.latched:
            return self.latched.pop(0)
        count = self.count()
        if self.access == BOTH:
            high, self.read_high = self.read_high, not self.read_high
        else:
            high = self.access == HIGH
        return count >> 8 if high else count & 0xFF


class Pit:
    """Three channels at 0x40-0x43 and the system port 0x61.

    Parameters
    ----------
    queue : TimerQueue
        The board's timers.
    irq : Callable[[bool], None]
        Drives IRQ 0.
    """

    VERSION = 1

    def __init__(self, queue: TimerQueue, irq: Callable[[bool], None]) -> None:
        self._clock = queue.clock
        self._irq = irq
        self._timer = Deadline(queue, self._edge)
        self.channels = [Channel(self._clock, gate=index != 2) for index in range(3)]
        self.control = 0
        """Writable bits 3:0 of port 0x61."""

    def attach(self, ports: PortBus) -> None:
        """Take the ports 0x40-0x43 and 0x61."""
        ports.register(BASE, 4, self, widths=(1,))
        ports.register(SYSTEM_PORT, 1, _SystemPort(self), widths=(1,))

    def read(self, offset: int, size: int) -> int:
        """Read a counter; the control register can't be read."""
        return 0xFF if offset == CONTROL else self.channels[offset].read()

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a counter or the control word."""
        if offset != CONTROL:
            if self.channels[offset].write(value) and offset == 0:
                self._arm()
            return
        select = value >> 6
        if select == 3:
            self._read_back(value)
        elif value >> 4 & 3 == LATCH:
            self.channels[select].latch_count()
        else:
            channel = self.channels[select]
            channel.program(value)
            if select == 0:
                self._timer.set(None)
                if channel.mode == 0:
                    self._irq(False)

    def read_system_port(self) -> int:
        """Read port 0x61: OUT2 in bit 5, refresh toggle in bit 4, GATE2 in bit 0."""
        refresh = self._clock.now() // REFRESH_NS & 1
        return self.control | refresh << 4 | self.channels[2].out() << 5

    def write_system_port(self, value: int) -> None:
        """Write port 0x61: GATE2 in bit 0, speaker data in bit 1."""
        self.control = value & 0x0F
        self.channels[2].set_gate(bool(value & 1))

    def _read_back(self, value: int) -> None:
        for index, channel in enumerate(self.channels):
            if value >> index + 1 & 1:
                if not value & 0x20:
                    channel.latch_count()
                if not value & 0x10:
                    channel.latch_status()

    def _arm(self) -> None:
        """Set the deadline of channel 0's next rising OUT."""
        channel = self.channels[0]
        if not channel.running:
            self._timer.set(None)
        elif channel.mode in (2, 3):
            minimum = MINIMUM_PERIOD_NS * HZ // NS_PER_SECOND
            period = channel.reload * -(-minimum // channel.reload)
            self._timer.set(channel.tick_time((channel.ticks() // period + 1) * period))
        elif channel.ticks() < channel.reload:
            self._timer.set(channel.tick_time(channel.reload))
        else:
            self._timer.set(None)

    def _edge(self) -> None:
        self._irq(False)
        self._irq(True)
        self._arm()

    def save(self) -> State:
        """Return the state of the three channels and port 0x61."""
        return {
            "version": self.VERSION,
            "channels": [channel.save() for channel in self.channels],
            "control": self.control,
        }

    def restore(self, state: State) -> None:
        """Take over what `save` returned; the clock must have been restored before."""
        check_version("Pit", state, self.VERSION)
        for channel, saved in zip(self.channels, state["channels"], strict=True):
            channel.restore(saved)
        self.control = int(state["control"])
        self._arm()


class _SystemPort:
    """Port 0x61 as a device of its own."""

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, offset: int, size: int) -> int:
        return self._pit.read_system_port()

    def write(self, offset: int, size: int, value: int) -> None:
        self._pit.write_system_port(value)
