"""Native code's side of `memory.registers`, as an engine has it, for tests."""

from __future__ import annotations

import ctypes
import functools

from ringfence.memory.registers import RegisterBank, RegisterMap, read_register, write_register
from ringfence.native.compiler import compile_image
from ringfence.native.library import Library


@functools.cache
def _library() -> Library:
    return Library(compile_image([read_register, write_register], optimize=False))


class Answering:
    """Accesses by a map; the calls leave Python's lock, as guest code does."""

    def __init__(self, places: RegisterMap) -> None:
        self.places = places
        self._read = _library().function("read_register", 4, long=True)
        self._write = _library().function("write_register", 4, long=True)
        self._result = ctypes.c_uint64()

    @classmethod
    def of(cls, bank: RegisterBank, length: int = 0x20000) -> Answering:
        """Of a bank that is seen from address 0 on."""
        places = RegisterMap()
        places.show([(0, length, 0, bank)])
        return cls(places)

    def read(self, physical: int, size: int = 4) -> int | None:
        """What is read; None where it is not for native code."""
        self._result.value = 0
        done = self._read(self.places.address, physical, size, ctypes.addressof(self._result))
        return self._result.value if done else None

    def write(self, physical: int, value: int, size: int = 4) -> bool:
        """Whether the write is done."""
        return bool(self._write(self.places.address, physical, size, value))
