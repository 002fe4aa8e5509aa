"""Registers that native code answers for: what each kind does, where they are seen, who wins."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from memory.answering import Answering
from ringfence.memory.causes import CauseWord, unmasked
from ringfence.memory.registers import (
    MASK,
    PLACES,
    POST,
    READ,
    ROWS,
    STORE,
    TAKE,
    UNMASK,
    RegisterBank,
    RegisterMap,
    place_of,
)


@pytest.fixture
def restless() -> Iterator[None]:
    """Python's threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_plain_registers() -> None:
    bank = RegisterBank()
    only_read, kept = bank.add(0, read=READ), bank.add(4, read=READ, write=STORE, writable=0xF0FF)
    by_byte = bank.add(8, read=READ, write=STORE, width=1)
    native = Answering.of(bank)
    only_read.value = 0x12345678
    assert native.read(0) == 0x12345678
    assert not native.write(0, 5)
    assert only_read.value == 0x12345678
    assert native.write(4, 0xFFFFFFFF)
    assert (kept.value, native.read(4)) == (0xF0FF, 0xF0FF)
    assert native.write(8, 0x17F, 1)
    assert native.read(8, 1) == 0x7F
    by_byte.value = 0
    assert native.read(8, 1) == 0


@pytest.mark.parametrize(("at", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (4, 4), (64, 4)])
def test_other_sizes_and_places_are_left_alone(at: int, size: int) -> None:
    bank = RegisterBank()
    register = bank.add(0, read=READ, write=STORE)
    native = Answering.of(bank, 64)
    assert native.read(at, size) is None
    assert not native.write(at, 0x55, size)
    assert register.value == 0


def test_a_doorbell_is_heard_unless_it_is_open() -> None:
    bank = RegisterBank()
    tail = bank.add(0, read=READ, write=POST, writable=0xFFFF)
    native = Answering.of(bank)
    assert not native.write(0, 7)
    tail.open = 1
    assert native.write(0, 0x10008)
    assert tail.value == 8
    bank.close(tail)
    bank.close(tail)
    assert not native.write(0, 9)


def test_no_doorbell_is_lost(restless: None) -> None:
    """Whoever writes while it is being closed is either seen behind that, or leaves."""
    bank = RegisterBank()
    tail = bank.add(0, write=POST)
    native = Answering.of(bank)
    rounds = 3000
    written = left = seen = 0

    def guest() -> None:
        nonlocal written, left
        for number in range(1, rounds + 1):
            if not native.write(0, number):
                left = number
            written = number

    thread = threading.Thread(target=guest)
    thread.start()
    while seen < rounds:
        tail.open = 1
        bank.close(tail)
        seen = max(seen, tail.value, left)
        if not thread.is_alive():
            seen = max(seen, tail.value, left)
            break
    thread.join()
    assert seen == rounds == written


class Line:
    """Causes with a mask, and the line that Python drives."""

    ICR, IMS, IMC = 0, 4, 8

    def __init__(self) -> None:
        self.bank = RegisterBank(self.follow)
        word = place_of(self.bank.add(self.ICR, read=TAKE))
        self.bank.add(self.IMS, write=UNMASK, writable=0xFFFF, place=word)
        self.bank.add(self.IMC, write=MASK, writable=0xFFFF, place=word)
        self.word = CauseWord(word)
        self.native = Answering.of(self.bank)
        self.asserted = False

    def follow(self) -> None:
        driven = self.word.drive()
        if driven is not None:
            self.asserted = driven


def test_causes_and_masks() -> None:
    line = Line()
    native, posted = line.native, line.native.places
    assert native.write(line.IMS, 0x10003)
    assert line.word.mask == 3
    line.word.note(4)
    line.follow()
    assert not line.asserted
    assert not native.write(line.IMS, 4), "this would interrupt"
    assert line.word.mask == 3
    line.word.want(4)
    line.follow()
    assert line.asserted
    assert native.write(line.IMS, 8), "it is asserted as it is"
    assert not posted.posted
    assert native.write(line.IMC, 2)
    assert not posted.posted
    assert native.write(line.IMC, 0xFFFFFFFF)
    assert line.word.mask == 0
    assert posted.posted
    assert line.asserted
    posted.settle()
    assert not posted.posted
    assert not line.asserted
    assert native.read(line.ICR) == 4
    assert native.read(line.ICR) == 0
    assert native.read(line.IMS) is None


