"""The local APIC: priorities, the two register views, IPIs and the timer."""

from __future__ import annotations

import pytest

from ringfence.cpu.faults import GeneralProtection

TPR, PPR, EOI, LDR, SVR, ESR = 0x80, 0xA0, 0xB0, 0xD0, 0xF0, 0x280
ICR, ICR_HIGH, LVT_TIMER, LINT0, LVT_ERROR = 0x300, 0x310, 0x320, 0x350, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
EN, EXTD, BSP = 0x800, 0x400, 0x100


@pytest.fixture
def lapic(rig):
    rig.apic(SVR, 0x1FF)
    return rig.board.lapics[0]


def test_identity(rig) -> None:
    assert rig.apic(0x20) == 0
    assert rig.apic(0x30) == 0x50014
    assert rig.board.msr_read(0, 0x1B) == 0xFEE00000 | EN | BSP


@pytest.mark.parametrize(
    ("tpr", "serving", "requested", "pending"),
    [
        (0, None, 0x31, 0x31),
        (0x30, None, 0x31, None),
        (0x2F, None, 0x31, 0x31),
        (0, 0x41, 0x45, None),
        (0, 0x41, 0x51, 0x51),
        (0x60, 0x41, 0x55, None),
        (0xF0, None, 0xFF, None),
    ],
)
def test_priority(lapic, tpr, serving, requested, pending) -> None:
    if serving is not None:
        lapic.accept(serving, False)
        assert lapic.acknowledge() == serving
    lapic.write_cr8(tpr >> 4)
    lapic._write_tpr(tpr)
    lapic.accept(requested, False)
    assert lapic.pending_vector() == pending


def test_service_cycle_and_wakes(rig, lapic) -> None:
    rig.events.clear()
    lapic.accept(0x40, False)
    assert rig.events == [("wake", 0)]
    assert rig.apic(0x200 + 0x20) == 1  # IRR, vectors 0x40-0x5f
    assert rig.take() == 0x40
    assert rig.apic(0x100 + 0x20) == 1
    assert rig.apic(PPR) == 0x40
    lapic.accept(0x41, False)
    assert rig.events == [("wake", 0)]
    rig.apic(EOI, 0)
    assert rig.events == [("wake", 0)] * 2
    assert rig.take() == 0x41
    rig.apic(EOI, 0)
    assert rig.apic(PPR) == 0
    assert rig.board.acknowledge(0) == 0xFF  # spurious


def test_lowering_cr8_wakes(rig, lapic) -> None:
    rig.board.write_cr8(0, 5)
    assert rig.apic(TPR) == 0x50
    lapic.accept(0x41, False)
    assert not rig.board.interrupt_pending(0)
    rig.events.clear()
    rig.board.write_cr8(0, 3)
    assert rig.events == [("wake", 0)]
    assert rig.board.read_cr8(0) == 3


def test_software_disable_masks_the_lvt_and_refuses(rig, lapic) -> None:
    rig.apic(LVT_TIMER, 0x30)
    rig.apic(SVR, 0xFF)
    assert rig.apic(LVT_TIMER) == 0x10030
    assert not lapic.accepts_fixed
    assert rig.apic(LVT_TIMER, 0x31) == 0x10031


def test_errors(rig, lapic) -> None:
    rig.apic(LVT_ERROR, 0x77)
    rig.apic(ICR, 0x40005)  # self, vector 5
    assert rig.take() == 0x77
    rig.apic(ESR, 0)
    assert rig.apic(ESR) == 0x20
    rig.apic(0x3D0)
    rig.apic(ESR, 0)
    assert rig.apic(ESR) == 0x80


@pytest.mark.parametrize(
    ("values", "ok"),
    [
        ([EN | EXTD], True),
        ([EN | EXTD, EN], False),
        ([EN | EXTD, 0], True),
        ([0, EN], True),
        ([0, EN | EXTD], False),
        ([EXTD], False),
        ([EN | EXTD, EXTD], False),
        ([EN | 1], False),
        ([EN | 1 << 40], False),
        ([EN | 1 << 60], False),
    ],
)
def test_apic_base_transitions(rig, values, ok) -> None:
    *first, last = [0xFEE00000 | BSP | value for value in values]
    for value in first:
        rig.board.msr_write(0, 0x1B, value)
    if ok:
        rig.board.msr_write(0, 0x1B, last)
        assert rig.board.msr_read(0, 0x1B) == last
    else:
        with pytest.raises(GeneralProtection):
            rig.board.msr_write(0, 0x1B, last)


