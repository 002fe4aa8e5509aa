"""The balloon: pages go back to the host, and only pages of the guest's."""

from __future__ import annotations

import os
import struct

import pytest

from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, DEVICE, RAM, Driver
from ringfence.devices.virtio.balloon import VirtioBalloon


@pytest.fixture
def driver(drive: Drive) -> Driver:
    made = drive(VirtioBalloon())
    made.start(made.offered() & 0xFFFFFF, messages=True)
    return made


def inflate(driver: Driver, pages: list[int]) -> None:
    data = struct.pack(f"<{len(pages)}I", *pages)
    driver.memory.write(BUFFERS, data)
    assert len(driver.request(0, [(BUFFERS, len(data), False)])) == 1


def test_target_and_actual(driver: Driver) -> None:
    device = driver.device
    assert isinstance(device, VirtioBalloon)
    device.set_target(1 << 20)
    assert driver.vectors() == [0x40]
    assert driver.settings(0, 4) == 256
    driver.put(4, 4, 200, DEVICE)
    assert (device.actual, driver.settings(4, 4)) == (200, 200)
    driver.put(0, 4, 7, DEVICE)
    driver.put(4, 2, 7, DEVICE)
    assert (device.target, device.actual) == (256, 200)


def test_inflating_frees_pages(driver: Driver) -> None:
    driver.memory.write(0x200000, b"x" * 0x8000)
    inflate(driver, [0x300])  # what the rings touch is there now
    before = os.fstat(driver.memory.fd).st_blocks
    inflate(driver, [0x203, 0x200, 0x201, 0x201])
    assert before - os.fstat(driver.memory.fd).st_blocks == 3 * 8
    assert (
        driver.memory.read(0x200000, 0x5000)
        == bytes(0x2000) + b"x" * 0x1000 + bytes(0x1000) + b"x" * 0x1000
    )
    driver.memory.write(BUFFERS, struct.pack("<I", 0x200))
    assert driver.request(1, [(BUFFERS, 4, False)])


@pytest.mark.parametrize(
    "pages", [[RAM >> 12], [0xFEE00], [0xFFFFFFFF], [0xC0000, 0x100000], list(range(0x7FE, 0x802))]
)
def test_only_ram_is_given_back(driver: Driver, pages: list[int]) -> None:
    driver.memory.write(RAM - 0x3000, b"y" * 0x3000)
    inflate(driver, pages)
    kept = b"y" * 0x1000 if 0x7FE in pages else b"y" * 0x3000
    assert driver.memory.read(RAM - 0x3000, 0x3000).rstrip(b"\0") == kept
    assert driver.status == 15


@pytest.mark.parametrize("queue", [2, 3, 4])
def test_free_page_reporting(driver: Driver, queue: int) -> None:
    driver.memory.write(0x200000, b"x" * 0x6000)
    driver.request(queue, [(0x200800, 0x2000, True), (0x204000, 0x1000, True)])
    data = driver.memory.read(0x200000, 0x6000)
    assert data == b"x" * 0x1000 + bytes(0x1000) + b"x" * 0x2000 + bytes(0x1000) + b"x" * 0x1000


def test_odd_requests(driver: Driver) -> None:
    for segments in ([(BUFFERS, 3, False)], [(BUFFERS, 7, False)], [(BUFFERS, 0x100000, False)]):
        assert len(driver.request(0, segments)) == 1
    assert driver.status == 15
