"""The block device, over an image in memory and one that fails."""

from __future__ import annotations

import random
import struct
import threading

import pytest

from devices.virtio.backends import SIZE, Inline, Ramdisk
from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, DEVICE, Driver, Segment
from ringfence.devices.virtio import blk
from ringfence.devices.virtio.blk import VirtioBlk
from ringfence.storage.pool import IoPool

HEADER, STATUS, DATA = BUFFERS, BUFFERS + 0x800, BUFFERS + 0x1000


def disk_driver(drive: Drive, disk: Ramdisk, **options: int) -> Driver:
    driver = drive(VirtioBlk(disk, Inline(), serial="SERIAL-1", **options))
    driver.start(driver.offered() & 0xFFFFFF, messages=True)
    return driver


def ask(
    driver: Driver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0
) -> tuple[int, bytes]:
    """One request; return status and what was read."""
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    driver.memory.write(STATUS, b"\xee")
    segments: list[Segment] = [(HEADER, 16, False)]
    if data:
        driver.memory.write(DATA, data)
        segments.append((DATA, len(data), False))
    if room:
        segments.append((DATA, room, True))
    driver.rings[0].add([*segments, (STATUS, 1, True)])
    driver.notify()
    (used,) = driver.rings[0].used()
    status = driver.memory.read(STATUS, 1)[0]
    assert used[1] == 1 + room
    return status, driver.memory.read(DATA, room)


