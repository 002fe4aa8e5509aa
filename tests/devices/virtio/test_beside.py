"""Writes beside the guest: who does them, who brings them back, what may come between."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.virtio.backends import SIZE, Filedisk, Inline
from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, Driver, Segment
from ringfence.devices.virtio.beside import CROWD, PROBE, SLOTS
from ringfence.devices.virtio.blk import VirtioBlk
from ringfence.memory.summons import ABOUT, ASLEEP, INSIDE, Door
from ringfence.storage.pool import IoPool

LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
FLUSH = 1 << 9
PIECE = 4096


@pytest.fixture
def pool() -> Iterator[IoPool]:
    made = IoPool(3)
    yield made
    made.close()


@pytest.fixture
def disk() -> Filedisk:
    """Skip where the file system takes writes without waiting: none would go beside."""
    made = Filedisk()
    try:
        os.pwritev(made.own, [bytes(512)], 0, os.RWF_NOWAIT)
    except OSError:
        os.pwrite(made.own, made.data[:512], 0)
        return made
    pytest.skip("the file system of temporary files takes writes at once")


def started(drive: Drive, disk: Filedisk, workers: object, packed: bool = False) -> Driver:
    driver = drive(VirtioBlk(disk, workers), packed=packed)
    driver.start(FLUSH, size=256, packed=packed, event_idx=True, messages=True)
    return driver


def vcpu(driver: Driver) -> tuple[ctypes.Array[ctypes.c_uint8], int, ctypes.c_uint64]:
    """A door: bytes that say what is wanted of it (request, attention), its address and place."""
    wanted = (ctypes.c_uint8 * 16)()  # its second half: that no process runs user code
    at = ctypes.addressof(wanted)
    return wanted, *driver.board.summons.add_door(at, at + 1, at + 8)


def write(driver: Driver, slot: int, sector: int, data: bytes) -> int:
    """Ask for a write in two pieces; what the chain is called."""
    at, half = BUFFERS + slot * 0x2000, len(data) // 2
    driver.memory.write(at, struct.pack("<IIQ", 1, 0, sector) + b"\xee")
    driver.memory.write(at + 0x1000, data)
    pieces: list[Segment] = [(at + 0x1000, half, False), (at + 0x1000 + half, half, False)]
    return driver.rings[0].add([(at, 16, False), *pieces, (at + 16, 1, True)])


def status(driver: Driver, slot: int) -> int:
    return driver.memory.read(BUFFERS + slot * 0x2000 + 16, 1)[0]


def returned(driver: Driver, count: int) -> list[tuple[int, int]]:
    """What comes back, until so many have."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        found += driver.rings[0].used()
        time.sleep(0.0005)
    return found


