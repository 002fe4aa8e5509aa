"""Registers, EEPROM, PHY, interrupts, state: what drivers do to a card that sends nothing."""

from __future__ import annotations

import random

import pytest

from devices.e1000.driver import MAC, Driver, frame_of
from ringfence.devices.e1000.card import IO_BAR, MEMORY_BAR, MEMORY_SIZE
from ringfence.devices.e1000.eeprom import CHECKSUM
from ringfence.devices.e1000.registers import (
    ALL,
    CTRL,
    EECD,
    EERD,
    ICR,
    ITR,
    MDIC,
    PLAIN,
    RCTL,
    STATUS,
    TCTL,
    Ring,
)


def bit_bang(driver: Driver, address: int, words: int = 1) -> list[int]:
    """Read EEPROM words as a driver does: by the chip's pins."""
    pins = EECD.REQ

    def drive(value: int) -> None:
        nonlocal pins
        pins = value
        driver.write(EECD.OFFSET, value)

    def clock(bit: int) -> bool:
        drive(pins & ~(EECD.DI | EECD.SK) | EECD.DI * bit)
        drive(pins | EECD.SK)
        out = bool(driver.read(EECD.OFFSET) & EECD.DO)
        drive(pins & ~EECD.SK)
        return out

    drive(pins)
    assert driver.read(EECD.OFFSET) & EECD.GNT
    drive(pins | EECD.CS)
    for at in reversed(range(9)):
        last = clock((0b110 << 6 | address) >> at & 1)
    assert not last, "a dummy bit comes before the data"
    found = []
    for _ in range(words):
        value = 0
        for _ in range(16):
            value = value << 1 | clock(0)
        found.append(value)
    drive(0)
    assert not driver.read(EECD.OFFSET) & EECD.GNT
    return found


def by_eerd(driver: Driver, address: int) -> int:
    driver.write(EERD.OFFSET, address << EERD.ADDR_SHIFT | EERD.START)
    value = driver.read(EERD.OFFSET)
    assert value & EERD.DONE
    return value >> EERD.DATA_SHIFT


def test_eeprom_by_both_ways(driver) -> None:
    words = [by_eerd(driver, at) for at in range(64)]
    assert b"".join(word.to_bytes(2, "little") for word in words[:3]) == MAC
    assert sum(words) & 0xFFFF == CHECKSUM
    assert bit_bang(driver, 0, 64) == words
    assert bit_bang(driver, 63, 2) == [words[63], words[0]]
    assert [bit_bang(driver, at)[0] for at in (0, 10, 63)] == [words[0], words[10], words[63]]
    assert by_eerd(driver, 64) == by_eerd(driver, 255) == 0xFFFF


def test_eeprom_takes_no_writes(driver) -> None:
    before = bit_bang(driver, 0, 64)
    source = random.Random(1)
    for _ in range(5000):
        driver.write(EECD.OFFSET, source.getrandbits(32))
    driver.write(EECD.OFFSET, 0)
    assert bit_bang(driver, 0, 64) == before


def phy(driver: Driver, register: int, value: int | None = None, address: int = 1) -> int:
    operation = MDIC.OP_READ if value is None else MDIC.OP_WRITE
    command = operation << MDIC.OP_SHIFT | address << MDIC.PHYADD_SHIFT
    driver.write(MDIC.OFFSET, command | register << MDIC.REGADD_SHIFT | (value or 0))
    found = driver.read(MDIC.OFFSET)
    assert found & MDIC.R
    return found & (MDIC.E | MDIC.DATA)


def test_phy(driver) -> None:
    assert phy(driver, 2) << 16 | phy(driver, 3) == 0x01410C20
    assert phy(driver, 1) & 0x24 == 0x24, "link, negotiated"
    assert phy(driver, 17) & 0xEC00 == 0xAC00, "1000 Mb/s, full duplex, resolved, link"
    assert phy(driver, 0, address=2) & MDIC.E
    phy(driver, 4, 0x0101)
    phy(driver, 0, 0x9140)
    assert phy(driver, 4) == 0x0DE1
    assert phy(driver, 0) == 0x1140
    phy(driver, 2, 0xFFFF)
    assert phy(driver, 2) == 0x0141
    assert not driver.asserted
    driver.write(ICR.IMS, ICR.MDAC)
    driver.write(MDIC.OFFSET, MDIC.I | MDIC.OP_READ << MDIC.OP_SHIFT | 1 << MDIC.PHYADD_SHIFT)
    assert driver.asserted


