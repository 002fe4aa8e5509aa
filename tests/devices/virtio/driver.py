"""The guest's side of virtio: a driver in Python that obeys the rules, unless told otherwise."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

from chipset.conftest import Rig
from ringfence.devices.virtio.device import VERSION_1, VirtioDevice
from ringfence.devices.virtio.pci import (
    COMMON,
    DEFAULT_PACING,
    DEVICE,
    ISR,
    NOTIFY,
    VirtioPci,
)
from ringfence.devices.virtio.rules import EVENT_IDX, INDIRECT_DESC, RING_PACKED
from ringfence.memory.ram import GuestMemory
from ringfence.pacing import Pacing

RAM = 8 << 20
BAR, MSIX = 0xC0000000, 0xC0010000
QUEUE_AREA = 0x100000
"""Where the first queue is; each has 64 KiB."""
BUFFERS = 0x400000
NEXT, WRITE, INDIRECT = 1, 2, 4

Segment = tuple[int, int, bool]
"""Address, length, whether the device writes it."""


class DriverRing(Protocol):
    """The driver's side of a ring."""

    def add(self, segments: Sequence[Segment], *, indirect: bool = False) -> int:
        """Make a chain available; return its identifier."""

    def used(self) -> list[tuple[int, int]]:
        """Take what the device has given back: (identifier, length)."""

    def needs_kick(self) -> bool:
        """Whether the device wants to be told of what was added since the last call."""

    def interrupts(self, wanted: bool) -> None:
        """Ask for an interrupt at the next used chain, or for none."""


class SplitDriver:
    """2.7, from the driver's side."""

    def __init__(self, memory: GuestMemory, size: int, base: int, event_idx: bool) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc, self.avail, self.device = base, base + 0x8000, base + 0xA000
        self.tables = base + 0xC000
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.avail_index = self.kicked = self.seen = 0

    def _put(self, table: int, index: int, segment: Segment, flags: int, following: int) -> None:
        address, length, write = segment
        flags |= WRITE if write else 0
        entry = struct.pack("<QIHH", address & (1 << 64) - 1, length, flags, following)
        self.memory.write(table + 16 * index, entry)

    def add(self, segments: Sequence[Segment], *, indirect: bool = False) -> int:
        if indirect:
            head = self.free.pop()
            table = self.tables + 0x100 * (head % 64)
            for n, segment in enumerate(segments):
                last = n == len(segments) - 1
                self._put(table, n, segment, 0 if last else NEXT, n + 1)
            self._put(self.desc, head, (table, 16 * len(segments), False), INDIRECT, 0)
            self.chains[head] = [head]
        else:
            taken = [self.free.pop() for _ in segments]
            for n, segment in enumerate(segments):
                last = n == len(segments) - 1
                following = 0 if last else taken[n + 1]
                self._put(self.desc, taken[n], segment, 0 if last else NEXT, following)
            head = taken[0]
            self.chains[head] = taken
        self.publish(head)
        return head

    def publish(self, head: int) -> None:
        slot = self.avail + 4 + 2 * (self.avail_index % self.size)
        self.memory.write(slot, struct.pack("<H", head))
        self.avail_index = self.avail_index + 1 & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_index))

    def used(self) -> list[tuple[int, int]]:
        found = []
        (index,) = struct.unpack("<H", self.memory.read(self.device + 2, 2))
        while self.seen != index:
            at = self.device + 4 + 8 * (self.seen % self.size)
            found.append(struct.unpack("<II", self.memory.read(at, 8)))
            self.free += self.chains.pop(found[-1][0])
            self.seen = self.seen + 1 & 0xFFFF
        return found

    def needs_kick(self) -> bool:
        old, self.kicked = self.kicked, self.avail_index
        if self.event_idx:
            raw = self.memory.read(self.device + 4 + 8 * self.size, 2)
            (event,) = struct.unpack("<H", raw)
            return self.avail_index - event - 1 & 0xFFFF < self.avail_index - old & 0xFFFF
        return not self.memory.read(self.device, 1)[0] & 1

    def interrupts(self, wanted: bool) -> None:
        event = self.seen if wanted else self.seen - 1 & 0xFFFF
        if self.event_idx:
            self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", event))
        else:
            self.memory.write(self.avail, struct.pack("<H", 0 if wanted else 1))


