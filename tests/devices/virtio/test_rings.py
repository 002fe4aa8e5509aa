"""Both ring layouts: well-behaved drivers, and those that are not."""

from __future__ import annotations

import random
import struct
import subprocess
import sys

import pytest

from devices.virtio.conftest import Drive
from devices.virtio.driver import (
    BUFFERS,
    INDIRECT,
    NEXT,
    QUEUE_AREA,
    RAM,
    WRITE,
    Driver,
    PackedDriver,
    SplitDriver,
)
from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain

LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
EVENTS = pytest.mark.parametrize("event_idx", [False, True], ids=["plain", "event_idx"])


class Echo(VirtioDevice):
    """Gives back what it reads, in order; keeps chains on request."""

    TYPE = 63
    CLASS_CODE = 0xFF0000

    def __init__(self) -> None:
        super().__init__(0, (256,))
        self.kept: list[Chain] | None = None
        self.chains = 0
        self.resets = 0

    def notified(self, number: int) -> None:
        self.drain(number, self.handle)

    def handle(self, chain: Chain) -> int | None:
        self.chains += 1
        if self.kept is not None:
            self.kept.append(chain)
            return None
        return chain.write(chain.read())

    def reset(self) -> None:
        self.resets += 1


def echo(drive: Drive, packed: bool, **options: bool) -> tuple[Driver, Echo]:
    device = Echo()
    driver = drive(device, packed=True)
    driver.start(packed=packed, **options)
    return driver, device


@LAYOUTS
@EVENTS
def test_a_long_conversation(drive: Drive, packed: bool, event_idx: bool) -> None:
    """Chains of all shapes, in batches, around the ring many times."""
    driver, device = echo(drive, packed, event_idx=event_idx, messages=True)
    ring, chance = driver.rings[0], random.Random(2)
    assert isinstance(ring, SplitDriver | PackedDriver)
    total = 0
    while total < 70_000 // (7 if packed else 1):
        expected = {}
        for slot in range(chance.randrange(1, 20)):
            at = BUFFERS + slot * 0x1000
            data = chance.randbytes(chance.randrange(1, 300))
            driver.memory.write(at, data)
            cut = chance.randrange(len(data) + 1)
            segments = [(at, cut, False), (at + cut, len(data) - cut, False)]
            segments += [(at + 0x400, 150, True), (at + 0x800, 200, True)]
            wants = chance.random() < 0.5
            identifier = ring.add(segments[0 if cut else 1 :], indirect=wants)
            expected[identifier] = (at, data)
            total += 1
            if isinstance(ring, PackedDriver) and ring.room < 4:
                break
            if isinstance(ring, SplitDriver) and len(ring.free) < 4:
                break
        ring.interrupts(True)
        assert ring.needs_kick()
        driver.notify()
        assert driver.vectors() == [0x41]
        for identifier, length in ring.used():
            at, data = expected.pop(identifier)
            assert length == len(data)
            got = driver.memory.read(at + 0x400, 150) + driver.memory.read(at + 0x800, 200)
            assert got[: len(data)] == data
        assert not expected
    assert device.chains == total
    assert not driver.status & 64


@LAYOUTS
@EVENTS
def test_interrupts_are_suppressed(drive: Drive, packed: bool, event_idx: bool) -> None:
    driver, _ = echo(drive, packed, event_idx=event_idx, messages=True)
    ring = driver.rings[0]
    ring.interrupts(False)
    driver.request(0, [(BUFFERS, 4, True)])
    assert driver.vectors() == []
    ring.interrupts(True)
    driver.request(0, [(BUFFERS, 4, True)])
    assert driver.vectors() == [0x41]
    if event_idx:  # the event is behind: nothing until it is set anew
        driver.request(0, [(BUFFERS, 4, True)])
        assert driver.vectors() == []


