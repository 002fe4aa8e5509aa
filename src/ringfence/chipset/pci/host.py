"""The PCI host bridge: one bus of 32 slots, and the two ways to its configuration spaces.

Mechanism #1 is a pair of ports (3.2.2.3.2): CONFIG_ADDRESS answers only 32-bit accesses; a byte at
0xcf9 is the chipset's reset control instead, as on every PC. The other way is a window of memory,
4 KiB per function (PCI Express Base 2.0, 7.2.2; PCI Firmware 3.0, 4.1.2). Its functions are
conventional ones: beyond their 256 bytes, as where there is no function, reads give all ones.

Interrupt pins are swizzled over four lines (slot + pin, modulo 4), GSI 16 to 19; a line is the OR
of the pins on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ringfence.chipset.bus import Device, MmioBus, PortBus
from ringfence.chipset.clock import Timer
from ringfence.chipset.pci import config
from ringfence.chipset.pci.config import Identity, Register
from ringfence.chipset.pci.device import PciDevice, Socket
from ringfence.chipset.spare import Waiting
from ringfence.chipset.state import Saved, State
from ringfence.errors import ImageError, UsageError
from ringfence.memory.summons import Summons

BASE, LENGTH = 0xCF8, 8
ENABLE = 1 << 31
SLOTS = 32
FUNCTIONS = 8
LINES = 4
FIRST_GSI = 16
"""PCI interrupts use GSI 16-19, level-triggered."""
ECAM_BASE, ECAM_LENGTH = 0xFEF0_0000, 1 << 20
"""The memory window to bus 0's configuration spaces; behind what firmware uses for BARs."""
MULTIFUNCTION = 1 << 7
"""In Header Type of function 0: the slot has others (6.2.1)."""
HOST_BRIDGE = Identity(
    vendor=0x8086,
    device=0x1237,
    class_code=0x060000,
    revision=2,
    subsystem_vendor=0x1AF4,
    subsystem=0x1100,
)
"""00:00.0: an Intel 82441FX by its identity. Its subsystem is what firmware knows QEMU by."""
PAM, SMRAM = Register(0x59, 7), Register(0x72, 1)
"""Which parts of 0xC0000-0xFFFFF are RAM to reads and writes. They only read as they were written:
there is RAM always. SMRAM likewise (82441FX data sheet, 3.2.18 and 3.2.26)."""


def line_of(slot: int, pin: int) -> int:
    """Return the interrupt line of a slot's pin (0 = INTA#)."""
    return (slot + pin) % LINES


def gsi_of(slot: int, pin: int) -> int:
    """Return the GSI of a slot's interrupt pin (0 = INTA#), as the DSDT's _PRT tells it."""
    return FIRST_GSI + line_of(slot, pin)


