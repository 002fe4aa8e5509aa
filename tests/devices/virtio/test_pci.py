"""The transport: capabilities, registers, negotiation, interrupts, reset, state."""

from __future__ import annotations

import random

import pytest

from devices.virtio.conftest import Drive
from devices.virtio.driver import BAR, BUFFERS, DEVICE, ISR, NOTIFY, Driver
from ringfence.chipset.state import Saved
from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain
from ringfence.errors import ImageError


class Slow(VirtioDevice):
    """Keeps chains as a backend would."""

    TYPE = 62
    CLASS_CODE = 0xFF0000
    FIELDS = ("value",)

    def __init__(self) -> None:
        super().__init__(1 << 5 | 1 << 40, (16, 8))
        self.value = 0x1122334455667788
        self.kept: list[tuple[int, Chain]] = []

    def config(self) -> bytes:
        return self.value.to_bytes(8, "little")

    def config_write(self, offset: int, data: bytes) -> None:
        raw = bytearray(self.config())
        raw[offset : offset + len(data)] = data
        self.value = int.from_bytes(raw[:8], "little")

    def notified(self, number: int) -> None:
        self.drain(number, lambda chain: self.keep(number, chain))

    def keep(self, number: int, chain: Chain) -> None:
        self.busy += 1
        self.kept.append((number, chain))

    def finish(self) -> None:
        for number, chain in self.kept:
            ring = self.transport.ring(number)
            if ring is not None:
                ring.push(chain, 0)
                self.transport.publish(number)
        self.kept.clear()
        self.busy = 0
        self.transport.finished()


@pytest.fixture
def driver(drive: Drive) -> Driver:
    return drive(Slow())


@pytest.fixture
def device(driver: Driver) -> Slow:
    assert isinstance(driver.device, Slow)
    return driver.device


def test_identity_and_capabilities(driver: Driver) -> None:
    assert driver.config(0x00) == (0x1040 + 62) << 16 | 0x1AF4
    assert driver.config(0x08) & 0xFF == 1
    found = {}
    at = driver.config(0x34, size=1)
    while at:
        if driver.config(at, size=1) == 9:
            kind = driver.config(at + 3, size=1)
            found[kind] = (
                driver.config(at + 2, size=1),
                driver.config(at + 4, size=1),
                driver.config(at + 8),
                driver.config(at + 12),
            )
        at = driver.config(at + 1, size=1)
    assert found == {
        1: (16, 4, 0x0000, 64),
        2: (20, 4, 0x3000, 0x1000),
        3: (16, 4, 0x1000, 0x1000),
        4: (16, 4, 0x2000, 0x1000),
        5: (20, 0, 0, 0),
    }


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (1 << 32, True),
        (1 << 32 | 1 << 5 | 1 << 40 | 3 << 28, True),
        (1 << 5, False),
        (0, False),
        (1 << 32 | 1 << 6, False),
        (1 << 32 | 1 << 34, False),
        (1 << 32 | 1 << 63, False),
    ],
)
def test_negotiation(driver: Driver, features: int, accepted: bool) -> None:
    assert driver.offered() == 1 << 32 | 1 << 5 | 1 << 40 | 3 << 28
    assert driver.negotiate(features) == accepted
    assert driver.status == (11 if accepted else 3)


def test_features_hold_after_features_ok(driver: Driver) -> None:
    driver.negotiate(1 << 32)
    driver.put(0x08, 4, 0)
    driver.put(0x0C, 4, 1 << 5)
    assert driver.get(0x0C, 4) == 0
    for select in (2, 0xFFFFFFFF):
        driver.put(0x08, 4, select)
        driver.put(0x0C, 4, 1)
        driver.put(0x00, 4, select)
        assert driver.get(0x04, 4) == driver.get(0x0C, 4) == 0


def test_queue_registers(driver: Driver) -> None:
    driver.negotiate(1 << 32)
    assert driver.get(0x12, 2) == 2
    driver.put(0x16, 2, 1)
    assert (driver.get(0x18, 2), driver.get(0x1E, 2)) == (8, 1)
    driver.put(0x18, 2, 4)
    driver.put(0x20, 4, 0x12345678)
    driver.put(0x24, 4, 0x9)
    assert driver.get(0x20, 8) == 0x9_12345678
    assert driver.get(0x16, 1) == 1
    assert driver.get(0x18, 4) == 4 | 0xFFFF << 16
    driver.put(0x1A, 2, 3)  # there are three vectors: 0, 1, 2
    assert driver.get(0x1A, 2) == 0xFFFF
    driver.put(0x1A, 2, 2)
    assert driver.get(0x1A, 2) == 2
    driver.put(0x16, 2, 0)
    assert driver.get(0x18, 2) == 16
    driver.put(0x16, 2, 2)
    assert (driver.get(0x18, 2), driver.get(0x1A, 2), driver.get(0x1C, 2)) == (0, 0xFFFF, 0)
    driver.put(0x1C, 2, 1)
    driver.put(0x16, 2, 0)
    assert driver.get(0x1C, 2) == 0


def test_enabled_queues_stand_still(driver: Driver) -> None:
    driver.start()
    driver.put(0x16, 2, 0)
    before = driver.get(0x20, 4)
    driver.put(0x20, 4, 0x5000)
    driver.put(0x18, 2, 2)
    driver.put(0x1C, 2, 0)
    assert (driver.get(0x20, 4), driver.get(0x18, 2), driver.get(0x1C, 2)) == (before, 16, 1)