def test_the_cable(driver) -> None:
    assert driver.read(STATUS.OFFSET) & STATUS.LU
    driver.card.set_link(False)
    assert driver.asserted
    assert driver.read(ICR.OFFSET) == ICR.LSC
    assert not driver.read(STATUS.OFFSET) & STATUS.LU
    assert not phy(driver, 1) & 0x24
    driver.send(frame_of(60))
    assert driver.wire.frames == []
    assert driver.card.receive([frame_of(60)])
    assert driver.take() == []
    driver.card.set_link(True)
    assert driver.read(ICR.OFFSET) & ICR.LSC
    driver.send(frame_of(60))
    assert len(driver.wire.frames) == 1


@pytest.mark.parametrize("way", ["phy", "mac"])
def test_loopback(driver, way) -> None:
    if way == "phy":
        phy(driver, 0, 0x4140)
    else:
        driver.write(RCTL.OFFSET, driver.read(RCTL.OFFSET) | 0x40)
    assert driver.card.receive([frame_of(60, seed=1)]), "the wire is cut off"
    driver.send(frame_of(60))
    assert [data[:-4] for data in driver.take()] == [frame_of(60)]
    assert driver.wire.frames == []


# ---- interrupts


def test_causes_and_mask() -> None:
    driver = Driver()
    driver.write(ICR.ICS, ICR.LSC | ICR.RXO)
    assert not driver.asserted
    driver.write(ICR.IMS, ICR.LSC)
    assert driver.asserted
    assert driver.read(ICR.IMS) == ICR.LSC
    driver.write(ICR.IMC, ICR.LSC)
    assert not driver.asserted
    driver.write(ICR.IMS, ICR.RXO)
    assert driver.asserted
    driver.write(ICR.OFFSET, ICR.RXO)
    assert not driver.asserted
    assert driver.read(ICR.OFFSET) == ICR.LSC
    assert driver.read(ICR.OFFSET) == 0
    driver.write(ICR.ICS, ALL)
    assert driver.read(ICR.OFFSET) == ICR.IMPLEMENTED


def test_throttling() -> None:
    driver = Driver()
    driver.write(ITR.OFFSET, 1000)
    driver.write(ICR.IMS, ICR.LSC)
    rises = []
    for step in range(1000):
        driver.write(ICR.ICS, ICR.LSC)
        if driver.asserted:
            rises.append(step)
            driver.read(ICR.OFFSET)
        driver.clock.advance(1000)
    assert rises == [0, 256, 512, 768]


def test_a_throttled_interrupt_comes_by_itself() -> None:
    driver = Driver()
    driver.write(ITR.OFFSET, 1000)
    driver.write(ICR.IMS, ICR.LSC)
    driver.write(ICR.ICS, ICR.LSC)
    driver.read(ICR.OFFSET)
    driver.write(ICR.ICS, ICR.LSC)
    assert not driver.asserted
    driver.clock.advance(256_000)
    assert driver.asserted


# ---- registers


@pytest.mark.parametrize("offset", [*PLAIN, 0x5408, 0x5600, 0x57FC, 0x5200, 0x53FC])
def test_registers_keep_their_writable_bits(driver, offset) -> None:
    mask = PLAIN[offset][1] if offset in PLAIN else ALL
    for value in (ALL, 0, 0x5A5A5A5A, 0xA5A5A5A5):
        driver.write(offset, value)
        assert driver.read(offset) == value & mask


@pytest.mark.parametrize(
    ("offset", "mask"),
    [
        (0x2800, 0xFFFFFFF0), (0x2804, ALL), (0x2808, 0xFFF80), (0x2810, 0xFFFF), (0x2818, 0xFFFF),
        (0x3800, 0xFFFFFFF0), (0x3804, ALL), (0x3808, 0xFFF80), (0x3810, 0xFFFF), (0x3818, 0xFFFF),
        (0x2820, 0xFFFF), (0x282C, 0xFFFF), (0x3820, 0xFFFF), (0x382C, 0xFFFF),
        (0x540C, 0x8003FFFF), (ITR.OFFSET, 0xFFFF), (0x5000, 0x3FF),
    ],
)  # fmt: skip
def test_registers_of_the_rings_and_filters(offset, mask) -> None:
    driver = Driver()
    for value in (0x5A5A5A5A & mask, 0xA5A5A5A5 & mask, 0):
        driver.write(offset, value)
        assert driver.read(offset) == value