@LAYOUTS
def test_kicks_are_suppressed_while_working(drive: Drive, packed: bool) -> None:
    driver, device = echo(drive, packed)
    ring, wanted = driver.rings[0], []
    device.handle = lambda chain: wanted.append(ring.needs_kick()) or 0  # type: ignore[method-assign]
    driver.request(0, [(BUFFERS, 4, True)])
    assert wanted == [False]
    assert ring.needs_kick()


@LAYOUTS
def test_pin_interrupt(drive: Drive, packed: bool) -> None:
    driver, _ = echo(drive, packed)
    driver.route(17, 0x8050)
    driver.request(0, [(BUFFERS, 4, True)])
    assert driver.take() == 0x50
    assert driver.isr() == 1
    driver.apic(0xB0, 0)
    assert driver.take() is None
    assert driver.isr() == 0


@LAYOUTS
def test_chains_come_back_in_any_order(drive: Drive, packed: bool) -> None:
    driver, device = echo(drive, packed)
    device.kept = []
    names = [driver.rings[0].add([(BUFFERS + n, 1, True)] * (1 + n % 3)) for n in range(10)]
    driver.notify()
    assert driver.rings[0].used() == []
    ring = driver.function.ring(0)
    assert ring is not None
    order = random.Random(1).sample(range(10), 10)
    for n in order:
        ring.push(device.kept[n], 0)
    driver.function.publish(0)
    assert [name for name, _ in driver.rings[0].used()] == [names[n] for n in order]


def test_work_per_notification_is_bounded(drive: Drive) -> None:
    """A driver that adds a chain for each that is taken does not keep the lock."""
    driver, device = echo(drive, False)
    ring = driver.rings[0]
    assert isinstance(ring, SplitDriver)

    def handle(chain: Chain) -> int:
        device.chains += 1
        if device.chains < 1000:
            ring.publish(chain.identifier)
        return 0

    device.handle = handle  # type: ignore[method-assign, assignment]
    ring.add([(BUFFERS, 4, True)])
    driver.notify()
    assert device.chains < 100
    driver.notify()
    driver.notify()
    assert len([t for t in driver.board.timers._heap if t.callback is not None]) == 1
    for _ in range(30):
        driver.clock.advance(1)
    assert device.chains == 1000


# ---- drivers that break the rules

DESC = QUEUE_AREA
TOP = (1 << 64) - 1

SPLIT_CRIMES = {
    "next beyond the table": [(BUFFERS, 4, NEXT, 64)],
    "linked to itself": [(BUFFERS, 4, NEXT, 0)],
    "a circle of two": [(BUFFERS, 4, NEXT, 1), (BUFFERS, 4, NEXT, 0)],
    "beyond RAM": [(RAM - 3, 4, WRITE, 0)],
    "in the local APIC": [(0xFEE00000, 4, WRITE, 0)],
    "in its own BAR": [(0xC0000000, 4, WRITE, 0)],
    "address wraps": [(TOP - 1, 4, WRITE, 0)],
    "4 GiB": [(0, 0xFFFFFFFF, WRITE, 0)],
    "readable behind writable": [(BUFFERS, 4, WRITE | NEXT, 1), (BUFFERS, 4, 0, 0)],
    "indirect of length 0": [(BUFFERS, 0, INDIRECT, 0)],
    "indirect of odd length": [(BUFFERS, 24, INDIRECT, 0)],
    "indirect beyond RAM": [(RAM - 16, 32, INDIRECT, 0)],
    "indirect and next": [(BUFFERS, 16, INDIRECT | NEXT, 1)],
    "indirect in indirect": [(DESC + 16, 16, INDIRECT, 0), (DESC + 32, 16, INDIRECT, 0)],
    "next beyond the indirect table": [(DESC + 16, 16, INDIRECT, 0), (BUFFERS, 4, NEXT, 1)],
    "circle in the indirect table": [(DESC + 16, 16, INDIRECT, 0), (BUFFERS, 4, NEXT, 0)],
    "huge indirect table": [(0, 0x7FFFFFF0, INDIRECT, 0)],
    "too many buffers": [(DESC + 16, 1040 * 16, INDIRECT, 0)]
    + [(BUFFERS, 4, NEXT, n + 1) for n in range(1040)],
}


