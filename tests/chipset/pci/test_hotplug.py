"""Slots that are filled and emptied: what the DSDT's methods find in the registers."""

from __future__ import annotations

import pytest

from chipset.conftest import Rig
from chipset.pci.conftest import Bench, Card
from ringfence.chipset.pci.device import PciDevice
from ringfence.chipset.pci.hotplug import BASE, EJECT, FILLED, SLOTS, WANTED
from ringfence.chipset.pm import Gpe
from ringfence.errors import UsageError

FIRST = SLOTS[0]
STATUS, ENABLE = 0x60C, 0x60E
EVENT = 1 << Gpe.HOT_PLUG


def test_a_slot_is_filled(bench: Bench) -> None:
    board, card = bench.board, Card()
    assert bench.get(0, slot=FIRST) == 0xFFFFFFFF
    assert board.hot_plug(card) == FIRST
    assert board.port_read(STATUS, 2) == EVENT
    assert board.port_read(BASE + WANTED, 4) == 0
    assert board.port_read(BASE + FILLED, 4) == 1 << FIRST
    assert board.port_read(BASE + FILLED, 4) == 0
    assert bench.get(0, slot=FIRST) == 0x56781234
    assert board.hot_plug(Card()) == FIRST + 1


def test_the_event_interrupts(rig: Rig) -> None:
    rig.start_pic()
    rig.board.port_write(ENABLE, 2, EVENT)
    rig.board.hot_plug(Card())
    assert rig.take() == 0x39


def test_a_slot_is_emptied(bench: Bench) -> None:
    """The guest lets go when it is asked to, or when it likes."""
    board = bench.board
    gone: list[tuple[int, PciDevice]] = []
    board.on_eject = lambda slot, device: gone.append((slot, device))
    cards = [Card(), Card()]
    for card in cards:
        slot = board.hot_plug(card)
        bench.put(0x10, 0xC0100000 + 0x1000 * slot, slot=slot)
        bench.put(0x04, 7, 2, slot=slot)
    board.port_read(BASE + FILLED, 4)
    board.request_removal(FIRST)
    assert board.port_read(BASE + WANTED, 4) == 1 << FIRST
    assert board.mmio_read(0xC0100000 + 0x1000 * FIRST, 4) == 1
    cards[0].set_intx(True)
    board.port_write(BASE + EJECT, 4, 1 << FIRST | 1 << FIRST + 1)
    assert gone == [(FIRST, cards[0]), (FIRST + 1, cards[1])]
    assert board.mmio_read(0xC0100000 + 0x1000 * FIRST, 4) == 0xFFFFFFFF
    assert bench.get(0, slot=FIRST) == 0xFFFFFFFF
    assert board.pci.lines == [0, 0, 0, 0]
    cards[0].set_intx(True)  # what is out of its slot drives nothing
    assert board.pci.lines == [0, 0, 0, 0]
    assert board.hot_plug(Card()) == FIRST


def test_what_can_not_be_done(bench: Bench) -> None:
    board = bench.board
    board.port_write(BASE + EJECT, 4, 0xFFFFFFFF)
    board.port_write(BASE + EJECT, 2, 0xFFFF)
    assert bench.get(0) == 0x56781234, "what was there from the start stays"
    for slot in (0, 1, FIRST, 32, -1):
        with pytest.raises(UsageError, match="no device"):
            board.request_removal(slot)
    for _ in range(2, FIRST + 1):
        board.plug(Card())
    board.port_write(BASE + EJECT, 4, 0xFFFFFFFF)
    assert board.pci.present(FIRST), "even where there was no other slot for it"
    for _ in SLOTS[1:]:
        board.hot_plug(Card())
    with pytest.raises(UsageError, match="taken"):
        board.hot_plug(Card())
    for size in (1, 2):  # narrow accesses see and do nothing
        assert board.port_read(BASE + FILLED, size) == 0
    assert board.port_read(BASE + FILLED, 4) == sum(1 << slot for slot in SLOTS[1:])


def test_state(bench: Bench) -> None:
    bench.board.hot_plug(Card())
    bench.board.request_removal(FIRST)
    saved = bench.board.save()
    other = Bench()
    other.board.plug(Card(), FIRST)
    other.board.restore(saved)
    assert other.board.port_read(STATUS, 2) == EVENT
    assert other.board.port_read(BASE + FILLED, 4) == 1 << FIRST
    assert other.board.port_read(BASE + WANTED, 4) == 1 << FIRST
