"""The console device: control messages, bytes both ways, limits."""

from __future__ import annotations

import struct

import pytest

from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, Driver
from ringfence.devices.virtio.console import INPUT_LIMIT, MULTIPORT, Port, VirtioConsole

ADD, NAME, OPEN, CONSOLE = 1, 7, 6, 4


class Guest:
    """A driver and what its ports' sinks were given."""

    def __init__(self, drive: Drive, features: int = MULTIPORT, packed: bool = False) -> None:
        self.out = [bytearray(), bytearray()]
        self.opened: list[tuple[int, bool]] = []
        self.device = VirtioConsole(
            [
                Port("", self.out[0].extend, lambda opened: self.opened.append((0, opened))),
                Port("agent", self.out[1].extend, lambda opened: self.opened.append((1, opened))),
            ]
        )
        self.driver: Driver = drive(self.device, packed=packed)
        self.driver.start(features, packed=packed, messages=True)
        self.slot = 0
        self.places: dict[tuple[int, int], int] = {}

    def buffers(self, queue: int, count: int, length: int = 64) -> None:
        for _ in range(count):
            self.slot += 1
            at = BUFFERS + 0x1000 + self.slot * 0x100
            name = self.driver.rings[queue].add([(at, length, True)])
            self.places[queue, name] = at
        self.driver.notify(queue)

    def taken(self, queue: int) -> list[bytes]:
        return [
            self.driver.memory.read(self.places.pop((queue, name)), length)
            for name, length in self.driver.rings[queue].used()
        ]

    def write(self, queue: int, data: bytes) -> None:
        self.driver.memory.write(BUFFERS, data)
        assert len(self.driver.request(queue, [(BUFFERS, len(data), False)])) == 1

    def control(self, number: int, event: int, value: int) -> None:
        self.write(3, struct.pack("<IHH", number, event, value))

    def heard(self) -> list[tuple[int, int, int, bytes]]:
        return [(*struct.unpack_from("<IHH", raw), raw[8:]) for raw in self.taken(2)]


@pytest.mark.parametrize("packed", [False, True])
def test_ports_are_introduced(drive: Drive, packed: bool) -> None:
    guest = Guest(drive, packed=packed)
    assert guest.driver.settings(4, 4) == 2
    guest.control(0, 0, 1)
    guest.buffers(2, 8)
    assert guest.heard() == [(0, ADD, 1, b""), (1, ADD, 1, b"")]
    guest.control(0, 3, 1)
    guest.control(1, 3, 1)
    assert guest.heard() == [
        (0, CONSOLE, 1, b""),
        (0, OPEN, 1, b""),
        (1, NAME, 1, b"agent"),
        (1, OPEN, 1, b""),
    ]
    guest.control(1, OPEN, 1)
    assert guest.opened == [(1, True)]
    guest.driver.put(0x14, 1, 0)
    assert guest.opened == [(1, True), (1, False)]


def test_bytes_both_ways(drive: Drive) -> None:
    guest = Guest(drive)
    guest.write(1, b"to the console")
    guest.write(5, b"to the agent")
    assert guest.out == [b"to the console", b"to the agent"]
    assert guest.device.send(1, b"early") == 5
    guest.buffers(4, 2, 4)
    assert guest.taken(4) == []
    guest.control(1, OPEN, 1)
    assert guest.taken(4) == [b"earl", b"y"]
    assert guest.device.send(1, b"later") == 5
    guest.buffers(4, 2, 64)
    assert guest.taken(4) == [b"later"]


def test_without_control_messages_there_is_one_port(drive: Drive) -> None:
    guest = Guest(drive, features=0)
    assert guest.opened == [(0, True)]
    guest.buffers(0, 1)
    assert guest.device.send(0, b"hello") == 5
    assert guest.taken(0) == [b"hello"]


def test_limits(drive: Drive) -> None:
    guest = Guest(drive)
    assert guest.device.send(0, bytes(INPUT_LIMIT + 1)) == INPUT_LIMIT
    assert guest.device.send(0, b"x") == 0
    for _ in range(1000):
        guest.control(0, 0, 1)
        guest.control(1, 3, 1)
    assert len(guest.device._messages) <= 6
    for message in ((2, 3, 1), (0xFFFFFFFF, OPEN, 1), (0, 99, 1), (0, 0, 0)):
        guest.control(*message)
    guest.write(3, b"short")
    assert guest.driver.status == 15


def test_saved_input_is_there_again(drive: Drive) -> None:
    guest, other = Guest(drive), Guest(drive)
    guest.control(1, OPEN, 1)
    guest.device.send(1, b"kept")
    other.device.restore(guest.device.save())
    other.buffers(4, 1)
    assert other.taken(4) == [b"kept"]
