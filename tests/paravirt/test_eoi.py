"""Interrupts that a guest ends by a bit in its memory, and all that may come in between."""

from __future__ import annotations

import random

import pytest

from paravirt.support import RAM, Guest
from ringfence.chipset.apicbus import Delivery
from ringfence.cpu.faults import GeneralProtection
from ringfence.paravirt.eoi import MSR_PV_EOI

WORD = 0x3FFC
EOI = 0xFEE000B0
LEVEL = 0x8000


class Cpu:
    """CPU 0 of a guest: takes interrupts, and ends them as Linux does."""

    def __init__(self, guest: Guest, enabled: bool = True) -> None:
        self.guest = guest
        self.board = guest.board
        self.wakes = 0
        self.serving: list[int] = []
        self.board.set_wake(0, self._woken)
        self.exits = 0
        if enabled:
            guest.services.vcpus[0].msr_write(MSR_PV_EOI, WORD | 1)

    def _woken(self) -> None:
        self.wakes += 1

    def send(self, vector: int, level: bool = False) -> None:
        """Another device or CPU requests an interrupt."""
        self.board.send_msi(0xFEE00000, vector | Delivery.FIXED << 8 | (LEVEL if level else 0))

    def take(self) -> int:
        """What an engine does when it is woken; the vector, or -1."""
        if not self.board.interrupt_pending(0):
            return -1
        vector = self.board.acknowledge(0)
        self.serving.append(vector)
        return vector

    def end(self) -> None:
        """The handler's last act."""
        self.serving.pop()
        memory = self.guest.memory
        value = memory.read(WORD, 1)[0]
        if value & 1:
            memory.write(WORD, bytes([value & ~1]))
        else:
            self.exits += 1
            self.board.mmio_write(EOI, 4, 0)


@pytest.fixture
def cpu(guest: Guest) -> Cpu:
    return Cpu(guest)


def test_a_single_interrupt_needs_no_exit(cpu: Cpu) -> None:
    for vector in (0x41, 0x41, 0xEC, 0x33):
        cpu.send(vector)
        assert cpu.take() == vector
        assert cpu.take() == -1
        cpu.end()
    assert cpu.exits == 0
    cpu.send(0x31)
    assert cpu.take() == 0x31


def test_without_the_service_every_end_is_an_exit(guest: Guest) -> None:
    it = Cpu(guest, enabled=False)
    it.send(0x41)
    assert it.take() == 0x41
    it.end()
    assert it.exits == 1
    assert guest.memory.read(WORD, 4) == bytes(4)


def test_a_lower_one_that_comes_while_a_handler_runs(cpu: Cpu) -> None:
    """It wakes the CPU although its priority is too low: nobody else would notice the end."""
    cpu.send(0x81)
    assert cpu.take() == 0x81
    wakes = cpu.wakes
    cpu.send(0x41)
    assert cpu.wakes == wakes + 1
    assert cpu.take() == -1  # the bit is taken back, as the end has to be heard of
    cpu.end()
    assert cpu.exits == 1
    assert cpu.wakes == wakes + 2
    assert cpu.take() == 0x41


def test_a_lower_one_that_comes_after_the_silent_end(cpu: Cpu) -> None:
    cpu.send(0x81)
    cpu.take()
    cpu.end()
    wakes = cpu.wakes
    cpu.send(0x41)
    assert cpu.wakes == wakes + 1
    assert cpu.take() == 0x41
    assert cpu.exits == 0


def test_a_higher_one_on_top(cpu: Cpu) -> None:
    cpu.send(0x41)
    cpu.take()
    cpu.send(0x81)
    assert cpu.take() == 0x81
    cpu.end()  # silent, the inner one
    assert cpu.exits == 0
    assert cpu.board.lapics[0].isr >> 0x41 & 1
    cpu.end()
    assert cpu.exits == 1
    assert cpu.board.lapics[0].isr == 0


def test_several_that_wait_are_ended_by_exits(cpu: Cpu) -> None:
    cpu.send(0x41)
    cpu.send(0x42)
    assert cpu.take() == 0x42
    assert cpu.guest.memory.read(WORD, 4) == bytes(4)
    cpu.end()
    assert cpu.take() == 0x41
    cpu.end()
    assert cpu.exits == 1


def test_level_triggered_ones_are_ended_by_exits(cpu: Cpu) -> None:
    cpu.send(0x41, level=True)
    assert cpu.take() == 0x41
    cpu.end()
    assert cpu.exits == 1


