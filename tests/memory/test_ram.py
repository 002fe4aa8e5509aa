"""Guest RAM as devices use it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ringfence.memory.ram import GuestMemory

SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(SIZE)
    yield made
    made.close()


def test_observers_hear_what_devices_write(memory: GuestMemory) -> None:
    heard: list[tuple[int, int]] = []
    memory.watch_dma(lambda offset, length: heard.append((offset, length)))
    memory.write(0x100, b"owner")
    memory.dma_write(0x1000, b"device")
    view = memory.slice(0x2000, 4)
    view[:] = b"more"
    memory.dma_written(0x2000, 4)
    assert heard == [(0x1000, 6), (0x2000, 4)]
    assert memory.read(0x1000, 6) == b"device"
    assert memory.read(0x2000, 4) == b"more"


def test_discarded_pages_are_zero_and_take_no_space(memory: GuestMemory) -> None:
    heard: list[tuple[int, int]] = []
    memory.write(0, b"x" * SIZE)
    memory.watch_dma(lambda offset, length: heard.append((offset, length)))
    before = os.fstat(memory.fd).st_blocks
    memory.discard(0x1000, 0x4000)
    assert heard == [(0x1000, 0x4000)]
    assert before - os.fstat(memory.fd).st_blocks == 0x4000 // 512
    assert memory.read(0xFFF, 0x4002) == b"x" + bytes(0x4000) + b"x"
    with pytest.raises(ValueError, match="whole pages"):
        memory.discard(0x1800, 0x1000)
    with pytest.raises(IndexError):
        memory.discard(SIZE - 0x1000, 0x2000)


@pytest.mark.parametrize(
    ("address", "length"),
    [(SIZE - 3, 4), (SIZE, 0 + 1), (0xFEE00000, 4), (1 << 64, 4), ((1 << 64) - 2, 4), (-4, 4)],
)
def test_devices_stay_in_ram(memory: GuestMemory, address: int, length: int) -> None:
    for attempt in (
        lambda: memory.slice(address, length),
        lambda: memory.dma_written(address, length),
        lambda: memory.dma_write(address, bytes(length)),
    ):
        with pytest.raises(IndexError):
            attempt()