class PackedDriver:
    """2.8, from the driver's side."""

    def __init__(self, memory: GuestMemory, size: int, base: int, event_idx: bool) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc, self.avail, self.device = base, base + 0x8000, base + 0xA000
        self.tables = base + 0xC000
        self.next, self.wrap = 0, 1
        self.seen, self.seen_wrap = 0, 1
        self.kicked = (0, 0)
        self.added = 0
        self.room = size
        self.counts: dict[int, int] = {}
        self.identifiers = list(range(size))

    def add(self, segments: Sequence[Segment], *, indirect: bool = False) -> int:
        identifier = self.identifiers.pop()
        if indirect:
            table = self.tables + 0x100 * (identifier % 64)
            for n, (address, length, write) in enumerate(segments):
                entry = struct.pack("<QIHH", address, length, 0, WRITE if write else 0)
                self.memory.write(table + 16 * n, entry)
            entries = [(table, 16 * len(segments), INDIRECT)]
        else:
            entries = [
                (address, length, (WRITE if write else 0) | (NEXT if n < len(segments) - 1 else 0))
                for n, (address, length, write) in enumerate(segments)
            ]
        first = None
        for address, length, flags in entries:
            flags |= self.wrap << 7 | (1 - self.wrap) << 15
            at = self.desc + 16 * self.next
            body = struct.pack("<QIH", address & (1 << 64) - 1, length, identifier)
            self.memory.write(at, body)
            if first is None:
                first = (at, flags)
            else:
                self.memory.write(at + 14, struct.pack("<H", flags))
            self.next += 1
            self.added += 1
            if self.next == self.size:
                self.next, self.wrap = 0, 1 - self.wrap
        assert first is not None
        self.memory.write(first[0] + 14, struct.pack("<H", first[1]))
        self.counts[identifier] = len(entries)
        self.room -= len(entries)
        return identifier

    def used(self) -> list[tuple[int, int]]:
        found = []
        while True:
            raw = self.memory.read(self.desc + 16 * self.seen, 16)
            _, length, identifier, flags = struct.unpack("<QIHH", raw)
            if not flags >> 7 & 1 == flags >> 15 & 1 == self.seen_wrap:
                return found
            found.append((identifier, length))
            count = self.counts.pop(identifier)
            self.identifiers.append(identifier)
            self.room += count
            self.seen += count
            if self.seen >= self.size:
                self.seen -= self.size
                self.seen_wrap = 1 - self.seen_wrap

    def needs_kick(self) -> bool:
        added, self.added = self.added, 0
        offset, flags = struct.unpack("<HH", self.memory.read(self.device, 4))
        if flags != 2:
            return flags == 0
        event = offset & 0x7FFF
        if offset >> 15 != self.wrap:
            event -= self.size
        return 0 <= self.next - event - 1 < added

    def interrupts(self, wanted: bool) -> None:
        if wanted and self.event_idx:
            value = struct.pack("<HH", self.seen | self.seen_wrap << 15, 2)
        else:
            value = struct.pack("<HH", 0, 0 if wanted else 1)
        self.memory.write(self.avail, value)


