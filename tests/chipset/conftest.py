"""A board on a mock clock, with everything that leaves it recorded."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.chipset.board import Board
from ringfence.chipset.clock import MockClock

WALL = 1_709_251_199 * 1_000_000_000
"""2024-02-29 23:59:59 UTC, a Thursday."""


class MockTsc:
    """A TSC of 2 GHz that follows a mock clock."""

    hz = 2_000_000_000

    def __init__(self, clock: MockClock) -> None:
        self._clock = clock

    def read(self) -> int:
        return self._clock.now() * 2

    def vcpu(self, number: int) -> MockTsc:
        return self


class Rig:
    """A board and what came out of it."""

    def __init__(
        self, cpus: int = 1, memory_size: int = 256 << 20, generation: bytes = bytes(16)
    ) -> None:
        self.clock = MockClock(WALL)
        self.console = bytearray()
        self.events: list[Any] = []
        self.board = Board(
            clock=self.clock,
            tsc=MockTsc(self.clock),
            memory_size=memory_size,
            cpus=cpus,
            generation=generation,
            console_sink=self.console.extend,
            on_power_off=lambda: self.events.append("off"),
            on_reset=lambda: self.events.append("reset"),
        )
        self.board.on_signal = lambda cpu, mode, vector: self.events.append(
            (cpu, mode.name, vector)
        )
        for cpu in range(cpus):
            self.board.set_wake(cpu, lambda cpu=cpu: self.events.append(("wake", cpu)))

    def out(self, port: int, *values: int) -> None:
        """Write bytes to a port."""
        for value in values:
            self.board.port_write(port, 1, value)

    def inb(self, port: int) -> int:
        """Read a byte from a port."""
        return self.board.port_read(port, 1)

    def apic(self, offset: int, value: int | None = None, cpu: int = 0) -> int:
        """Read or write a local APIC register."""
        if value is not None:
            self.board.mmio_write(0xFEE00000 + offset, 4, value, cpu)
        return self.board.mmio_read(0xFEE00000 + offset, 4, cpu)

    def ioapic(self, index: int, value: int | None = None) -> int:
        """Read or write an I/O APIC register."""
        self.board.mmio_write(0xFEC00000, 4, index)
        if value is not None:
            self.board.mmio_write(0xFEC00010, 4, value)
        return self.board.mmio_read(0xFEC00010, 4)

    def route(self, pin: int, entry: int) -> None:
        """Write a redirection entry."""
        self.ioapic(0x11 + 2 * pin, entry >> 32)
        self.ioapic(0x10 + 2 * pin, entry & 0xFFFFFFFF)

    def start_pic(self, imr: int = 0) -> None:
        """Initialize both 8259s as PCs do: vectors 0x30 and 0x38."""
        for base, icws in ((0x20, (0x30, 0x04, 0x01)), (0xA0, (0x38, 0x02, 0x01))):
            self.out(base, 0x11)
            self.out(base + 1, *icws, imr)

    def take(self, cpu: int = 0) -> int | None:
        """Acknowledge what is pending, or None."""
        return self.board.acknowledge(cpu) if self.board.interrupt_pending(cpu) else None


@pytest.fixture
def rig() -> Rig:
    """One CPU."""
    return Rig()


@pytest.fixture
def rig2() -> Rig:
    """Two CPUs."""
    return Rig(cpus=2)
