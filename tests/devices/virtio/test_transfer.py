"""Disks that are files, over either ring: small requests without Python, and what goes past it."""

from __future__ import annotations

import os
import random
import struct
import threading
from pathlib import Path

import pytest

from devices.virtio.backends import SIZE, Filedisk, Inline
from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, DEVICE, QUEUE_AREA, Driver, Segment
from ringfence.devices.virtio import transfer
from ringfence.devices.virtio.blk import VirtioBlk
from ringfence.devices.virtio.transfer import AT_ONCE, SMALL
from ringfence.storage.pool import IoPool
from ringfence.storage.raw import RawDisk

HEADER, STATUS, DATA = BUFFERS, BUFFERS + 0x800, BUFFERS + 0x1000
FLUSH = 1 << 9
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Counted(Inline):
    """Workers that count what they are given."""

    jobs = 0

    def submit(self, job) -> None:
        self.jobs += 1
        super().submit(job)


def brought(drive: Drive, disk: Filedisk, *, packed: bool = False, **options: object) -> Driver:
    driver = drive(VirtioBlk(disk, Counted()), packed=packed)
    driver.start(driver.offered() & 0xFFFFFF, messages=True, packed=packed, **options)
    return driver


def jobs(driver: Driver) -> int:
    return driver.device._workers.jobs


def ask(driver: Driver, kind: int, sector: int, data: list[Segment]) -> tuple[int, int]:
    """One request; its status, and how much the device says that it has written."""
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    driver.memory.write(STATUS, b"\xee")
    ((_, length),) = driver.request(0, [(HEADER, 16, False), *data, (STATUS, 1, True)])
    return driver.memory.read(STATUS, 1)[0], length


