"""The buses: dispatch, splitting, and what nobody answers."""

from __future__ import annotations

import random

import pytest

from ringfence.chipset.bus import AddressMap, MmioBus, PortBus, Window
from ringfence.errors import UsageError


class Recorder:
    def __init__(self) -> None:
        self.log: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append((offset, size))
        return sum((0x10 + offset + at) << 8 * at for at in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value))


@pytest.mark.parametrize(
    ("port", "size", "value", "log"),
    [
        (0x100, 1, 0x10, [(0, 1)]),
        (0x102, 2, 0x1312, [(2, 2)]),
        (0x104, 4, 0x17161514, [(4, 4)]),
        (0x101, 2, 0x1211, [(1, 1), (2, 1)]),
        (0x106, 4, 0xFFFF1716, [(6, 1), (7, 1)]),
        (0xFF, 2, 0x10FF, [(0, 1)]),
        (0x200, 4, 0xFFFFFFFF, []),
        (0xFFFF, 4, 0xFFFFFFFF, []),
    ],
)
def test_port_access(port: int, size: int, value: int, log: list[tuple[int, ...]]) -> None:
    bus, device = PortBus(), Recorder()
    bus.register(0x100, 8, device)
    assert bus.read(port, size) == value
    assert device.log == log
    device.log.clear()
    bus.write(port, size, 0xDDCCBBAA)
    assert [entry[:2] for entry in device.log] == log


def test_narrow_port_device_gets_bytes() -> None:
    bus, device = PortBus(), Recorder()
    bus.register(0x100, 4, device, widths=(1,))
    bus.write(0x100, 4, 0x44332211)
    assert device.log == [(0, 1, 0x11), (1, 1, 0x22), (2, 1, 0x33), (3, 1, 0x44)]


def test_ports_are_exclusive_until_freed() -> None:
    bus = PortBus()
    bus.register(0x100, 8, Recorder())
    with pytest.raises(UsageError):
        bus.register(0x107, 2, Recorder())
    bus.unregister(0x100, 8)
    bus.register(0x107, 2, Recorder())
    with pytest.raises(UsageError):
        bus.register(0xFFFF, 2, Recorder())


@pytest.mark.parametrize(
    ("pa", "size", "value", "log"),
    [
        (0x1000, 8, 0x1716151413121110, [(0, 8)]),
        (0x1002, 4, 0x15141312, [(2, 1), (3, 1), (4, 1), (5, 1)]),
        (0x100E, 4, 0xFFFF1F1E, [(14, 1), (15, 1)]),
        (0xFFF, 2, 0x10FF, [(0, 1)]),
        (0x5000, 8, (1 << 64) - 1, []),
        (0x1000, 3, 0x121110, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_mmio_access(pa: int, size: int, value: int, log: list[tuple[int, ...]]) -> None:
    bus, device = MmioBus(), Recorder()
    bus.register(0x4000, 4, Recorder())
    bus.register(0x1000, 16, device)
    assert bus.read(pa, size) == value
    assert device.log == log
    device.log.clear()
    bus.write(pa, size, 0)
    assert [entry[:2] for entry in device.log] == log


def test_mmio_regions_do_not_overlap() -> None:
    bus = MmioBus()
    bus.register(0x1000, 0x100, Recorder())
    with pytest.raises(UsageError):
        bus.register(0x10FF, 1, Recorder())
    bus.unregister(0x1000)
    bus.register(0x10FF, 1, Recorder())


def test_overlapping_windows_are_seen_by_rank() -> None:
    """Against the plain search through all windows, while they come and go."""
    chance, bus, windows = random.Random(4), AddressMap(), []
    for _ in range(500):
        if len(windows) > 12 or (windows and chance.random() < 0.4):
            bus.remove(windows.pop(chance.randrange(len(windows))))
        else:
            base, length = chance.randrange(64), chance.choice((1, 2, 8, 16))
            windows.append(Window(base, length, Recorder(), chance.randrange(4)))
            bus.add(windows[-1])
        for address in range(-1, 82):
            holders = [each for each in windows if each.base <= address < each.end]
            expected = min(holders, key=lambda each: each.rank, default=None)
            found = bus.find(address)
            if expected is None:
                assert found is None
                continue
            assert found is not None
            end, base, device = found
            assert (base, device) == (expected.base, expected.device)
            assert address < end <= expected.end


def test_windows_come_behind_the_board_s_ports() -> None:
    bus, fixed, window = PortBus(), Recorder(), Recorder()
    bus.register(0x104, 2, fixed, widths=(1,))
    bus.windows.add(Window(0x100, 16, window, 1))
    assert bus.read(0x100, 4) == 0x13121110
    assert bus.read(0x104, 4) == 0x17161110
    bus.write(0x106, 2, 0xBBAA)
    assert fixed.log == [(0, 1), (1, 1)]
    assert window.log == [(0, 4), (6, 1), (7, 1), (6, 2, 0xBBAA)]
