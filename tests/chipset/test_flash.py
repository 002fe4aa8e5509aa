"""Flash memory: commands, what survives, and what a driver does wrong."""

from __future__ import annotations

import random

import pytest

from ringfence.chipset.flash import (
    BLOCK,
    CLEAR_STATUS,
    CONFIRM,
    ERASE,
    ERASE_ERROR,
    PROGRAM,
    PROGRAM_ALTERNATE,
    PROGRAM_ERROR,
    READ_ARRAY,
    READ_ID,
    READ_STATUS,
    READY,
    WRITE_BUFFER,
    Flash,
    Rom,
)

SIZE = 4 * BLOCK


class Rig:
    """A chip, and what was handed to its file."""

    def __init__(self) -> None:
        self.kept = bytearray(b"\xff" * SIZE)
        self.full = False
        self.chip = Flash(bytes(self.kept), self.store)

    def store(self, offset: int, data: bytes) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.kept[offset : offset + len(data)] = data

    def write(self, offset: int, *values: int) -> None:
        for value in values:
            self.chip.write(offset, 1, value)

    def status(self) -> int:
        self.chip.write(0, 1, READ_STATUS)
        return self.chip.read(0, 1)


@pytest.mark.parametrize("command", [PROGRAM, PROGRAM_ALTERNATE])
def test_program_clears_bits(command: int) -> None:
    rig = Rig()
    rig.write(5, command, 0xF0)
    assert rig.chip.read(5, 1) == READY  # status, until told otherwise
    rig.write(5, command, 0x3C, READ_ARRAY)
    assert rig.chip.read(4, 4) == 0xFFFF_30FF
    assert rig.kept[5] == 0x30


def test_erase() -> None:
    rig = Rig()
    rig.write(BLOCK + 7, PROGRAM, 0)
    rig.write(2 * BLOCK, PROGRAM, 0)
    rig.write(BLOCK + 99, ERASE, CONFIRM)
    assert rig.status() == READY
    rig.write(0, READ_ARRAY)
    assert (rig.chip.read(BLOCK + 7, 1), rig.chip.read(2 * BLOCK, 1)) == (0xFF, 0)
    rig.write(0, ERASE, READ_ARRAY)  # not confirmed
    assert rig.status() == READY | ERASE_ERROR | PROGRAM_ERROR


def test_write_to_buffer() -> None:
    rig = Rig()
    rig.write(8, WRITE_BUFFER, 3)
    for at, value in enumerate(b"abcd"):
        rig.chip.write(8 + at, 1, value)
    rig.write(8, CONFIRM, READ_ARRAY)
    assert rig.kept[8:12] == b"abcd"
    rig.write(8, WRITE_BUFFER, 0, 0, READ_ARRAY)  # not confirmed
    assert rig.status() & PROGRAM_ERROR
    assert rig.kept[8:12] == b"abcd"


def test_how_firmware_tells_it_from_ram_and_rom() -> None:
    rig = Rig()
    rig.write(0, CLEAR_STATUS)
    assert rig.chip.read(0, 1) == 0xFF
    rig.write(0, READ_STATUS)
    assert rig.chip.read(0, 1) == 0
    rig.write(0, READ_ID)
    assert (rig.chip.read(0, 1), rig.chip.read(1, 1)) == (0x89, 0x18)
    rom = Rom(b"\x12\x34\x56\x78")
    rom.write(0, 4, 0)
    assert rom.read(0, 4) == 0x7856_3412


def test_full_disk_is_the_chips_error() -> None:
    rig = Rig()
    rig.full = True
    rig.write(5, PROGRAM, 0)
    assert rig.status() == READY | PROGRAM_ERROR
    rig.write(5, ERASE, CONFIRM)
    assert rig.status() == READY | PROGRAM_ERROR | ERASE_ERROR
    rig.write(5, READ_ARRAY)
    assert rig.chip.read(5, 1) == 0xFF
    rig.full = False
    rig.write(5, CLEAR_STATUS, PROGRAM, 0)
    assert rig.status() == READY
    assert rig.kept[5] == 0


def test_random_accesses() -> None:
    source, rig = random.Random(5), Rig()
    commands = (PROGRAM, ERASE, CONFIRM, WRITE_BUFFER, READ_ARRAY, READ_STATUS, READ_ID, 0x60)
    for _ in range(20_000):
        size = source.choice([1, 2, 4, 8])
        offset = source.randrange(SIZE // size) * size
        if source.randrange(2):
            value = source.choice([*commands, source.randrange(1 << 8 * size)])
            rig.chip.write(offset, size, value)
        else:
            assert 0 <= rig.chip.read(offset, size) < 1 << 8 * size
    assert len(rig.chip.content) == SIZE
    assert rig.chip.content == rig.kept


def test_saved_in_the_middle_of_a_command() -> None:
    rig, other = Rig(), Rig()
    rig.write(8, PROGRAM, 0x11, WRITE_BUFFER, 1, 0x22)
    other.chip.restore(rig.chip.save())
    assert other.kept == rig.kept
    other.write(9, 0x33, CONFIRM)
    assert other.kept[8:10] == b"\x00\x33"
