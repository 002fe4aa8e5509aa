"""A CPU on flat memory whose effects are compiled once for all tests of this room."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from cpu import flat
from cpu.tables import Rig
from ringfence.cpu import exceptions, flags, segments, syscalls, transfer
from ringfence.cpu.state import NO_EXCEPTION, Cpu
from ringfence.native.compiler import compile_image
from ringfence.native.dialect import NativeFunction
from ringfence.native.library import Library


class FlatMachine:
    """One CPU, its flat memory at linear address ``BASE``, and the effects by name."""

    BASE = 0x10000
    SIZE = 0x40000

    def __init__(self, library: Library) -> None:
        self._library = library
        kind = flat.FlatCpu
        self._state = ctypes.create_string_buffer(kind.size + 64)
        self._memory = ctypes.create_string_buffer(self.SIZE)
        self.address = -(-ctypes.addressof(self._state) // 64) * 64
        self.cpu: Any = kind.at(self.address)
        cpu = self.cpu
        cpu.flat_host = ctypes.addressof(self._memory)
        cpu.flat_base = self.BASE
        cpu.flat_size = self.SIZE
        cpu.flat_hole = cpu.flat_supervisor = (1 << 64) - 1
        cpu.exc_vector = cpu.delivering = NO_EXCEPTION
        cpu.cr0 = 0x80050033
        cpu.cr4 = 0x6F0
        cpu.efer = 0xD01

    def run(self, name: str, *arguments: int) -> int:
        """Call a native function with the CPU and what else it takes; returns its status."""
        function = self._library.function(name, 1 + len(arguments))
        return int(function(self.address, *arguments))

    def effect(self, name: str, *operands: int, rip: int = 0x1000, length: int = 2) -> int:
        """Carry out an effect with operands, as the instruction at ``rip``."""
        self.cpu.rip = rip
        self.cpu.next_rip = rip + length
        for number, value in enumerate(operands):
            self.cpu.op[number] = value & ((1 << 64) - 1)
        return self.run(name)

    def read(self, address: int, size: int = 8) -> int:
        """Little-endian integer at a linear address."""
        at = address - self.BASE
        return int.from_bytes(self._memory.raw[at : at + size], "little")

    def write(self, address: int, value: int, size: int = 8) -> None:
        """Put a little-endian integer at a linear address."""
        at = address - self.BASE
        assert 0 <= at <= self.SIZE - size
        self._memory[at : at + size] = (value & ((1 << size * 8) - 1)).to_bytes(size, "little")

    def snapshot(self) -> bytes:
        """The architectural state, without the fields that report an exception or a read."""
        copy = ctypes.create_string_buffer(ctypes.string_at(self.address, Cpu.size), Cpu.size)
        for name in ("exc_vector", "exc_error", "exc_address", "value", "delivering", "op"):
            field = Cpu.fields[name]
            count = field.width * max(field.count, 1)
            copy[field.offset : field.offset + count] = bytes(count)
        return copy.raw

    @property
    def pending(self) -> tuple[int, int]:
        """Vector and error code of the pending exception."""
        return self.cpu.exc_vector, self.cpu.exc_error


Build = Callable[..., Library]


@pytest.fixture(scope="session")
def build_natives() -> Build:
    """Compile all native functions of modules, with flat memory behind them; remembered."""
    made: dict[tuple[str, ...], Library] = {}

    def build(*modules: ModuleType) -> Library:
        key = tuple(m.__name__ for m in modules)
        if key not in made:
            roots = [
                value
                for module in (*modules, flat)
                for value in vars(module).values()
                if isinstance(value, NativeFunction) and not value.external and not value.inline
            ]
            made[key] = Library(compile_image(roots))
        return made[key]

    return build


@pytest.fixture
def flat_machine(build_natives: Build) -> Iterator[Callable[..., FlatMachine]]:
    """Make a machine with the effects of modules: ``flat_machine(segments, transfer)``."""

    def make(*modules: ModuleType) -> FlatMachine:
        return FlatMachine(build_natives(*modules))

    yield make


@pytest.fixture
def rig(flat_machine: Callable[..., FlatMachine]) -> Rig:
    """A kernel's tables, and the effects that go by them."""
    return Rig(flat_machine(flags, segments, exceptions, transfer, syscalls))