def x2apic(rig, cpu: int = 0) -> None:
    rig.board.msr_write(cpu, 0x1B, 0xFEE00000 | EN | EXTD | (BSP if cpu == 0 else 0))
    rig.board.msr_write(cpu, 0x80F, 0x1FF)


def test_x2apic_registers(rig2) -> None:
    x2apic(rig2, 1)
    read = rig2.board.msr_read
    assert (read(1, 0x802), read(1, 0x803), read(1, 0x80D)) == (1, 0x50014, 2)
    rig2.board.msr_write(1, 0x83F, 0x55)
    assert read(1, 0x822) == 1 << 0x15
    assert rig2.take(1) == 0x55
    rig2.board.msr_write(1, 0x80B, 0)
    assert rig2.board.mmio_read(0xFEE00020, 4, cpu=1) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0x80B, 1), (0x80D, 0), (0x80E, 0), (0x802, 0), (0x808, 0x100), (0x810, 0), (0x828, 1),
        (0x831, 0), (0x839, 0), (0x830, 0x100000), (0x83F, 0x100), (0x838, 1 << 32), (0x8FF, 0),
        (0x832, 1 << 20), (0x80F, 1 << 9), (0x82F, 0),
    ],
)  # fmt: skip
def test_x2apic_reserved_writes(rig, index, value) -> None:
    x2apic(rig)
    with pytest.raises(GeneralProtection):
        rig.board.msr_write(0, index, value)


@pytest.mark.parametrize("index", [0x800, 0x80B, 0x80E, 0x831, 0x83F, 0x8FF, 0x10])
def test_x2apic_reserved_reads(rig, index) -> None:
    with pytest.raises(GeneralProtection):  # xAPIC mode: none is there
        rig.board.msr_read(0, 0x802)
    x2apic(rig)
    if index == 0x80B:
        index = 0x80C
    with pytest.raises(GeneralProtection):
        rig.board.msr_read(0, index)


@pytest.mark.parametrize(
    ("high", "low", "targets"),
    [
        (1 << 24, 0x41, [1]),
        (0, 0x41, [0]),
        (0xFF << 24, 0x41, [0, 1]),
        (0, 0x40041, [0]),
        (0, 0x80041, [0, 1]),
        (0, 0xC0041, [1]),
        (2 << 24, 0x841, [1]),
        (3 << 24, 0x841, [0, 1]),
        (3 << 24, 0x941, [0]),
        (7 << 24, 0x41, []),
    ],
)
def test_ipi_destinations(rig2, high, low, targets) -> None:
    for cpu in range(2):
        rig2.apic(SVR, 0x1FF, cpu)
        rig2.apic(LDR, 1 << 24 + cpu, cpu)
    rig2.apic(ICR_HIGH, high)
    rig2.apic(ICR, low)
    taken = [cpu for cpu in range(2) if rig2.board.lapics[cpu].pending_vector() == 0x41]
    assert taken == targets


def test_init_sipi_nmi_leave_as_signals(rig2) -> None:
    rig2.apic(ICR_HIGH, 1 << 24)
    rig2.events.clear()
    for low in (0xC500, 0x8500, 0x0608, 0x0400):
        rig2.apic(ICR, low)
    assert rig2.events == [(1, "INIT", 0), (1, "SIPI", 8), (1, "NMI", 0)]


def test_x2apic_ipi_logical(rig2) -> None:
    x2apic(rig2, 0)
    x2apic(rig2, 1)
    rig2.board.msr_write(0, 0x830, 2 << 32 | 0x841)
    assert rig2.take(1) == 0x41
    rig2.board.msr_write(1, 0x830, 0xFFFFFFFF << 32 | 0x42)
    assert rig2.take(0) == 0x42


@pytest.mark.parametrize(
    ("divide", "by"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)],
)
def test_one_shot(rig, lapic, divide, by) -> None:
    rig.apic(LVT_TIMER, 0x60)
    rig.apic(DIVIDE, divide)
    rig.apic(INITIAL, 1000)
    rig.clock.advance(250 * by)
    assert rig.apic(CURRENT) == 750
    rig.clock.advance(750 * by - 1)
    assert rig.take() is None
    rig.clock.advance(1)
    assert rig.take() == 0x60
    assert rig.apic(CURRENT) == 0
    rig.apic(EOI, 0)
    rig.clock.advance(10**9)
    assert rig.take() is None