def offered(disk: Filedisk) -> None:
    """Skip where the file system can't read without waiting."""
    try:
        os.preadv(disk.own, [bytearray(512)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("the file system of temporary files doesn't offer RWF_NOWAIT")


@LAYOUTS
@pytest.mark.parametrize("event_idx", [False, True])
def test_reads_come_without_python(drive: Drive, event_idx: bool, packed: bool) -> None:
    disk = Filedisk()
    offered(disk)
    driver = brought(drive, disk, event_idx=event_idx, packed=packed)
    pieces = [(DATA, 512, True), (DATA + 0x3001, 1024, True), (DATA + 0x1000, 1, True)]
    for sector in (0, 7, SIZE // 512 - 4):
        driver.rings[0].interrupts(True)
        data = [*pieces, (DATA + 0x1001, 511, True)]
        assert ask(driver, 0, sector, data) == (0, 2049)
        got = b"".join(driver.memory.read(at, length) for at, length, _ in data)
        assert got == disk.data[sector * 512 : sector * 512 + 2048]
        assert driver.vectors() == [0x41]
    assert jobs(driver) == 0
    assert ask(driver, 4, 0, []) == (0, 1)
    assert jobs(driver) == 1, "a flush may take long"


@LAYOUTS
def test_writes_may_wait_for_the_host(drive: Drive, packed: bool) -> None:
    disk = Filedisk()
    driver = brought(drive, disk, packed=packed)
    driver.memory.write(DATA, b"w" * 4096)
    assert ask(driver, 1, 3, [(DATA, 4096, False)]) == (0, 1)
    assert os.pread(disk.own, 4096, 1536) == b"w" * 4096
    with Path("/dev/null").open("r+b", buffering=0) as nothing:  # takes all, and at once
        disk.file, before = nothing.fileno(), jobs(driver)
        driver.start(FLUSH, packed=packed)
        assert ask(driver, 1, 0, [(DATA, 4096, False)]) == (0, 1)
        assert jobs(driver) == before
        driver.put(32, 1, 0, DEVICE)
    with Path("/dev/full").open("r+b", buffering=0) as full:
        disk.file = full.fileno()
        assert ask(driver, 1, 0, [(DATA, 512, False)]) == (0, 1), "the disk itself has room"
        assert jobs(driver) == before + 2, "a worker tries, the pool does it"


def test_writes_through_go_to_the_pool(drive: Drive) -> None:
    disk = Filedisk()
    driver = brought(drive, disk)
    with Path("/dev/null").open("r+b", buffering=0) as nothing:
        disk.file = nothing.fileno()
        driver.start(0)  # a driver that doesn't know of flushes
        assert ask(driver, 1, 0, [(DATA, 512, False)]) == (0, 1)
    assert disk.log == [("write", 0, 512), ("flush",)]


@pytest.mark.parametrize(("sector", "length"), [
    (SIZE // 512, 512), (SIZE // 512 - 1, 1024), (1 << 54, 512), (1 << 55, 512),
    ((1 << 64) - 1, 512), (0, 511), (0, 513),
])  # fmt: skip
@pytest.mark.parametrize("kind", [0, 1])
def test_refused(drive: Drive, kind: int, sector: int, length: int) -> None:
    disk = Filedisk()
    before = bytes(disk.data)
    driver = brought(drive, disk)
    assert ask(driver, kind, sector, [(DATA, length, kind == 0)])[0] == 1
    assert os.pread(disk.own, SIZE + 1, 0) == before
    assert ask(driver, 0, 0, [(DATA, 512, True)]) == (0, 513)


def test_read_only(drive: Drive) -> None:
    disk = Filedisk(read_only=True)
    driver = brought(drive, disk)
    with Path("/dev/null").open("r+b", buffering=0) as nothing:
        disk.file = nothing.fileno()
        assert ask(driver, 1, 0, [(DATA, 512, False)])[0] == 1


@pytest.mark.parametrize("file", ["/dev/full", "/proc/self/mem", "/dev/null"])
def test_files_that_fail_or_end_early_leave_it_to_the_pool(drive: Drive, file: str) -> None:
    disk = Filedisk()
    driver = brought(drive, disk)
    with Path(file).open("rb", buffering=0) as other:
        disk.file = other.fileno()
        status, length = ask(driver, 0, 2, [(DATA, 1024, True)])
    assert (status, length) == (0, 1025)
    if file != "/dev/full":  # which reads as zeroes
        assert jobs(driver) == 2, "a worker beside the guest, and then the pool"
        assert driver.memory.read(DATA, 1024) == disk.data[1024:2048]


@LAYOUTS
def test_one_turn_is_bounded(drive: Drive, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than may be moved at once: the rest is done by others, all of it comes back."""
    monkeypatch.setattr(transfer, "TURN", 8 * SMALL)
    disk = Filedisk()
    offered(disk)
    driver = brought(drive, disk, size=64, packed=packed)
    ring, count = driver.rings[0], 12
    for number in range(count):
        driver.memory.write(HEADER + 32 * number, struct.pack("<IIQ", 0, 0, number))
        segments = [(HEADER + 32 * number, 16, False), (DATA, SMALL, True)]
        ring.add([*segments, (STATUS + number, 1, True)])
    driver.notify()
    assert sorted(length for _, length in ring.used()) == [SMALL + 1] * count
    assert driver.device._lane(0).lane.put == count - 8


@pytest.mark.parametrize("direct", [False, True])
def test_large_requests_of_a_raw_disk_go_to_the_pool(drive: Drive, tmp_path, direct: bool) -> None:
    """Reads and writes of many pieces, by threads, on a file: all data end where they belong."""
    source, pool = random.Random(9), IoPool(3)
    content = bytearray(source.randbytes(4 << 20))
    image = tmp_path / "disk"
    image.write_bytes(content)
    disk = RawDisk(image, direct=direct)
    driver = drive(VirtioBlk(disk, pool))
    driver.start(FLUSH, size=256, messages=True)
    memory, ring = driver.memory, driver.rings[0]
    told = threading.Semaphore(0)
    driver.board.set_wake(0, told.release)
    size = 2 * AT_ONCE
    for write in (True, False, True, False):
        expected = {}
        for slot, sector in enumerate(source.sample(range(0, len(content) // 512, size // 512), 3)):
            at = BUFFERS + slot * 0x100000
            memory.write(at, struct.pack("<IIQ", int(write), 0, sector) + b"\xee")
            pieces = [(at + 0x1000 + n * size // 8, size // 8, not write) for n in range(8)]
            if write:
                data = source.randbytes(size)
                memory.write(at + 0x1000, data)
                content[sector * 512 : sector * 512 + size] = data
            name = ring.add([(at, 16, False), *pieces, (at + 16, 1, True)])
            expected[name] = (at, sector)
        ring.interrupts(True)
        driver.notify()
        while expected:
            for name, length in ring.used():
                at, sector = expected.pop(name)
                assert length == (1 if write else size + 1)
                assert memory.read(at + 16, 1) == b"\0"
                got = memory.read(at + 0x1000, size)
                assert got == content[sector * 512 : sector * 512 + size]
            ring.interrupts(True)
        driver.board.quiesce()
    driver.function.close()
    pool.close()
    disk.close()
    assert image.read_bytes() == content


def test_a_disk_that_fails_in_the_pool(drive: Drive) -> None:
    disk = Filedisk()
    disk.fails = True
    driver = brought(drive, disk)
    with Path("/dev/null").open("rb", buffering=0) as other:
        disk.file = other.fileno()
        assert ask(driver, 0, 0, [(DATA, 2 * AT_ONCE, True)]) == (1, 2 * AT_ONCE + 1)
    disk.fails, disk.file = False, disk.own
    assert ask(driver, 0, 0, [(DATA, 512, True)]) == (0, 513)


@LAYOUTS
def test_all_that_is_filled_is_told(drive: Drive, packed: bool) -> None:
    disk = Filedisk()
    driver = brought(drive, disk, event_idx=True, packed=packed)
    memory, source = driver.memory, random.Random(5)
    told = bytearray(memory.size)

    def tell(at: int, length: int) -> None:
        told[at : at + length] = b"\1" * length

    memory.watch_dma(tell)
    ring = driver.rings[0]
    expected = {}
    for number in range(12):
        at, sector = BUFFERS + number * 0x10000, source.randrange(SIZE // 512 - 16)
        memory.write(at, struct.pack("<IIQ", 0, 0, sector))
        data = [(at + 0x1000 * n, 512 * source.randrange(1, 4), True) for n in range(1, 4)]
        ring.add([(at, 16, False), *data, (at + 16, 1, True)], indirect=number % 2 == 0)
        expected[at] = (sector, data)
    before = memory.read(0, memory.size)
    driver.notify()
    driver.board.idle()
    assert len(ring.used()) == len(expected)
    driver.function.ring(0).want_kicks(True)
    after = memory.read(0, memory.size)
    assert all(told[at] for at in range(memory.size) if before[at] != after[at])
    for sector, data in expected.values():
        got = b"".join(memory.read(at, length) for at, length, _ in data)
        assert got == disk.data[sector * 512 : sector * 512 + len(got)]


def test_an_indirect_table_that_is_the_table_itself(drive: Drive) -> None:
    """It is one level deep, wherever it lies: no way round and round."""
    driver = brought(drive, Filedisk())
    ring = driver.rings[0]
    entry = struct.pack("<QIHH", QUEUE_AREA, 16 * ring.size, 4, 0)
    for index in range(ring.size):
        driver.memory.write(QUEUE_AREA + 16 * index, entry)
    ring.publish(0)
    driver.notify()
    assert driver.status & 0x40, "DEVICE_NEEDS_RESET"
    driver.start(FLUSH)
    assert ask(driver, 0, 0, [(DATA, 512, True)]) == (0, 513)
