"""The base of every PCI device: header, base addresses, interrupts.

A device declares in its constructor what it is (`Identity`), its BARs (`add_bar`) and how it
interrupts (`add_msi`, `add_msix`; an INTx pin it has anyway). Plugged into a slot it gets a
`Socket`, its only way to the board: address maps, its interrupt line, messages, the lock.

A guest's write to configuration space is stored first (see `config`); then the device compares
what its header says now with what is mapped, and moves its windows. So BARs follow the guest
wherever it puts them, over each other or over the board's devices, and `bus.AddressMap` decides who
is seen. RAM is always seen first: accesses to it never come to the board.

**Locking.** Everything here runs with the board's lock held; a device's own threads take
``self.lock`` before they call anything of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import ClassVar

from ringfence.chipset.bus import AddressMap, Device, Window
from ringfence.chipset.clock import Timer
from ringfence.chipset.pci.config import BARS, Command, ConfigSpace, Identity, Register, Status
from ringfence.chipset.pci.msi import Msi, MsiX
from ringfence.chipset.spare import Waiting
from ringfence.chipset.state import Saved, State
from ringfence.errors import ImageError, UsageError
from ringfence.memory.registers import RegisterBank
from ringfence.memory.summons import Summons


class Space(Enum):
    """What a base address register asks for: the value is its read-only low bits (6.2.5.1)."""

    IO = 0b001
    MEMORY = 0b000
    MEMORY_64 = 0b100


PREFETCHABLE = 1 << 3


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: its number, what it asks for, its size in bytes, who answers."""

    index: int
    space: Space
    size: int
    device: Device
    bank: RegisterBank | None = None
    """Registers of its that an engine may access by itself."""

    @property
    def words(self) -> int:
        """Registers that it takes."""
        return 2 if self.space is Space.MEMORY_64 else 1

    @property
    def mask(self) -> int:
        """The address bits that the guest may set."""
        return (1 << 32 * self.words) - self.size

    def register(self) -> Register:
        """Where it is in configuration space: one or two words."""
        return Register(0x10 + 4 * self.index, 4 * self.words)


@dataclass(frozen=True, slots=True)
class Socket:
    """What a slot offers to the device in it.

    Attributes
    ----------
    lock : threading.RLock
        The board's.
    memory, ports : AddressMap
        Where BARs are mapped.
    rank : int
        The precedence of this device's windows.
    interrupt : Callable[[bool], None]
        Drives the interrupt pin.
    message : Callable[[int, int], None]
        Takes a message-signalled interrupt: address, data.
    later : Callable[[Callable[[], None], int], Timer]
        Has something done by the timers' thread in some nanoseconds, the lock held.
    put_off : Callable[[Callable[[], None], int], Waiting]
        Has something done when a vCPU sleeps, or in some nanoseconds, the lock held.
    summons : Summons
        How native code calls a vCPU out of guest code.
    """

    lock: threading.RLock
    memory: AddressMap
    ports: AddressMap
    rank: int
    interrupt: Callable[[bool], None]
    message: Callable[[int, int], None]
    later: Callable[[Callable[[], None], int], Timer]
    put_off: Callable[[Callable[[], None], int], Waiting]
    summons: Summons


class _BarAccess:
    """A BAR's accesses, handed to the device's `bar_read` and `bar_write`, 32 bits at most."""

    def __init__(self, device: PciDevice, index: int) -> None:
        self.read_part = partial(device.bar_read, index)
        self.write_part = partial(device.bar_write, index)

    def read(self, offset: int, size: int) -> int:
        if size <= 4:
            return self.read_part(offset, size) & (1 << 8 * size) - 1
        low = self.read_part(offset, 4) & 0xFFFF_FFFF
        return low | (self.read_part(offset + 4, 4) & 0xFFFF_FFFF) << 32

    def write(self, offset: int, size: int, value: int) -> None:
        if size <= 4:
            self.write_part(offset, size, value)
        else:
            self.write_part(offset, 4, value & 0xFFFF_FFFF)
            self.write_part(offset + 4, 4, value >> 32 & 0xFFFF_FFFF)


