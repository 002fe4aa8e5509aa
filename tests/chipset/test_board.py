"""The board as a whole: hostile accesses, and saving and restoring."""

from __future__ import annotations

import json
import random

import pytest

from ringfence.chipset.state import Saved
from ringfence.errors import ImageError


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_port_bears_every_access(rig, size) -> None:
    for port in range(0x10000):
        assert 0 <= rig.board.port_read(port, size) < 1 << 8 * size
        for value in (0, (1 << 8 * size) - 1):
            rig.board.port_write(port, size, value)
            assert 0 <= rig.board.port_read(port, size) < 1 << 8 * size


def test_random_accesses_to_devices(rig2) -> None:
    chance = random.Random(1)
    board = rig2.board
    ports = [
        port
        for start, length in (
            (0x20, 2), (0x40, 4), (0x60, 5), (0x70, 2), (0x92, 1), (0xA0, 2), (0x3F8, 8),
            (0x4D0, 2), (0x600, 16), (0xCF8, 8),
        )
        for port in range(start, start + length)
    ]  # fmt: skip
    for _ in range(30_000):
        size, value = chance.choice((1, 1, 2, 4)), chance.getrandbits(32)
        port = chance.choice(ports)
        board.port_write(port, size, value & (1 << 8 * size) - 1)
        assert 0 <= board.port_read(chance.choice(ports), size) < 1 << 8 * size
        base = chance.choice((0xFEE00000, 0xFEC00000))
        at = base + (chance.randrange(0x40) * 16 if base == 0xFEE00000 else chance.choice((0, 16)))
        board.mmio_write(at, 4, value, cpu=chance.randrange(2))
        board.mmio_read(at, chance.choice((1, 2, 4, 8)), cpu=chance.randrange(2))
        board.receive(bytes([value & 0xFF]))
        rig2.clock.advance(chance.randrange(10**5))
        rig2.take(chance.randrange(2))
    state = board.save()
    board.restore(state)
    assert board.save() == state


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("base", [0xFEE00000, 0xFEC00000, 0x12345000])
def test_every_mmio_offset_bears_every_access(rig, base, size) -> None:
    for offset in [*range(-20, 0x420), *range(0xFE0, 0x1010)]:
        assert 0 <= rig.board.mmio_read(base + offset, size) < 1 << 8 * size
        rig.board.mmio_write(base + offset, size, (1 << 8 * size) - 1)
        assert 0 <= rig.board.mmio_read(base + offset, size) < 1 << 8 * size


def test_part_of_a_register(rig) -> None:
    assert rig.board.mmio_read(0xFEE00032, 1) == 5
    assert rig.board.mmio_read(0xFEE00030, 2) == 0x14
    assert rig.board.mmio_read(0xFEE00030, 8) == 0x50014


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, int | str) and _plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return isinstance(value, int | str | bytes)


def test_restored_board_goes_on_where_the_saved_one_was(rig) -> None:
    rig.start_pic()
    rig.apic(0xF0, 0x1FF)
    rig.apic(0x3E0, 11)
    rig.apic(0x320, 0x20060)
    rig.apic(0x380, 1_000_000)
    rig.out(0x43, 0x34)
    rig.out(0x40, 0xA9, 0x04)
    rig.route(9, 0x8050)
    rig.board.receive(b"typed")
    rig.clock.advance(300_000)
    state = rig.board.save()
    assert _plain(state)
    json.dumps(state, default=bytes.hex)

    def future() -> list[object]:
        seen: list[object] = []
        for _ in range(40):
            rig.clock.advance(100_000)
            seen.append((rig.take(), rig.apic(0x390), rig.inb(0x40), rig.inb(0x3F8)))
            rig.apic(0xB0, 0)
            rig.out(0x20, 0x20)
        return seen

    first = future()
    assert {0x60, 0x30} <= {entry[0] for entry in first}
    rig.clock.advance(123_456_789)
    rig.board.restore(state)
    assert rig.board.save() == state
    assert future() == first


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 99},
        {"lapics": []},
        {"pit": {"version": 0}},
        {"uart": {"version": 1, "ier": "x"}},
    ],
)
def test_damaged_state_is_refused(rig, damage) -> None:
    with pytest.raises(ImageError):
        rig.board.restore(rig.board.save() | damage)


def test_missing_section_is_refused(rig) -> None:
    state = rig.board.save()
    del state["rtc"]
    with pytest.raises(ImageError):
        rig.board.restore(state)


def test_saved_data_are_copies() -> None:
    class Thing(Saved):
        FIELDS = ("values",)

        def __init__(self) -> None:
            self.values = [1]

    thing = Thing()
    state = thing.save()
    thing.values.append(2)
    assert state["values"] == [1]
    thing.restore(state)
    thing.values.append(3)
    assert state["values"] == [1]