def test_device_configuration(driver: Driver, device: Slow) -> None:
    assert driver.settings(0, 4) == 0x55667788
    assert driver.settings(6, 2) == 0x1122
    assert driver.settings(8, 4) == 0
    driver.put(1, 1, 0xAA, DEVICE)
    assert device.value == 0x112233445566AA88
    driver.put(0xFFC, 4, 1, DEVICE)
    driver.start(messages=True)
    generation = driver.get(0x15, 1)
    device.transport.config_changed()
    assert driver.get(0x15, 1) == generation + 1
    assert driver.vectors() == [0x40]


def test_window_in_configuration_space(driver: Driver) -> None:
    at = driver.config(0x34, size=1)
    while driver.config(at + 3, size=1) != 5 or driver.config(at, size=1) != 9:
        at = driver.config(at + 1, size=1)

    def aim(bar: int, offset: int, length: int) -> None:
        driver.config(at + 4, bar, 1)
        driver.config(at + 8, offset)
        driver.config(at + 12, length)

    aim(4, DEVICE, 4)
    assert driver.config(at + 16) == 0x55667788
    aim(4, 0x14, 1)
    driver.config(at + 16, 1)
    assert driver.status == 1
    for bar, offset, length in ((1, 0, 4), (4, 2, 4), (4, 0x4000, 4), (4, 0, 3), (4, 1 << 31, 4)):
        aim(bar, offset, length)
        driver.config(at + 16, 0xFFFFFFFF)
    assert driver.status == 1


def test_reset_waits_for_what_is_in_flight(driver: Driver, device: Slow) -> None:
    driver.start(messages=True)
    driver.request(0, [(BUFFERS, 4, True)])
    assert len(device.kept) == 1
    driver.put(0x14, 1, 0)
    assert driver.status != 0
    driver.put(0x14, 1, 1)  # not before it is done
    driver.notify()
    device.finish()
    assert driver.status == 0
    assert driver.get(0x10, 2) == 0xFFFF
    assert driver.rings[0].used() == []
    driver.start()
    assert driver.request(0, [(BUFFERS, 4, True)]) == []
    device.finish()
    assert len(driver.rings[0].used()) == 1


def test_no_work_without_bus_mastering(driver: Driver, device: Slow) -> None:
    driver.start()
    driver.config(0x04, 2, 2)
    driver.request(0, [(BUFFERS, 4, True)])
    assert device.kept == []
    driver.config(0x04, 6, 2)
    driver.notify()
    assert len(device.kept) == 1
    device.finish()


@pytest.mark.parametrize("packed", [False, True])
def test_restored_device_goes_on(drive: Drive, packed: bool) -> None:
    first, second = (drive(Slow(), packed=packed) for _ in range(2))
    first.start(packed=packed, event_idx=True, messages=True)
    ring = first.rings[0]
    for _ in range(5):
        ring.add([(BUFFERS, 4, True)])
    first.notify()
    first.device.finish()
    ring.used()
    first.isr()
    state = first.board.save()
    second.memory.write(0, first.memory.read(0, 8 << 20))
    second.board.restore(state)
    assert second.board.save() == state
    second.rings = first.rings
    for each in second.rings:
        each.memory = second.memory
    ring.add([(BUFFERS, 4, True)])
    second.notify()
    second.device.finish()
    assert len(ring.used()) == 1
    assert second.status == 15
    with pytest.raises(ImageError):
        second.function.restore(second.function.save() | {"queues": []})
    damaged = second.function.save()
    damaged["queues"][0]["descriptors"] = 3
    with pytest.raises(ImageError):
        second.function.restore(damaged)


@pytest.mark.parametrize("packed", [False, True])
def test_positions_outside_their_ring_are_not_restored(drive: Drive, packed: bool) -> None:
    """Native code goes by them, so a forged state must not bring them."""
    driver = drive(Slow(), packed=packed)
    driver.start(packed=packed, size=64)
    names = ("next_avail", "next_used") if packed else ("last_avail", "used_index", "signalled")
    for name in names:
        for value in (64 if packed else 1 << 16, 1 << 40, -1, True, "1", None):
            forged = driver.function.save()
            forged["rings"][0][name] = value
            with pytest.raises(ImageError):
                driver.function.restore(forged)
    if packed:
        with pytest.raises(ImageError):
            forged = driver.function.save()
            driver.function.restore({**forged, "rings": [forged["rings"][0] | {"used_wrap": 2}]})


def test_random_registers_are_borne(driver: Driver, device: Slow) -> None:
    chance = random.Random(5)
    for _ in range(20_000):
        page = chance.choice((0, 0, 0, ISR, DEVICE, NOTIFY))
        offset, size = chance.randrange(0x48), chance.choice((1, 2, 4, 8))
        value = chance.choice((0, 1, 4, 15, 0xFFFF, BUFFERS, chance.getrandbits(32)))
        driver.board.mmio_write(BAR + page + offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= driver.board.mmio_read(BAR + page + offset, size) < 1 << 8 * size
        if chance.random() < 0.02:
            device.finish()
            driver.vectors()
    device.finish()
    driver.put(0x14, 1, 0)
    driver.start()
    assert driver.status == 15
    assert isinstance(driver.function, Saved)