def test_narrow_accesses(driver) -> None:
    driver.write(0x5200, 0x12345678)
    for offset, size, value in ((0, 1, 0x78), (1, 1, 0x56), (2, 2, 0x1234), (3, 1, 0x12)):
        driver.write(0x5200 + offset, ALL, size)
        assert driver.read(0x5200 + offset, size) == value


def test_every_offset_in_every_size() -> None:
    driver = Driver().start()
    for offset in range(0, MEMORY_SIZE, 4):
        for size in (1, 2, 4):
            for at in range(offset, offset + 4, size):
                assert 0 <= driver.read(at, size) < 1 << 8 * size
                driver.write(at, 0, size)
                driver.write(at, ALL & ~(CTRL.RST if offset in (0, 4) else 0), size)
    driver.clock.advance(1_000_000_000)


def test_the_same_registers_through_ports(driver) -> None:
    card = driver.card
    card.bar_write(IO_BAR, 0, 4, 0x5204)
    assert card.bar_read(IO_BAR, 0, 4) == 0x5204
    card.bar_write(IO_BAR, 4, 4, 0x11223344)
    assert card.bar_read(IO_BAR, 4, 4) == driver.read(0x5204) == 0x11223344
    assert card.bar_read(IO_BAR, 6, 1) & 0xFF == 0x22
    card.bar_write(IO_BAR, 0, 4, CTRL.OFFSET)
    card.bar_write(IO_BAR, 4, 4, CTRL.RST)
    assert driver.read(0x5204) == 0
    for bad in (0x5205, MEMORY_SIZE, ALL):
        card.bar_write(IO_BAR, 0, 4, bad)
        card.bar_write(IO_BAR, 4, 4, ALL)
        assert card.bar_read(IO_BAR, 4, 4) == 0
    for offset in range(64):
        for size in (1, 2, 4):
            if offset % size == 0:
                card.bar_write(IO_BAR, offset, size, 0)
                card.bar_read(IO_BAR, offset, size)


def test_reset(driver) -> None:
    driver.send(frame_of(60))
    driver.card.receive([frame_of(60)])
    driver.write(0x5200, ALL)
    driver.write(0x5408, ALL)
    driver.write(CTRL.OFFSET, CTRL.RST)
    fresh = Driver()
    for offset in range(0, MEMORY_SIZE, 4):
        assert driver.read(offset) == fresh.read(offset), hex(offset)
    assert not driver.asserted
    assert driver.read(0x5404) == int.from_bytes(MAC[4:], "little") | 1 << 31


# ---- state


def test_save_and_restore(driver) -> None:
    source = random.Random(7)
    for _ in range(20):
        driver.send(source.randbytes(source.randrange(14, 200)))
        driver.card.receive([frame_of(60 + source.randrange(1000))])
    driver.take()
    driver.write(0x5210, 0x1234)
    driver.write(0x0038, 0x88A8)
    driver.write(0x2820, 100)
    driver.read(ICR.OFFSET)
    driver.card.receive([frame_of(100)])
    state = driver.card.save()
    other = Driver()
    other.memory.write(0, driver.memory.read(0, driver.memory.size))
    other.card.restore(state)
    assert other.card.save() == state
    other.clock.advance(200_000)
    assert other.asserted, "the delayed interrupt comes there, too"
    other.rx_head, other.tx_tail = driver.rx_head, driver.tx_tail
    other.write(0x0038, 0x8100)
    other.card.receive([frame_of(200)])
    other.send(frame_of(90))
    assert [data[:-4] for data in other.take()] == [frame_of(100), frame_of(200)]
    assert other.wire.frames == [frame_of(90)]
    other.write(0x5210, 0)
    assert driver.read(0x5210) == 0x1234
    assert driver.read(TCTL.OFFSET) == other.read(TCTL.OFFSET)
    assert driver.read(Ring.RECEIVE + Ring.LEN) == other.read(Ring.RECEIVE + Ring.LEN)
    assert driver.card.bar_read(MEMORY_BAR, 0x38, 4) == 0x88A8
