"""The VM generation ID: registers, and what a guest hears that goes on elsewhere."""

from __future__ import annotations

import pytest

from chipset.conftest import Rig
from ringfence.chipset.generation import BASE, LENGTH, GenerationId
from ringfence.errors import ImageError

FIRST, SECOND = bytes(range(16)), bytes(range(100, 116))
GPE_STATUS, GPE_ENABLE = 0x60C, 0x60E


def made(identity: bytes) -> Rig:
    """A board whose guest listens to events."""
    rig = Rig(generation=identity)
    rig.start_pic()
    rig.board.port_write(GPE_ENABLE, 2, 1)
    return rig


def seen(rig: Rig, size: int) -> bytes:
    """The number as a guest reads it."""
    parts = (rig.board.mmio_read(BASE + at, size) for at in range(0, 16, size))
    return b"".join(part.to_bytes(size, "little") for part in parts)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_it_is_read_only(size: int) -> None:
    rig = made(FIRST)
    rig.board.mmio_write(BASE, size, (1 << 8 * size) - 1)
    assert seen(rig, size) == FIRST
    assert rig.board.mmio_read(BASE + LENGTH - size, size) == 0
    assert rig.board.mmio_read(BASE + 12, 8) == int.from_bytes(FIRST[12:], "little")


def test_who_goes_on_as_another_hears_of_it() -> None:
    state = made(FIRST).board.save()
    again = made(SECOND)
    again.board.restore(state)
    assert seen(again, 8) == SECOND
    assert again.take() == 0x39
    assert again.board.port_read(GPE_STATUS, 2) == 1


def test_who_hears_of_it_late_still_does() -> None:
    """Saved again before it ran, a guest has the news to come."""
    between = made(SECOND)
    between.board.restore(made(FIRST).board.save())
    after = made(SECOND)
    after.board.restore(between.board.save())
    assert after.take() == 0x39


def test_who_moves_does_not() -> None:
    state = made(FIRST).board.save()
    moved = made(FIRST)
    moved.board.restore(state)
    assert moved.take() is None
    assert moved.board.port_read(GPE_STATUS, 2) == 0


def test_no_number_of_another_length() -> None:
    with pytest.raises(ImageError, match="expected 16"):
        GenerationId(b"short")
