"""The south bridge that firmware knows, and the ACPI tables that it places."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from chipset.conftest import Rig
from ringfence.chipset import piix, pm
from ringfence.chipset.acpi import Hardware
from ringfence.chipset.acpi_loader import (
    ADD_CHECKSUM,
    ADD_POINTER,
    ALLOCATE,
    RSDP_FILE,
    SCRIPT_FILE,
    TABLES_FILE,
    loader_files,
)
from ringfence.chipset.board import Board

PMBASE, PMREGMISC = 0x8000_0B40, 0x8000_0B80
"""CONFIG_ADDRESS of 00:01.3."""


@pytest.fixture(name="board")
def board_fixture() -> Board:
    """A board without anything plugged in."""
    return Rig().board


@pytest.fixture(name="power")
def power_fixture(board: Board) -> Iterator[piix.PowerFunction]:
    """A board with a PIIX."""
    piix.detach_power(board.ports)
    power = piix.PowerFunction(board.pm)
    board.pci.plug(piix.IsaBridge(), piix.SLOT, piix.ISA_FUNCTION)
    board.pci.plug(power, piix.SLOT, piix.POWER_FUNCTION)
    yield power


def configure(board: Board, register: int, size: int, value: int) -> None:
    board.port_write(0xCF8, 4, register)
    board.port_write(0xCFC, size, value)


def test_ports_follow_pmbase(board: Board, power: piix.PowerFunction) -> None:
    assert power.base == 0
    assert board.port_read(pm.BASE + 4, 2) == 0xFFFF
    configure(board, PMBASE, 4, 0xB001)
    assert power.base == 0
    configure(board, PMREGMISC, 1, 1)
    assert power.base == 0xB000
    assert board.port_read(0xB004, 2) == 1  # SCI_EN
    configure(board, PMBASE, 4, 0x601)
    assert (board.port_read(0xB004, 2), board.port_read(0x604, 2)) == (0xFFFF, 1)
    configure(board, PMBASE, 4, 0x3C1)  # over COM1: what is on the board is seen first
    assert board.port_read(0x3FD, 1) == 0x60
    configure(board, PMREGMISC, 1, 0)
    assert board.port_read(0x3C4, 2) == 0xFFFF


def test_soft_off(rig: Rig) -> None:
    piix.detach_power(rig.board.ports)
    rig.board.pci.plug(piix.IsaBridge(), piix.SLOT, piix.ISA_FUNCTION)
    rig.board.pci.plug(piix.PowerFunction(rig.board.pm), piix.SLOT, piix.POWER_FUNCTION)
    configure(rig.board, PMBASE, 4, 0xB001)
    configure(rig.board, PMREGMISC, 1, 1)
    rig.board.port_write(0xB004, 2, 0x2001)
    assert rig.events == ["off"]


def test_saved(board: Board, power: piix.PowerFunction) -> None:
    configure(board, PMBASE, 4, 0xB001)
    configure(board, PMREGMISC, 1, 1)
    state = power.save()
    configure(board, PMBASE, 4, 0x701)
    power.restore(state)
    assert power.base == 0xB000
    assert board.port_read(0xB004, 2) == 1


def test_shadow_registers_read_as_written(board: Board) -> None:
    configure(board, 0x8000_0058, 4, 0xFFFF_FFFF)
    assert board.port_read(0xCFC, 4) == 0x3333_3000


@pytest.mark.parametrize("cpus", [1, 4])
def test_tables_are_right_when_the_script_is_done(cpus: int) -> None:
    files = loader_files(Hardware(cpus, 0xB000))
    memory: dict[str, bytearray] = {}
    bases = {RSDP_FILE: 0xF5000, TABLES_FILE: 0x3FFF000}
    script = files[SCRIPT_FILE]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        (kind,) = struct.unpack_from("<I", script, at)
        name = script[at + 4 : at + 60].rstrip(b"\0").decode()
        if kind == ALLOCATE:
            memory[name] = bytearray(files[name])
        elif kind == ADD_POINTER:
            other = script[at + 60 : at + 116].rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", script, at + 116)
            place = slice(offset, offset + size)
            value = int.from_bytes(memory[name][place], "little") + bases[other]
            memory[name][place] = value.to_bytes(size, "little")
        else:
            assert kind == ADD_CHECKSUM
            offset, start, length = struct.unpack_from("<III", script, at + 60)
            assert memory[name][offset] == 0
            memory[name][offset] = -sum(memory[name][start : start + length]) & 0xFF

    def table(address: int) -> bytes:
        at = address - bases[TABLES_FILE]
        (size,) = struct.unpack_from("<I", memory[TABLES_FILE], at + 4)
        return bytes(memory[TABLES_FILE][at : at + size])

    rsdp = memory[RSDP_FILE]
    assert rsdp[:8] == b"RSD PTR "
    assert not sum(rsdp[:20]) & 0xFF
    assert not sum(rsdp) & 0xFF
    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    found = {}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[table(address)[:4]] = table(address)
    fadt = found[b"FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert table(facs)[:4] == b"FACS"
    assert struct.unpack_from("<Q", fadt, 140) == (dsdt,)
    assert struct.unpack_from("<I", fadt, 56) == (0xB000,)
    for each in (xsdt, table(dsdt), *found.values()):
        assert not sum(each) & 0xFF, each[:4]
