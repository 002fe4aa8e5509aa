"""Tables of the MultiProcessor Specification."""

from __future__ import annotations

import struct

import pytest

from ringfence.chipset import mptable
from ringfence.chipset.pci.host import gsi_of

LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


@pytest.mark.parametrize("cpus", [1, 4, 32])
def test_tables_are_whole(cpus: int) -> None:
    image = mptable.build_mp_tables(0xF0000, cpus)
    pointer, table = image[:16], image[16:]
    assert (pointer[:4], struct.unpack_from("<I", pointer, 4)[0]) == (b"_MP_", 0xF0010)
    length, count = struct.unpack_from("<H", table, 4)[0], struct.unpack_from("<H", table, 34)[0]
    assert (table[:4], length) == (b"PCMP", len(table))
    assert sum(pointer) % 256 == sum(table) % 256 == 0
    entries, at = [], 44
    while at < length:
        entries.append(table[at : at + LENGTHS[table[at]]])
        at += LENGTHS[table[at]]
    assert len(entries) == count
    processors = [entry for entry in entries if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1)
    wires = {(entry[4], entry[5]): entry[7] for entry in entries if entry[0] == 3}
    assert (wires[1, 0], wires[1, 4], (1, 2) in wires) == (2, 4, False)
    assert wires[0, 3 << 2 | 1] == gsi_of(3, 1)