def after_the_crime(driver: Driver, device: Echo, taken: int) -> None:
    """The device asks for a reset, does nothing until then, and works after it."""
    assert driver.status & 64
    assert device.chains == taken
    assert 0x40 in driver.vectors()
    driver.notify()
    assert device.chains == taken
    driver.start(messages=True)
    assert device.resets
    assert driver.status == 15
    driver.memory.write(BUFFERS, b"ping")
    assert driver.request(0, [(BUFFERS, 4, False), (BUFFERS + 8, 4, True)])[0][1] == 4
    assert driver.memory.read(BUFFERS + 8, 4) == b"ping"


@pytest.mark.parametrize("crime", SPLIT_CRIMES)
def test_split_crimes(drive: Drive, crime: str) -> None:
    driver, device = echo(drive, False, messages=True)
    ring = driver.rings[0]
    assert isinstance(ring, SplitDriver)
    for n, entry in enumerate(SPLIT_CRIMES[crime]):
        driver.memory.write(DESC + 16 * n, struct.pack("<QIHH", *entry))
    ring.publish(0)
    driver.notify()
    after_the_crime(driver, device, 0)


@pytest.mark.parametrize(("index", "head"), [(65535, 0), (65, 0), (1, 64), (1, 0xFFFF)])
def test_split_index_crimes(drive: Drive, index: int, head: int) -> None:
    driver, device = echo(drive, False, messages=True)
    ring = driver.rings[0]
    assert isinstance(ring, SplitDriver)
    driver.memory.write(ring.avail + 2, struct.pack("<HH", index, head))
    driver.notify()
    after_the_crime(driver, device, 0)


AVAIL = 1 << 7
PACKED_CRIMES = {
    "a chain without end": [(BUFFERS, 4, 0, AVAIL | NEXT)] * 64,
    "beyond RAM": [(RAM - 3, 4, 0, AVAIL | WRITE)],
    "address wraps": [(TOP - 1, 4, 0, AVAIL | WRITE)],
    "readable behind writable": [
        (BUFFERS, 4, 0, AVAIL | WRITE | NEXT),
        (BUFFERS, 4, 0, AVAIL),
    ],
    "indirect of odd length": [(BUFFERS, 24, 0, AVAIL | INDIRECT)],
    "indirect and next": [(BUFFERS, 16, 0, AVAIL | INDIRECT | NEXT)],
    "too many buffers": [(0, 1040 * 16, 0, AVAIL | INDIRECT)],
}


@pytest.mark.parametrize("crime", PACKED_CRIMES)
def test_packed_crimes(drive: Drive, crime: str) -> None:
    driver, device = echo(drive, True, messages=True)
    driver.memory.write(0, struct.pack("<QIHH", BUFFERS, 4, 0, 0) * 1040)
    for n, entry in enumerate(PACKED_CRIMES[crime]):
        driver.memory.write(DESC + 16 * n, struct.pack("<QIHH", *entry))
    driver.notify()
    after_the_crime(driver, device, 0)


# Another process that has the guest's memory: swaps what it is given at all these places, for ever.
SWAPPER = """
import mmap, sys
fd, size, first, step, *bodies = sys.argv[1:]
memory = mmap.mmap(int(fd), int(size))
places = range(int(first), int(first) + 64 * int(step), int(step))
print(flush=True)
while True:
    for body in map(bytes.fromhex, bodies):
        for at in places:
            memory[at : at + len(body)] = body
"""


