"""The receive ring: storing, filtering, checksums, waiting for room, hostile rings."""

from __future__ import annotations

import random
import struct
import zlib

import pytest

from devices.e1000.driver import (
    BUFFER,
    MAC,
    MEMORY,
    PEER,
    RX_BUFFERS,
    RX_RING,
    Driver,
    frame_of,
)
from devices.e1000.packets import ipv4, ipv6
from devices.e1000.test_transmit import stays_usable
from ringfence.devices.e1000.offload import verify
from ringfence.devices.e1000.registers import (
    CTRL,
    ICR,
    RCTL,
    RXCSUM,
    Delay,
    Ring,
    RxDescriptor,
)
from ringfence.network.offload import WIRE_MSS, segments, tcp_over_ipv4

BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("01005e000001")
RDH, RDT, RDLEN = (Ring.RECEIVE + at for at in (Ring.HEAD, Ring.TAIL, Ring.LEN))


@pytest.mark.parametrize("length", [14, 59, 60, 61, 1514])
def test_a_frame_is_stored_with_its_fcs(driver, length) -> None:
    frame = frame_of(length).ljust(60, b"\0")
    assert driver.card.receive([frame_of(length)])
    assert driver.take() == [frame + zlib.crc32(frame).to_bytes(4, "little")]
    assert driver.status & RxDescriptor.IXSM
    assert driver.asserted


def test_the_fcs_can_be_stripped() -> None:
    driver = Driver().start(rctl=RCTL.SECRC)
    driver.card.receive([frame_of(100)])
    assert driver.take() == [frame_of(100)]


