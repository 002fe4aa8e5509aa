"""ACPI hardware and tables, PCI configuration, and the three ways to reset."""

from __future__ import annotations

import struct

import pytest

from ringfence.chipset import aml
from ringfence.chipset.acpi import ADDRESS, Hardware, build_tables
from ringfence.chipset.pm import Gpe

# ---- power management


def test_pm_timer_counts(rig) -> None:
    rig.clock.advance(10**9)
    assert rig.board.port_read(0x608, 4) == 3_579_545
    rig.clock.advance(1200 * 10**9)
    assert rig.board.port_read(0x608, 4) == 1201 * 3_579_545 & 0xFFFFFFFF
    assert rig.board.port_read(0x600, 2) == 0x0001
    rig.board.port_write(0x600, 2, 0x0001)
    assert rig.board.port_read(0x600, 2) == 0


def test_pm_timer_interrupt(rig) -> None:
    rig.start_pic()
    rig.board.port_write(0x602, 2, 0x0001)
    rig.clock.advance(599 * 10**9)
    assert rig.take() is None
    rig.clock.advance(10**9)
    assert rig.take() == 0x39


def test_power_button_raises_the_sci(rig) -> None:
    rig.start_pic()
    rig.board.press_power_button()
    assert rig.take() is None
    rig.board.port_write(0x602, 2, 0x0100)
    assert rig.take() == 0x39
    assert rig.board.port_read(0x600, 4) == 0x01000100
    rig.board.port_write(0x600, 2, 0x0100)
    assert rig.board.port_read(0x600, 2) == 0


@pytest.mark.parametrize(
    ("port", "size", "value", "events"),
    [
        (0x604, 2, 0x3401, ["off"]),
        (0x605, 1, 0x34, ["off"]),
        (0x604, 2, 0x1401, []),
        (0x604, 2, 0x2001, []),
        (0xCF9, 1, 0x06, ["reset"]),
        (0xCF9, 1, 0x02, []),
        (0x64, 1, 0xFE, ["reset"]),
        (0x64, 1, 0xFF, []),
        (0x92, 1, 0x03, ["reset"]),
        (0x92, 1, 0x02, []),
    ],
)
def test_power_off_and_reset(rig, port, size, value, events) -> None:
    rig.board.port_write(0x3F8, 1, 0x41)
    rig.board.port_write(port, size, value)
    assert rig.events == events
    assert bool(rig.console) == bool(events)


def test_sci_en_is_always_set(rig) -> None:
    rig.board.port_write(0x604, 2, 0)
    assert rig.board.port_read(0x604, 2) == 1


# ---- general-purpose events


def test_events_raise_the_sci_where_they_are_enabled(rig) -> None:
    rig.start_pic()
    rig.board.pm.raise_event(Gpe.GENERATION)
    assert rig.take() is None
    assert rig.board.port_read(0x60C, 4) == 1
    rig.board.port_write(0x60E, 2, 0xFFFF)
    assert rig.take() == 0x39
    assert rig.board.port_read(0x60C, 4) == 0xFFFF0001
    rig.board.port_write(0x60D, 1, 0xFF)
    assert rig.board.port_read(0x60C, 2) == 1
    rig.board.port_write(0x60C, 1, 0xFF)
    assert rig.board.port_read(0x60C, 2) == 0
    rig.out(0xA0, 0x20)
    rig.out(0x20, 0x20)
    assert rig.take() is None


# ---- keyboard controller


@pytest.mark.parametrize(
    ("writes", "reply"),
    [
        ([(0x64, 0xAA)], 0x55),
        ([(0x64, 0xAB)], 0x00),
        ([(0x64, 0x20)], 0x34),
        ([(0x64, 0x60), (0x60, 0x47), (0x64, 0x20)], 0x47),
        ([(0x64, 0xD0)], 0x03),
    ],
)
def test_i8042_replies(rig, writes, reply) -> None:
    for port, value in writes:
        rig.out(port, value)
    assert rig.inb(0x64) & 1
    assert rig.inb(0x60) == reply
    assert not rig.inb(0x64) & 1


@pytest.mark.parametrize(
    ("bytes_", "answer"),
    [
        ([0xFF], "fa aa"),
        ([0xF2], "fa ab 83"),
        ([0xED, 0x07], "fa fa"),
        ([0xF0, 0x01, 0xF0, 0x00], "fa fa fa fa 01"),
        ([0xF3, 0xF4], "fa fa"),
        ([0xEE, 0x00], "ee fe"),
    ],
)
def test_keyboard_answers(rig, bytes_, answer) -> None:
    for value in bytes_:
        rig.out(0x60, value)
    heard = []
    while rig.inb(0x64) & 1:
        heard.append(rig.inb(0x60))
    assert bytes(heard) == bytes.fromhex(answer)