@LAYOUTS
def test_all_data_arrive(drive: Drive, disk: Filedisk, pool: IoPool, packed: bool) -> None:
    driver, source = started(drive, disk, pool, packed), random.Random(7)
    content = bytearray(disk.data)
    for _ in range(20):
        count = source.randrange(1, 2 * SLOTS)  # more than there are slots: the pool has the rest
        for slot, block in enumerate(source.sample(range(SIZE // PIECE), count)):
            data = source.randbytes(PIECE)
            content[block * PIECE : (block + 1) * PIECE] = data
            write(driver, slot, block * PIECE // 512, data)
        driver.notify()
        assert {length for _, length in returned(driver, count)} == {1}
        assert not any(status(driver, slot) for slot in range(count))
    driver.board.quiesce()
    assert driver.device.busy == 0
    assert os.pread(disk.own, SIZE, 0) == content


def test_what_fails_is_done_by_the_pool(drive: Drive, disk: Filedisk, pool: IoPool) -> None:
    driver = started(drive, disk, pool)
    with Path("/dev/full").open("r+b", buffering=0) as full:
        disk.file = full.fileno()
        for slot in range(3):
            write(driver, slot, 8 * slot, b"f" * PIECE)
        driver.notify()
        returned(driver, 3)
        driver.board.quiesce()
    assert [status(driver, slot) for slot in range(3)] == [0, 0, 0], "the disk itself has room"
    assert sorted(disk.log) == [("write", PIECE * slot, PIECE) for slot in range(3)]


@LAYOUTS
def test_a_reset_waits_for_what_is_under_way(drive: Drive, disk: Filedisk, packed: bool) -> None:
    workers = Inline()
    workers.held = []
    driver = started(drive, disk, workers, packed)
    for slot in range(4):
        write(driver, slot, 8 * slot, b"r" * PIECE)
    driver.notify()
    driver.put(0x14, 1, 0)
    assert driver.status, "data of the driver's are still to be read"
    jobs, workers.held = workers.held, None
    for job in jobs:
        job()
    assert driver.status == 0
    assert driver.rings[0].used() == []
    driver.start(FLUSH, packed=packed, messages=True)
    write(driver, 0, 0, b"s" * PIECE)
    driver.notify()
    assert len(driver.rings[0].used()) == 1
    assert os.pread(disk.own, PIECE, 0) == b"s" * PIECE


def test_a_running_vcpu_is_summoned(drive: Drive, disk: Filedisk, pool: IoPool) -> None:
    """It gives back what is done when it comes; if it ends up asleep or standing, then before."""
    driver = started(drive, disk, pool)
    wanted, _, place = vcpu(driver)
    comings = (driver.board.collect, driver.board.idle, driver.board.quiesce)
    for number, come in enumerate(comings):
        place.value = INSIDE
        write(driver, number, 0, b"v" * PIECE)
        driver.notify()
        while not wanted[1]:
            os.sched_yield()
        assert wanted[0], "the reason comes before the call"
        assert driver.rings[0].used() == []
        assert driver.device.busy == 1
        wanted[:] = bytes(len(wanted))
        place.value = ASLEEP
        come()
        assert len(driver.rings[0].used()) == 1
        assert driver.device.busy == 0
    driver.vectors()
    driver.rings[0].interrupts(True)
    write(driver, 0, 0, b"w" * PIECE)
    driver.notify()
    returned(driver, 1)
    driver.board.quiesce()
    assert driver.vectors() == [0x41]
    assert not any(wanted), "nobody was inside"


def test_workers_leave_when_nothing_comes(drive: Drive, disk: Filedisk, pool: IoPool) -> None:
    driver = started(drive, disk, pool)
    write(driver, 0, 0, b"l" * PIECE)
    driver.notify()
    returned(driver, 1)
    (beside,) = driver.device._lanes.values()
    driver.function.close()
    assert beside.lane.workers == 0


def test_a_driver_need_not_notify_while_requests_are_under_way(
    drive: Drive, disk: Filedisk
) -> None:
    """They are found when those are given back, or before a vCPU sleeps."""
    workers = Inline()
    workers.held = []
    driver = started(drive, disk, workers)
    write(driver, 0, 0, b"a" * PIECE)
    assert driver.rings[0].needs_kick()
    driver.notify()
    write(driver, 1, 8, b"b" * PIECE)
    assert not driver.rings[0].needs_kick()
    driver.board.idle()
    assert driver.device.busy == 2
    write(driver, 2, 16, b"c" * PIECE)
    (job,) = workers.held
    workers.held = None
    job()
    assert driver.rings[0].used() and driver.device.busy == 0
    write(driver, 3, 24, b"d" * PIECE)
    assert driver.rings[0].needs_kick(), "nothing is under way any more"
    assert os.pread(disk.own, 3 * PIECE, 0) == b"".join(each * PIECE for each in (b"a", b"b", b"c"))


def test_slow_transfers_have_a_worker_each(drive: Drive, disk: Filedisk) -> None:
    """And the driver notifies of every request."""
    workers = Inline()
    workers.held = []
    driver = started(drive, disk, workers)
    lane = driver.device._lane(0).lane
    lane.took = 1_000_000_000
    for slot in range(2 * CROWD):
        write(driver, slot, 8 * slot, b"s" * PIECE)
        assert driver.rings[0].needs_kick()
        driver.notify()
    assert len(workers.held) == lane.workers == CROWD
    jobs, workers.held = workers.held, None
    for job in jobs:
        job()
    assert len(driver.rings[0].used()) == 2 * CROWD
    assert lane.workers == 0


def test_lonely_reads_are_done_at_once(drive: Drive, disk: Filedisk) -> None:
    workers = Inline()
    driver = started(drive, disk, workers)
    lane = driver.device._lane(0).lane
    length = 32 << 10

    def read(slot: int) -> None:
        at = BUFFERS + slot * 0x10000
        driver.memory.write(at, struct.pack("<IIQ", 0, 0, 64 * slot) + b"\xee")
        driver.rings[0].add([(at, 16, False), (at + 0x1000, length, True), (at + 16, 1, True)])

    def beside(*slots: int) -> bool:
        before = lane.put
        for slot in slots:
            read(slot)
        driver.notify()
        driver.board.idle()  # one notification in many is put off, to see
        assert [length for _, length in driver.rings[0].used()] == [length + 1] * len(slots)
        for slot in slots:
            data = driver.memory.read(BUFFERS + slot * 0x10000 + 0x1000, length)
            assert data == disk.data[512 * 64 * slot :][:length]
        return bool(lane.put != before)

    assert [beside(0) for _ in range(4)] == [True, True, False, False]
    turns = [beside(1) for _ in range(PROBE)]
    assert turns.count(True) == 1, "one is left to a worker, to see"
    turns = [beside(0, 1) for _ in range(2 * PROBE)]
    assert all(turns[-PROBE:]), "they have company, as was seen by then"


def test_a_vcpu_that_is_about_is_awaited(drive: Drive, disk: Filedisk, pool: IoPool) -> None:
    """What is done waits a moment for it, and comes back without it if it stays away."""
    driver = started(drive, disk, pool)
    wanted, _, place = vcpu(driver)
    place.value = ABOUT
    write(driver, 0, 0, b"v" * PIECE)
    driver.notify()
    assert len(returned(driver, 1)) == 1
    driver.board.quiesce()
    assert not any(wanted)


def test_a_vcpu_waits_for_what_is_about_to_end(drive: Drive, disk: Filedisk, pool: IoPool) -> None:
    driver = started(drive, disk, pool)
    wanted, door, place = vcpu(driver)
    assert not driver.board.await_done(door), "nothing is under way"
    place.value = INSIDE  # so that nobody else brings it back
    for number in range(2):
        write(driver, number, 0, b"a" * PIECE)
        driver.notify()
        while not driver.board.await_done(door):
            wanted[1] = 0
        assert driver.rings[0].used() == []
        driver.board.collect()
        assert len(driver.rings[0].used()) == 1
        assert not driver.board.await_done(door), "it was brought back"


def test_a_vcpu_waits_for_a_moment_only(drive: Drive, disk: Filedisk) -> None:
    """It sleeps where a transfer takes long, and where something else wants it."""
    workers = Inline()
    workers.held = []
    driver = started(drive, disk, workers)
    wanted, door, _ = vcpu(driver)
    write(driver, 0, 0, b"a" * PIECE)
    driver.notify()
    lane = driver.device._lane(0).lane
    clock = Door.at(door).time
    lane.took = 1_000_000_000_000
    assert not driver.board.await_done(door), "such a lane is not waited for"
    lane.took = 0
    wanted[1] = 1
    assert not driver.board.await_done(door)
    assert not any(clock), "it went without waiting"
    wanted[1] = 0
    assert not driver.board.await_done(door)
    assert any(clock)
    assert driver.rings[0].used() == []
    (job,) = workers.held
    job()
    assert len(driver.rings[0].used()) == 1
