"""The 8259 pair and the I/O APIC, through the board's wiring."""

from __future__ import annotations

import pytest


def test_virtual_wire_delivers_at_boot(rig) -> None:
    rig.start_pic()
    rig.board.set_irq(4, True)
    assert ("wake", 0) in rig.events
    assert rig.take() == 0x34
    assert rig.take() is None
    rig.out(0x20, 0x20)
    assert rig.take() is None  # edge: still high, no new request
    rig.board.set_irq(4, False)
    rig.board.set_irq(4, True)
    assert rig.take() == 0x34


def test_pic_delivers_with_the_local_apic_switched_off(rig) -> None:
    rig.start_pic()
    rig.board.msr_write(0, 0x1B, 0xFEE00100)
    rig.board.set_irq(4, True)
    assert rig.take() == 0x34


def test_masked_lint0_holds_the_pic_back(rig) -> None:
    rig.start_pic()
    rig.apic(0x350, 0x10700)
    rig.board.set_irq(4, True)
    assert rig.take() is None
    rig.events.clear()
    rig.apic(0x350, 0x700)
    assert rig.events == [("wake", 0)]
    assert rig.take() == 0x34


def test_slave_goes_through_the_cascade(rig) -> None:
    rig.start_pic()
    rig.board.set_irq(12, True)
    rig.board.set_irq(8, True)
    assert rig.take() == 0x38
    rig.out(0xA0, 0x20)
    rig.out(0x20, 0x20)
    assert rig.take() == 0x3C
    rig.board.set_irq(1, True)  # higher than the cascade
    assert rig.take() == 0x31


@pytest.mark.parametrize(
    ("setup", "raised", "order"),
    [
        ([], [3, 5], [3]),
        ([(0x20, 0xC3)], [3, 5], [5, 3]),  # set priority: 3 lowest
        ([(0x21, 0x08)], [3, 5], [5]),  # 3 masked
    ],
)
def test_priorities(rig, setup, raised, order) -> None:
    rig.start_pic()
    for port, value in setup:
        rig.out(port, value)
    for irq in raised:
        rig.board.set_irq(irq, True)
    for irq in order:
        assert rig.take() == 0x30 + irq
        if len(order) > 1:
            rig.out(0x20, 0x20)
    assert rig.take() is None


def test_special_mask_mode_lets_lower_levels_in(rig) -> None:
    rig.start_pic()
    rig.board.set_irq(3, True)
    assert rig.take() == 0x33
    rig.board.set_irq(5, True)
    assert rig.take() is None
    rig.out(0x21, 0x08)
    rig.out(0x20, 0x68)
    assert rig.take() == 0x35


def test_auto_eoi_poll_and_readback(rig) -> None:
    rig.start_pic()
    rig.board.set_irq(3, True)
    rig.out(0x20, 0x0A)
    assert rig.inb(0x20) == 0x08
    rig.out(0x20, 0x0C)
    assert rig.inb(0x20) == 0x83
    rig.out(0x20, 0x0B)
    assert rig.inb(0x20) == 0x08
    rig.out(0x20, 0x63)  # specific EOI
    assert rig.inb(0x20) == 0
    rig.out(0x20, 0x11)
    rig.out(0x21, 0x30, 4, 3, 0)
    rig.board.set_irq(5, True)
    assert rig.take() == 0x35
    rig.out(0x20, 0x0B)
    assert rig.inb(0x20) == 0


def test_level_by_elcr(rig) -> None:
    rig.start_pic()
    assert rig.inb(0x4D1) == 0x02  # the SCI
    rig.out(0x4D0, 0xFF)
    assert rig.inb(0x4D0) == 0xF8
    rig.board.set_irq(5, True)
    assert rig.take() == 0x35
    rig.out(0x20, 0x20)
    assert rig.take() == 0x35
    rig.board.set_irq(5, False)
    rig.out(0x20, 0x20)
    assert rig.take() is None


def test_spurious(rig) -> None:
    rig.start_pic()
    rig.board.pic.master.imr = 0xFF
    assert rig.board.pic.acknowledge() == 0x37


# ---- I/O APIC


@pytest.fixture
def apic(rig):
    rig.apic(0xF0, 0x1FF)
    rig.apic(0x350, 0x10000)
    return rig


def test_ioapic_identity(rig) -> None:
    assert rig.ioapic(1) == 0x170020
    assert rig.ioapic(0, 0x0F000000) == 0x0F000000
    assert rig.ioapic(0x10) == 0x10000
    assert rig.ioapic(0x50) == 0