def test_configuration(drive: Drive) -> None:
    driver = disk_driver(drive, Ramdisk(), queues=3)
    assert driver.get(0x12, 2) == 3
    assert [driver.settings(at, 4) for at in (0, 4, 12, 20)] == [SIZE // 512, 0, 254, 512]
    assert driver.settings(34, 2) == 3
    assert [driver.settings(at, 4) for at in (36, 40, 44, 48, 52)] == [131072, 16, 1, 131072, 16]
    assert driver.settings(56, 1) == 1
    assert driver.offered() & (1 << 5) == 0
    assert disk_driver(drive, Ramdisk(read_only=True)).offered() & (1 << 5)


@pytest.mark.parametrize("quick", [False, True])
def test_requests(drive: Drive, quick: bool) -> None:
    disk = Ramdisk()
    disk.quick = quick
    driver = disk_driver(drive, disk)
    assert ask(driver, 0, 3, room=1024) == (0, disk.data[1536:2560])
    assert ask(driver, 1, 7, data=b"w" * 512)[0] == 0
    assert disk.data[3584:4096] == b"w" * 512
    assert ask(driver, 4)[0] == 0
    assert ask(driver, 8, room=20) == (0, b"SERIAL-1".ljust(20, b"\0"))
    ranges = struct.pack("<QIIQII", 8, 2, 0, 16, 1, 0)
    assert ask(driver, 11, data=ranges)[0] == 0
    assert ask(driver, 13, data=struct.pack("<QII", 1, 1, 1))[0] == 0
    assert disk.log == [
        ("write", 3584, 512),
        ("flush",),
        ("discard", 4096, 1024),
        ("discard", 8192, 512),
        ("zero", 512, 512, True),
    ]
    assert driver.vectors() == [0x41]


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (0, SIZE // 512, b"", 512, 1),
        (0, SIZE // 512 - 1, b"", 1024, 1),
        (0, (1 << 63) // 512, b"", 512, 1),
        (0, (1 << 64) - 1, b"", 512, 1),
        (0, 0, b"", 100, 1),
        (1, SIZE // 512, b"x" * 512, 0, 1),
        (1, 0, b"x" * 511, 0, 1),
        (2, 0, b"", 0, 2),
        (0xFFFFFFFF, 0, b"", 0, 2),
        (11, 0, b"x" * 15, 0, 1),
        (11, 0, b"", 0, 1),
        (11, 0, struct.pack("<QII", SIZE // 512, 1, 0), 0, 1),
        (11, 0, struct.pack("<QII", 0, 0xFFFFFFFF, 0), 0, 1),
        (11, 0, struct.pack("<QII", 0, 1, 1), 0, 2),
        (13, 0, struct.pack("<QII", 0, 1, 2), 0, 2),
        (11, 0, struct.pack("<QII", 0, 1, 0) * 17, 0, 1),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_refused_requests(
    drive: Drive, kind: int, sector: int, data: bytes, room: int, status: int, quick: bool
) -> None:
    disk = Ramdisk()
    disk.quick = quick
    before = bytes(disk.data)
    driver = disk_driver(drive, disk)
    assert ask(driver, kind, sector, data, room)[0] == status
    assert disk.data == before
    assert disk.log == []
    assert ask(driver, 0, 0, room=512) == (0, before[:512])


def test_read_only_and_failing_disks(drive: Drive) -> None:
    disk = Ramdisk(read_only=True)
    driver = disk_driver(drive, disk)
    assert ask(driver, 1, 0, data=b"x" * 512)[0] == 1
    assert ask(driver, 11, data=struct.pack("<QII", 0, 1, 0))[0] == 1
    disk.fails = True
    for disk.quick in (False, True):
        assert ask(driver, 0, 0, room=512)[0] == 1
    assert disk.log == []


@pytest.mark.parametrize(
    "segments",
    [
        [(HEADER, 16, False)],  # nowhere to put the status
        [(HEADER, 8, False), (STATUS, 1, True)],  # half a header
        [(STATUS, 1, True)],
        [(HEADER, 16, False), (DATA, 3, True)],
    ],
)
def test_malformed_requests(drive: Drive, segments: list[Segment]) -> None:
    disk = Ramdisk()
    driver = disk_driver(drive, disk)
    driver.memory.write(HEADER, struct.pack("<IIQ", 1, 0, 0))
    assert len(driver.request(0, segments)) == 1
    assert ask(driver, 0, 0, room=512)[0] == 0


def test_headers_in_pieces(drive: Drive) -> None:
    disk = Ramdisk()
    driver = disk_driver(drive, disk)
    driver.memory.write(HEADER, struct.pack("<IIQ", 1, 0, 5) + b"d" * 1024)
    pieces = [(HEADER + at, 5, False) for at in range(0, 1040, 5)]
    assert (
        len(driver.request(0, [*pieces[:60], (HEADER + 300, 740, False), (STATUS, 1, True)])) == 1
    )
    assert disk.data[2560:3584] == b"d" * 1024


def test_write_cache(drive: Drive) -> None:
    disk = Ramdisk()
    driver = disk_driver(drive, disk)
    assert driver.settings(32, 1) == 1
    driver.put(32, 1, 0, DEVICE)
    disk.quick = True
    ask(driver, 1, 0, data=b"x" * 512)
    assert disk.log == [("write", 0, 512), ("flush",)]
    driver.start(0)  # a driver that doesn't know of flushes
    disk.log.clear()
    ask(driver, 1, 0, data=b"x" * 512)
    assert disk.log == [("write", 0, 512), ("flush",)]


def test_reset_in_flight(drive: Drive) -> None:
    disk = Ramdisk()
    driver = disk_driver(drive, disk)
    pool = driver.device._workers
    pool.held = []
    driver.memory.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    driver.rings[0].add([(HEADER, 16, False), (DATA, 512, True), (STATUS, 1, True)])
    driver.notify()
    driver.put(0x14, 1, 0)
    assert driver.status
    for job in pool.held:
        job()
    pool.held = None
    assert driver.status == 0
    assert driver.rings[0].used() == []
    driver.start(messages=True)
    assert ask(driver, 0, 0, room=512)[0] == 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_pool_of_threads(drive: Drive, packed: bool) -> None:
    """Many requests at once come back complete, whoever is first."""
    disk, pool = Ramdisk(), IoPool(3)
    driver = drive(VirtioBlk(disk, pool), packed=packed)
    driver.start(1 << 9, size=256, packed=packed, event_idx=True, messages=True)
    told = threading.Semaphore(0)
    driver.board.set_wake(0, told.release)
    ring, chance = driver.rings[0], random.Random(3)
    for _ in range(20):
        expected = {}
        for slot in range(40):
            at, sector = BUFFERS + slot * 0x2000, chance.randrange(SIZE // 512 - 4)
            driver.memory.write(at, struct.pack("<IIQ", 0, 0, sector))
            name = ring.add([(at, 16, False), (at + 0x1000, 2048, True), (at + 16, 1, True)])
            expected[name] = (at, sector)
        ring.interrupts(True)
        driver.notify()
        while expected:
            for name, length in ring.used():
                at, sector = expected.pop(name)
                assert length == 2049
                got = driver.memory.read(at + 0x1000, 2048)
                assert got == disk.data[sector * 512 : sector * 512 + 2048]
                assert driver.memory.read(at + 16, 1) == b"\0"
            ring.interrupts(True)
        driver.board.quiesce()
        assert driver.device.busy == 0
    driver.function.close()
    pool.close()


def test_constants_follow_the_specification() -> None:
    assert blk.CONFIG.size == 60
    assert blk.HEADER.size == blk.RANGE.size == 16