@LAYOUTS
@pytest.mark.parametrize("indirect", [False, True], ids=["ring", "table"])
def test_descriptors_that_change_while_they_are_read(
    drive: Drive, packed: bool, indirect: bool
) -> None:
    """Good addresses become bad ones and good again, as another CPU might do it: both are borne."""
    driver, device = echo(drive, packed)
    first, step = (QUEUE_AREA + 0xC000, 0x100) if indirect else (DESC, 16)
    bodies = [struct.pack("<QI", *each).hex() for each in ((RAM - 2, 1 << 20), (BUFFERS, 4))]
    memory = [str(each) for each in (driver.memory.fd, RAM, first, step)]
    with subprocess.Popen(
        [sys.executable, "-c", SWAPPER, *memory, *bodies],
        pass_fds=[driver.memory.fd],
        stdout=subprocess.PIPE,
    ) as swapper:
        assert swapper.stdout is not None and swapper.stdout.readline()
        resets = 0
        for _ in range(1000):
            if driver.status & 64:
                resets += 1
                driver.start(packed=packed)
            driver.request(0, [(BUFFERS, 4, True)], indirect=indirect)
        swapper.kill()
    assert resets + device.chains >= 999
    driver.start(packed=packed)
    assert driver.request(0, [(BUFFERS, 4, True)])


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, DESC, DESC + 0x8000, DESC + 0xA000),
        (48, DESC, DESC + 0x8000, DESC + 0xA000),
        (512, DESC, DESC + 0x8000, DESC + 0xA000),
        (64, DESC + 8, DESC + 0x8000, DESC + 0xA000),
        (64, DESC, DESC + 0x8001, DESC + 0xA000),
        (64, DESC, DESC + 0x8000, DESC + 0xA002),
        (64, RAM - 16, DESC + 0x8000, DESC + 0xA000),
        (64, DESC, 0xFEE00000, DESC + 0xA000),
        (64, DESC, DESC + 0x8000, TOP - 15),
        (64, 0xC0000000, 0xC0000000, 0xC0000000),
    ],
)
def test_impossible_queues(drive: Drive, size: int, desc: int, avail: int, used: int) -> None:
    driver, device = echo(drive, False, messages=True)
    driver.negotiate((1 << 32) | (1 << 28))
    driver.set_queue(0, size, desc, avail, used)
    driver.put(0x14, 1, 15)
    assert driver.status & 64
    driver.notify()
    assert device.chains == 0
    driver.start()
    assert driver.status == 15


@LAYOUTS
def test_rings_of_noise(drive: Drive, packed: bool) -> None:
    """Random rings, overlapping areas: the device may ask for a reset, and nothing else."""
    chance = random.Random(11)
    driver, device = echo(drive, packed, event_idx=True, messages=True)
    for _ in range(400):
        driver.start(packed=packed, event_idx=chance.random() < 0.5)
        if chance.random() < 0.3:
            areas = [chance.choice((DESC, DESC + 0x100, DESC + 0x400)) for _ in range(3)]
            driver.negotiate(1 << 32 | 1 << 28 | (1 << 34 if packed else 0))
            driver.set_queue(0, 64, *areas)
            driver.put(0x14, 1, 15)
        for _ in range(3):
            rows = [
                struct.pack(
                    "<QIHH",
                    chance.choice((BUFFERS, RAM - 64, DESC, 0, TOP - 5, chance.getrandbits(23))),
                    chance.choice((0, 1, 16, 32, 4096, 0xFFFFFFFF, chance.getrandbits(12))),
                    chance.choice((0, 1, 2, 3, 64, chance.getrandbits(16))),
                    chance.choice(
                        (0, 1, 2, 3, 4, 0x80, 0x82, 0x84, 0x8080, chance.getrandbits(16))
                    ),
                )
                for _ in range(64)
            ]
            driver.memory.write(DESC, b"".join(rows))
            index = chance.choice((1, 2, 64, chance.getrandbits(16)))
            head = struct.pack("<HHH", 0, index, chance.randrange(70))
            driver.memory.write(DESC + 0x8000, head)
            driver.notify(chance.choice((0, 0, 0, 1, 1000)))
            driver.clock.advance(1)
            driver.vectors()
    after = device.chains
    driver.put(0x14, 1, 0)
    driver.start(packed=packed)
    driver.request(0, [(BUFFERS, 4, True)])
    assert device.chains == after + 1