def test_keyboard_interrupts_for_each_byte(rig) -> None:
    lines: list[bool] = []
    rig.board.i8042._irq = lines.append
    rig.out(0x60, 0xF2)
    assert not any(lines)
    rig.out(0x64, 0x60)
    rig.out(0x60, 0x01)
    del lines[:]
    saved = rig.board.i8042.save()
    assert [rig.inb(0x60) for _ in range(3)] == [0xFA, 0xAB, 0x83]
    assert lines == [False, True, False, True, False, False]
    rig.board.i8042.restore(saved)
    assert rig.inb(0x60) == 0xFA
    for _ in range(100):
        rig.out(0x60, 0xF2)
    assert len(rig.board.i8042.output) == 16


def test_there_is_no_mouse(rig) -> None:
    rig.out(0x64, 0xD4)
    rig.out(0x60, 0xFF)
    assert not rig.inb(0x64) & 1
    rig.out(0x64, 0xD1)
    rig.out(0x60, 0xDE)
    assert rig.events == ["reset"]


# ---- PCI


def config(rig, slot: int, offset: int, size: int = 4) -> int:
    rig.board.port_write(0xCF8, 4, 0x80000000 | slot << 11 | offset & 0xFC)
    return rig.board.port_read(0xCFC + (offset & 3), size)


def test_pci_probe(rig) -> None:
    rig.board.port_write(0xCF8, 4, 0x80000000)
    assert rig.board.port_read(0xCF8, 4) == 0x80000000
    assert config(rig, 0, 0) == 0x12378086
    assert config(rig, 0, 0x0A, 2) == 0x0600
    assert config(rig, 0, 0x0E, 1) == 0
    assert config(rig, 1, 0) == 0xFFFFFFFF
    assert config(rig, 0x1F | 1 << 5, 0) == 0xFFFFFFFF  # bus 1
    rig.board.port_write(0xCF8, 4, 0)
    assert rig.board.port_read(0xCFC, 4) == 0xFFFFFFFF


# ---- tables


def tables(cpus: int) -> dict[bytes, bytes]:
    blob = build_tables(ADDRESS, Hardware(cpus))

    def table(address: int) -> bytes:
        at = address - ADDRESS
        return blob[at : at + struct.unpack_from("<I", blob, at + 4)[0]]

    xsdt = table(struct.unpack_from("<Q", blob, 24)[0])
    found = {b"RSDP": blob[:36], b"XSDT": xsdt}
    for address in struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:]):
        found[table(address)[:4]] = table(address)
    fadt = found[b"FACP"]
    found[b"DSDT"] = table(struct.unpack_from("<Q", fadt, 140)[0])
    found[b"FACS"] = table(struct.unpack_from("<I", fadt, 36)[0])
    assert len(blob) < 0x20000
    return found


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_checksums(cpus) -> None:
    found = tables(cpus)
    assert set(found) == {b"RSDP", b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT", b"FACS"}
    assert found[b"RSDP"][:8] == b"RSD PTR "
    assert sum(found[b"RSDP"][:20]) & 0xFF == 0
    for signature, table in found.items():
        assert signature in (b"FACS", b"RSDP") or table[:4] == signature
        assert signature == b"FACS" or sum(table) & 0xFF == 0
    assert len(found[b"FACP"]) == 276
    assert len(found[b"FACS"]) == 64


def test_madt_entries() -> None:
    madt = tables(2)[b"APIC"]
    entries = []
    at = 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [entry[0] for entry in entries] == [0, 0, 1, 2, 2, 4]
    assert [entry[3] for entry in entries[:2]] == [0, 1]
    assert entries[3] == bytes([2, 10, 0, 0, 2, 0, 0, 0, 0, 0])
    assert entries[4] == bytes([2, 10, 0, 9, 9, 0, 0, 0, 0x0D, 0])


def test_fadt_fields() -> None:
    fadt = tables(1)[b"FACP"]
    assert struct.unpack_from("<H", fadt, 46)[0] == 9
    assert [struct.unpack_from("<I", fadt, at)[0] for at in (56, 64, 76)] == [0x600, 0x604, 0x608]
    assert struct.unpack_from("<I", fadt, 80)[0] == 0x60C
    assert fadt[92] == 4
    assert struct.unpack_from("<Q", fadt, 120)[0] == 0xCF9
    assert fadt[128] == 6
    assert not struct.unpack_from("<H", fadt, 109)[0] & 2  # no 8042


@pytest.mark.parametrize(
    ("term", "code"),
    [
        (aml.integer(0), "00"),
        (aml.integer(0x1234), "0b3412"),
        (aml.integer(1 << 40), "0e0000000000010000"),
        (aml.eisa_id("PNP0501"), "0c41d00501"),
        (aml.path("\\_SB.PCI0"), "5c2e5f53425f50434930"),
        (aml.path("A.B.C"), "2f03415f5f5f425f5f5f435f5f5f"),
        (aml.name("_UID", aml.integer(1)), "085f55494401"),
        (aml.package(aml.integer(1)), "12030101"),
        (aml.buffer(bytes(70))[:5], "114a040a46"),
        (aml.io(0x3F8, 8), "4701f803f8030108"),
        (aml.irq(4), "221000"),
        (aml.method("_E00", aml.notify("\\A.B", 0x80)), "14135f45303000865c2e415f5f5f425f5f5f0a80"),
    ],
)
def test_aml(term, code) -> None:
    assert term.hex() == code
