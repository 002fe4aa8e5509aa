"""The paravirtual clock's structures, as a guest reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from ringfence.cpu.faults import GeneralProtection
from ringfence.memory.ram import GuestMemory
from ringfence.paravirt import clock as pv

SECOND = 1_000_000_000


class _Clock:
    def now(self) -> int:
        return 5 * SECOND

    def wall(self) -> int:
        return 1_700_000_000 * SECOND + 5 * SECOND + 123


class _Tsc:
    hz = 2_600_000_000

    def read(self) -> int:
        return 13_000_000_000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(1 << 20)
    yield ram
    ram.close()


@pytest.mark.parametrize("hz", [1_000_000, 999_999_999, 1_000_000_000, 2_596_000_000, 6 << 30])
def test_scale_gives_nanoseconds(hz: int) -> None:
    multiplier, shift = pv.time_scale(hz)
    assert 0 < multiplier < 1 << 32
    ticks = hz * 100
    shifted = ticks << shift if shift >= 0 else ticks >> -shift
    assert abs((shifted * multiplier >> 32) - 100 * SECOND) < 1000


def test_time_structure(memory: GuestMemory) -> None:
    device = pv.ParavirtualClock(memory, _Clock(), _Tsc())
    device.msr_write(pv.MSR_SYSTEM_TIME, 0x2000 | 1)
    version, _, ticks, now, multiplier, shift, flags = struct.unpack(
        "<IIQQIbBxx", memory.read(0x2000, 32)
    )
    assert version % 2 == 0 and version > 0
    assert (ticks, now, flags) == (13_000_000_000, 5 * SECOND, 1)
    assert (multiplier, shift) == pv.time_scale(_Tsc.hz)
    assert device.msr_read(pv.MSR_SYSTEM_TIME) == 0x2001


def test_wall_clock_is_the_start(memory: GuestMemory) -> None:
    device = pv.ParavirtualClock(memory, _Clock(), _Tsc())
    device.msr_write(pv.MSR_WALL_CLOCK, 0x3000)
    assert struct.unpack("<III", memory.read(0x3000, 12)) == (2, 1_700_000_000, 123)


def test_disabled_writes_nothing(memory: GuestMemory) -> None:
    device = pv.ParavirtualClock(memory, _Clock(), _Tsc())
    device.msr_write(pv.MSR_SYSTEM_TIME, 0x2000)
    assert memory.read(0x2000, 32) == bytes(32)


@pytest.mark.parametrize("index", pv.MSRS)
@pytest.mark.parametrize("address", [0xFFFF0, 0xFEE00000, 1 << 63])
def test_outside_ram_is_a_fault(memory: GuestMemory, index: int, address: int) -> None:
    device = pv.ParavirtualClock(memory, _Clock(), _Tsc())
    if address == 0xFFFF0:
        address = 0xFFFFC
    with pytest.raises(GeneralProtection):
        device.msr_write(index, address | 1)
