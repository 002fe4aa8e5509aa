"""The transmit ring: frames out, write-back, turns of bounded work, hostile rings."""

from __future__ import annotations

import random
import struct

import pytest

from devices.e1000.driver import EOP_RS, MAC, MEMORY, PEER, TX_BUFFERS, TX_RING, Driver, frame_of
from devices.e1000.packets import ipv4
from ringfence.chipset.spare import SpareTime
from ringfence.devices.e1000 import transmit
from ringfence.devices.e1000.registers import CTRL, ICR, TCTL, Ring, TxDescriptor
from ringfence.devices.e1000.statistics import TSCTFC
from ringfence.devices.gathering import PROBE
from ringfence.network.backend import FEW

DEXT_DATA = TxDescriptor.DEXT | TxDescriptor.DTYP_DATA << TxDescriptor.DTYP_SHIFT
TDH, TDT, TDLEN = (Ring.TRANSMIT + at for at in (Ring.HEAD, Ring.TAIL, Ring.LEN))


def done(driver: Driver, descriptor: int) -> bool:
    return bool(driver.memory.read(descriptor + 12, 1)[0] & TxDescriptor.DD)


@pytest.mark.parametrize("length", [14, 59, 60, 61, 1514, 9000, 16288])
def test_a_frame_goes_out_padded(driver, length) -> None:
    frame = frame_of(length)
    descriptor = driver.send(frame)
    assert driver.wire.frames == [frame.ljust(60, b"\0")]
    assert done(driver, descriptor)
    assert driver.asserted
    assert driver.read(ICR.OFFSET) & (ICR.TXDW | ICR.TXQE) == ICR.TXDW | ICR.TXQE
    assert not driver.asserted
    assert driver.read(TDH) == driver.read(TDT)


@pytest.mark.parametrize("length", [0, 1, 13, 16289, 65535])
def test_what_is_no_frame_is_dropped_but_reported(driver, length) -> None:
    assert done(driver, driver.send(frame_of(length)))
    assert driver.wire.frames == []


def test_without_rs_nothing_is_written_back(driver) -> None:
    assert not done(driver, driver.send(frame_of(100), TxDescriptor.EOP))
    assert not driver.asserted
    assert len(driver.wire.frames) == 1


def test_no_padding_unless_asked(driver) -> None:
    driver.write(TCTL.OFFSET, TCTL.EN)
    driver.send(frame_of(20))
    assert [len(frame) for frame in driver.wire.frames] == [20]


def test_many_buffers_make_a_frame(driver) -> None:
    frame = frame_of(3000)
    driver.memory.write(TX_BUFFERS, frame)
    for at in range(0, 3000, 100):
        last = TxDescriptor.EOP if at == 2900 else 0
        driver.put(TX_BUFFERS + at, DEXT_DATA | last | 100)
        driver.put(0, DEXT_DATA | 100)  # a null buffer: nothing to fetch
        if last:
            driver.tx_tail -= 1
    driver.ring_tail()
    assert driver.wire.frames == [frame]


def test_the_ring_goes_round(driver) -> None:
    frames = [frame_of(60 + seed, seed=seed) for seed in range(3 * driver.entries)]
    for frame in frames:
        driver.send(frame)
    assert driver.wire.frames == frames


def test_delayed_report(driver) -> None:
    driver.write(0x3820, 100)  # TIDV
    driver.write(0x382C, 250)  # TADV
    for _ in range(4):
        driver.send(frame_of(60), EOP_RS | TxDescriptor.IDE)
        assert not driver.asserted
        driver.clock.advance(80_000)
    assert driver.asserted, "the absolute timer bounds the wait"
    assert len(driver.wire.frames) == 4


def test_vlan_tags_are_inserted(driver) -> None:
    driver.write(CTRL.OFFSET, CTRL.DEFAULT | CTRL.VME)
    frame = frame_of(64)
    driver.send(frame, EOP_RS | TxDescriptor.VLE, 0x2005 << 16)
    assert driver.wire.frames == [frame[:12] + bytes.fromhex("81002005") + frame[12:]]


