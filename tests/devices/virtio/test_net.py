"""The network device between a driver and a backend that loops, drops and floods."""

from __future__ import annotations

import struct

import pytest

from devices.virtio.backends import Wire
from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, Driver
from ringfence.devices.virtio import net
from ringfence.devices.virtio.net import VirtioNet

MAC = bytes.fromhex("020000000001")
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def card(drive: Drive, *, packed: bool = False, pairs: int = 1, features: int = -1) -> Driver:
    driver = drive(VirtioNet(Wire(), MAC, pairs=pairs), packed=packed)
    offered = driver.offered() & 0xFFFFFF
    driver.start(offered & features, packed=packed, event_idx=True, messages=True)
    return driver


def wire(driver: Driver) -> Wire:
    backend = driver.device._backend
    assert isinstance(backend, Wire)
    return backend


def send(driver: Driver, header: bytes, frame: bytes) -> None:
    driver.memory.write(BUFFERS, header + frame)
    cut = len(header) + len(frame) // 2
    segments = [(BUFFERS, cut, False), (BUFFERS + cut, len(header + frame) - cut, False)]
    assert len(driver.request(1, segments)) == 1


def plain(count: int = 0) -> bytes:
    return net.HEADER.pack(0, 0, 0, 0, 0, 0, count)


def frame_of(length: int, seed: int = 0) -> bytes:
    return bytes((seed + at * 7) & 0xFF for at in range(length))


def add_buffers(driver: Driver, count: int, length: int) -> dict[int, int]:
    places = {}
    for slot in range(count):
        at = BUFFERS + 0x10000 + slot * 0x1000
        places[driver.rings[0].add([(at, length, True)])] = at
    driver.notify(0)
    return places


def test_configuration(drive: Drive) -> None:
    driver = card(drive, pairs=2)
    assert bytes(driver.settings(at, 1) for at in range(6)) == MAC
    assert [driver.settings(at, 2) for at in (6, 8, 10)] == [1, 2, 1500]
    assert driver.get(0x12, 2) == 5


@LAYOUTS
def test_frames_both_ways(drive: Drive, packed: bool) -> None:
    driver = card(drive, packed=packed)
    send(driver, plain(), frame_of(60))
    assert wire(driver).frames == [frame_of(60)]
    driver.vectors()
    places = add_buffers(driver, 4, 2000)
    driver.rings[0].interrupts(True)
    for n in range(3):
        assert wire(driver).receive(frame_of(100 + n, n))
    assert driver.vectors() == [0x41]
    used = driver.rings[0].used()
    assert [length for _, length in used] == [112, 113, 114]
    for n, (name, length) in enumerate(used):
        raw = driver.memory.read(places[name], length)
        assert raw == net.HEADER.pack(2, 0, 0, 0, 0, 0, 1) + frame_of(100 + n, n)


@LAYOUTS
def test_large_frames_take_several_buffers(drive: Drive, packed: bool) -> None:
    driver = card(drive, packed=packed)
    places = add_buffers(driver, 4, 1000)
    assert wire(driver).receive(frame_of(2500))
    used = driver.rings[0].used()
    raw = b"".join(driver.memory.read(places[name], length) for name, length in used)
    assert len(used) == 3
    assert raw == net.HEADER.pack(2, 0, 0, 0, 0, 0, 3) + frame_of(2500)


@LAYOUTS
def test_a_card_without_room_says_when_it_has_some(drive: Drive, packed: bool) -> None:
    driver = card(drive, packed=packed)
    assert not wire(driver).receive(frame_of(60))
    add_buffers(driver, 2, 1000)
    assert wire(driver).resumed == 1
    assert not wire(driver).receive(frame_of(3000))
    assert driver.rings[0].used() == []
    assert driver.rings[0].needs_kick() in (True, False)
    add_buffers(driver, 2, 1000)
    assert wire(driver).resumed == 2
    assert wire(driver).receive(frame_of(3000))
    assert len(driver.rings[0].used()) == 4


def test_buffers_that_are_too_small(drive: Drive) -> None:
    driver = card(drive, features=~net.MRG_RXBUF)
    add_buffers(driver, 2, 50)
    assert wire(driver).receive(frame_of(100))
    assert driver.rings[0].used() == [(driver.rings[0].size - 1, 0)]
    assert driver.device.dropped == 1
    for length in (0, 13, 70000):
        assert wire(driver).receive(bytes(length))
    assert driver.device.dropped == 4


