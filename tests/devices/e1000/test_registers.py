"""Registers that an engine accesses by itself: nobody can tell the difference."""

from __future__ import annotations

import random

import pytest

from devices.e1000.driver import Driver, frame_of
from ringfence.chipset.spare import SpareTime
from ringfence.devices.e1000.registers import CTRL, ICR, ITR, RCTL, STATUS, Ring
from ringfence.devices.gathering import PROBE

TAILS = (Ring.RECEIVE + Ring.TAIL, Ring.TRANSMIT + Ring.TAIL)
REGISTERS = (
    CTRL.OFFSET, STATUS.OFFSET, ICR.OFFSET, ICR.ICS, ICR.IMS, ICR.IMC, ITR.OFFSET, RCTL.OFFSET,
    *TAILS,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_two_drivers_that_do_the_same(seed: int) -> None:
    """One by native code where it answers: they read the same, and so does what is saved."""
    plain, native = Driver().start(), Driver().go_native().start()
    source = random.Random(seed)
    for _ in range(1500):
        kind, at = source.random(), source.choice(REGISTERS)
        value = source.choice((source.getrandbits(32) & ~CTRL.RST, 1 << source.randrange(10)))
        size = 4 if source.random() < 0.9 else source.choice((1, 2))
        time, frame = source.choice((1, 1000, 100_000)), frame_of(source.randrange(60, 1500))
        if at in TAILS:
            value &= 63
        seen = []
        for driver in (plain, native):
            if kind < 0.4:
                seen.append(driver.read(at & -size, size))
            elif kind < 0.8:
                driver.write(at, value, size)
            elif kind < 0.9:
                seen.append(driver.card.receive([frame]))
            else:
                driver.clock.advance(time)
        assert seen[:1] == seen[1:]
    assert native.native is not None
    native.native.places.settle()
    assert plain.card.save() == native.card.save()
    assert plain.asserted == native.asserted
    assert plain.wire.frames == native.wire.frames
    assert plain.memory.read(0, 4 << 20) == native.memory.read(0, 4 << 20)


def test_an_interrupt_costs_no_exit_but_to_raise_it() -> None:
    """What Linux's driver does from handler to poll and back."""
    driver = Driver().go_native().start()
    native = driver.native
    assert native is not None
    assert driver.card.receive([frame_of(100)])
    assert driver.asserted
    assert native.read(ICR.OFFSET) == ICR.RXT0
    assert native.write(ICR.IMC, 0xFFFFFFFF)
    assert native.read(STATUS.OFFSET) == STATUS.FD | STATUS.LU | 0x280
    assert native.places.posted
    native.places.settle()
    assert not driver.asserted
    assert driver.card.receive([frame_of(100)])
    assert native.write(ITR.OFFSET, 500)
    assert native.write(Ring.RECEIVE + Ring.TAIL, 1)
    assert not driver.asserted
    assert not native.write(ICR.IMS, ICR.RXT0), "a frame has come meanwhile"
    driver.write(ICR.IMS, ICR.RXT0)
    assert driver.asserted


def test_a_frame_that_waits_for_room_hears_of_it() -> None:
    driver = Driver(entries=8).go_native().start()
    assert driver.native is not None
    sent = 0
    while driver.card.receive([frame_of(100)]):
        sent += 1
    assert sent == 7
    driver.take()
    assert driver.wire.resumed == 1
    assert driver.native.write(Ring.RECEIVE + Ring.TAIL, 6), "nothing waits any more"


def test_doorbells_while_work_is_put_off() -> None:
    """Only the first one is heard; the frames behind the others go along."""
    driver = Driver().go_native().start()
    native = driver.native
    assert native is not None
    spare = SpareTime(driver.queue)
    driver.card.transmitter._gatherer._put_off = spare.put_off
    for _ in range(PROBE):
        driver.send(frame_of(60))
    assert len(driver.wire.frames) == PROBE - 1
    for _ in range(20):
        tail = driver.tx_tail
        driver.send(frame_of(60))
        assert native.write(Ring.TRANSMIT + Ring.TAIL, (tail + 1) % driver.entries)
    assert len(driver.wire.frames) == PROBE - 1
    spare.begin()
    assert len(driver.wire.frames) == PROBE + 20
    assert not native.write(Ring.TRANSMIT + Ring.TAIL, driver.tx_tail), "now it is looked at"


def test_a_reset_forgets_what_was_open() -> None:
    driver = Driver().go_native().start()
    assert driver.native is not None
    driver.card.transmitter._tail.open = 1
    driver.write(CTRL.OFFSET, CTRL.RST)
    assert not driver.native.write(Ring.TRANSMIT + Ring.TAIL, 1)


def test_the_link_is_seen() -> None:
    driver = Driver().go_native()
    assert driver.native is not None
    for up in (False, True):
        driver.card.set_link(up)
        status = driver.native.read(STATUS.OFFSET)
        assert status is not None
        assert bool(status & STATUS.LU) == up
    other = Driver().go_native()
    driver.card.set_link(False)
    other.card.restore(driver.card.save())
    assert other.read(STATUS.OFFSET) & STATUS.LU == 0
