"""The 8254: counting, latching, channel 0's interrupt, and what kernels calibrate by."""

from __future__ import annotations

import pytest

HZ = 1_193_182


def ticks(count: int) -> int:
    """Nanoseconds until ``count`` input clocks have passed."""
    return -(-count * 10**9 // HZ)


def program(rig, channel: int, mode: int, count: int, *, bcd: bool = False) -> None:
    rig.out(0x43, channel << 6 | 0x30 | mode << 1 | bcd)
    rig.out(0x40 + channel, count & 0xFF, count >> 8)


def read(rig, channel: int) -> int:
    rig.out(0x43, channel << 6)
    return rig.inb(0x40 + channel) | rig.inb(0x40 + channel) << 8


@pytest.mark.parametrize(
    ("mode", "count", "after", "reads"),
    [
        (0, 1000, 0, 1000),
        (0, 1000, 400, 600),
        (0, 1000, 1001, 0xFFFF),
        (0, 0, 1, 0xFFFF),
        (2, 1000, 400, 600),
        (2, 1000, 2400, 600),
        (3, 1000, 0, 1000),
        (3, 1000, 100, 800),
        (3, 1000, 600, 800),
        (4, 1000, 400, 600),
    ],
)
def test_count(rig, mode, count, after, reads) -> None:
    program(rig, 0, mode, count)
    rig.clock.advance(ticks(after))
    assert read(rig, 0) == reads


def test_bcd(rig) -> None:
    program(rig, 0, 2, 0x1000, bcd=True)
    rig.clock.advance(ticks(1))
    assert read(rig, 0) == 0x0999


def test_latch_holds_until_read_and_then_counts_live(rig) -> None:
    program(rig, 0, 2, 0x8000)
    rig.out(0x43, 0x00)
    rig.clock.advance(ticks(0x100))
    rig.out(0x43, 0x00)
    assert (rig.inb(0x40), rig.inb(0x40)) == (0x00, 0x80)
    assert (rig.inb(0x40), rig.inb(0x40)) == (0x00, 0x7F)


def test_read_back_gives_status_then_count(rig) -> None:
    program(rig, 0, 2, 0x1234)
    rig.out(0x43, 0xC2)
    assert rig.inb(0x40) == 0x80 | 0x30 | 2 << 1
    assert rig.inb(0x40) | rig.inb(0x40) << 8 == 0x1234


def test_single_byte_access(rig) -> None:
    rig.out(0x43, 0x14)
    rig.out(0x40, 0x80)
    assert rig.inb(0x40) == 0x80
    assert rig.inb(0x40) == 0x80


@pytest.mark.parametrize(("mode", "fires"), [(0, 1), (2, 10), (3, 10), (4, 1)])
def test_interrupts(rig, mode, fires) -> None:
    rig.start_pic()
    program(rig, 0, mode, 1193)
    taken = 0
    for _ in range(10):
        rig.clock.advance(ticks(1193))
        if rig.take() == 0x30:
            taken += 1
            rig.out(0x20, 0x20)
    assert taken == fires


def test_periodic_interrupts_do_not_drift(rig) -> None:
    rig.start_pic()
    program(rig, 0, 2, 11932)
    taken = 0
    for _ in range(10_000):
        rig.clock.advance(100_000)
        if rig.take() == 0x30:
            taken += 1
            rig.out(0x20, 0x20)
    assert taken == HZ // 11932


def test_new_mode_stops_the_old(rig) -> None:
    rig.start_pic()
    program(rig, 0, 2, 1193)
    rig.out(0x43, 0x30)
    rig.clock.advance(10**8)
    assert rig.take() is None


def test_channel_2_with_gate(rig) -> None:
    rig.out(0x61, 0x00)
    program(rig, 2, 0, 1000)
    rig.clock.advance(ticks(5000))
    assert rig.inb(0x61) & 0x21 == 0
    rig.out(0x61, 0x01)
    rig.clock.advance(ticks(400))
    rig.out(0x61, 0x00)
    rig.clock.advance(ticks(5000))
    assert rig.inb(0x61) & 0x20 == 0
    rig.out(0x61, 0x01)
    rig.clock.advance(ticks(599))
    assert rig.inb(0x61) & 0x20 == 0
    rig.clock.advance(ticks(2))
    assert rig.inb(0x61) & 0x21 == 0x21


def test_one_shot_of_channel_2_is_triggered_by_gate(rig) -> None:
    program(rig, 2, 1, 1000)
    rig.out(0x61, 0x01)
    assert rig.inb(0x61) & 0x20 == 0
    rig.clock.advance(ticks(1000))
    assert rig.inb(0x61) & 0x20


def test_the_calibration_loops_of_kernels_end(rig) -> None:
    """Channel 2 in mode 0 from 0xffff: each high byte lasts 256 clocks; OUT comes after 50 ms."""
    rig.out(0x61, rig.inb(0x61) & ~2 | 1)
    rig.out(0x43, 0xB0)
    rig.out(0x42, 0xFF, 0xFF)
    seen = []
    for _ in range(2000):
        rig.clock.advance(2000)
        rig.inb(0x42)
        seen.append(rig.inb(0x42))
    lengths = [seen.count(high) for high in range(0xFE, 0xF5, -1)]
    assert all(abs(length - 107) <= 1 for length in lengths)
    latch = HZ // 20
    rig.out(0x43, 0xB0)
    rig.out(0x42, latch & 0xFF, latch >> 8)
    rig.clock.advance(49_990_000)
    assert not rig.inb(0x61) & 0x20
    rig.clock.advance(20_000)
    assert rig.inb(0x61) & 0x20


def test_refresh_toggles(rig) -> None:
    seen = set()
    for _ in range(4):
        seen.add(rig.inb(0x61) & 0x10)
        rig.clock.advance(15_085)
    assert seen == {0, 0x10}
