"""PCI devices as a guest sees them: header, base addresses, interrupts, state."""

from __future__ import annotations

import random

import pytest

from chipset.pci.conftest import Bench, Card
from ringfence.chipset.pci.config import Identity
from ringfence.chipset.pci.device import PciDevice, Space
from ringfence.errors import ImageError, UsageError

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0x00, 4, 0x56781234),
        (0x06, 2, 0x0010),
        (0x08, 4, 0x02000003),
        (0x0E, 1, 0x00),
        (0x2C, 4, 0x11001AF4),
        (0x3C, 2, 0x0111),  # INTA# of slot 1: GSI 17
    ],
)
def test_header(bench: Bench, offset: int, size: int, value: int) -> None:
    assert bench.get(offset, size) == value
    bench.put(offset & ~3, ONES)
    writable = {0x06: 0, 0x3C: 0xFF}.get(offset, 0)
    assert bench.get(offset, size) & ~writable == value & ~writable


@pytest.mark.parametrize(
    ("offset", "mask"),
    [
        (0x10, 0xFFFFF000),
        (0x14, 0xFFFFFFC1),
        (0x18, 0xFFFF000C),
        (0x1C, ONES),
        (0x20, 0xFFFFF000),
        (0x24, 0),
        (0x30, 0),
    ],
)
def test_sizing(bench: Bench, offset: int, mask: int) -> None:
    bench.put(offset, ONES)
    assert bench.get(offset) == mask


def test_bars_answer_where_they_are(bench: Bench) -> None:
    read, board = bench.board.mmio_read, bench.board
    assert read(0xC0000010, 4) == ONES
    bench.place()
    assert read(0xC0000010, 4) == 0x11
    assert board.port_read(0xC004, 4) == 5
    assert read(0xD0000100, 8) == 0x0000010500000101
    board.mmio_write(0xC0000008, 8, 0x1122334455667788)
    assert bench.card.log[-2:] == [(0, 8, 4, 0x55667788), (0, 12, 4, 0x11223344)]
    bench.put(0x10, 0xC1000000)
    assert read(0xC0000010, 4) == ONES
    assert read(0xC1000010, 4) == 0x11
    bench.put(0x18, 0x00000000)
    bench.put(0x1C, 0x00000001)
    assert read(0x1_0000_0010, 4) == 0x11
    bench.put(0x04, 1, 2)
    assert read(0xC1000010, 4) == ONES
    assert board.port_read(0xC004, 4) == 5
    bench.put(0x04, 6, 2)
    assert board.port_read(0xC004, 4) == ONES


def test_accesses_are_aligned_and_inside(bench: Bench) -> None:
    bench.place()
    board, log = bench.board, bench.card.log
    board.mmio_read(0xC0000002, 4)
    board.mmio_read(0xC0000FFF, 2)
    board.port_read(0xC03F, 2)
    assert log == [(0, at, 1) for at in (2, 3, 4, 5, 0xFFF)] + [(1, 0x3F, 1)]


@pytest.mark.parametrize("base", [0xFEE00000, 0xFEC00000, 0xFEF00000])
def test_the_board_is_seen_before_a_bar(bench: Bench, base: int) -> None:
    bench.place()
    offset = 0x30 if base == 0xFEE00000 else 0
    before = bench.board.mmio_read(base + offset, 4)
    bench.put(0x10, base)
    assert bench.board.mmio_read(base + offset, 4) == before
    bench.put(0x14, 0x03C0)  # over COM1: the UART is still there
    bench.out(0x3FF, 0x5A)
    assert bench.inb(0x3FF) == 0x5A
    assert bench.inb(0x3F0) == 0x31
    assert bench.board.port_read(0x3F4, 4) == 0x35
    assert bench.board.port_read(0x3F6, 4) >> 16 == bench.board.port_read(0x3F8, 2)


def test_overlapping_bars(bench: Bench) -> None:
    other = Card()
    bench.board.plug(other, 2)
    bench.place()
    bench.put(0x10, 0xC0000000, slot=2)
    bench.put(0x04, 7, 2, slot=2)
    bench.board.mmio_read(0xC0000000, 4)
    assert (len(bench.card.log), len(other.log)) == (1, 0)
    bench.put(0x04, 0, 2)
    bench.board.mmio_read(0xC0000000, 4)
    assert (len(bench.card.log), len(other.log)) == (1, 1)


def test_intx(bench: Bench) -> None:
    bench.route(17, 0x8050)
    bench.card.set_intx(True)
    assert bench.get(0x06, 2) & 8
    assert bench.taken() == 0x50
    assert bench.take() == 0x50
    bench.put(0x04, 0x400, 2)
    bench.apic(0xB0, 0)
    assert bench.take() is None
    assert bench.get(0x06, 2) & 8
    bench.put(0x04, 0, 2)
    assert bench.take() == 0x50
    bench.card.set_intx(False)
    bench.apic(0xB0, 0)
    assert bench.take() is None
    assert not bench.get(0x06, 2) & 8


def test_msi(bench: Bench) -> None:
    bench.place()
    at = bench.capability(5)
    assert bench.get(at + 2, 2) == 0x0184
    assert not bench.card.signal(0)
    bench.put(at + 4, 0xFEE00000)
    bench.put(at + 12, 0x4060, 2)
    bench.put(at + 2, 0x21, 2)  # enabled, four vectors
    assert bench.card.signal(2)
    assert bench.taken() == 0x62
    bench.card.signal(31)
    assert bench.taken() == 0x63
    bench.put(at + 16, ONES)
    bench.card.signal(1)
    assert bench.taken() is None
    assert bench.get(at + 20) == 2
    bench.put(at + 16, 0)
    assert bench.taken() == 0x61
    bench.put(0x04, 0, 2)  # not a bus master
    bench.card.signal(1)
    assert bench.taken() is None


