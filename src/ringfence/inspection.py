"""What an owner sees and changes inside a machine that stands still: memory and registers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ringfence.assembly import Parts
from ringfence.engine import VirtualCpu
from ringfence.memory.linear import read_linear, write_linear


class Inspectable(ABC):
    """A machine whose memory and registers can be seen; UsageError while its guest runs."""

    @abstractmethod
    def inspected(self) -> Parts:
        """The parts of a machine that stands still, or has ended; UsageError otherwise."""

    def read_physical(self, address: int, length: int) -> bytes:
        """Bytes of guest RAM; IndexError outside it."""
        return self.inspected().memory.read(address, length)

    def write_physical(self, address: int, data: bytes) -> None:
        """Change guest RAM as a device would; IndexError outside it."""
        self.inspected().memory.dma_write(address, data)

    @property
    def vcpus(self) -> tuple[VirtualCpu, ...]:
        """The vCPUs by number, each with its registers."""
        return self.inspected().engine.vcpus

    def read_virtual(self, address: int, length: int, cpu: int = 0) -> bytes:
        """Bytes as a paused vCPU would read them; IndexError where nothing is mapped."""
        parts = self.inspected()
        return read_linear(
            parts.memory, lambda at: parts.engine.translate(at, cpu), address, length
        )

    def write_virtual(self, address: int, data: bytes, cpu: int = 0) -> None:
        """Change RAM at an address of a paused vCPU's, all or nothing, permitted there or not.

        Raises
        ------
        IndexError
            Nothing is mapped there, or what is no RAM.
        """
        parts = self.inspected()
        write_linear(parts.memory, lambda at: parts.engine.translate(at, cpu), address, data)

    def registers(self, cpu: int = 0) -> dict[str, int]:
        """Registers of a vCPU, by the manual's lower-case names."""
        return self.inspected().engine.registers(cpu)

    def set_registers(self, values: dict[str, int], cpu: int = 0) -> None:
        """Change some registers of a vCPU."""
        self.inspected().engine.set_registers(values, cpu)
