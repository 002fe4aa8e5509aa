"""What all backends share: queues with a bound, waiting cards, attaching and closing."""

from __future__ import annotations

import os
import select
import socket
import threading

import pytest

from network.support import Card, frame, until
from ringfence.network import threaded
from ringfence.network.backend import BATCH, FEW, MAXIMUM_FRAME, SHORT
from ringfence.network.threaded import MOST, QUEUE, ThreadedBackend


class Pair(ThreadedBackend):
    """A datagram socket; its other end is the test's."""

    NAME = "pair"

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.inner.setblocking(False)
        self.released = 0

    def _interest(self):
        return ([] if self._stalled else [(self.inner.fileno(), select.POLLIN)]), None

    def _handle(self, ready):
        if ready:
            self._deliver(self.inner.recv(1 << 20))

    def _send(self, sent: bytes) -> None:
        self.inner.setblocking(True)
        self.inner.send(sent)
        self.inner.setblocking(False)

    def _release(self) -> None:
        self.released += 1
        self.inner.close()
        self.outer.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def test_both_ways(pair) -> None:
    card = Card()
    pair.attach(card)
    for number in range(200):
        pair.outer.send(frame(number))
        pair.transmit(frame(number, 1514))
    pair.carry()
    assert [pair.outer.recv(2000) for _ in range(200)] == [frame(n, 1514) for n in range(200)]
    until(lambda: len(card.frames) == 200)
    assert card.frames == [frame(number) for number in range(200)]
    assert card.thread == "ringfence-pair"
    until(lambda: pair.stats()["received"] == 200)
    assert pair.stats() == {
        "sent": 200,
        "sent_bytes": 200 * 1514,
        "received": 200,
        "received_bytes": 200 * 60,
        "dropped_sending": 0,
        "dropped_receiving": 0,
    }


def test_what_comes_together_is_brought_together(pair) -> None:
    """One look gives a datagram at a time, a turn has many looks."""
    for number in range(3 * BATCH):
        pair.outer.send(frame(number))
    card = Card()
    pair.attach(card)
    until(lambda: len(card.frames) == 3 * BATCH)
    assert card.frames == [frame(number) for number in range(3 * BATCH)]
    assert card.batches == [BATCH] * 3


class Flood(Pair):
    """There is always one more frame for the card."""

    def _handle(self, ready):
        if ready:
            self._deliver(frame(1))


def test_a_flood_holds_nothing_up() -> None:
    """Neither frames of the card's, nor jobs, nor the end: a turn's looks are bounded."""
    flood, card, done = Flood(), Card(), []
    flood.outer.send(b"never read")
    flood.attach(card)
    until(lambda: len(card.frames) > BATCH)
    flood.transmit(frame(2))
    flood.carry()
    assert flood.outer.recv(100) == frame(2)
    flood._call(lambda: done.append(1))
    assert done
    flood.close()
    assert max(card.batches) == BATCH


class Mirror(Pair):
    """What is sent comes back, too, in the same turn."""

    def _send(self, sent: bytes) -> None:
        super()._send(sent)
        self._deliver(sent)


@pytest.fixture
def mirror():
    made = Mirror()
    yield made
    made.close()


def test_a_few_short_frames_are_dealt_with_at_once(mirror) -> None:
    card = Card()
    mirror.attach(card)
    for number in range(FEW):
        mirror.transmit(frame(number))
    assert card.frames == []
    mirror.carry()
    assert card.frames == [frame(number) for number in range(FEW)]
    assert card.thread == threading.current_thread().name


@pytest.mark.parametrize(("count", "length"), [(FEW + 1, 60), (1, SHORT + 1)])
def test_many_and_long_ones_are_the_threads(mirror, count, length) -> None:
    card = Card()
    mirror.attach(card)
    for number in range(count):
        mirror.transmit(frame(number, length))
    mirror.carry()
    until(lambda: len(card.frames) == count)
    assert card.frames == [frame(number, length) for number in range(count)]
    assert card.thread == "ringfence-pair"


def test_nobody_waits_for_a_turn_with_the_cards_lock_held(mirror) -> None:
    """The thread waits for the card's lock in its turn; who has it ends a batch."""
    lock, waiting = threading.Lock(), threading.Event()

    class Locked(Card):
        def receive(self, frames):
            if threading.current_thread().name == "ringfence-pair":
                waiting.set()
                with lock:
                    return super().receive(frames)
            return super().receive(frames)

    card = Locked()
    mirror.attach(card)
    with lock:
        mirror.outer.send(frame(1))
        assert waiting.wait(20)
        mirror.transmit(frame(2))
        carrying = threading.Thread(target=mirror.carry, daemon=True)
        carrying.start()
        carrying.join(20)
        assert not carrying.is_alive()
        assert card.frames == []
    until(lambda: len(card.frames) == 2)
    assert card.frames == [frame(1), frame(2)]


@pytest.mark.parametrize("length", [0, 1, 13, MAXIMUM_FRAME + 1, 1 << 20])
def test_frames_of_absurd_lengths_are_dropped(pair, length) -> None:
    pair.attach(Card())
    pair.transmit(bytes(length))
    pair.carry()
    pair.transmit(frame(1))
    pair.carry()
    assert pair.outer.recv(1 << 21) == frame(1)
    assert pair.stats()["dropped_sending"] == 1


def test_a_flood_is_bounded(pair) -> None:
    """Nobody takes the frames away before something is attached."""
    for number in range(MOST + QUEUE):
        pair.transmit(frame(number))
    pair.carry()
    assert pair.stats()["dropped_sending"] == QUEUE
    pair.attach(Card())
    assert [pair.outer.recv(100) for _ in range(MOST)] == [frame(n) for n in range(MOST)]