def test_msix(bench: Bench) -> None:
    bench.place()
    at = bench.capability(0x11)
    table, board = 0xC0010000, bench.board
    assert bench.get(at + 2, 2) == 2
    assert (bench.get(at + 4), bench.get(at + 8)) == (4, 0x804)
    assert board.mmio_read(table + 12, 4) == 1
    for entry in range(3):
        board.mmio_write(table + 16 * entry, 8, 0xFEE00000)
        board.mmio_write(table + 16 * entry + 8, 8, 0x4070 + entry | ONES << 32)
    assert board.mmio_read(table + 16 + 8, 8) == 0x1_00004071
    bench.card.set_intx(True)
    bench.put(at + 2, 0x8000, 2)
    assert not bench.get(0x06, 2) & 8  # no pin while there are messages
    bench.card.signal(1)
    bench.card.signal(1)
    assert bench.taken() is None
    assert board.mmio_read(table + 0x800, 8) == 2
    board.mmio_write(table + 0x800, 8, ONES)
    board.mmio_write(table + 16 + 12, 4, 0)
    assert bench.taken() == 0x71
    assert bench.taken() is None
    assert board.mmio_read(table + 0x800, 4) == 0
    board.mmio_write(table + 12, 4, 0)
    bench.put(at + 2, 0xC000, 2)  # the function is masked
    bench.card.signal(0)
    assert bench.taken() is None
    bench.put(at + 2, 0x8000, 2)
    assert bench.taken() == 0x70
    bench.card.signal(77)
    bench.put(at + 2, 0, 2)
    assert not bench.card.signal(0)
    assert bench.get(0x06, 2) & 8


def test_random_configuration_is_borne(bench: Bench) -> None:
    chance = random.Random(3)
    bench.board.plug(Card(), 9)
    bench.route(17, 0x8050)
    for _ in range(4000):
        slot, size = chance.choice((0, 1, 9)), chance.choice((1, 2, 4))
        offset = chance.randrange(0, 0x90, size)
        value = chance.choice((0, ONES, 0xFEE00000, 0xC0000000, chance.getrandbits(32)))
        if chance.random() < 0.5:
            bench.put(offset, value & (1 << 8 * size) - 1, size, slot)
        else:
            bench.board.mmio_write(0xFEF00000 + slot * 0x8000 + offset, size, value)
        base = chance.choice((0xC0000000, 0xFEE00000, 0xFEC00000, bench.get(0x10) & ~0xFFF))
        bench.board.mmio_write(base + chance.randrange(0x1000), chance.choice((1, 2, 4, 8)), value)
        bench.board.port_read(chance.randrange(0x10000), size)
        bench.card.signal(chance.randrange(4))
        bench.card.set_intx(chance.random() < 0.5)
        bench.take()
    state = bench.board.save()
    bench.board.restore(state)
    assert bench.board.save() == state


def test_ecam(bench: Bench) -> None:
    window = 0xFEF00000
    read = bench.board.mmio_read
    assert read(window, 4) == 0x12378086
    assert read(window + 0x8000, 8) == bench.get(4) << 32 | 0x56781234
    assert read(window + 0x8002, 2) == 0x5678
    assert read(window + 0x8100, 4) == ONES
    assert read(window + 0x10000, 4) == ONES
    bench.board.mmio_write(window + 0x8010, 4, 0xC0000000)
    bench.board.mmio_write(window + 0x8004, 2, 2)
    assert read(0xC0000000, 4) == 1


def test_restored_device_is_where_it_was(bench: Bench) -> None:
    bench.place()
    bench.card.value = 5
    bench.card.set_intx(True)
    state = bench.board.save()
    again = Bench()
    again.board.restore(state)
    assert again.board.save() == state
    assert again.card.value == 5
    assert again.board.mmio_read(0xC0000010, 4) == 0x11
    again.route(17, 0x8050)
    assert again.take() == 0x50
    lonely = Bench()
    lonely.board.plug(Card())
    with pytest.raises(ImageError):
        lonely.board.restore(state)


def test_functions_of_one_slot(bench: Bench) -> None:
    with pytest.raises(UsageError):
        bench.board.pci.plug(Card(), 5, 1)
    bench.board.pci.plug(Card(), 1, 3)
    assert bench.get(0x0E, 1) == 0x80
    bench.board.port_write(0xCF8, 4, 0x80000000 | 1 << 11 | 3 << 8)
    assert bench.board.port_read(0xCFC, 4) == 0x56781234


@pytest.mark.parametrize("slot", [0, 1, 32])
def test_slots_are_exclusive(bench: Bench, slot: int) -> None:
    with pytest.raises(UsageError):
        bench.board.plug(Card(), slot)


def test_the_bus_may_be_full(bench: Bench) -> None:
    for _ in range(30):
        bench.board.plug(PciDevice(Identity(1, 2, 0xFF0000)))
    with pytest.raises(UsageError):
        bench.board.plug(PciDevice(Identity(1, 2, 0xFF0000)))


@pytest.mark.parametrize(
    ("index", "size", "space"),
    [
        (0, 16, Space.MEMORY),
        (5, 24, Space.MEMORY),
        (5, 8, Space.MEMORY),
        (5, 512, Space.IO),
        (5, 16, Space.MEMORY_64),
        (6, 16, Space.MEMORY),
        (3, 16, Space.MEMORY),
    ],
)
def test_impossible_bars(index: int, size: int, space: Space) -> None:
    with pytest.raises(UsageError):
        Card().add_bar(index, size, space)