def test_statistics(driver) -> None:
    for length, destination in ((60, PEER), (61, b"\xff" * 6), (1514, b"\x01" + PEER[1:])):
        driver.send(frame_of(length, destination))
    names = {"gptc": 0x4080, "tpt": 0x40D4, "bptc": 0x40F4, "mptc": 0x40F0}
    names |= {"ptc64": 0x40D8, "ptc127": 0x40DC, "ptc1522": 0x40EC, "gotcl": 0x4090, "toth": 0x40CC}
    found = {name: driver.read(offset) for name, offset in names.items()}
    octets = 60 + 61 + 1514 + 3 * 4
    expected = {"gptc": 3, "tpt": 3, "bptc": 1, "mptc": 1, "ptc64": 1, "ptc127": 1, "ptc1522": 1}
    assert found == expected | {"gotcl": octets, "toth": 0}
    assert driver.read(names["gptc"]) == 0, "reading clears"
    assert driver.read(0x4094) == 0
    assert driver.read(names["gotcl"]) == 0, "reading the upper half clears both"


# ---- segmentation through the ring


def tso(driver: Driver, packet: bytes, mss: int, header: int, **fields: int) -> None:
    driver.memory.write(TX_BUFFERS, packet)
    driver.context(
        mss=mss,
        hdrlen=header,
        tucmd=TxDescriptor.TUCMD_TCP | TxDescriptor.TUCMD_IP | TxDescriptor.TSE,
        **{"ipcss": 14, "ipcso": 24, "ipcse": 33, "tucss": 34, "tucso": 50, **fields},
    )
    left, at = len(packet), TX_BUFFERS
    options = (TxDescriptor.IXSM | TxDescriptor.TXSM) << TxDescriptor.POPTS_SHIFT
    while left > 0:
        part = min(left, 60000)
        end = EOP_RS if part == left else 0
        driver.put(at, DEXT_DATA | TxDescriptor.TSE | end | part, options)
        left, at = left - part, at + part
    driver.ring_tail()


def test_a_long_packet_goes_out_in_turns(driver) -> None:
    tso(driver, frame_of(54 + 60000), 100, 54)
    first = len(driver.wire.frames)
    assert 0 < first <= transmit.FRAMES
    while driver.queue.next_deadline() is not None:
        before = len(driver.wire.frames)
        driver.clock.advance(transmit.PAUSE_NS)
        assert len(driver.wire.frames) - before <= transmit.FRAMES
    assert len(driver.wire.frames) == 600
    assert {len(frame) for frame in driver.wire.frames} == {154}


def test_a_turn_survives_a_save(driver) -> None:
    tso(driver, frame_of(54 + 60000), 100, 54)
    state = driver.card.save()
    other = Driver()
    other.card.restore(state)
    other.clock.advance(10 * transmit.PAUSE_NS)
    assert len(driver.wire.frames) + len(other.wire.frames) == 600
    driver.clock.advance(10 * transmit.PAUSE_NS)
    assert driver.wire.frames[-len(other.wire.frames) :] == other.wire.frames


@pytest.mark.parametrize(
    ("mss", "header", "length"),
    [(0, 54, 500), (100, 0, 500), (100, 255, 200), (0, 0, 500), (1000, 54, 300000)],
)
def test_senseless_segmentation_sends_nothing(driver, mss, header, length) -> None:
    tso(driver, frame_of(length), mss, header)
    driver.clock.advance(1_000_000)
    assert driver.wire.frames == []
    assert driver.card.statistics.counters[TSCTFC] == 1
    driver.send(frame_of(60))
    assert len(driver.wire.frames) == 1, "and the next frame goes out as ever"


@pytest.mark.parametrize("field", ["ipcss", "ipcso", "ipcse", "tucss", "tucso", "tucse"])
@pytest.mark.parametrize("value", [0, 53, 153, 254, 255])
def test_offsets_outside_the_frame_do_nothing(driver, field, value) -> None:
    tso(driver, frame_of(54 + 250), 100, 54, **{field: value})
    assert [len(frame) for frame in driver.wire.frames] == [154, 154, 104]


