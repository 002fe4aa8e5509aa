"""The firmware configuration device: bytes by port, copies by DMA, and commands that are wrong."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from ringfence.chipset import fwcfg
from ringfence.chipset.bus import PortBus
from ringfence.chipset.fwcfg import (
    DMA_ERROR,
    DMA_READ,
    DMA_SELECT,
    DMA_SKIP,
    DMA_WRITE,
    FwCfg,
    machine_items,
    ram_map,
)
from ringfence.errors import UsageError
from ringfence.memory.ram import GuestMemory

SIZE = 4 << 20
COMMAND, TARGET = 0x1000, 0x2000


class Rig:
    """The device on a bus, and a driver for it."""

    def __init__(self) -> None:
        self.memory = GuestMemory(SIZE)
        self.calls = 0
        items = machine_items(self.memory, 3)
        self.device = FwCfg(
            self.memory, items, {"etc/e820": ram_map(self.memory), "etc/made": self.made}
        )
        self.ports = PortBus()
        self.device.attach(self.ports)

    def made(self) -> bytes:
        self.calls += 1
        return b"made %d" % self.calls

    def read(self, key: int, count: int) -> bytes:
        self.ports.write(0x510, 2, key)
        return bytes(self.ports.read(0x511, 1) for _ in range(count))

    def command(self, control: int, length: int, target: int = TARGET) -> int:
        self.memory.write(COMMAND, struct.pack(">IIQ", control, length, target))
        self.ports.write(0x514, 4, 0)
        self.ports.write(0x518, 4, int.from_bytes(COMMAND.to_bytes(4, "little"), "big"))
        return int.from_bytes(self.memory.read(COMMAND, 4), "big")

    def files(self) -> dict[str, tuple[int, int]]:
        count = int.from_bytes(self.read(fwcfg.FILE_DIRECTORY, 4), "big")
        rows = bytes(self.ports.read(0x511, 1) for _ in range(64 * count))
        return {
            name.rstrip(b"\0").decode(): (key, size)
            for size, key, _, name in struct.iter_unpack(">IHH56s", rows)
        }


@pytest.fixture(name="rig")
def rig_fixture() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.memory.close()


def test_items(rig: Rig) -> None:
    assert rig.read(0, 6) == b"QEMU\0\0"
    assert rig.read(1, 4) == b"\3\0\0\0"
    assert int.from_bytes(rig.read(3, 8), "little") == SIZE
    assert rig.read(5, 2) == b"\3\0" == rig.read(15, 2)
    assert rig.read(0x7777, 2) == b"\0\0"


def test_files(rig: Rig) -> None:
    files = rig.files()
    key, size = files["etc/e820"]
    assert rig.read(key, size) == struct.pack("<QQI", 0, SIZE, 1)
    made = files["etc/made"][0]
    calls = rig.calls
    assert rig.read(made, 7) == b"made %d\0" % (calls + 1)


def test_dma(rig: Rig) -> None:
    assert rig.ports.read(0x514, 4).to_bytes(4, "little") == b"QEMU"
    assert rig.ports.read(0x518, 4).to_bytes(4, "little") == b" CFG"
    assert rig.command(DMA_SELECT | DMA_READ, 2) == 0
    assert rig.memory.read(TARGET, 3) == b"QE\0"
    assert rig.command(DMA_SKIP, 1) == 0
    rig.memory.write(TARGET, b"xxx")
    assert rig.command(DMA_READ, 2) == 0
    assert rig.memory.read(TARGET, 3) == b"U\0x"


@pytest.mark.parametrize(
    ("control", "length", "target", "status"),
    [
        (DMA_READ, 4, SIZE - 2, DMA_ERROR),
        (DMA_READ, 4, 1 << 63, DMA_ERROR),
        (DMA_READ, 0xFFFF_FFFF, 0, DMA_ERROR),
        (DMA_READ, 2 << 20, 0, DMA_ERROR),  # in RAM, but nobody needs so many zeroes
        (DMA_SKIP, 0xFFFF_FFFF, 0, 0),
        (DMA_WRITE, 4, TARGET, DMA_ERROR),
        (0, 4, TARGET, 0),
        (DMA_READ, 0, 1 << 63, 0),
    ],
)
def test_odd_commands(rig: Rig, control: int, length: int, target: int, status: int) -> None:
    rig.memory.write(TARGET, b"untouched")
    assert rig.command(control, length, target) == status
    assert rig.memory.read(TARGET, 9) == b"untouched"
    assert rig.read(0, 4) == b"QEMU"


def test_command_outside_ram(rig: Rig) -> None:
    rig.ports.write(0x514, 4, 0xFFFF_FFFF)
    rig.ports.write(0x518, 4, 0xFFFF_FFFF)
    assert rig.read(0, 4) == b"QEMU"


def test_every_access_size(rig: Rig) -> None:
    for port in range(0x510, 0x51C):
        for size in (1, 2, 4):
            assert 0 <= rig.ports.read(port, size) < 1 << 8 * size
            rig.ports.write(port, size, (1 << 8 * size) - 1)


def test_saved(rig: Rig) -> None:
    rig.read(0, 2)
    state = rig.device.save()
    rig.read(3, 1)
    rig.device.restore(state)
    assert bytes(rig.ports.read(0x511, 1) for _ in range(2)) == b"MU"


def test_long_names_are_refused(rig: Rig) -> None:
    with pytest.raises(UsageError):
        FwCfg(rig.memory, {}, {"x" * 56: b""})
