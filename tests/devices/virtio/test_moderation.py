"""The switches of virtio's queues: fewer interrupts, fewer notifications, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest

from devices.virtio.backends import Wire
from devices.virtio.driver import BUFFERS, Driver
from ringfence.chipset.state import State
from ringfence.devices.gathering import PROBE
from ringfence.devices.virtio import net
from ringfence.devices.virtio.net import FEW, VirtioNet
from ringfence.devices.virtio.rules import EVENT_IDX
from ringfence.pacing import Pacing

US = 1000
Make = Callable[..., Driver]
LAYOUTS = pytest.mark.parametrize(
    ("packed", "event_idx"),
    list(product((False, True), repeat=2)),
    ids=["split", "split-event_idx", "packed", "packed-event_idx"],
)


@pytest.fixture
def card() -> Iterator[Make]:
    """Make a card with switches, and its driver: ``card(pacing, packed, event_idx)``."""
    made: list[Driver] = []

    def make(pacing: Pacing, packed: bool = False, event_idx: bool = True) -> Driver:
        device = VirtioNet(Wire(), bytes.fromhex("020000000001"))
        driver = Driver(device, packed=packed, pacing=pacing)
        made.append(driver)
        driver.start(packed=packed, event_idx=event_idx, messages=True)
        return driver

    yield make
    for driver in made:
        driver.close()


def sent(driver: Driver) -> int:
    """Frames on the wire since the last time."""
    wire = driver.device._backend  # type: ignore[attr-defined]
    count = len(wire.frames)
    wire.frames.clear()
    return count


def send(driver: Driver, count: int = 1) -> bool:
    """Make frames available; notify only if the device asks for that. Return whether it did."""
    ring = driver.rings[1]
    ring.used()
    for _ in range(count):
        ring.add([(BUFFERS, net.HEADER.size + 60, False)])
    wanted = ring.needs_kick()
    if wanted:
        driver.notify(1)
    return wanted


def receive(driver: Driver, count: int = 1) -> None:
    """Let frames come in, into buffers of their own."""
    for at in range(count):
        driver.rings[0].add([(BUFFERS + 0x1000 * at, 2048, True)])
    for _ in range(count):
        assert driver.device.receive([bytes(60)])  # type: ignore[attr-defined]


@pytest.mark.parametrize("offered", [True, False])
def test_event_idx_is_offered_or_not(card: Make, offered: bool) -> None:
    driver = card(Pacing(event_idx=offered), event_idx=False)
    assert bool(driver.offered() & EVENT_IDX) is offered


@LAYOUTS
def test_an_interrupt_waits_for_packets(card: Make, packed: bool, event_idx: bool) -> None:
    driver = card(Pacing(packets=4, microseconds=50), packed, event_idx)
    driver.rings[0].interrupts(True)
    receive(driver, 3)
    assert driver.vectors() == []
    assert len(driver.rings[0].used()) == 3  # they are there, though nobody was told
    receive(driver, 1)
    assert driver.vectors() == [0x41]
    driver.clock.advance(1000 * US)
    assert driver.vectors() == []


@LAYOUTS
def test_an_interrupt_does_not_wait_longer(card: Make, packed: bool, event_idx: bool) -> None:
    driver = card(Pacing(packets=4, microseconds=50), packed, event_idx)
    driver.rings[0].interrupts(True)
    receive(driver)
    driver.clock.advance(49 * US)
    assert driver.vectors() == []
    driver.clock.advance(1 * US)
    assert driver.vectors() == [0x41]
    driver.rings[0].used()
    driver.rings[0].interrupts(False)
    receive(driver, 8)
    driver.clock.advance(1000 * US)
    assert driver.vectors() == []  # not wanted: nothing waits


def test_no_interrupt_outlives_a_reset(card: Make) -> None:
    driver = card(Pacing(packets=4, microseconds=50))
    receive(driver)
    driver.put(0x14, 1, 0)
    driver.clock.advance(1000 * US)
    assert driver.vectors() == []
    assert driver.board.timers.next_deadline() is None


def test_an_interrupt_that_waits_is_not_lost_by_saving(card: Make) -> None:
    driver = card(Pacing(packets=4, microseconds=50))
    receive(driver)
    driver.board.quiesce()
    assert driver.vectors() == [0x41]


@LAYOUTS
def test_a_busy_queue_needs_no_notifications(card: Make, packed: bool, event_idx: bool) -> None:
    driver = card(Pacing(poll=100), packed, event_idx)
    assert send(driver)
    assert sent(driver) == 1
    for _ in range(20):
        assert not send(driver, 3)
        driver.clock.advance(50 * US)
        assert sent(driver) == 3


@LAYOUTS
def test_an_idle_queue_is_left_alone(card: Make, packed: bool, event_idx: bool) -> None:
    driver = card(Pacing(poll=100), packed, event_idx)
    assert send(driver)
    driver.clock.advance(1000 * US)
    assert driver.board.timers.next_deadline() is None
    assert send(driver)
    assert sent(driver) == 2


def test_pauses_adapt(card: Make) -> None:
    driver = card(Pacing(poll=160))
    timers = driver.board.timers

    def pause() -> int:
        deadline = timers.next_deadline()
        return 0 if deadline is None else (deadline - driver.clock.now()) // US

    send(driver)
    pauses = [pause()]
    for count in (1, 1, 1, 1, 0, 0, 0, 0):
        if count:
            send(driver)
        driver.clock.advance(pauses[-1] * US)
        pauses.append(pause())
    assert pauses == [80, 40, 20, 20, 20, 40, 80, 160, 0]


def test_notifications_while_polling_arm_nothing_more(card: Make) -> None:
    driver = card(Pacing(poll=100))
    send(driver)
    for _ in range(100):
        driver.notify(1)
    assert len(driver.board.timers._heap) == 1
    driver.put(0x14, 1, 0)
    assert driver.board.timers.next_deadline() is None


@LAYOUTS
def test_polling_goes_on_after_a_restore(card: Make, packed: bool, event_idx: bool) -> None:
    pacing = Pacing(poll=100)
    first, second = (card(pacing, packed, event_idx) for _ in range(2))
    assert send(first)
    assert not send(first)  # it polls: nobody says that this one is there
    state: State = first.board.save()
    second.memory.write(0, first.memory.read(0, first.memory.size))
    second.board.restore(state)
    second.clock.advance(1000 * US)
    assert sent(second) == 1
    assert second.board.timers.next_deadline() is None


def probe(driver: Driver) -> None:
    """Send until a notification is put off."""
    for _ in range(PROBE - 1):
        assert send(driver)
        assert sent(driver) == 1
    assert send(driver)
    assert sent(driver) == 0


@LAYOUTS
def test_who_comes_alone_is_served_at_once(card: Make, packed: bool, event_idx: bool) -> None:
    driver = card(Pacing(), packed, event_idx)
    for _ in range(3):
        probe(driver)
        driver.board.idle()
        assert sent(driver) == 1


@LAYOUTS
def test_requests_that_come_together_wait(card: Make, packed: bool, event_idx: bool) -> None:
    """Until a vCPU sleeps; meanwhile nobody needs to say that there are more."""
    driver = card(Pacing(), packed, event_idx)
    probe(driver)
    for _ in range(5):
        assert not send(driver, FEW)
        assert sent(driver) == 0
        driver.board.idle()
        assert sent(driver) == FEW + 1
        assert send(driver)
    assert sent(driver) == 0
    driver.board.idle()
    assert sent(driver) == 1
    for _ in range(2):  # alone once more, and it was for the last time
        assert send(driver)
        driver.board.idle()
        assert sent(driver) == 1
    assert send(driver)
    assert sent(driver) == 1


def test_they_wait_no_longer_than_they_may(card: Make) -> None:
    driver = card(Pacing(gather=50))
    probe(driver)
    assert not send(driver)
    driver.clock.advance(49 * US)
    assert sent(driver) == 0
    driver.clock.advance(US)
    assert sent(driver) == 2
    driver.clock.advance(1000 * US)
    assert driver.board.timers.next_deadline() is None


def test_large_requests_do_not_wait(card: Make) -> None:
    driver = card(Pacing())
    probe(driver)
    driver.board.idle()
    for _ in range(3):
        for _ in range(PROBE):
            ring = driver.rings[1]
            ring.used()
            for _ in range(2):
                ring.add([(BUFFERS, net.HEADER.size + 9000, False)])
            driver.notify(1)
        assert sent(driver) >= 2 * (PROBE - 1)
        driver.board.idle()
        sent(driver)


@pytest.mark.parametrize("pacing", [Pacing(gather=0), Pacing(poll=100)])
def test_nothing_waits_where_it_is_switched_off(card: Make, pacing: Pacing) -> None:
    driver = card(pacing)
    for _ in range(3 * PROBE):
        if send(driver):
            assert sent(driver)
        driver.clock.advance(1000 * US)
        sent(driver)


def test_a_reset_forgets_what_was_put_off(card: Make) -> None:
    driver = card(Pacing())
    probe(driver)
    driver.put(0x14, 1, 0)
    driver.board.idle()
    assert sent(driver) == 0
    driver.start(event_idx=True, messages=True)
    assert send(driver)
    assert sent(driver) == 1


def test_what_was_put_off_is_done_after_a_restore(card: Make) -> None:
    first, second = (card(Pacing()) for _ in range(2))
    probe(first)
    state: State = first.board.save()
    second.memory.write(0, first.memory.read(0, first.memory.size))
    second.board.restore(state)
    second.clock.advance(1000 * US)
    assert sent(second) == 1
    first.clock.advance(1000 * US)
    assert sent(first) == 1