def test_a_guest_that_writes_eoi_all_the_same(cpu: Cpu) -> None:
    cpu.send(0x41)
    cpu.take()
    cpu.board.mmio_write(EOI, 4, 0)
    assert cpu.board.lapics[0].isr == 0
    assert cpu.guest.memory.read(WORD, 1) == b"\0"


def test_registers_show_the_end(cpu: Cpu) -> None:
    cpu.send(0x81)
    cpu.take()
    assert cpu.board.mmio_read(0xFEE000A0, 4) == 0x80
    cpu.end()
    assert cpu.board.mmio_read(0xFEE000A0, 4) == 0
    assert cpu.board.mmio_read(0xFEE00140, 4) == 0


def test_moving_and_disabling_it(cpu: Cpu) -> None:
    services = cpu.guest.services.vcpus[0]
    cpu.send(0x41)
    cpu.take()
    services.msr_write(MSR_PV_EOI, WORD + 4 | 1)
    assert cpu.guest.memory.read(WORD, 8) == bytes(8)
    cpu.end()
    assert cpu.exits == 1
    services.msr_write(MSR_PV_EOI, 0)
    cpu.send(0x41)
    cpu.take()
    assert cpu.guest.memory.read(WORD, 8) == bytes(8)


def test_init_ends_it(cpu: Cpu) -> None:
    services = cpu.guest.services.vcpus[0]
    cpu.board.lapics[0].reset_by_init()
    assert services.msr_read(MSR_PV_EOI) == 0
    assert services.eoi.save()["register"] == 0


@pytest.mark.parametrize(
    "value", [RAM | 1, RAM - 2 | 1, 0xFEE00001, 1 << 63 | 1, (1 << 64) - 3, 0x1002, 0x1003]
)
def test_bad_words(cpu: Cpu, value: int) -> None:
    services = cpu.guest.services.vcpus[0]
    with pytest.raises(GeneralProtection):
        services.msr_write(MSR_PV_EOI, value)
    assert services.msr_read(MSR_PV_EOI) == WORD | 1


@pytest.mark.parametrize("ended", [True, False])
def test_a_snapshot_in_a_handler(cpu: Cpu, ended: bool) -> None:
    cpu.send(0x81)
    cpu.take()
    if ended:
        cpu.end()
    board, services = cpu.board.save(), cpu.guest.services.save()
    other = Guest()
    try:
        other.memory.write(WORD, cpu.guest.memory.read(WORD, 4))
        there = Cpu(other, enabled=False)
        there.serving = list(cpu.serving)
        other.services.restore(services)
        other.board.restore(board)
        there.send(0x41)
        assert there.take() == (0x41 if ended else -1)
        if not ended:
            there.end()
            assert there.take() == 0x41
    finally:
        other.memory.close()


@pytest.mark.parametrize("seed", range(6))
def test_the_order_is_that_of_a_guest_without_it(guest: Guest, seed: int) -> None:
    """Random requests and ends: the same vectors in the same order, no request is lost."""
    plain_guest = Guest()
    try:
        silent, plain = Cpu(guest), Cpu(plain_guest, enabled=False)
        source = random.Random(seed)
        for _ in range(2000):
            choice = source.random()
            if choice < 0.25:
                vector, level = source.randrange(0x30, 0xF0, 7), source.random() < 0.1
                for it in (silent, plain):
                    it.send(vector, level)
            elif choice < 0.7 and plain.serving:
                for it in (silent, plain):
                    it.end()
            elif choice < 0.75:
                assert silent.board.mmio_read(0xFEE000A0, 4) == plain.board.mmio_read(0xFEE000A0, 4)
            wakes = silent.wakes
            assert silent.take() == plain.take()
            assert silent.serving == plain.serving
            assert silent.wakes >= wakes
        assert silent.exits < plain.exits
    finally:
        plain_guest.memory.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_word_that_the_guest_scribbles_on(guest: Guest, seed: int) -> None:
    it = Cpu(guest)
    source = random.Random(seed)
    for _ in range(1000):
        guest.memory.write(WORD, source.randbytes(4))
        it.send(source.randrange(256))
        it.take()
        if source.random() < 0.5:
            it.board.mmio_write(EOI, 4, 0)
    assert guest.memory.read(WORD + 4, 4) == bytes(4)
