"""What a BIOS leaves behind: the words that kernels look for, and vectors that return."""

from __future__ import annotations

import struct

from boot.kernels import MIB
from ringfence.boot import bios
from ringfence.memory.ram import GuestMemory


def test_data_area_and_vectors() -> None:
    memory = GuestMemory(2 * MIB)
    bios.store_bios_remains(memory, 0x3F8)

    def word(address: int) -> int:
        return int(struct.unpack("<H", memory.read(address, 2))[0])

    def routine(vector: int) -> bytes:
        offset, segment = struct.unpack("<HH", memory.read(4 * vector, 4))
        return memory.read((segment << 4) + offset, 16).split(b"\xcf")[0]

    assert (word(0x400), word(0x402), word(0x40E)) == (0x3F8, 0, 0x9FC0)
    assert (word(0x410), word(0x413)) == (1 << 9 | 1 << 1, 639)
    assert word(0x9FC00) == 1
    assert {routine(vector) for vector in (*range(0x10), *range(0x20, 0x100))} == {b""}
    assert routine(0x15) == routine(0x13) == routine(0x1A) != b""
    assert routine(0x12) == b"\xb8" + struct.pack("<H", 639)
    assert routine(0x11) == b"\xb8" + struct.pack("<H", word(0x410))
    memory.close()
