"""The real-time clock: reading, setting, interrupts, CMOS."""

from __future__ import annotations

import pytest

from ringfence.chipset.rtc import memory_bytes

SECOND = 10**9


def cmos(rig, index: int, value: int | None = None) -> int:
    rig.out(0x70, index)
    if value is not None:
        rig.out(0x71, value)
        return value
    return rig.inb(0x71)


def now(rig) -> list[int]:
    return [cmos(rig, index) for index in (0x32, 9, 8, 7, 6, 4, 2, 0)]


@pytest.mark.parametrize(
    ("b", "advance", "expected"),
    [
        (0x02, 0, [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x59]),
        (0x06, 0, [20, 24, 2, 29, 5, 23, 59, 59]),
        (0x00, 0, [0x20, 0x24, 0x02, 0x29, 5, 0x91, 0x59, 0x59]),
        (0x02, 1, [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]),
        (0x04, 1, [20, 24, 3, 1, 6, 12, 0, 0]),
    ],
)
def test_read_out(rig, b, advance, expected) -> None:
    cmos(rig, 0x0B, b)
    rig.clock.advance(advance * SECOND)
    assert now(rig) == expected


def test_setting_the_time(rig) -> None:
    cmos(rig, 0x0B, 0x82)
    for index, value in ((7, 0x31), (8, 0x01), (9, 0x99), (0x32, 0x19), (4, 5), (2, 6), (0, 7)):
        cmos(rig, index, value)
    rig.clock.advance(100 * SECOND)
    assert cmos(rig, 0) == 7
    cmos(rig, 0x0B, 0x02)
    assert now(rig) == [0x19, 0x99, 0x01, 0x31, 1, 5, 6, 7]
    rig.clock.advance(3 * SECOND)
    assert cmos(rig, 0) == 0x10


def test_nonsense_makes_some_date(rig) -> None:
    for index in (0, 2, 4, 6, 7, 8, 9, 0x32):
        cmos(rig, index, 0xFF)
        now(rig)
    for index in (8, 7, 9, 0x32, 0):
        cmos(rig, index, 0)
        now(rig)


def test_update_in_progress(rig) -> None:
    rig.clock.advance(SECOND // 2)
    assert cmos(rig, 0x0A) == 0x26
    rig.clock.advance(SECOND // 2 - 100_000)
    assert cmos(rig, 0x0A) == 0xA6
    rig.clock.advance(100_000)
    assert cmos(rig, 0x0A) == 0x26
    assert cmos(rig, 0x0D) == 0x80


def interrupts(rig, step: int, count: int) -> list[int]:
    """Advance in steps; return register C of each interrupt."""
    seen = []
    for _ in range(count):
        rig.clock.advance(step)
        if rig.take() == 0x38:
            seen.append(cmos(rig, 0x0C))
            rig.out(0xA0, 0x20)
            rig.out(0x20, 0x20)
    return seen


def test_update_interrupt(rig) -> None:
    rig.start_pic()
    cmos(rig, 0x0B, 0x12)
    seen = interrupts(rig, SECOND, 3)
    assert [value & 0x90 for value in seen] == [0x90] * 3


@pytest.mark.parametrize(("rate", "per_second"), [(6, 1024), (15, 2), (3, 8192), (1, 256)])
def test_periodic_interrupt(rig, rate, per_second) -> None:
    rig.start_pic()
    cmos(rig, 0x0A, 0x20 | rate)
    cmos(rig, 0x0B, 0x42)
    seen = interrupts(rig, SECOND // per_second + 1, 50)
    assert len(seen) in (49, 50)
    assert all(value & 0xC0 == 0xC0 for value in seen)


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x05, 0x00, 0x00), 6),
        ((0x05, 0xFF, 0xFF), 6),
        ((0x00, 0x02, 0xC0), 121),
        ((0x59, 0x59, 0x23), 86400),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xFF, 0xFF, 0x01), 3601),
    ],
)
def test_alarm(rig, alarm, seconds) -> None:
    rig.start_pic()
    for index, value in zip((1, 3, 5), alarm, strict=True):
        cmos(rig, index, value)
    cmos(rig, 0x0B, 0x22)
    rig.clock.advance(seconds * SECOND - 1)
    assert rig.take() is None
    rig.clock.advance(1)
    assert rig.take() == 0x38
    assert cmos(rig, 0x0C) & 0xA0 == 0xA0


def test_impossible_alarm_never_comes(rig) -> None:
    cmos(rig, 5, 0x99)
    cmos(rig, 0x0B, 0x22)
    rig.clock.advance(3 * 86400 * SECOND)
    assert cmos(rig, 0x0C) & 0x20 == 0


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (16, {0x15: 0x80, 0x16: 0x02, 0x17: 0x00, 0x18: 0x3C, 0x34: 0, 0x35: 0}),
        (256, {0x17: 0xFF, 0x18: 0xFF, 0x34: 0x00, 0x35: 0x0F, 0x5B: 0}),
        (5120, {0x34: 0x00, 0x35: 0xBF, 0x5B: 0x00, 0x5C: 0x80, 0x5D: 0}),
    ],
)
def test_memory_size(mib, expected) -> None:
    told = memory_bytes(mib << 20)
    assert {index: told[index] for index in expected} == expected