# ---- hostile rings


def stays_usable(driver: Driver) -> None:
    """After a reset, a round trip works."""
    driver.write(CTRL.OFFSET, CTRL.RST)
    driver.wire.frames.clear()
    driver.tx_tail = driver.rx_head = 0
    driver.start()
    driver.send(frame_of(64))
    assert len(driver.wire.frames) == 1
    assert driver.card.receive([frame_of(64)])
    assert [data[:-4] for data in driver.take()] == [frame_of(64)]


@pytest.mark.parametrize(
    ("register", "value"),
    [(TDT, 64), (TDT, 0xFFFF), (TDH, 64), (TDH, 0xFFFF), (TDLEN, 0), (TDLEN, 8), (TDLEN, 0x7F)],
)
def test_head_and_tail_outside_the_ring(driver, register, value) -> None:
    driver.write(register, value)
    driver.put(TX_BUFFERS, EOP_RS | 100)
    driver.write(TDT, driver.read(TDT) or 1)
    driver.clock.advance(1_000_000)
    assert driver.wire.frames == []
    assert driver.queue.next_deadline() is None, "nothing is tried again and again"
    stays_usable(driver)


@pytest.mark.parametrize(
    "base", [MEMORY, MEMORY - 16, 0xFEE00000, 0xFFFF_FFFF_FFFF_FFF0, 1 << 63, 0xC0000000]
)
def test_rings_outside_ram(driver, base) -> None:
    driver.write(Ring.TRANSMIT + Ring.BAL, base & 0xFFFFFFFF)
    driver.write(Ring.TRANSMIT + Ring.BAH, base >> 32)
    driver.write(TDT, 40)
    assert driver.card.transmitter.ring.failed
    assert driver.wire.frames == []
    stays_usable(driver)


@pytest.mark.parametrize(
    "address", [MEMORY - 50, MEMORY, 0xC0000000, (1 << 64) - 1, (1 << 64) - 50]
)
def test_buffers_outside_ram(driver, address) -> None:
    descriptor = driver.put(address, EOP_RS | 100)
    driver.ring_tail()
    assert driver.card.transmitter.ring.failed
    assert not done(driver, descriptor)
    assert driver.wire.frames == []
    stays_usable(driver)


def test_a_buffer_that_ends_with_ram(driver) -> None:
    frame = frame_of(100)
    driver.memory.write(MEMORY - 100, frame)
    driver.put(MEMORY - 100, EOP_RS | 100)
    driver.ring_tail()
    assert driver.wire.frames == [frame]


def test_an_endless_packet_is_cut_off(driver) -> None:
    for _ in range(100):
        for _ in range(20):
            driver.put(TX_BUFFERS, DEXT_DATA | 0xFFFFF)
        driver.ring_tail()
        driver.clock.advance(10_000_000)
    assert len(driver.card.transmitter.packet) <= transmit.LIMIT
    stays_usable(driver)


def test_a_ring_of_contexts_only(driver) -> None:
    for _ in range(driver.entries - 1):
        driver.context(mss=1, hdrlen=1)
    driver.ring_tail()
    driver.clock.advance(1_000_000)
    assert driver.read(TDH) == driver.read(TDT)
    stays_usable(driver)


