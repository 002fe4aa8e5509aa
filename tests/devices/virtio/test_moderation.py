"""The switches of virtio's queues: fewer interrupts, fewer notifications, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest

from devices.virtio.backends import Wire
from devices.virtio.driver import BUFFERS, Driver
from ringfence.chipset.state import State
from ringfence.devices.virtio import net
from ringfence.devices.virtio.net import VirtioNet
from ringfence.devices.virtio.ring import EVENT_IDX
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
        assert driver.device.receive(bytes(60))  # type: ignore[attr-defined]


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