def test_periodic(rig, lapic) -> None:
    rig.apic(DIVIDE, 11)
    rig.apic(LVT_TIMER, 0x20060)
    rig.apic(INITIAL, 1_000_000)
    for _ in range(5):
        rig.clock.advance(1_000_000)
        assert rig.take() == 0x60
        rig.apic(EOI, 0)
    rig.clock.advance(400_000)
    assert rig.apic(CURRENT) == 600_000
    rig.apic(INITIAL, 0)
    rig.clock.advance(10_000_000)
    assert rig.take() is None


def test_periodic_too_fast_is_slowed(rig, lapic) -> None:
    rig.apic(DIVIDE, 11)
    rig.apic(LVT_TIMER, 0x20060)
    rig.apic(INITIAL, 1)
    rig.events.clear()
    for _ in range(3):
        rig.clock.advance(100_000)
        assert rig.take() == 0x60
        rig.apic(EOI, 0)


def test_tsc_deadline(rig, lapic) -> None:
    write = rig.board.msr_write
    write(0, 0x6E0, 5000)  # not in the mode: ignored
    assert rig.board.msr_read(0, 0x6E0) == 0
    rig.apic(LVT_TIMER, 0x40060)
    write(0, 0x6E0, 20_001)  # 2 GHz: 10000.5 ns
    assert rig.board.msr_read(0, 0x6E0) == 20_001
    rig.clock.advance(10_000)
    assert rig.take() is None
    rig.clock.advance(1)
    assert rig.take() == 0x60
    assert rig.board.msr_read(0, 0x6E0) == 0
    rig.apic(EOI, 0)
    write(0, 0x6E0, 1)  # in the past: at once
    assert rig.take() == 0x60
    rig.apic(EOI, 0)
    write(0, 0x6E0, 10**9)
    write(0, 0x6E0, 0)
    rig.clock.advance(10**9)
    assert rig.take() is None


def test_masked_timer_runs_silently(rig, lapic) -> None:
    rig.apic(LVT_TIMER, 0x10060)
    rig.apic(INITIAL, 100)
    rig.clock.advance(1000)
    assert rig.take() is None


def test_changing_the_divider_keeps_the_count(rig, lapic) -> None:
    rig.apic(DIVIDE, 11)
    rig.apic(LVT_TIMER, 0x60)
    rig.apic(INITIAL, 1000)
    rig.clock.advance(500)
    rig.apic(DIVIDE, 0)
    assert rig.apic(CURRENT) == 500
    rig.clock.advance(999)
    assert rig.take() is None
    rig.clock.advance(1)
    assert rig.take() == 0x60


def test_a_count_shorter_than_our_own_work_fires(rig, lapic, monkeypatch) -> None:
    """A count of one tick ends while its register is still being written; it fires all the same."""
    now = rig.clock.now

    def hurried() -> int:
        rig.clock.advance(100)
        return now()

    rig.apic(LVT_TIMER, 0x40)
    rig.apic(DIVIDE, 0xB)
    monkeypatch.setattr(rig.clock, "now", hurried)
    rig.apic(INITIAL, 1)
    monkeypatch.undo()
    rig.clock.advance(1000)
    assert rig.take() == 0x40


def test_between_one_shot_and_periodic_the_count_goes_on(rig, lapic) -> None:
    rig.apic(DIVIDE, 0xB)
    rig.apic(LVT_TIMER, 0x50)
    rig.apic(INITIAL, 1_000_000)
    rig.clock.advance(600_000)
    rig.apic(LVT_TIMER, 0x20050)
    assert rig.apic(CURRENT) == 400_000
    rig.clock.advance(700_000)
    assert rig.take() == 0x50
    assert rig.apic(CURRENT) == 700_000
    rig.apic(EOI, 0)
    rig.apic(LVT_TIMER, 0x50)
    assert rig.apic(CURRENT) == 700_000
    rig.clock.advance(700_000)
    assert rig.take() == 0x50
    assert rig.apic(CURRENT) == 0


def test_a_count_that_has_run_out_stays_at_zero(rig, lapic) -> None:
    rig.apic(DIVIDE, 0xB)
    rig.apic(LVT_TIMER, 0x50)
    rig.apic(INITIAL, 1_000_000)
    rig.clock.advance(1_500_000)
    assert rig.take() == 0x50
    rig.apic(EOI, 0)
    rig.apic(LVT_TIMER, 0x20050)
    rig.clock.advance(5_000_000)
    assert rig.apic(CURRENT) == 0
    assert rig.take() is None
    rig.apic(INITIAL, 1_000_000)
    rig.clock.advance(1_000_000)
    assert rig.take() == 0x50