def test_a_doorbell_does_a_bounded_amount(driver) -> None:
    """A full ring of the largest size, each descriptor with as much data as fits."""
    big = Driver(entries=0xFFF80 // 16)
    descriptor = struct.pack("<QII", 0x200000, DEXT_DATA | 0xFFFFF, 0)
    room = (MEMORY - TX_RING) // 16
    big.memory.write(TX_RING, descriptor * room)
    big.ring(Ring.TRANSMIT, TX_RING)
    big.write(TCTL.OFFSET, TCTL.EN)
    big.write(TDT, big.entries - 1)
    assert big.read(TDH) <= transmit.BYTES // 0xFFFFF + 1
    assert big.queue.next_deadline() is not None


def test_loopback_into_its_own_registers(driver) -> None:
    """Receive buffers in the card's own BAR: an address outside RAM like any other."""
    driver.card.config_write(0x10, 4, 0xC0000000)
    for index in range(driver.entries):
        driver.memory.write(0x11000 + index * 16, struct.pack("<QQ", 0xC0000000 + TDT, 0))
    driver.write(0x100, driver.read(0x100) | 0x40)
    driver.send(frame_of(200, MAC))
    assert driver.wire.frames == []
    assert driver.card.receiver.ring.failed
    driver.write(0x100, driver.read(0x100) & ~0xC2)
    stays_usable(driver)


def test_nothing_is_fetched_without_bus_mastering(driver) -> None:
    driver.card.config_write(4, 2, 0x03)
    descriptor = driver.send(frame_of(60))
    driver.clock.advance(1_000_000)
    assert driver.wire.frames == []
    assert not done(driver, descriptor)
    driver.card.config_write(4, 2, 0x07)
    assert driver.wire.frames == [frame_of(60)]


def test_a_backend_that_takes_large_segments_gets_them_whole(driver) -> None:
    """As the chip would have cut them, the statistics say."""
    payload = random.Random(6).randbytes(50_001)
    packet = bytearray(PEER + MAC + ipv4(6, payload)[12:])
    wanted = bytes(packet)
    packet[16:18] = packet[24:26] = bytes(2)
    driver.wire.takes_large = True
    tso(driver, bytes(packet), 1460, 54)
    assert driver.wire.frames == [wanted]
    assert driver.read(0x4080) == 35, "GPTC"
    assert driver.read(0x40F8) == 1, "TSCTC"
    assert driver.read(0x4090) == 50_001 + 35 * 58, "GOTCL"


@pytest.mark.parametrize(
    "odd",
    [
        {"tucss": 38},
        {"tucso": 48},
        {"ipcss": 10},
        {"ipcse": 0},
        {"tucse": 60},
        {"hdrlen": 58},
        {"tucmd": TxDescriptor.TUCMD_TCP | TxDescriptor.TSE},
        {"tucmd": TxDescriptor.TUCMD_IP | TxDescriptor.TSE},
    ],
)
def test_what_is_no_plain_segment_is_cut_as_the_chip_does(driver, odd) -> None:
    packet = PEER + MAC + ipv4(6, bytes(3000))[12:]
    sent = []
    for large in (False, True):
        driver.wire.takes_large = large
        fields = {"mss": 1460, "hdrlen": 54, "tucmd": 0x07000000, **odd}
        driver.memory.write(TX_BUFFERS, packet)
        driver.context(
            **{"ipcss": 14, "ipcso": 24, "ipcse": 33, "tucss": 34, "tucso": 50, **fields}
        )
        options = (TxDescriptor.IXSM | TxDescriptor.TXSM) << TxDescriptor.POPTS_SHIFT
        driver.put(TX_BUFFERS, DEXT_DATA | TxDescriptor.TSE | EOP_RS | len(packet), options)
        driver.ring_tail()
        sent.append(list(driver.wire.frames))
        driver.wire.frames.clear()
    assert sent[0] == sent[1]
    assert len(sent[0]) > 1


def test_small_packets_that_come_together_are_gathered(driver) -> None:
    """Until a vCPU sleeps, or for a moment; those that come alone go out at once."""
    spare = SpareTime(driver.queue)
    driver.card.transmitter._gatherer._put_off = spare.put_off
    wire = driver.wire.frames
    for number in range(PROBE - 1):
        driver.send(frame_of(60))
        assert len(wire) == number + 1
    for _ in range(1 + FEW):
        driver.send(frame_of(60))
    assert len(wire) == PROBE - 1
    spare.begin()
    before = PROBE + FEW
    assert len(wire) == before
    for _ in range(5):
        for _ in range(10):
            driver.send(frame_of(60))
        assert len(wire) == before
        driver.clock.advance(transmit.GATHER_NS)
        assert len(wire) == before + 10
        del wire[-10:]
    driver.card.reset()
    driver.tx_tail = driver.rx_head = 0
    driver.start()
    driver.send(frame_of(60))
    assert len(wire) == before + 1