def ones_sum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    value = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def tcp_frame(payload: bytes, version: int, flags: int = 0x18) -> bytes:
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0xFFFFFF00, 9, 5 << 4, flags, 100, 0, 0)
    if version == 4:
        length = 40 + len(payload) & 0xFFFF
        ip = struct.pack(">BBHHHBBH", 0x45, 0, length, 7, 0, 64, 6, 0) + bytes(range(8))
    else:
        ip = struct.pack(">IHBB", 6 << 28, 20 + len(payload) & 0xFFFF, 6, 64) + bytes(range(32))
    return MAC * 2 + (b"\x08\0" if version == 4 else b"\x86\xdd") + ip + tcp + payload


def test_checksums_are_finished(drive: Drive) -> None:
    driver = card(drive)
    for length in (0, 1, 30, 1461):
        frame = bytearray(tcp_frame(frame_of(length), 4))
        pseudo = bytes(frame[26:34]) + struct.pack(">HH", 6, 20 + length)
        struct.pack_into(">H", frame, 50, ones_sum(pseudo))
        send(driver, net.HEADER.pack(1, 0, 0, 0, 34, 16, 0), bytes(frame))
        out = wire(driver).frames.pop()
        assert ones_sum(pseudo + out[34:]) == 0xFFFF


@pytest.mark.parametrize(("version", "tcp"), [(4, 34), (6, 54)])
@pytest.mark.parametrize("length", [1, 1400, 1401, 30_000])
def test_segmentation(drive: Drive, version: int, tcp: int, length: int) -> None:
    driver = card(drive)
    payload = frame_of(length)
    send(
        driver,
        net.HEADER.pack(1, 1 if version == 4 else 4, tcp + 20, 1400, tcp, 16, 0),
        tcp_frame(payload, version, flags=0x99),
    )
    frames = wire(driver).frames
    assert b"".join(frame[tcp + 20 :] for frame in frames) == payload
    assert len(frames) == -(-length // 1400)
    for n, frame in enumerate(frames):
        last = n == len(frames) - 1
        (sequence,) = struct.unpack_from(">I", frame, tcp + 4)
        assert sequence == 0xFFFFFF00 + 1400 * n & 0xFFFFFFFF
        assert frame[tcp + 13] == 0x10 | (0x09 if last else 0) | (0 if n else 0x80)
        size = len(frame) - tcp
        if version == 4:
            assert ones_sum(frame[14:34]) == 0xFFFF
            assert struct.unpack_from(">HH", frame, 16) == (len(frame) - 14, 7 + n)
            addresses = frame[26:34]
        else:
            assert struct.unpack_from(">H", frame, 18) == (size,)
            addresses = frame[22:54]
        assert ones_sum(addresses + struct.pack(">II", size, 6) + frame[tcp:]) == 0xFFFF


@pytest.mark.parametrize(
    "header",
    [
        (1, 0, 0, 0, 0, 0, 0),
        (1, 0, 0, 0, 1000, 0, 0),
        (1, 0, 0, 0, 34, 1000, 0),
        (1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
        (0, 1, 0, 0, 34, 16, 0),
        (0, 1, 0, 1, 34, 16, 0),
        (0, 1, 0, 1400, 0, 16, 0),
        (0, 1, 0, 1400, 0xFFFF, 16, 0),
        (0, 4, 0, 1400, 54, 16, 0),
        (0, 3, 0, 1400, 34, 16, 0),
        (0, 5, 0, 1400, 34, 16, 0),
        (0, 0x7F, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    ],
)
def test_malformed_offloads_are_dropped(drive: Drive, header: tuple[int, ...]) -> None:
    driver = card(drive)
    send(driver, net.HEADER.pack(*header), tcp_frame(frame_of(100), 4))
    assert wire(driver).frames == []
    assert driver.device.dropped == 1
    assert not driver.status & 64
    for data in (b"", b"x" * 5, plain(), plain() + b"y" * 13):
        if data:
            driver.memory.write(BUFFERS, data)
        driver.request(1, [(BUFFERS, len(data), False)])
    assert wire(driver).frames == []


def test_segments_stay_whole_for_a_backend_that_takes_them(drive: Drive) -> None:
    driver = card(drive)
    wire(driver).takes_large = True
    payload = frame_of(40_000)
    send(driver, net.HEADER.pack(1, 1, 54, 1400, 34, 16, 0), tcp_frame(payload, 4, flags=0x99))
    (frame,) = wire(driver).frames
    assert frame[54:] == payload
    assert frame[47] == 0x99
    assert ones_sum(frame[14:34]) == 0xFFFF
    assert ones_sum(frame[26:34] + struct.pack(">II", len(frame) - 34, 6) + frame[34:]) == 0xFFFF


@LAYOUTS
def test_large_segments_reach_a_driver_that_takes_them(drive: Drive, packed: bool) -> None:
    driver = card(drive, packed=packed)
    assert wire(driver).large
    places = add_buffers(driver, 5, 2000)
    whole = tcp_frame(frame_of(4000), 4)
    assert wire(driver).receive(whole)
    data = b"".join(
        driver.memory.read(places[identifier], written)
        for identifier, written in driver.rings[0].used()
    )
    # NEEDS_CSUM, GSO_TCPV4, headers' length, MSS, where the checksum is, buffers
    assert net.HEADER.unpack_from(data) == (1, 1, 54, 1460, 34, 16, 3)
    pseudo = ones_sum(whole[26:34] + struct.pack(">II", len(whole) - 34, 6))
    assert data[12:] == whole[:50] + pseudo.to_bytes(2, "big") + whole[52:]


def test_other_large_frames_are_what_they_are(drive: Drive) -> None:
    """Fragments, other protocols, IPv6, and headers that lie outside of the frame."""
    driver = card(drive)
    tcp = tcp_frame(frame_of(1600), 4)
    frames = [
        tcp[:20] + b"\x20\0" + tcp[22:],
        tcp[:23] + b"\x11" + tcp[24:],
        tcp[:14] + b"\x4f" + tcp[15:36],
        tcp_frame(frame_of(1600), 6),
        frame_of(1600),
    ]
    for frame in frames:
        (place,) = add_buffers(driver, 1, 3000).values()
        assert wire(driver).receive(frame)
        assert driver.memory.read(place, 12) == net.HEADER.pack(2, 0, 0, 0, 0, 0, 1)
        assert driver.memory.read(place + 12, len(frame)) == frame
        driver.rings[0].used()


def test_a_driver_without_the_feature_and_one_that_switches_it_off(drive: Drive) -> None:
    driver = card(drive, features=~net.GUEST_TSO4)
    assert not wire(driver).large
    driver = card(drive)
    assert driver.device.offloads == net.OFFLOADS
    backend = wire(driver)
    for offloads, result in ((net.GUEST_CSUM, 0), (net.OFFLOADS | 1, 1), (net.OFFLOADS, 0)):
        assert command(driver, b"\5\0" + struct.pack("<Q", offloads), 2) == result
        assert backend.large == (result == 0 and offloads == net.OFFLOADS)
    assert command(driver, b"\5\0\0", 2) == 1
    driver.start()
    assert driver.device.offloads == 0


def command(driver: Driver, data: bytes, queue: int) -> int:
    driver.memory.write(BUFFERS, data + b"\xee")
    at = BUFFERS + len(data)
    driver.request(queue, [(BUFFERS, len(data), False), (at, 1, True)])
    return driver.memory.read(at, 1)[0]


def test_queue_pairs(drive: Drive) -> None:
    driver = card(drive, pairs=3)
    assert command(driver, b"\0\0\1", 6) == 0
    for wanted, result in ((3, 0), (4, 1), (0, 1)):
        assert command(driver, b"\4\0" + struct.pack("<H", wanted), 6) == result
    assert driver.device.active_pairs == 3
    for n, ring in enumerate(driver.rings[0:6:2]):
        for slot in range(20):
            ring.add([(BUFFERS + 0x1000 * (20 * n + slot), 2000, True)])
    for n in range(20):
        assert wire(driver).receive(frame_of(60, n))
    counts = [len(ring.used()) for ring in driver.rings[0:6:2]]
    assert sum(counts) == 20
    assert all(counts)
    assert command(driver, b"\x77", 6) == 1


def test_broken_receive_ring(drive: Drive) -> None:
    driver = card(drive)
    ring = driver.rings[0]
    driver.memory.write(ring.avail + 2, struct.pack("<H", 999))
    assert not wire(driver).receive(frame_of(60))
    assert driver.status & 64
    driver.start()
    add_buffers(driver, 1, 2000)
    assert wire(driver).receive(frame_of(60))


def test_nothing_is_written_after_the_end(drive: Drive) -> None:
    driver = card(drive)
    add_buffers(driver, 1, 2000)
    receive = wire(driver).receive
    driver.function.close()
    assert not receive(frame_of(60))
    assert driver.rings[0].used() == []


@LAYOUTS
def test_a_batch_is_one_interrupt(drive: Drive, packed: bool) -> None:
    driver = card(drive, packed=packed)
    places = add_buffers(driver, 4, 2000)
    driver.rings[0].interrupts(True)
    frames = [frame_of(60, n) for n in range(6)]
    assert driver.device.receive(frames) == 4, "as many as there are buffers"
    assert driver.vectors() == [0x41]
    stored = [driver.memory.read(places[name], length) for name, length in driver.rings[0].used()]
    assert [raw[net.HEADER.size :] for raw in stored] == frames[:4]
    add_buffers(driver, 2, 2000)
    assert wire(driver).resumed == 1
    assert driver.device.receive(frames[4:]) == 2


def queue_up(driver: Driver, count: int, number: int = 1) -> list[bytes]:
    """Have frames to send, and say so once."""
    frames = [frame_of(60, n) for n in range(count)]
    for n, frame in enumerate(frames):
        at = BUFFERS + 0x1000 * n
        driver.memory.write(at, plain() + frame)
        driver.rings[number].add([(at, net.HEADER.size + 60, False)])
    driver.notify(number)
    return frames


@LAYOUTS
def test_frames_wait_in_the_queue_for_room(drive: Drive, packed: bool) -> None:
    driver = card(drive, packed=packed)
    wire(driver).limit = 3
    frames = queue_up(driver, 9)
    assert wire(driver).frames == frames[:3]
    assert len(driver.rings[1].used()) == 3
    driver.notify(1)
    assert wire(driver).frames == frames[:3], "the network says when to go on"
    for limit in (3, 5, 100):
        wire(driver).limit = limit
        driver.device.more()
        assert wire(driver).frames == frames[:limit]
    assert len(driver.rings[1].used()) == 6
    driver.device.more()
    wire(driver).frames.clear()
    assert queue_up(driver, 2) == wire(driver).frames


def test_each_queue_waits(drive: Drive) -> None:
    driver = card(drive, pairs=2)
    wire(driver).limit = 0
    frames = queue_up(driver, 3) + queue_up(driver, 3, 3)
    assert wire(driver).frames == []
    wire(driver).limit = 4
    driver.device.more()
    assert wire(driver).frames == frames[:4]
    wire(driver).limit = 6
    driver.device.more()
    assert wire(driver).frames == frames


def test_a_reset_forgets_what_waits(drive: Drive) -> None:
    driver = card(drive)
    wire(driver).limit = 0
    queue_up(driver, 3)
    driver.put(0x14, 1, 0)
    wire(driver).limit = 100
    driver.device.more()
    assert wire(driver).frames == []
    driver.start()
    assert queue_up(driver, 2) == wire(driver).frames


def test_what_waits_goes_on_where_it_is_restored(drive: Drive) -> None:
    driver, other = card(drive), drive(VirtioNet(Wire(), MAC))
    wire(driver).limit = 2
    frames = queue_up(driver, 5)
    state = driver.function.save()
    other.memory.write(0, driver.memory.read(0, driver.memory.size))
    other.function.restore(state)
    other.clock.advance(1)
    assert wire(other).frames == frames[2:]


def test_a_queue_that_breaks_while_it_waits(drive: Drive) -> None:
    """Found out when there is room, in the network's thread, which must survive it."""
    driver = card(drive)
    wire(driver).limit = 2
    queue_up(driver, 5)
    driver.memory.write(driver.rings[1].avail + 2, struct.pack("<H", 999))
    wire(driver).limit = 100
    driver.device.more()
    assert driver.status & 64
    driver.device.more()
    driver.start()
    wire(driver).frames.clear()
    assert queue_up(driver, 2) == wire(driver).frames


def test_no_room_after_the_end(drive: Drive) -> None:
    driver = card(drive)
    wire(driver).limit = 2
    queue_up(driver, 5)
    driver.function.close()
    wire(driver).limit = 100
    driver.device.more()
    assert len(wire(driver).frames) == 2