class Driver(Rig):
    """A board with one virtio device in slot 1, and a driver for it."""

    def __init__(
        self, device: VirtioDevice, *, packed: bool = False, pacing: Pacing = DEFAULT_PACING
    ) -> None:
        super().__init__(memory_size=RAM)
        self.memory = GuestMemory(RAM)
        self.device = device
        self.function = VirtioPci(device, self.memory, packed=packed, pacing=pacing)
        self.board.plug(self.function)
        self.rings: list[DriverRing] = []
        self.config(0x10 + 16, BAR)
        self.config(0x14, MSIX)
        self.config(0x04, 6, 2)
        self.apic(0xF0, 0x1FF)

    def close(self) -> None:
        self.function.close()
        self.memory.close()

    # ---- registers

    def config(self, offset: int, value: int | None = None, size: int = 4) -> int:
        self.board.port_write(0xCF8, 4, 0x80000000 | 1 << 11 | offset & 0xFC)
        if value is not None:
            self.board.port_write(0xCFC + (offset & 3), size, value)
        return self.board.port_read(0xCFC + (offset & 3), size)

    def get(self, offset: int, size: int, page: int = COMMON) -> int:
        return self.board.mmio_read(BAR + page + offset, size)

    def put(self, offset: int, size: int, value: int, page: int = COMMON) -> None:
        self.board.mmio_write(BAR + page + offset, size, value)

    @property
    def status(self) -> int:
        return self.get(0x14, 1)

    def settings(self, offset: int, size: int) -> int:
        """The device's own configuration."""
        return self.get(offset, size, DEVICE)

    def isr(self) -> int:
        return self.get(0, 1, ISR)

    def notify(self, queue: int = 0) -> None:
        self.put(4 * queue, 2, queue, NOTIFY)

    # ---- life

    def offered(self) -> int:
        value = 0
        for half in (0, 1):
            self.put(0x00, 4, half)
            value |= self.get(0x04, 4) << 32 * half
        return value

    def negotiate(self, features: int) -> bool:
        """From reset to FEATURES_OK."""
        self.put(0x14, 1, 0)
        self.put(0x14, 1, 1)
        self.put(0x14, 1, 3)
        for half in (0, 1):
            self.put(0x08, 4, half)
            self.put(0x0C, 4, features >> 32 * half & 0xFFFFFFFF)
        self.put(0x14, 1, 11)
        return bool(self.status & 8)

    def set_queue(
        self, number: int, size: int, desc: int, avail: int, used: int, vector: int = 0xFFFF
    ) -> None:
        self.put(0x16, 2, number)
        self.put(0x18, 2, size)
        self.put(0x1A, 2, vector)
        for at, value in ((0x20, desc), (0x28, avail), (0x30, used)):
            self.put(at, 4, value & 0xFFFFFFFF)
            self.put(at + 4, 4, value >> 32)
        self.put(0x1C, 2, 1)

    def start(
        self,
        features: int = 0,
        *,
        size: int = 64,
        packed: bool = False,
        event_idx: bool = False,
        messages: bool = False,
    ) -> None:
        """Negotiate, set up all queues, and go."""
        features |= VERSION_1 | INDIRECT_DESC
        features |= (RING_PACKED if packed else 0) | (EVENT_IDX if event_idx else 0)
        assert self.negotiate(features)
        if messages:
            self.enable_messages()
        self.rings = []
        for number in range(self.get(0x12, 2)):
            base = QUEUE_AREA + number * 0x10000
            for at in range(0, 0x10000, 0x1000):
                self.memory.write(base + at, bytes(0x1000))
            kind = PackedDriver if packed else SplitDriver
            self.put(0x16, 2, number)
            entries = min(size, self.get(0x18, 2))
            ring = kind(self.memory, entries, base, event_idx)
            self.rings.append(ring)
            vector = number + 1 if messages else 0xFFFF
            self.set_queue(number, entries, ring.desc, ring.avail, ring.device, vector)
        self.put(0x14, 1, 15)

    def enable_messages(self) -> None:
        """MSI-X with vector 0x40 + n for entry n."""
        at = self.config(0x34, size=1)
        while self.config(at, size=1) != 0x11:
            at = self.config(at + 1, size=1)
        for entry in range(4):
            for word, value in enumerate((0xFEE00000, 0, 0x4040 + entry, 0)):
                self.board.mmio_write(MSIX + 16 * entry + 4 * word, 4, value)
        self.config(at + 2, 0x8000, 2)
        self.put(0x10, 2, 0)

    def request(
        self, queue: int, segments: Sequence[Segment], *, indirect: bool = False
    ) -> list[tuple[int, int]]:
        """One chain there and, if it is answered at once, back."""
        self.rings[queue].add(segments, indirect=indirect)
        self.notify(queue)
        return self.rings[queue].used()

    def vectors(self) -> list[int]:
        """All interrupts that are pending, ended."""
        found = []
        while (vector := self.take()) is not None:
            found.append(vector)
            self.apic(0xB0, 0)
        return found