@pytest.mark.parametrize(("irq", "pin"), [(0, 2), (4, 4), (8, 8), (15, 15)])
def test_isa_lines(apic, irq, pin) -> None:
    apic.route(pin, 0x50)
    apic.board.set_irq(irq, True)
    assert apic.take() == 0x50
    apic.apic(0xB0, 0)
    apic.board.set_irq(irq, True)
    assert apic.take() is None
    apic.board.set_irq(irq, False)
    apic.board.set_irq(irq, True)
    assert apic.take() == 0x50


def test_level_interrupt_repeats_until_released(apic) -> None:
    apic.route(9, 0x8050)
    apic.board.set_irq(9, True)
    assert apic.take() == 0x50
    assert apic.ioapic(0x10 + 18) == 0xC050  # remote IRR
    assert apic.apic(0x180 + 0x20) == 1 << 16  # TMR
    apic.apic(0xB0, 0)
    assert apic.take() == 0x50
    apic.board.set_irq(9, False)
    apic.apic(0xB0, 0)
    assert apic.take() is None
    assert apic.ioapic(0x10 + 18) == 0x8050


def test_eoi_register(apic) -> None:
    apic.route(9, 0x8050)
    apic.board.set_irq(9, True)
    assert apic.take() == 0x50
    apic.board.set_irq(9, False)
    apic.board.mmio_write(0xFEC00040, 4, 0x50)
    assert apic.ioapic(0x10 + 18) == 0x8050


def test_masked_edge_is_lost_and_masked_level_is_not(apic) -> None:
    for pin, trigger in ((5, 0), (9, 0x8000)):
        apic.route(pin, 0x10050 | trigger)
        apic.board.set_irq(pin, True)
    apic.route(5, 0x50)
    assert apic.take() is None
    apic.route(9, 0x8051)
    assert apic.take() == 0x51


def test_switching_to_edge_clears_remote_irr(apic) -> None:
    apic.route(9, 0x8050)
    apic.board.set_irq(9, True)
    apic.route(9, 0x10050)
    apic.route(9, 0x18050)
    assert apic.ioapic(0x10 + 18) == 0x18050


def test_extint_through_pin_0(apic) -> None:
    apic.start_pic()
    apic.route(0, 0x700)
    apic.board.set_irq(3, True)
    assert apic.take() == 0x33


def test_shared_pci_interrupt_is_an_or(apic) -> None:
    apic.route(17, 0x8050)
    apic.board.pci.set_irq(1, 0, True)
    apic.board.pci.set_irq(5, 0, True)
    apic.board.pci.set_irq(1, 0, False)
    assert apic.take() == 0x50
    apic.apic(0xB0, 0)
    assert apic.take() == 0x50
    apic.board.pci.set_irq(5, 0, False)
    apic.apic(0xB0, 0)
    assert apic.take() is None


def test_msi(apic) -> None:
    apic.board.send_msi(0x1000_FEE0_0000, 0x4051)
    apic.board.send_msi(0x0EE00000, 0x4051)
    assert apic.take() is None
    apic.board.send_msi(0xFEE00000, 0x4052)
    assert apic.take() == 0x52


def test_messages_follow_logical_names(apic) -> None:
    """Who is meant by an address is remembered, but not for longer than it is true."""
    board, named_2 = apic.board, 0xFEE00000 | 2 << 12 | 4
    apic.apic(0xD0, 2 << 24)
    board.send_msi(named_2, 0x4053)
    assert apic.take() == 0x53
    apic.apic(0xB0, 0)
    apic.apic(0xD0, 1 << 24)
    board.send_msi(named_2, 0x4053)
    assert apic.take() is None
    saved = board.lapics[0].save()
    apic.apic(0xD0, 2 << 24)
    board.send_msi(named_2, 0x4053)
    assert apic.take() == 0x53
    board.lapics[0].restore(saved)
    board.send_msi(named_2, 0x4054)
    assert apic.take() is None
    for destination in range(256):  # more than are remembered
        board.send_msi(0xFEE00000 | destination << 12, 0x4055)
    assert apic.take() == 0x55


def test_next_interrupt(apic) -> None:
    """What `interrupt_pending` and `acknowledge` say, in one call."""
    board = apic.board
    assert board.next_interrupt(0, allowed=True) == (-1, False)
    board.send_msi(0xFEE00000, 0x4051)
    assert board.next_interrupt(0, allowed=False) == (-1, True)
    board.send_msi(0xFEE00000, 0x4062)
    assert board.next_interrupt(0, allowed=True) == (0x62, False), "0x51 has a lower priority"
    apic.apic(0xB0, 0)
    assert board.next_interrupt(0, allowed=True) == (0x51, False)