class PciDevice(Saved):
    """A function with a type 0 header.

    Parameters
    ----------
    identity : Identity
        What the header says.
    pin : int
        1 for INTA# to 4 for INTD#; 0: the device has no pin.

    Attributes
    ----------
    config : ConfigSpace
        The header and the capabilities.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("intx",)

    def __init__(self, identity: Identity, *, pin: int = 1) -> None:
        self.config = ConfigSpace(identity, pin=pin)
        self.intx = False
        """Whether the device wants its pin asserted."""
        self.msi: Msi | None = None
        self.msix: MsiX | None = None
        self._bars: list[Bar] = []
        self._mapped: dict[int, Window] = {}
        self._socket: Socket | None = None
        self.bus_master = False
        """Whether the guest lets the device access memory."""

    # ---- what a device declares

    def add_bar(
        self,
        index: int,
        size: int,
        space: Space = Space.MEMORY,
        *,
        device: Device | None = None,
        prefetchable: bool = False,
        bank: RegisterBank | None = None,
    ) -> None:
        """Ask for ``size`` bytes (a power of two; at least 16, ports 4) through BAR ``index``.

        ``device`` answers it, by default `bar_read` and `bar_write`; ``bank`` has those of its
        registers that don't always need the device. A 64-bit BAR takes the next register, too.
        """
        floor, ceiling = (4, 256) if space is Space.IO else (16, 1 << 31)
        bar = Bar(index, space, size, device or _BarAccess(self, index), bank)
        wanted = set(range(index, index + bar.words))
        taken = {at for each in self._bars for at in range(each.index, each.index + each.words)}
        if size & size - 1 or not floor <= size <= ceiling:
            raise UsageError(f"BAR of {size} bytes: expected a power of two, {floor} to {ceiling}")
        if wanted & taken or not wanted <= set(range(BARS)):
            raise UsageError(f"BAR {index} is taken or absent: expected a free one of 0-{BARS - 1}")
        self._bars.append(bar)
        self.config.allow(bar.register(), bar.mask)
        low = space.value | (PREFETCHABLE if prefetchable else 0)
        self.config.set(bar.register(), low)

    def add_msi(self, vectors: int = 1) -> None:
        """Offer MSI with up to 32 vectors."""
        self.msi = Msi(self.config, vectors, self._send)

    def add_msix(self, bar: int, vectors: int) -> None:
        """Offer MSI-X; its table takes BAR ``bar`` for itself."""
        self.msix = MsiX(self.config, bar, vectors, self._send)
        self.add_bar(bar, self.msix.bar_size, device=self.msix)

    # ---- what a device does

    @property
    def lock(self) -> AbstractContextManager[object]:
        """The board's lock, for the device's own threads."""
        return self._socket.lock if self._socket else nullcontext()

    @property
    def summons(self) -> Summons:
        """How the device's native code calls a vCPU out of guest code."""
        return self._socket.summons if self._socket else Summons()

    @property
    def uses_messages(self) -> bool:
        """Whether the guest has switched MSI-X or MSI on."""
        return any(each is not None and each.enabled for each in (self.msix, self.msi))

    def later(self, action: Callable[[], None], delay: int = 0) -> Timer | None:
        """Have ``action`` called in ``delay`` ns, the lock held; others have their turn before."""
        return self._socket.later(action, delay) if self._socket is not None else None

    def put_off(self, action: Callable[[], None], delay: int) -> Waiting | None:
        """Have ``action`` called, the lock held, when a vCPU goes to sleep, or in ``delay`` ns."""
        return self._socket.put_off(action, delay) if self._socket is not None else None

    def set_intx(self, asserted: bool) -> None:
        """Say whether the device wants its level-triggered pin asserted."""
        self.intx = asserted
        self._drive()

    def signal(self, vector: int) -> bool:
        """Send a message by MSI-X or MSI; False if the guest uses neither (see `set_intx`)."""
        for messages in (self.msix, self.msi):
            if messages is not None and messages.enabled:
                messages.signal(vector)
                return True
        return False

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Return ``size`` (1, 2, 4) bytes of a BAR; ``offset`` is naturally aligned."""
        del bar, offset
        return (1 << 8 * size) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Store ``size`` (1, 2, 4) bytes in a BAR; ``offset`` is naturally aligned."""

    def quiesce(self) -> None:
        """Wait, without the lock, until nothing is in flight; the vCPUs stand still."""

    def close(self) -> None:
        """Let go of what the device holds outside the board; no more accesses follow."""

    # ---- what the host bridge calls

    def plug(self, socket: Socket) -> None:
        """Connect the device with its slot."""
        self._socket = socket
        self._settle()

    def unplug(self) -> None:
        """Take the device off the bus; its threads still find the lock."""
        self.config.command = 0
        self._settle()
        if self._socket is not None:
            self._socket.interrupt(False)
            self._socket = replace(self._socket, interrupt=lambda asserted: None)

    def config_read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of configuration space, within an aligned word."""
        return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Store ``size`` bytes in configuration space and do what follows from it."""
        self.config.write(offset, size, value)
        if any(
            each.touched(offset, size) for each in (ConfigSpace.command, ConfigSpace.base_addresses)
        ):
            self._settle()
        for messages in (self.msix, self.msi):
            if messages is not None and messages.span.touched(offset, size):
                messages.written()
                self._drive()

    # ---- following the header

    def _settle(self) -> None:
        """Map, move or unmap BARs as the header says, and drive the pin."""
        self.bus_master = bool(self.config.command & Command.BUS_MASTER)
        if self._socket is None:
            return
        for bar in self._bars:
            base = self._placed(bar)
            mapped = self._mapped.get(bar.index)
            if mapped is not None and mapped.base == base:
                continue
            where = self._socket.ports if bar.space is Space.IO else self._socket.memory
            if mapped is not None:
                where.remove(self._mapped.pop(bar.index))
            if base is not None:
                window = Window(base, bar.size, bar.device, self._socket.rank, bar.bank)
                where.add(window)
                self._mapped[bar.index] = window
        self._drive()

    def _placed(self, bar: Bar) -> int | None:
        """Where a BAR is to be seen now, or None."""
        ports = bar.space is Space.IO
        enable = Command.IO_SPACE if ports else Command.MEMORY_SPACE
        if not self.config.command & enable:
            return None
        base = self.config.get(bar.register()) & bar.mask
        return None if ports and base + bar.size > 0x10000 else base

    def _drive(self) -> None:
        """Show the pin's state in Status and on the line (6.2.2 Interrupt Disable, 6.2.3)."""
        wanted = self.intx and not self.uses_messages
        status = self.config.status & ~Status.INTERRUPT
        self.config.status = status | (Status.INTERRUPT if wanted else 0)
        if self._socket is not None and self.config.interrupt_pin:
            disabled = self.config.command & Command.INTERRUPT_DISABLE
            self._socket.interrupt(wanted and not disabled)

    def _send(self, address: int, data: int) -> None:
        """A message is a memory write: it needs bus mastering."""
        if self._socket is not None and self.bus_master:
            self._socket.message(address, data)

    # ---- state

    def save(self) -> State:
        """See `Saved.save`."""
        state = super().save() | {"config": bytes(self.config.raw)}
        return state if self.msix is None else state | {"msix": self.msix.save()}

    def restore(self, state: State) -> None:
        """See `Saved.restore`; the device has to be of the same making."""
        raw = state.get("config")
        if not isinstance(raw, bytes) or len(raw) != len(self.config.raw):
            raise ImageError(f"saved {type(self).__name__} has no configuration space")
        if self.msix is not None:
            self.msix.restore(state.get("msix", {}))
        self.config.raw[:] = raw
        super().restore(state)
        self._settle()