@pytest.mark.parametrize(
    ("rctl", "size"),
    [(0, 2048), (1 << 16, 1024), (2 << 16, 512), (3 << 16, 256), (1 << 16 | RCTL.BSEX, 16384)],
)
def test_buffer_sizes(rctl, size) -> None:
    driver = Driver().start(rctl=rctl | RCTL.LPE | RCTL.SECRC)
    driver.card.receive([frame_of(9000)])
    assert driver.read(RDH) == -(-9000 // size)
    if size <= 2048:
        assert driver.take() == [frame_of(9000)]


@pytest.mark.parametrize(("length", "lpe", "taken"), [
    (1514, 0, True), (1515, 0, False), (9000, 0, False),
    (9000, RCTL.LPE, True), (16380, RCTL.LPE, True), (16381, RCTL.LPE, False),
])  # fmt: skip
def test_long_frames(length, lpe, taken) -> None:
    driver = Driver().start(rctl=lpe)
    assert driver.card.receive([frame_of(length)]), "it does not wait for anything"
    assert bool(driver.take()) == taken
    assert driver.read(0x40AC) == (not taken)


def test_without_room_a_frame_waits(driver) -> None:
    for seed in range(driver.entries - 1):
        assert driver.card.receive([frame_of(60, seed=seed)])
    assert not driver.card.receive([frame_of(60, seed=99)])
    assert not driver.card.receive([frame_of(60, seed=99)])
    assert driver.read(0x40A0) == 1, "RNBC"
    assert driver.wire.resumed == 0
    assert len(driver.take()) == driver.entries - 1
    assert driver.wire.resumed == 1
    assert driver.card.receive([frame_of(60, seed=99)])
    assert driver.read(0x4074) == driver.entries


@pytest.mark.parametrize("way", ["disable", "reset"])
def test_a_frame_that_waits_is_asked_for_when_all_changes(driver, way) -> None:
    for seed in range(driver.entries):
        driver.card.receive([frame_of(60, seed=seed)])
    if way == "disable":
        driver.write(RCTL.OFFSET, 0)
    else:
        driver.write(CTRL.OFFSET, CTRL.RST)
    assert driver.wire.resumed == 1
    assert driver.card.receive([frame_of(60)]), "swallowed"


def test_a_frame_larger_than_the_ring_is_missed() -> None:
    driver = Driver(entries=8).start(rctl=RCTL.LPE | 3 << RCTL.BSIZE_SHIFT)
    assert driver.card.receive([frame_of(9000)])
    assert driver.read(0x4010) == 1
    assert driver.take() == []


def test_a_ring_that_runs_empty_warns(driver) -> None:
    for seed in range(driver.entries // 2 - 2):
        driver.card.receive([frame_of(60, seed=seed)])
    assert not driver.read(ICR.OFFSET) & ICR.RXDMT0
    driver.card.receive([frame_of(60)])
    assert driver.read(ICR.OFFSET) & ICR.RXDMT0


def test_delayed_report(driver) -> None:
    driver.write(Delay.RDTR, 100)
    driver.card.receive([frame_of(60)])
    assert not driver.asserted
    driver.clock.advance(90 * 1024)
    driver.card.receive([frame_of(60)])
    driver.clock.advance(90 * 1024)
    assert not driver.asserted, "each frame starts the packet timer anew"
    driver.write(Delay.RDTR, 100 | Delay.FPD)
    assert driver.asserted, "flushed"


def test_a_delay_that_is_over_at_once_is_none(driver) -> None:
    driver.write(Delay.RDTR, 8)
    driver.card.receive([frame_of(60)])
    assert driver.asserted


# ---- filters


@pytest.mark.parametrize(("destination", "rctl", "taken"), [
    (MAC, 0, True),
    (PEER, 0, False),
    (PEER, RCTL.UPE, True),
    (BROADCAST, 0, True),
    (MULTICAST, 0, False),
    (MULTICAST, RCTL.MPE, True),
])  # fmt: skip
def test_destinations(destination, rctl, taken) -> None:
    driver = Driver().start(rctl=rctl)
    driver.card.receive([frame_of(60, destination)])
    assert bool(driver.take()) == taken
    assert driver.read(0x40D0) == 1, "TPR counts all"
    assert driver.read(0x4074) == taken


def test_broadcast_needs_bam(driver) -> None:
    driver.write(RCTL.OFFSET, RCTL.EN)
    driver.card.receive([frame_of(60, BROADCAST)])
    assert driver.take() == []


@pytest.mark.parametrize(("offset", "shift"), [(0, 36), (1, 35), (2, 34), (3, 32)])
def test_the_multicast_hash(offset, shift) -> None:
    """The manual's hash is of bits of the address as a number, least significant byte first."""
    driver = Driver().start(rctl=offset << RCTL.MO_SHIFT)
    group = bytes.fromhex("0180c2a1b3c5")
    bit = int.from_bytes(group, "little") >> shift & 0xFFF
    driver.write(0x5200 + 4 * (bit >> 5), 1 << (bit & 31))
    driver.card.receive([frame_of(60, group)])
    assert len(driver.take()) == 1


def test_more_addresses(driver) -> None:
    driver.write(0x5408, int.from_bytes(PEER[:4], "little"))
    driver.write(0x540C, int.from_bytes(PEER[4:], "little"))
    driver.card.receive([frame_of(60, PEER)])
    assert driver.take() == [], "not valid yet"
    driver.write(0x540C, int.from_bytes(PEER[4:], "little") | 1 << 31)
    driver.card.receive([frame_of(60, PEER)])
    assert len(driver.take()) == 1


def test_vlan_tags_are_taken_off_and_filtered() -> None:
    driver = Driver().start(rctl=RCTL.VFE | RCTL.SECRC)
    driver.write(CTRL.OFFSET, CTRL.DEFAULT | CTRL.VME)
    plain = frame_of(1514)
    tagged = plain[:12] + bytes.fromhex("8100a064") + plain[12:]
    driver.card.receive([tagged])
    assert driver.take() == []
    driver.write(0x5600 + 4 * (100 >> 5), 1 << (100 & 31))
    driver.card.receive([tagged])
    assert driver.take() == [plain]
    assert driver.status & RxDescriptor.VP
    assert driver.tag == 0xA064


# ---- checksums

IP_GOOD = RxDescriptor.IPCS
ALL_GOOD = RxDescriptor.IPCS | RxDescriptor.TCPCS
_JUDGED = RxDescriptor.IXSM | RxDescriptor.IPCS | RxDescriptor.TCPCS


def damaged(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 0x40]) + frame[at + 1 :]


@pytest.mark.parametrize(("frame", "status", "errors"), [
    (ipv4(6, b"x" * 501), ALL_GOOD, 0),
    (ipv4(17, b"x" * 500), ALL_GOOD, 0),
    (ipv4(1, b"x" * 500), IP_GOOD, 0),
    (ipv6(6, b"x" * 501), RxDescriptor.TCPCS, 0),
    (ipv6(17, b"x" * 500), RxDescriptor.TCPCS, 0),
    (damaged(ipv4(6, b"x" * 501), 100), ALL_GOOD, RxDescriptor.TCPE),
    (damaged(ipv4(6, b"x" * 501), 22), ALL_GOOD, RxDescriptor.IPE),
    (damaged(ipv4(6, b"x" * 501), 14), RxDescriptor.IXSM, 0),
    (ipv4(6, b"x" * 500, fragment=0x2000), IP_GOOD, 0),
    (ipv4(6, b"x" * 500, fragment=0x0100), IP_GOOD, 0),
    (ipv4(6, b"x" * 500)[:300], RxDescriptor.IXSM, 0),
    (ipv4(6, b"")[:54][:16] + b"\xff\xff" + ipv4(6, b"")[18:], RxDescriptor.IXSM, 0),
    (frame_of(200), RxDescriptor.IXSM, 0),
])  # fmt: skip
def test_checksums_are_judged(driver, frame, status, errors) -> None:
    driver.write(RXCSUM.OFFSET, RXCSUM.IPOFL | RXCSUM.TUOFL)
    driver.card.receive([frame])
    assert driver.take()
    assert (driver.status & _JUDGED, driver.errors) == (status, errors)


# ---- hostile rings


@pytest.mark.parametrize(
    ("register", "value"), [(RDT, 64), (RDT, 0xFFFF), (RDH, 64), (RDH, 0xFFFF), (RDLEN, 0)]
)
def test_head_and_tail_outside_the_ring(driver, register, value) -> None:
    driver.write(register, value)
    assert not driver.card.receive([frame_of(60)]), "it waits"
    stays_usable(driver)


@pytest.mark.parametrize("base", [MEMORY, 0xFEE00000, 0xFFFF_FFFF_FFFF_FFF0, 0xC0000000])
def test_rings_outside_ram(driver, base) -> None:
    driver.write(Ring.RECEIVE + Ring.BAL, base & 0xFFFFFFFF)
    driver.write(Ring.RECEIVE + Ring.BAH, base >> 32)
    assert driver.card.receive([frame_of(60)])
    assert driver.card.receiver.ring.failed
    assert driver.card.receive([frame_of(60)]), "swallowed"
    stays_usable(driver)


@pytest.mark.parametrize("address", [MEMORY - 50, MEMORY, 0xC0000000, (1 << 64) - 1])
def test_buffers_outside_ram(driver, address) -> None:
    driver.memory.write(RX_RING, struct.pack("<Q", address))
    assert driver.card.receive([frame_of(60)])
    assert driver.card.receiver.ring.failed
    stays_usable(driver)


def test_null_buffers_take_nothing(driver) -> None:
    before = driver.memory.read(0, 0x1000)
    driver.memory.write(RX_RING, bytes(16))
    assert driver.card.receive([frame_of(60)])
    assert driver.memory.read(0, 0x1000) == before
    assert driver.memory.read(RX_RING + 12, 1)[0] & RxDescriptor.DD


def test_nothing_is_stored_without_bus_mastering(driver) -> None:
    driver.card.config_write(4, 2, 0x03)
    assert driver.card.receive([frame_of(60)])
    assert driver.read(RDH) == 0
    assert driver.memory.read(RX_BUFFERS, 60) == bytes(60)


@pytest.mark.parametrize("length", [0, 1, 13])
def test_a_backend_s_runts(driver, length) -> None:
    assert driver.card.receive([frame_of(length)])


def test_large_segments_are_cut() -> None:
    driver = Driver().start(rctl=RCTL.SECRC)
    driver.write(RXCSUM.OFFSET, RXCSUM.IPOFL | RXCSUM.TUOFL)
    assert driver.wire.large
    payload = random.Random(7).randbytes(16_060)
    assert driver.card.receive([MAC + ipv4(6, payload)[6:]])
    frames = driver.take()
    assert [len(frame) for frame in frames] == [1514] * 11
    assert b"".join(frame[54:] for frame in frames) == payload
    good = RxDescriptor.IPCS | RxDescriptor.TCPCS
    assert driver.status & good == good
    assert not driver.errors
    assert verify(frames[-1]) == (True, True)
    assert driver.read(0x4074) == 11, "GPRC"


@pytest.mark.parametrize("seed", range(12))
def test_large_segments_are_cut_as_backends_do_it(seed) -> None:
    """Any headers, flags, numbers that wrap round, buffers that are smaller than a segment."""
    source = random.Random(seed)
    frame = bytearray(MAC + ipv4(6, source.randbytes(source.randrange(1500, 40_000)))[6:])
    frame[18:20] = source.choice((b"\xff\xfe", b"\0\0", source.randbytes(2)))
    frame[38:42] = source.choice((b"\xff\xff\xf0\0", source.randbytes(4)))
    frame[46:48] = bytes([source.choice((0x50, 0x80, 0xF0)), source.getrandbits(8)])
    sizes = source.choice((0, 1, 2)) << RCTL.BSIZE_SHIFT
    driver = Driver(entries=256).start(rctl=RCTL.SECRC * source.randrange(2) | sizes)
    for index in range(256):
        address = RX_BUFFERS + index * BUFFER + source.randrange(8)
        driver.memory.write(RX_RING + index * 16, struct.pack("<QQ", address, 0))
    tcp = tcp_over_ipv4(bytes(frame))
    assert tcp is not None
    assert driver.card.receive([bytes(frame)])
    wanted = list(segments(bytes(frame), tcp, WIRE_MSS, version=4))
    if not driver.read(RCTL.OFFSET) & RCTL.SECRC:
        wanted = [each + zlib.crc32(each).to_bytes(4, "little") for each in wanted]
    assert driver.take() == wanted
    assert driver.read(0x4074) == len(wanted), "GPRC"
    octets = sum(map(len, wanted)) + 4 * len(wanted) * bool(driver.read(RCTL.OFFSET) & RCTL.SECRC)
    assert driver.read(0x4088) == octets, "GORCL"


def test_all_that_is_stored_is_told() -> None:
    driver = Driver().start()
    before = driver.memory.read(0, MEMORY)
    told = bytearray(MEMORY)
    driver.memory.watch_dma(
        lambda at, length: told.__setitem__(slice(at, at + length), b"\1" * length)
    )
    driver.memory.dirty.enabled = True
    for seed in range(3):
        assert driver.card.receive([MAC + ipv4(6, random.Random(seed).randbytes(16_060))[6:]])
    after = driver.memory.read(0, MEMORY)
    changed = {at for at in range(MEMORY) if before[at] != after[at]}
    assert changed and all(told[at] for at in changed)
    pages = {
        page
        for run in driver.memory.dirty.take()
        for page in range(run.first, run.first + run.count)
    }
    assert pages == {at >> 12 for at in range(MEMORY) if told[at]}


def test_a_ring_across_the_end_of_memory_stops() -> None:
    driver = Driver().start()
    base = MEMORY - 5 * 16
    for index in range(5):
        driver.memory.write(base + index * 16, struct.pack("<QQ", RX_BUFFERS + index * BUFFER, 0))
    driver.write(Ring.RECEIVE + Ring.BAL, base)
    assert driver.card.receive([MAC + ipv4(6, bytes(16_060))[6:]])
    assert driver.card.receiver.ring.failed
    assert driver.read(RDH) == 5
    assert driver.read(0x4074) == 5, "GPRC"
    stays_usable(driver)


def test_a_large_segment_waits_as_a_whole() -> None:
    driver = Driver().start()
    for seed in range(driver.entries - 5):
        assert driver.card.receive([frame_of(60, seed=seed)])
    large = MAC + ipv4(6, bytes(16_060))[6:]
    assert not driver.card.receive([large])
    assert len(driver.take()) == driver.entries - 5
    assert driver.wire.resumed == 1
    assert driver.card.receive([large])
    assert len(driver.take()) == 11


def test_a_small_ring_gets_none() -> None:
    driver = Driver(entries=8).start()
    assert not driver.wire.large
    assert driver.card.receive([MAC + ipv4(6, bytes(16_060))[6:]])
    assert driver.take() == []
    assert driver.read(0x40AC) == 1, "ROC"
    driver.card.reset()
    assert not driver.wire.large


def test_other_large_frames_are_too_long(driver) -> None:
    for frame in (ipv4(17, bytes(5000)), ipv6(6, bytes(5000)), ipv4(6, bytes(5000), 0x2000)):
        assert driver.card.receive([MAC + frame[6:]])
    broken = bytearray(MAC + ipv4(6, bytes(5000))[6:])
    broken[46] = 0xF0
    assert driver.card.receive([bytes(broken[:14] + b"\x4f" + broken[15:])])
    assert all(len(frame) <= 1518 for frame in driver.take())


def test_a_batch_is_one_interrupt() -> None:
    """Told of when all of it is stored; what finds no room is left to the backend."""
    driver = Driver().start(RCTL.SECRC)
    frames = [frame_of(60, seed=seed) for seed in range(driver.entries + 5)]
    taken = driver.card.receive(frames)
    assert taken == driver.entries - 1, "as many as there are descriptors"
    assert driver.pin == [True]
    assert driver.take() == frames[:taken]
    assert driver.wire.resumed == 1
    assert driver.card.receive(frames[taken:]) == len(frames) - taken
    assert driver.take() == frames[taken:]
