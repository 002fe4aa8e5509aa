"""A machine's board and services without an engine, and how its guest's kernel calls them."""

from __future__ import annotations

from typing import Any

from ringfence.chipset.board import Board
from ringfence.chipset.clock import HostClock
from ringfence.chipset.timekeeping import Timekeeper
from ringfence.cpu.tsc import MASK64, Tsc
from ringfence.memory.ram import GuestMemory
from ringfence.paravirt.hypercalls import Functions
from ringfence.paravirt.services import Paravirtual

RAM = 4 << 20
CPUS = 4


class Guest:
    """A machine's board and services; `call` is VMCALL of its kernel."""

    def __init__(self) -> None:
        self.memory = GuestMemory(RAM)
        self.time = Timekeeper(HostClock(), Tsc())
        self.signals: list[Any] = []
        self.kicked: list[int] = []
        self.board = Board(
            clock=self.time.clock,
            tsc=self.time.tsc,
            memory_size=RAM,
            cpus=CPUS,
            console_sink=lambda data: None,
        )
        self.board.on_signal = lambda cpu, mode, vector: self.signals.append((cpu, mode.name))
        for cpu in range(CPUS):
            self.board.mmio_write(0xFEE000F0, 4, 0x1FF, cpu)
        self.functions = Functions()
        kicks = [lambda cpu=cpu: self.kicked.append(cpu) for cpu in range(CPUS)]
        self.services = Paravirtual(self.memory, self.time, self.board, kicks, self.functions)

    def call(self, number: int, *arguments: int, cpl: int = 0, bits: int = 64) -> int:
        """The result, errors negative."""
        given = [*arguments, 0, 0, 0, 0][:4]
        result = self.services.vcpus[0].hypercall(cpl, number, given, bits)
        assert 0 <= result <= MASK64
        return result - (1 << 64) if result >> 63 else result

    def requests(self, cpu: int) -> int:
        """IRR."""
        return self.board.lapics[cpu].irr
