"""Where registers that native code answers for are seen: wherever the guest sees their BAR."""

from __future__ import annotations

import pytest

from chipset.conftest import Rig
from memory.answering import Answering
from ringfence.chipset.pci.config import Identity
from ringfence.chipset.pci.device import PciDevice
from ringfence.memory.registers import MASK, READ, RegisterBank, place_of

AT, SIZE = 0x10, 0x2000
ANSWER = 0x600D


class Card(PciDevice):
    """A device with one such register in BAR 0."""

    def __init__(self) -> None:
        super().__init__(Identity(0x1234, 0x5678, 0x020000, 0, 0x1AF4, 0x1100))
        self.settled = 0
        bank = RegisterBank(self.settle)
        bank.add(AT, read=READ).value = ANSWER
        self.word = bank.add(0x20)
        bank.add(0x24, write=MASK, place=place_of(self.word))
        self.add_bar(0, SIZE, bank=bank)

    def settle(self) -> None:
        self.settled += 1


class Bench(Rig):
    """Two such cards, in slots 1 and 2."""

    def __init__(self, cpus: int = 1) -> None:
        super().__init__(cpus=cpus)
        self.cards = [Card(), Card()]
        for card in self.cards:
            self.board.plug(card)
        self.native = Answering(self.board.registers)

    def put(self, slot: int, offset: int, value: int) -> None:
        self.board.port_write(0xCF8, 4, 0x80000000 | slot << 11 | offset)
        self.board.port_write(0xCFC, 4, value)

    def place(self, slot: int, base: int, command: int = 2) -> None:
        self.put(slot, 0x10, base)
        self.put(slot, 4, command)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_they_follow_the_bar(bench: Bench) -> None:
    assert bench.native.read(0xC0000000 + AT) is None
    bench.place(1, 0xC0000000)
    assert bench.native.read(0xC0000000 + AT) == ANSWER
    bench.place(1, 0xD0000000)
    assert bench.native.read(0xC0000000 + AT) is None
    assert bench.native.read(0xD0000000 + AT) == ANSWER
    bench.put(1, 4, 0)
    assert bench.native.read(0xD0000000 + AT) is None


def test_whoever_lies_above_is_seen(bench: Bench) -> None:
    """The lower slot, and what is soldered to the board."""
    bench.place(2, 0xC0000000)
    bench.place(1, 0xC0000000)
    bench.cards[0].word.value = 1 << 31
    assert bench.native.write(0xC0000024, 0)
    assert (bench.cards[0].word.value, bench.board.registers.posted) == (1 << 31, True)
    bench.board.settle()
    assert not bench.board.registers.posted
    bench.put(1, 4, 0)
    bench.cards[1].word.value = 0
    assert bench.native.write(0xC0000024, 0)
    assert not bench.board.registers.posted, "the other card's line is low"
    bench.place(2, 0xFEC00000)
    assert bench.native.read(0xFEC00000 + AT) is None, "the I/O APIC's"


def test_local_apics_come_first() -> None:
    """Any CPU's page, wherever it has put it."""
    bench = Bench(cpus=2)
    bench.place(1, 0xFEE00000)
    assert bench.native.read(0xFEE00000 + AT) is None
    bench.place(1, 0xC0000000)
    assert bench.native.read(0xC0000000 + AT) == ANSWER
    base = bench.board.msr_read(1, 0x1B)
    bench.board.msr_write(1, 0x1B, base & 0xFFF | 0xC0001000)
    assert bench.native.read(0xC0000000 + AT) is None
    saved = bench.board.save()
    bench.board.msr_write(1, 0x1B, base)
    assert bench.native.read(0xC0000000 + AT) == ANSWER
    bench.board.restore(saved)
    assert bench.native.read(0xC0000000 + AT) is None


def test_a_device_that_is_gone(bench: Bench) -> None:
    bench.place(1, 0xC0000000)
    bench.board.pci.unplug(1)
    assert bench.native.read(0xC0000000 + AT) is None
