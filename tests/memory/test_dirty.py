"""The log of written pages, and RAM whose contents come from files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence.errors import HostError
from ringfence.memory.dirty import PAGE, DirtyLog, Run
from ringfence.memory.ram import GuestMemory, Layer

SIZE = 1 << 20


def test_marks_are_taken_once() -> None:
    log = DirtyLog(16)
    log.mark(0, 1)
    assert log.take() == []
    log.enabled = True
    log.mark(PAGE - 1, 2)
    log.mark(5 * PAGE, 3 * PAGE)
    log.mark(9 * PAGE, 0)
    log.mark_bits(8 * PAGE, bytes([0b1000_0001]))
    assert log.count() == 7
    assert log.take() == [Run(0, 2), Run(5, 4), Run(15, 1)]
    assert log.take() == []
    log.mark(0, 16 * PAGE)
    log.clear()
    assert log.count() == 0


def test_every_way_to_write_is_noted() -> None:
    memory = GuestMemory(SIZE)
    memory.dirty.enabled = True
    memory.write(0x1000, b"owner")
    memory.dma_write(0x3000, b"device")
    memory.slice(0x5000, 4)[:] = b"ring"
    memory.dma_written(0x5000, 4)
    memory.discard(0x7000, 0x1000)
    assert [run.first for run in memory.dirty.take()] == [1, 3, 5, 7]
    memory.close()


def file_of(path: Path, pages: dict[int, bytes]) -> int:
    with path.open("wb") as file:
        file.truncate(SIZE)
        for page, text in pages.items():
            file.seek(page * PAGE)
            file.write(text)
    return os.open(path, os.O_RDONLY)


def test_layers_lie_over_each_other_and_stay_as_they_are(tmp_path: Path) -> None:
    below = file_of(tmp_path / "below", {0: b"old", 1: b"kept", 9: b"unseen"})
    above = file_of(tmp_path / "above", {0: b"new", 1: b"not in the layer"})
    layers = [Layer(below, [Run(0, 4)]), Layer(above, [Run(0, 1), Run(2, 1)])]
    memory = GuestMemory(SIZE, layers=layers)
    os.close(below)
    os.close(above)
    assert memory.fd == -1
    assert memory.read(0, 3) == b"new"
    assert memory.read(PAGE, 4) == b"kept"
    assert memory.read(9 * PAGE, 6) == bytes(6)
    memory.write(PAGE, b"mine")
    memory.discard(0, PAGE)
    assert memory.read(0, 4) == bytes(4)
    memory.close()
    assert (tmp_path / "above").read_bytes()[:3] == b"new"
    assert (tmp_path / "below").read_bytes()[PAGE : PAGE + 4] == b"kept"


def test_a_memfd_is_taken_over() -> None:
    first = GuestMemory(SIZE, b"R" * PAGE)
    first.write(0x2000, b"shared")
    second = GuestMemory(SIZE, b"R" * PAGE, fd=os.dup(first.fd))
    assert second.read(0x2000, 6) == b"shared"
    second.write(0x2000, b"SHARED")
    assert first.read(0x2000, 6) == b"SHARED"
    assert bytes(second.everything()[SIZE : SIZE + 3]) == b"RRR"
    first.close()
    assert second.read(0x2000, 6) == b"SHARED"
    second.close()
    small = os.memfd_create("small", os.MFD_ALLOW_SEALING)
    os.ftruncate(small, SIZE)
    with pytest.raises(HostError, match="no sealed memory"):
        GuestMemory(SIZE, fd=small)
    with pytest.raises(ValueError, match="released"):
        second.read(0, 1)
