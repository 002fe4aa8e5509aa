"""Heavy traffic between a driver and the card, and what arrives of it: everything, in order."""

from __future__ import annotations

import hashlib
import os
import random

import pytest

from devices.e1000.driver import EOP_RS, TX_BUFFERS, Driver, frame_of
from devices.e1000.packets import ipv4
from devices.e1000.test_offload import prototype
from ringfence.devices.e1000.offload import verify
from ringfence.devices.e1000.registers import ICR, RXCSUM, TxDescriptor

LONG = os.environ.get("RINGFENCE_TEST_LONG") == "1"
MEGABYTES = 1000 if LONG else 50
"""Either way."""
DEXT_DATA = TxDescriptor.DEXT | TxDescriptor.DTYP_DATA << TxDescriptor.DTYP_SHIFT


def test_out_frame_by_frame(driver) -> None:
    source = random.Random(1)
    sent, total, count = hashlib.sha256(), 0, 0
    got = hashlib.sha256()
    while total < MEGABYTES << 20:
        frame = source.randbytes(source.choice([60, 1514, 1514, 1514]))
        for _ in range(50):
            driver.send(frame)
            sent.update(frame)
            total += len(frame)
            count += 1
        for each in driver.wire.frames:
            got.update(each)
        driver.wire.frames.clear()
    assert got.digest() == sent.digest()
    assert driver.read(0x4080) == count
    octets = driver.read(0x4090) + (driver.read(0x4094) << 32)
    assert octets == total + 4 * count


def test_out_by_segmentation(driver) -> None:
    """64 KiB at a time: payload, sequence numbers and all checksums."""
    payload = random.Random(2).randbytes(65535 - 40)
    packet = prototype(ipv4(6, payload), tcp=True, four=True)
    driver.memory.write(TX_BUFFERS, packet)
    options = (TxDescriptor.IXSM | TxDescriptor.TXSM) << TxDescriptor.POPTS_SHIFT
    expected = hashlib.sha256(payload).digest()
    for _ in range((MEGABYTES << 20) // len(payload)):
        driver.context(
            ipcss=14,
            ipcso=24,
            ipcse=33,
            tucss=34,
            tucso=50,
            mss=1460,
            hdrlen=54,
            tucmd=TxDescriptor.TUCMD_TCP | TxDescriptor.TUCMD_IP,
        )
        driver.put(TX_BUFFERS, DEXT_DATA | TxDescriptor.TSE | EOP_RS | len(packet), options)
        driver.ring_tail()
        frames = driver.wire.frames
        assert len(frames) == 45
        assert all(verify(frame) == (True, True) for frame in frames)
        assert hashlib.sha256(b"".join(frame[54:] for frame in frames)).digest() == expected
        frames.clear()


def test_in(driver) -> None:
    driver.write(RXCSUM.OFFSET, RXCSUM.IPOFL | RXCSUM.TUOFL)
    frames = [ipv4(6, random.Random(seed).randbytes(1460)) for seed in range(20)]
    total = at = 0
    while total < MEGABYTES << 20:
        before = at
        while driver.card.receive([frames[at % 20]]):
            total += len(frames[at % 20])
            at += 1
        assert driver.read(ICR.OFFSET) & ICR.RXT0
        taken = driver.take()
        assert [data[:-4] for data in taken] == [frames[n % 20] for n in range(before, at)]
        assert not driver.errors
    assert driver.read(0x4074) == at


@pytest.mark.parametrize("length", [60, 1514])
def test_a_full_ring_at_a_time(length) -> None:
    driver = Driver(entries=256).start()
    for turn in range(20):
        for number in range(255):
            driver.memory.write(TX_BUFFERS + number * 2048, frame_of(length, seed=number))
            driver.put(TX_BUFFERS + number * 2048, EOP_RS | length)
        driver.ring_tail()
        driver.clock.advance(1_000_000)
        assert driver.wire.frames == [frame_of(length, seed=number) for number in range(255)], turn
        driver.wire.frames.clear()