class Jam(Pair):
    """A wire that may be stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.jammed = True
        self.gone: list[bytes] = []

    def _send(self, sent: bytes) -> None:
        self.gone.append(sent)

    @property
    def _jammed(self):
        return self.jammed

    def go(self) -> None:
        self.jammed = False
        self._notify()


@pytest.fixture
def jam():
    made = Jam()
    yield made
    made.close()


def fill(network: ThreadedBackend) -> int:
    """Transmit as long as there is room; how many frames."""
    count = 0
    while network.room():
        network.transmit(frame(count))
        count += 1
    network.carry()
    return count


def test_a_card_is_told_of_room(jam, monkeypatch) -> None:
    monkeypatch.setattr(threaded, "PATIENCE", 1000.0)
    card = Card()
    jam.attach(card)
    assert jam.room() == QUEUE
    jam.transmit(frame(0))
    assert jam.room() == QUEUE - 1
    assert fill(jam) == QUEUE - 1
    assert not card.told
    jam.go()
    until(lambda: card.told)
    until(lambda: jam.room() == QUEUE)
    assert jam.stats()["dropped_sending"] == 0
    assert card.told == 1


def test_what_a_card_sends_when_told_is_sent(jam, monkeypatch) -> None:
    """From within the thread's turn, several times over the queue's size."""
    monkeypatch.setattr(threaded, "PATIENCE", 1000.0)

    class Sender(Card):
        left = 5 * QUEUE

        def more(self):
            super().more()
            while self.left and jam.room():
                jam.transmit(frame(self.left))
                self.left -= 1
            jam.carry()

    card = Sender()
    jam.attach(card)
    card.more()
    jam.go()
    until(lambda: len(jam.gone) == 5 * QUEUE)
    assert jam.gone == [frame(number) for number in range(5 * QUEUE, 0, -1)]
    assert card.told > 2
    assert jam.stats()["dropped_sending"] == 0


def test_nobody_waits_for_a_dead_wire(jam, monkeypatch) -> None:
    """After a while there is room again, for frames that are dropped."""
    monkeypatch.setattr(threaded, "PATIENCE", 0.05)
    card = Card()
    jam.attach(card)
    for number in range(QUEUE):
        jam.transmit(frame(number))
    if not jam.room():
        until(lambda: card.told)
    for number in range(2 * QUEUE):
        assert jam.room() == QUEUE
        jam.transmit(frame(number))
    jam.carry()
    assert jam.stats()["dropped_sending"] == QUEUE
    told = card.told
    jam.go()
    until(lambda: len(jam._outgoing) == 0)
    assert card.told == told, "nobody waited"
    assert jam.room() == QUEUE


def test_a_card_that_was_detached_is_told_later(jam, monkeypatch) -> None:
    monkeypatch.setattr(threaded, "PATIENCE", 1000.0)
    first, second = Card(), Card()
    jam.attach(first)
    fill(jam)
    jam.detach()
    jam.go()
    until(lambda: not jam._outgoing)
    jam.attach(second)
    until(lambda: second.told == 1)
    assert first.told == 0


def test_a_card_without_room_is_asked_again_when_it_says_so(pair) -> None:
    card = Card(room=3)
    pair.attach(card)
    for number in range(10):
        pair.outer.send(frame(number))
    until(lambda: card.refused)
    assert len(card.frames) == 3
    card.room = 1000
    pair.resume()
    until(lambda: len(card.frames) == 10)
    assert card.frames == [frame(number) for number in range(10)]


def test_room_found_between_refusal_and_waiting(pair) -> None:
    """The card says `resume` while its refusal is still on the way back."""

    class Fickle(Card):
        def take(self, data):
            if not self.refused:
                pair.resume()
                return False
            return super().take(data)

    card = Fickle()
    pair.attach(card)
    pair.outer.send(frame(1))
    until(lambda: card.frames == [frame(1)])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_frame_in_the_moment_of_waking_up(pair, monkeypatch, moment) -> None:
    """Whenever a frame comes, it and the next one are sent, without another event to help."""
    real, waiting = os.eventfd_read, [frame(2)]

    def read(descriptor: int) -> int:
        if moment == "before" and waiting:
            pair.transmit(waiting.pop())
            pair.carry()
        value = real(descriptor)
        if waiting:
            pair.transmit(waiting.pop())
            pair.carry()
        return value

    monkeypatch.setattr(threaded, "FEW", 0)
    monkeypatch.setattr(os, "eventfd_read", read)
    pair.outer.settimeout(20)
    pair.attach(Card())
    pair.transmit(frame(1))
    pair.carry()
    received = {pair.outer.recv(100), pair.outer.recv(100)}
    pair.transmit(frame(3))
    pair.carry()
    assert pair.outer.recv(100) == frame(3)
    assert received == {frame(1), frame(2)}


def test_detached_means_that_no_call_is_under_way(pair) -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(Card):
        def take(self, data):
            inside.set()
            leave.wait()
            return True

    pair.attach(Slow())
    pair.outer.send(frame(1))
    assert inside.wait(10)
    done = threading.Event()
    threading.Thread(target=lambda: (pair.detach(), done.set()), daemon=True).start()
    assert not done.wait(0.05)
    leave.set()
    assert done.wait(10)
    card = Card()
    pair.outer.send(frame(2))
    pair.outer.send(frame(3))
    pair.attach(card)
    until(lambda: len(card.frames) == 2)
    assert card.frames == [frame(2), frame(3)]


def test_close_twice_and_use_afterwards() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    made = Pair()
    made.attach(Card())
    made.close()
    made.close()
    made.transmit(frame(1))
    made.carry()
    made.resume()
    made.attach(Card())
    made.detach()
    assert made.released == 1
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert not [each for each in threading.enumerate() if each.name == "ringfence-pair"]