class PciHost(Saved):
    """CONFIG_ADDRESS and CONFIG_DATA, and what is plugged into bus 0.

    Parameters
    ----------
    reset_control : Device
        Answers byte accesses at 0xcf9.
    lock : threading.RLock
        The board's.
    ports, memory : PortBus, MmioBus
        Where the bridge itself and the functions' BARs are found.
    interrupt : Callable[[int, bool], None]
        Drives a GSI.
    message : Callable[[int, int], None]
        Takes message-signalled interrupts: address, data.
    later : Callable[[Callable[[], None], int], Timer]
        Has something done by the timers' thread in some nanoseconds, the lock held.
    put_off : Callable[[Callable[[], None], int], Waiting]
        Has something done when a vCPU sleeps, or in some nanoseconds, the lock held.
    summons : Summons
        How native code calls a vCPU out of guest code.
    """

    FIELDS = ("address", "lines")

    def __init__(
        self,
        reset_control: Device,
        *,
        lock: threading.RLock,
        ports: PortBus,
        memory: MmioBus,
        interrupt: Callable[[int, bool], None],
        message: Callable[[int, int], None],
        later: Callable[[Callable[[], None], int], Timer],
        put_off: Callable[[Callable[[], None], int], Waiting],
        summons: Summons,
    ) -> None:
        self._reset_control = reset_control
        self._lock = lock
        self._ports = ports
        self._memory = memory
        self._interrupt = interrupt
        self._message = message
        self._later = later
        self._put_off = put_off
        self._summons = summons
        self.address = 0
        self.lines = [0] * LINES
        """Per line, which pins assert it: bit 4 * slot + pin."""
        bridge = PciDevice(HOST_BRIDGE, pin=0)
        bridge.config.allow(PAM, 0x33_3333_3333_3330)
        bridge.config.allow(SMRAM, 0x7F)
        self._functions: dict[int, PciDevice] = {0: bridge}
        ports.register(BASE, LENGTH, self)
        memory.register(ECAM_BASE, ECAM_LENGTH, _Ecam(self._functions))

    @property
    def devices(self) -> tuple[PciDevice, ...]:
        """All functions, in order of slot and number; the host bridge is the first."""
        return tuple(device for _, device in sorted(self._functions.items()))

    def plug(self, device: PciDevice, slot: int | None = None, number: int = 0) -> int:
        """Put a function into a slot of bus 0, by default the first free one; return the slot.

        Function 0 of a slot has to come before the others.
        """
        with self._lock:
            if slot is None:
                free = (at for at in range(1, SLOTS) if at * FUNCTIONS not in self._functions)
                slot = next(free, SLOTS)
            if (
                not 0 < slot < SLOTS
                or not 0 <= number < FUNCTIONS
                or slot * FUNCTIONS + number in self._functions
                or (number and slot * FUNCTIONS not in self._functions)
            ):
                raise UsageError(
                    f"PCI slot {slot:#x}.{number} is taken or absent: expected a free one of"
                    f" 1-{SLOTS - 1}.0-{FUNCTIONS - 1}, function 0 first"
                )
            if number:
                self._functions[slot * FUNCTIONS].config.header_type = MULTIFUNCTION
            self._functions[slot * FUNCTIONS + number] = device
            pin = device.config.interrupt_pin - 1
            if pin >= 0:
                device.config.interrupt_line = gsi_of(slot, pin)
            device.plug(
                Socket(
                    lock=self._lock,
                    memory=self._memory.map,
                    ports=self._ports.windows,
                    rank=1 + slot * FUNCTIONS + number,
                    interrupt=lambda asserted: self.set_irq(slot, max(pin, 0), asserted),
                    message=self._message,
                    later=self._later,
                    put_off=self._put_off,
                    summons=self._summons,
                )
            )
            return slot

    def present(self, slot: int) -> bool:
        """Whether there is a device in a slot."""
        return slot * FUNCTIONS in self._functions

    def unplug(self, slot: int) -> PciDevice:
        """Take a device of one function out of its slot: nothing sees it any more."""
        with self._lock:
            device = self._functions.pop(slot * FUNCTIONS)
            device.unplug()
            return device

    def set_irq(self, slot: int, pin: int, asserted: bool) -> None:
        """Drive a slot's interrupt pin (0 = INTA#), the board's lock held."""
        line, bit = line_of(slot, pin), 1 << 4 * slot + pin
        was = self.lines[line]
        self.lines[line] = was & ~bit | (bit if asserted else 0)
        if self.lines[line] != was:
            self._interrupt(FIRST_GSI + line, bool(self.lines[line]))

    # ---- configuration mechanism #1

    def read(self, offset: int, size: int) -> int:
        """Read CONFIG_ADDRESS, CONFIG_DATA or the reset control."""
        if offset >= 4:
            device = self._selected()
            if device is not None:
                return device.config_read(self.address & 0xFC | offset & 3, size)
        elif size == 4:
            return self.address
        elif (offset, size) == (1, 1):
            return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write CONFIG_ADDRESS, CONFIG_DATA or the reset control."""
        if offset >= 4:
            device = self._selected()
            if device is not None:
                device.config_write(self.address & 0xFC | offset & 3, size, value)
        elif size == 4:
            self.address = value & 0x80FF_FFFC
        elif (offset, size) == (1, 1):
            self._reset_control.write(0, 1, value)

    def _selected(self) -> PciDevice | None:
        """Return the function that CONFIG_ADDRESS names, if it is there."""
        if not self.address & ENABLE or self.address >> 16 & 0xFF:
            return None
        return self._functions.get(self.address >> 8 & 0xFF)

    # ---- state

    def save(self) -> State:
        """See `Saved.save`; functions by their number."""
        devices = {str(at): device.save() for at, device in sorted(self._functions.items())}
        return super().save() | {"devices": devices}

    def restore(self, state: State) -> None:
        """See `Saved.restore`; the same devices have to be plugged in."""
        devices = state.get("devices")
        if not isinstance(devices, dict) or {*devices} != {str(at) for at in self._functions}:
            raise ImageError("saved PCI bus has other devices: restore it into a machine alike")
        super().restore(state)
        for at, device in self._functions.items():
            device.restore(devices[str(at)])


class _Ecam:
    """The memory window: 4 KiB per function."""

    def __init__(self, functions: dict[int, PciDevice]) -> None:
        self._functions = functions

    def read(self, offset: int, size: int) -> int:
        device = self._functions.get(offset >> 12)
        at = offset & 0xFFF
        if device is None or at >= config.SIZE:
            return (1 << 8 * size) - 1
        return device.config_read(at, size)

    def write(self, offset: int, size: int, value: int) -> None:
        device = self._functions.get(offset >> 12)
        at = offset & 0xFFF
        if device is not None and at < config.SIZE:
            device.config_write(at, size, value)
