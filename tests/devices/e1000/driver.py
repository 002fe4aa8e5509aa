"""A driver for the card, in Python: rings in guest RAM, frames out and in, registers by name."""

from __future__ import annotations

import random
import struct
import threading
import weakref
from dataclasses import dataclass, field

from memory.answering import Answering
from ringfence.chipset.clock import MockClock, TimerQueue
from ringfence.devices.e1000.card import E1000, MEMORY_BAR
from ringfence.devices.e1000.registers import (
    ICR,
    RCTL,
    TCTL,
    Ring,
    RxDescriptor,
    TxDescriptor,
)
from ringfence.devices.natives import natives
from ringfence.memory.ram import GuestMemory

MAC = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000002")
MEMORY = 4 << 20
TX_RING, RX_RING = 0x1000, 0x11000
TX_BUFFERS, RX_BUFFERS = 0x100000, 0x200000
ENTRIES = 64
BUFFER = 2048
COMMAND = 0x07
EOP_RS = TxDescriptor.EOP | TxDescriptor.RS


@dataclass
class Wire:
    """A backend that keeps what the card sends."""

    frames: list[bytes] = field(default_factory=list)
    resumed: int = 0
    takes_large: bool = False
    large: bool = False
    limit: int = 1 << 30
    """Frames that it keeps."""
    asked_in_vain: int = 0

    def attach(self, card) -> None:
        raise AssertionError("a card does not attach itself")

    detach = close = attach

    def resume(self) -> None:
        self.resumed += 1

    def bring_large(self, wanted: bool) -> None:
        self.large = wanted

    def room(self) -> int:
        room = max(self.limit - len(self.frames), 0)
        self.asked_in_vain += not room
        return room

    def transmit(self, frame: bytes) -> None:
        self.frames.append(frame)

    def carry(self) -> None: ...

    def stats(self) -> dict[str, int]:
        return {}


class Driver:
    """A card in a slot of its own, and what a driver does with it."""

    def __init__(self, entries: int = ENTRIES) -> None:
        self.memory = GuestMemory(MEMORY)
        weakref.finalize(self, self.memory.close)
        self.clock = MockClock()
        self.queue = TimerQueue(self.clock, threading.RLock())
        self.wire = Wire()
        self.pin: list[bool] = []
        self.card = E1000(self.memory, self.queue, self.wire, MAC, natives())
        self.card.interrupts._pin = self.pin.append
        self.entries = entries
        self.tx_tail = self.rx_head = 0
        self.status = self.errors = self.tag = 0
        """Of the last descriptor that `take` found."""
        self.card.config_write(4, 2, COMMAND)
        self.native: Answering | None = None
        """What an engine does by itself, if it is tried."""

    def go_native(self) -> Driver:
        """Access registers as an engine does that answers some by itself."""
        bank = self.card._bars[0].bank
        assert bank is not None
        self.native = Answering.of(bank)
        return self

    @property
    def asserted(self) -> bool:
        return bool(self.pin) and self.pin[-1]

    def read(self, offset: int, size: int = 4) -> int:
        if self.native is not None:
            value = self.native.read(offset, size)
            if value is not None:
                return value
            self.native.places.settle()
        return self.card.bar_read(MEMORY_BAR, offset, size) & (1 << 8 * size) - 1

    def write(self, offset: int, value: int, size: int = 4) -> None:
        if self.native is not None:
            if self.native.write(offset, value, size):
                return
            self.native.places.settle()
        self.card.bar_write(MEMORY_BAR, offset, size, value)

    # ---- bringing it up

    def start(self, rctl: int = 0, tctl: int = 0) -> Driver:
        """Set up both rings, all receive buffers given to the card."""
        self.ring(Ring.TRANSMIT, TX_RING)
        self.ring(Ring.RECEIVE, RX_RING)
        for index in range(self.entries):
            descriptor = struct.pack("<QQ", RX_BUFFERS + index * BUFFER, 0)
            self.memory.write(RX_RING + index * 16, descriptor)
        self.write(RCTL.OFFSET, RCTL.EN | RCTL.BAM | rctl)
        self.write(TCTL.OFFSET, TCTL.EN | TCTL.PSP | tctl)
        self.write(Ring.RECEIVE + Ring.TAIL, self.entries - 1)
        self.write(ICR.IMS, ICR.RXT0 | ICR.TXDW | ICR.RXDMT0 | ICR.LSC)
        return self

    def ring(self, registers: int, base: int) -> None:
        self.write(registers + Ring.BAL, base & 0xFFFFFFFF)
        self.write(registers + Ring.BAH, base >> 32)
        self.write(registers + Ring.LEN, self.entries * 16)
        self.write(registers + Ring.HEAD, 0)
        self.write(registers + Ring.TAIL, 0)

    # ---- sending

    def put(self, address: int, lower: int, upper: int = 0) -> int:
        """Write a descriptor behind the tail; the doorbell is `ring_tail`."""
        at = TX_RING + self.tx_tail * 16
        self.memory.write(at, struct.pack("<QII", address, lower, upper))
        self.tx_tail = (self.tx_tail + 1) % self.entries
        return at

    def context(self, **fields: int) -> None:
        """Write a context descriptor; names as in the manual, lower case."""
        get = fields.get
        raw = struct.pack(
            "<BBHBBHII",
            *(get("ipcss", 0), get("ipcso", 0), get("ipcse", 0)),
            *(get("tucss", 0), get("tucso", 0), get("tucse", 0)),
            TxDescriptor.DEXT | get("tucmd", 0) | get("paylen", 0),
            get("mss", 0) << 16 | get("hdrlen", 0) << 8,
        )
        at = TX_RING + self.tx_tail * 16
        self.memory.write(at, raw)
        self.tx_tail = (self.tx_tail + 1) % self.entries

    def ring_tail(self) -> None:
        self.write(Ring.TRANSMIT + Ring.TAIL, self.tx_tail)

    def send(self, frame: bytes, command: int = EOP_RS, upper: int = 0) -> int:
        """Send a frame with one legacy descriptor; return the descriptor's address."""
        buffer = TX_BUFFERS + self.tx_tail * 0x4000
        self.memory.write(buffer, frame)
        at = self.put(buffer, command | len(frame), upper)
        self.ring_tail()
        return at

    # ---- receiving

    def take(self) -> list[bytes]:
        """Take all frames that the card has stored, and give their buffers back."""
        frames, data = [], b""
        while True:
            at = RX_RING + self.rx_head * 16
            address, length, _, status, errors, tag = struct.unpack(
                "<QHHBBH", self.memory.read(at, 16)
            )
            if not status & RxDescriptor.DD:
                return frames
            self.status, self.errors, self.tag = status, errors, tag
            data += self.memory.read(address, length)
            if status & RxDescriptor.EOP:
                frames.append(data)
                data = b""
            self.memory.write(at, struct.pack("<QQ", address, 0))
            self.write(Ring.RECEIVE + Ring.TAIL, self.rx_head)
            self.rx_head = (self.rx_head + 1) % self.entries


def frame_of(length: int, destination: bytes = MAC, seed: int = 0) -> bytes:
    """A frame of ``length`` bytes with some content of no known protocol."""
    rest = random.Random(seed).randbytes(max(0, length - 14))
    return (destination + PEER + b"\x88\xb5" + rest)[:length]
