"""The PCI function: where registers lead to, resets, and the way to the backend.

Every register is a pair of functions in two tables by offset; those that only keep what is written
(`registers.PLAIN`) share one. Registers take words of 32 bits: a narrower read gives its part of
the word, a narrower write is lost (13.1). Offsets without a register read as 0.

Those that a driver touches at each interrupt and each batch of frames are in a bank that an engine
may access without us (`memory.registers`); we find their values there, too.

The same registers are reached through memory (BAR 0) and through two ports, address and data
(BAR 2), which drivers use for resets.

**Locking.** Accesses and timers come with the board's lock held; `receive`, which the backend's
thread calls, takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from ringfence.chipset.clock import TimerQueue
from ringfence.chipset.pci.config import ConfigSpace, Identity
from ringfence.chipset.pci.device import PciDevice, Space
from ringfence.chipset.state import State
from ringfence.devices.e1000 import registers as at
from ringfence.devices.e1000 import statistics
from ringfence.devices.e1000.eeprom import Eeprom
from ringfence.devices.e1000.filters import Filters
from ringfence.devices.e1000.interrupts import Interrupts
from ringfence.devices.e1000.phy import Phy
from ringfence.devices.e1000.receive import Receiver
from ringfence.devices.e1000.registers import (
    CTRL,
    EECD,
    EERD,
    ICR,
    ITR,
    MDIC,
    PLAIN,
    RCTL,
    RXCSUM,
    STATUS,
    TCTL,
    Delay,
    Ring,
)
from ringfence.devices.e1000.ring import DescriptorRing
from ringfence.devices.e1000.statistics import Statistics
from ringfence.devices.e1000.transmit import FRAMES, Transmitter
from ringfence.devices.natives import UNKEPT, Natives
from ringfence.memory.causes import CauseWord
from ringfence.memory.ram import GuestMemory
from ringfence.memory.registers import (
    MASK,
    POST,
    READ,
    STORE,
    TAKE,
    UNMASK,
    RegisterBank,
    place_of,
)
from ringfence.network.backend import NetworkBackend

IDENTITY = Identity(0x8086, 0x100E, 0x020000, 2, 0x8086, 0x001E)
MEMORY_BAR, MEMORY_SIZE = 0, 0x20000
IO_BAR, IO_SIZE = 2, 64
IOADDR, IODATA = 0, 4


class E1000(PciDevice):
    """An 82540EM.

    Parameters
    ----------
    memory : GuestMemory
        What its descriptors and buffers are in.
    timers : TimerQueue
        The board's.
    backend : NetworkBackend
        The other end of its cable, whose owner attaches it to `receive`.
    mac : bytes
        Its Ethernet address, 6 bytes.
    code : Natives
        Where native code is found.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (*PciDevice.FIELDS, "ctrl", "plain", "ioaddr")

    def __init__(
        self,
        memory: GuestMemory,
        timers: TimerQueue,
        backend: NetworkBackend,
        mac: bytes,
        code: Natives = UNKEPT,
    ) -> None:
        super().__init__(IDENTITY)
        bank = RegisterBank(lambda: self.interrupts.update())
        causes = bank.add(ICR.OFFSET, read=TAKE)
        self._status = bank.add(STATUS.OFFSET, read=READ)
        word = place_of(causes)
        bank.add(ICR.IMC, write=MASK, writable=ICR.IMPLEMENTED, place=word)
        bank.add(ICR.IMS, write=UNMASK, writable=ICR.IMPLEMENTED, place=word)
        transmit_tail, receive_tail = (
            bank.add(ring + Ring.TAIL, read=READ, write=POST, writable=Ring.INDEX)
            for ring in (Ring.TRANSMIT, Ring.RECEIVE)
        )
        throttle = bank.add(ITR.OFFSET, read=READ, write=STORE, writable=ITR.INTERVAL)
        self._ctrl = bank.add(CTRL.OFFSET, read=READ)
        self.add_bar(MEMORY_BAR, MEMORY_SIZE, bank=bank)
        self.add_bar(IO_BAR, IO_SIZE, Space.IO)
        self.mac = mac
        self.backend = backend
        self.ioaddr = 0
        self.plain: dict[int, int] = {}
        self.eeprom = Eeprom(mac)
        self.phy = Phy()
        self.filters = Filters()
        self.statistics = Statistics()
        self.interrupts = Interrupts(timers, self.set_intx, CauseWord(word), throttle)
        self.transmitter = Transmitter(
            *(memory, timers, self.interrupts, self.statistics),
            send=self._transmit,
            room=self._room,
            carry=backend.carry,
            vlan=self._vlan,
            master=lambda: self.bus_master,
            takes_large=lambda: self.backend.takes_large and not self._loops,
            put_off=self.put_off,
            tail=transmit_tail,
        )
        self.receiver = Receiver(
            *(memory, self.interrupts, self.statistics, self.filters),
            resume=backend.resume,
            vlan=self._vlan,
            natives=code,
            tail=receive_tail,
        )
        self._parts = {
            "eeprom": self.eeprom,
            "phy": self.phy,
            "filters": self.filters,
            "statistics": self.statistics,
            "interrupts": self.interrupts,
            "transmitter": self.transmitter,
            "receiver": self.receiver,
        }
        self._readers: dict[int, Callable[[], int]] = {}
        self._writers: dict[int, Callable[[int], object]] = {}
        self._lay_out()
        self.reset()

    def reset(self) -> None:
        """Be as after power-on (CTRL.RST, 14.2); the PHY and PCI configuration stay."""
        self.ctrl = CTRL.DEFAULT
        self._show_link()
        self.plain.update({offset: value for offset, (value, _) in PLAIN.items()})
        self.eeprom.reset()
        self.filters.reset(self.mac)
        self.statistics.reset()
        self.transmitter.reset()
        self.receiver.reset()
        self._tell_backend()
        self.interrupts.reset()

    # ---- the owner's side

    @property
    def ctrl(self) -> int:
        """CTRL."""
        return int(self._ctrl.value)

    @ctrl.setter
    def ctrl(self, value: int) -> None:
        self._ctrl.value = value & at.ALL

    @property
    def link(self) -> bool:
        """Whether the cable is plugged in."""
        return self.phy.link

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it; the guest is told."""
        with self.lock:
            if up != self.phy.link:
                self.phy.link = up
                self._show_link()
                self.interrupts.cause(ICR.LSC)

    # ---- frames

    def receive(self, frames: Sequence[bytes]) -> int:
        """Take frames from the backend, in its thread; see `NetworkCard.receive`."""
        with self.lock:
            if not self.phy.link or self._loops:
                return len(frames)
            return self._arrive(frames)

    def more(self) -> None:
        """See `NetworkCard.more`."""
        with self.lock:
            self.transmitter.run()

    def _room(self) -> int:
        """How many frames the transmitter may send."""
        return self.backend.room() if self.phy.link and not self._loops else FRAMES

    @property
    def _loops(self) -> bool:
        """Whether what is sent comes back."""
        return bool(self.phy.loopback or self.receiver.rctl & RCTL.LBM)

    def _arrive(self, frames: Sequence[bytes]) -> int:
        return self.receiver.receive(frames) if self.bus_master else len(frames)

    def _transmit(self, frame: bytes) -> None:
        """Take a frame from the transmitter."""
        if self._loops:
            self._arrive((frame,))  # what finds no room is lost, as in the chip's own buffer
        elif self.phy.link:
            self.backend.transmit(frame)

    def _vlan(self) -> int:
        return self.plain[at.VET] if self.ctrl & CTRL.VME else 0

    def config_write(self, offset: int, size: int, value: int) -> None:
        """See `PciDevice.config_write`; what waited for bus mastering goes on."""
        super().config_write(offset, size, value)
        if ConfigSpace.command.touched(offset, size):
            self.transmitter.run()

    # ---- registers

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`."""
        if bar == IO_BAR:
            return self._io_read(offset, size)
        reader = self._readers.get(offset & ~3)
        return reader() >> 8 * (offset & 3) if reader is not None else 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`."""
        if size != 4:
            return
        if bar == IO_BAR:
            self._io_write(offset, value)
            return
        writer = self._writers.get(offset)
        if writer is not None:
            writer(value)

    def _io_read(self, offset: int, size: int) -> int:
        """Read IOADDR or IODATA."""
        if offset & ~3 == IOADDR:
            return self.ioaddr >> 8 * (offset & 3)
        if offset & ~3 == IODATA and self.ioaddr < MEMORY_SIZE and not self.ioaddr & 3:
            return self.bar_read(MEMORY_BAR, self.ioaddr | offset & 3, size)
        return 0

    def _io_write(self, offset: int, value: int) -> None:
        if offset == IOADDR:
            self.ioaddr = value
        elif offset == IODATA and self.ioaddr < MEMORY_SIZE and not self.ioaddr & 3:
            self.bar_write(MEMORY_BAR, self.ioaddr, 4, value)

    def _lay_out(self) -> None:
        """Fill the tables of registers."""
        readers, writers = self._readers, self._writers
        for offset, (_, mask) in PLAIN.items():
            readers[offset] = partial(self._read_plain, offset)
            writers[offset] = partial(self._write_plain, offset, mask)
        for offset in (CTRL.OFFSET, CTRL.DUPLICATE):
            readers[offset] = lambda: self.ctrl
            writers[offset] = self._write_ctrl
        readers[STATUS.OFFSET] = lambda: int(self._status.value)
        self._both(EECD.OFFSET, self.eeprom.read_eecd, self.eeprom.write_eecd)
        self._both(EERD.OFFSET, self.eeprom.read_eerd, self.eeprom.write_eerd)
        self._both(MDIC.OFFSET, self.phy.read_mdic, self._write_mdic)
        interrupts = self.interrupts
        self._both(ICR.OFFSET, interrupts.read_icr, interrupts.write_icr)
        self._both(ICR.IMS, interrupts.read_ims, interrupts.write_ims)
        self._both(ITR.OFFSET, interrupts.read_itr, interrupts.write_itr)
        writers[ICR.ICS] = interrupts.cause
        writers[ICR.IMC] = interrupts.write_imc
        receiver, transmitter = self.receiver, self.transmitter
        self._both(RCTL.OFFSET, receiver.read_rctl, receiver.write_rctl)
        self._both(RXCSUM.OFFSET, receiver.read_rxcsum, receiver.write_rxcsum)
        self._both(TCTL.OFFSET, transmitter.read_tctl, transmitter.write_tctl)
        for part in (receiver, transmitter):
            for register in (Ring.BAL, Ring.BAH, Ring.LEN, Ring.HEAD):
                self._both(
                    part.ring.registers + register,
                    partial(part.ring.read, register),
                    partial(self._write_ring, part.ring, register),
                )
            tail = part.ring.registers + Ring.TAIL
            self._both(tail, partial(part.ring.read, Ring.TAIL), part.write_tail)
        for delayed, packet, absolute in (
            (interrupts.received, Delay.RDTR, Delay.RADV),
            (interrupts.transmitted, Delay.TIDV, Delay.TADV),
        ):
            self._both(packet, delayed.read_packet, delayed.write_packet)
            self._both(absolute, delayed.read_absolute, delayed.write_absolute)
        for index in range(statistics.COUNT):
            readers[at.STATISTICS + 4 * index] = partial(self.statistics.read, index)
        tables = (("mta", at.MTA, at.MTA_WORDS), ("ra", at.RA, at.RA_WORDS))
        for table, offset, words in (*tables, ("vfta", at.VFTA, at.VFTA_WORDS)):
            for index in range(words):
                readers[offset + 4 * index] = partial(self.filters.read, table, index)
                writers[offset + 4 * index] = partial(self.filters.write, table, index)

    def _write_ring(self, ring: DescriptorRing, register: int, value: int) -> None:
        ring.write(register, value)
        self._tell_backend()

    def _tell_backend(self) -> None:
        """Let the backend know whether the card takes large segments, as its rings are now."""
        self.backend.bring_large(self.receiver.takes_large)

    def _both(
        self, offset: int, reader: Callable[[], int], writer: Callable[[int], object]
    ) -> None:
        self._readers[offset], self._writers[offset] = reader, writer

    def _read_plain(self, offset: int) -> int:
        return self.plain[offset]

    def _write_plain(self, offset: int, mask: int, value: int) -> None:
        self.plain[offset] = value & mask

    def _show_link(self) -> None:
        """Have STATUS say what the cable is."""
        link = STATUS.LU if self.phy.link else 0
        self._status.value = STATUS.FD | STATUS.SPEED_1000 | STATUS.ASDV_1000 | link

    def _write_ctrl(self, value: int) -> None:
        if value & CTRL.PHY_RST:
            self.phy.reset()
        if value & CTRL.RST:
            self.reset()
        else:
            self.ctrl = value & ~(CTRL.PHY_RST | CTRL.RST)

    def _write_mdic(self, value: int) -> None:
        if self.phy.write_mdic(value):
            self.interrupts.cause(ICR.MDAC)

    # ---- state

    def save(self) -> State:
        """See `Saved.save`."""
        return super().save() | {name: part.save() for name, part in self._parts.items()}

    def restore(self, state: State) -> None:
        """See `Saved.restore`."""
        super().restore(state)
        for name, part in self._parts.items():
            part.restore(state[name])
        self._show_link()
        self._tell_backend()