def test_reading_causes_lets_the_line_fall_later() -> None:
    line = Line()
    line.word.want(0xFF)
    line.word.note(0x81)
    line.follow()
    assert line.native.read(line.ICR) == 0x81
    assert line.asserted
    line.word.note(2)  # before anybody has looked
    line.native.places.settle()
    assert line.asserted
    assert line.native.read(line.ICR) == 2
    line.native.places.settle()
    assert not line.asserted


def test_causes_from_two_sides(restless: None) -> None:
    """Each cause is read once, and the line is never asserted without one, nor low with one."""
    line = Line()
    got: list[int] = []
    raised = [0] * 8
    ended = threading.Event()

    def driver() -> None:
        source = random.Random(1)
        while not ended.is_set():
            line.native.write(line.IMC, source.getrandbits(8))
            found = line.native.read(line.ICR)
            if found:
                got.append(found)
            bits = source.getrandbits(8)
            if not line.native.write(line.IMS, bits):
                with lock:
                    line.word.want(bits)
                    line.follow()

    lock = threading.Lock()
    thread = threading.Thread(target=driver)
    thread.start()
    source = random.Random(2)
    for _ in range(3000):
        bit = source.randrange(8)
        with lock:
            before = line.word.causes
            line.word.note(1 << bit)
            raised[bit] += not before >> bit & 1
            line.follow()
    ended.set()
    thread.join()
    line.native.places.settle()
    word = line.word.value
    assert line.asserted == bool(unmasked(word))
    assert got
    rest = line.word.forget(0xFF)
    for bit in range(8):
        taken = sum(one >> bit & 1 for one in (*got, rest))
        # A bit may be taken between the look at it and its being noted: once more then.
        assert 0 < raised[bit] <= taken


def test_windows_move_and_vanish() -> None:
    first, second = RegisterBank(), RegisterBank()
    first.add(0x10, read=READ).value = 1
    second.add(0x10, read=READ).value = 2
    places = RegisterMap()
    native = Answering(places)
    assert native.read(0x1010) is None
    places.show([(0x1000, 0x2000, 0x1000, first), (0x5000, 0x6000, 0x5000, second)])
    assert (native.read(0x1010), native.read(0x5010)) == (1, 2)
    assert native.read(0x2010) is None
    places.show([(0x8000, 0x9000, 0x8000, first), (0x1008, 0x2000, 0x1000, second)])
    assert (native.read(0x8010), native.read(0x1010)) == (1, 2)
    places.show([(0x1014, 0x2000, 0x1000, second)])
    assert native.read(0x1010) is None, "another window lies over its first bytes"
    places.show([])
    assert native.read(0x8010) is None


def test_what_there_is_no_room_for_goes_the_ordinary_way() -> None:
    bank = RegisterBank()
    for number in range(ROWS):
        bank.add(4 * number, read=READ)
    with pytest.raises(ValueError, match="room for"):
        bank.add(0x100, read=READ)
    places = RegisterMap()
    native = Answering(places)
    places.show((at << 12, at + 1 << 12, at << 12, bank) for at in range(PLACES + 1))
    assert native.read(PLACES - 1 << 12) == 0
    assert native.read(PLACES << 12) is None


def test_nothing_is_found_while_windows_move(restless: None) -> None:
    """Two banks change places over and over: an offset of one is never read from the other."""
    left, right = RegisterBank(), RegisterBank()
    left.add(4, read=READ).value = 1
    right.add(8, read=READ).value = 2
    places = RegisterMap()
    found: set[int | None] = set()
    ended = threading.Event()

    def guest() -> None:
        native = Answering(places)
        while not ended.is_set():
            found.add(native.read(0x1004))
            found.add(native.read(0x2008))

    thread = threading.Thread(target=guest)
    thread.start()
    for _ in range(2000):
        places.show([(0x1000, 0x2000, 0x1000, left), (0x2000, 0x3000, 0x2000, right)])
        places.show([(0x2000, 0x3000, 0x2000, left), (0x1000, 0x2000, 0x1000, right)])
    ended.set()
    thread.join()
    assert found <= {None, 1, 2}
