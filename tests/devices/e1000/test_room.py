"""What finds no room in the network waits in the transmit ring, whatever else happens meanwhile."""

from __future__ import annotations

import pytest

from devices.e1000.driver import EOP_RS, MAC, TX_BUFFERS, Driver, frame_of
from devices.e1000.test_transmit import done, tso
from ringfence.devices.e1000 import transmit
from ringfence.devices.e1000.registers import CTRL, ICR, RCTL, TCTL, Ring

TDH, TDT = (Ring.TRANSMIT + at for at in (Ring.HEAD, Ring.TAIL))
FRAMES = [frame_of(60, seed=seed) for seed in range(20)]


@pytest.fixture
def waiting(driver: Driver) -> Driver:
    """A card with 20 frames to send and room for 3."""
    driver.wire.limit = 3
    for seed, frame in enumerate(FRAMES):
        driver.memory.write(TX_BUFFERS + seed * 2048, frame)
        driver.put(TX_BUFFERS + seed * 2048, EOP_RS | len(frame))
    driver.ring_tail()
    assert driver.wire.frames == FRAMES[:3]
    return driver


def make_room(driver: Driver, limit: int = 1000) -> None:
    driver.wire.limit = limit
    driver.card.more()


def test_frames_wait_in_the_ring(waiting: Driver) -> None:
    assert waiting.read(TDH) == 3
    assert waiting.read(ICR.OFFSET) & ICR.TXDW, "for those that have gone"
    assert waiting.queue.next_deadline() is None, "nobody looks before there is room"
    assert waiting.wire.asked_in_vain == 1
    make_room(waiting, 7)
    assert waiting.wire.frames == FRAMES[:7]
    make_room(waiting)
    assert waiting.wire.frames == FRAMES
    assert waiting.read(TDH) == waiting.read(TDT)
    assert waiting.read(ICR.OFFSET) & ICR.TXDW


def test_more_frames_come_behind_them(waiting: Driver) -> None:
    """The tail of a ring that waits is no exit, and nothing that is posted there is lost."""
    native = waiting.go_native().native
    assert native is not None
    waiting.memory.write(TX_BUFFERS + 0x20000, frame_of(90))
    waiting.put(TX_BUFFERS + 0x20000, EOP_RS | 90)
    assert native.write(TDT, waiting.tx_tail)
    make_room(waiting)
    assert waiting.wire.frames == [*FRAMES, frame_of(90)]
    waiting.put(TX_BUFFERS + 0x20000, EOP_RS | 90)
    assert not native.write(TDT, waiting.tx_tail), "the card hears of it again"


def test_segments_wait_too(driver: Driver) -> None:
    driver.wire.limit = 10
    tso(driver, frame_of(54 + 60_000), 100, 54)
    assert len(driver.wire.frames) == 10
    assert driver.read(TDH) == driver.read(TDT)
    make_room(driver)
    while driver.queue.next_deadline() is not None:
        driver.clock.advance(transmit.PAUSE_NS)
    assert len(driver.wire.frames) == 600


def test_a_reset_forgets_them(waiting: Driver) -> None:
    waiting.write(CTRL.OFFSET, CTRL.RST)
    make_room(waiting)
    assert waiting.wire.frames == FRAMES[:3]
    waiting.tx_tail = 0
    waiting.start()
    waiting.send(frame_of(99))
    assert waiting.wire.frames[3:] == [frame_of(99)]


def test_a_transmitter_that_is_switched_off_sends_nothing(waiting: Driver) -> None:
    waiting.write(TCTL.OFFSET, 0)
    make_room(waiting)
    assert waiting.wire.frames == FRAMES[:3]
    waiting.write(TCTL.OFFSET, TCTL.EN | TCTL.PSP)
    assert waiting.wire.frames == FRAMES


def test_nothing_is_fetched_without_bus_mastering(waiting: Driver) -> None:
    waiting.card.config_write(4, 2, 3)
    make_room(waiting)
    assert waiting.wire.frames == FRAMES[:3]
    waiting.card.config_write(4, 2, 7)
    assert waiting.wire.frames == FRAMES


def test_they_go_on_where_they_are_restored(waiting: Driver) -> None:
    state = waiting.card.save()
    other = Driver()
    other.memory.write(0, waiting.memory.read(0, waiting.memory.size))
    other.wire.limit = 5
    other.card.restore(state)
    other.clock.advance(transmit.PAUSE_NS)
    assert other.wire.frames == FRAMES[3:8]
    make_room(other)
    assert other.wire.frames == FRAMES[3:]
    assert all(done(other, 0x1000 + 16 * at) for at in range(20))
    make_room(waiting)
    assert waiting.wire.frames == FRAMES, "the one that stayed goes on as well"


def test_a_cable_that_is_cut_needs_no_room(waiting: Driver) -> None:
    waiting.card.set_link(False)
    waiting.card.more()
    assert waiting.read(TDH) == waiting.read(TDT)
    assert waiting.wire.frames == FRAMES[:3]


def test_loopback_needs_no_room(driver: Driver) -> None:
    driver.wire.limit = 0
    driver.write(RCTL.OFFSET, RCTL.EN | RCTL.LBM | RCTL.UPE)
    driver.send(frame_of(100, MAC))
    assert [data[:-4] for data in driver.take()] == [frame_of(100, MAC)]
