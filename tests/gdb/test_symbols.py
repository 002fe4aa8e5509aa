"""Kernels' own symbols and unwind tables, made small and in each layout."""

from __future__ import annotations

import io
import random
import struct
from typing import Any

import pytest
from elftools.dwarf.callframe import FDE, CallFrameInfo
from elftools.dwarf.structs import DWARFStructs

from ringfence.errors import ImageError
from ringfence.gdb.kallsyms import read_kallsyms
from ringfence.gdb.orc import RBP, RIP, RSP, debug_frame, read_orc
from ringfence.gdb.symbols import symbol_file

BASE = 0xFFFFFFFF81000000
NAMES = [f"function_{n}_{'x' * (n % 150)}" for n in range(700)]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def tables(*, new: bool, sequences: bool, percpu: bool) -> bytes:
    """What scripts/kallsyms.c writes; every byte of a name is a token."""
    tokens = [bytes((n,)) if 32 < n < 127 else b"<%d>" % n for n in range(256)]
    names, markers = b"", []
    for n, name in enumerate(NAMES):
        if n % 256 == 0:
            markers.append(len(names))
        raw = b"T" + name.encode()
        length = (
            bytes((len(raw),)) if len(raw) < 128 else bytes((len(raw) & 127 | 128, len(raw) >> 7))
        )
        names += length + raw
    count = len(NAMES)
    offsets = [-1 - 16 * n if percpu else 16 * n for n in range(count)]
    places = [sum(len(token) + 1 for token in tokens[:n]) for n in range(256)]
    addresses = padded(struct.pack(f"<{count}i", *offsets)) + struct.pack("<Q", BASE)
    middle = (
        padded(struct.pack("<I", count))
        + padded(names)
        + padded(struct.pack(f"<{len(markers)}I", *markers))
        + (padded(b"".join(n.to_bytes(3, "big") for n in range(count))) if sequences else b"")
        + padded(b"".join(token + b"\0" for token in tokens))
        + padded(struct.pack("<256H", *places))
    )
    body = middle + addresses if new else addresses + middle
    return b"0\x001\x00 not these\0".ljust(256, b"\x55") + body + b"\x77" * 4096


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("percpu", [False, True])
def test_each_layout(new: bool, sequences: bool, percpu: bool) -> None:
    found = read_kallsyms(tables(new=new, sequences=sequences, percpu=percpu))
    assert [symbol.name for symbol in found] == NAMES
    assert [symbol.address for symbol in found] == [BASE + 16 * n for n in range(len(NAMES))]
    assert {symbol.kind for symbol in found} == {"T"}


def test_no_symbols() -> None:
    chance = random.Random(5)
    whole = tables(new=False, sequences=True, percpu=True)
    for data in (b"", b"\0" * 100_000, chance.randbytes(100_000), whole[:5000], whole[6000:]):
        with pytest.raises(ImageError):
            read_kallsyms(data)
    for data in (
        b"",
        b"\x7fELF",
        b"\x7fELF\2\1\1" + bytes(200),
        b"\x7fELF" + chance.randbytes(500),
    ):
        with pytest.raises(ImageError):
            symbol_file(data)


def test_damaged_tables() -> None:
    chance = random.Random(6)
    for _ in range(60):
        data = bytearray(tables(new=False, sequences=False, percpu=True))
        for _ in range(chance.randrange(1, 40)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            read_kallsyms(bytes(data))
        except ImageError:
            continue


def unwind(section: bytes) -> list[FDE]:
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    information: Any = CallFrameInfo(io.BytesIO(section), len(section), 0, structs)
    return [entry for entry in information.get_entries() if isinstance(entry, FDE)]


OLD = {"call": 0, "regs": 1, "partial": 2}
NEW = {"call": 2, "regs": 3, "partial": 4}


@pytest.mark.parametrize("new", [False, True])
def test_rows(new: bool) -> None:
    kinds = NEW if new else OLD
    rows = [  # address, sp offset, bp offset, sp register, bp register, kind
        (0, 8, 0, 5, 0, "call"),
        (1, 16, -16, 5, 1, "call"),
        (4, 16, -16, 4, 1, "call"),
        (32, 0, 0, 5, 0, "regs"),
        (40, 8, 0, 5, 0, "partial"),
        (48, 0, 0, 0, 0, "call"),
    ]
    places = b"".join(struct.pack("<i", at - 4 * n) for n, (at, *_) in enumerate(rows))
    entries = b"".join(
        struct.pack("<hhH", sp, bp, sp_reg | bp_reg << 4 | kinds[kind] << 8)
        for _, sp, bp, sp_reg, bp_reg, kind in rows
    )
    read = read_orc(places, entries, BASE, new=new)
    assert [row.address - BASE for row in read] == [row[0] for row in rows]
    section = debug_frame(read, [BASE, BASE + 32], BASE + 64)
    first, second = unwind(section)
    assert (first["initial_location"], first["address_range"]) == (BASE, 32)
    table = {row["pc"] - BASE: row for row in first.get_decoded().table}
    assert (table[0]["cfa"].reg, table[0]["cfa"].offset) == (RSP, 8)
    assert (table[1]["cfa"].reg, table[1]["cfa"].offset) == (RSP, 16)
    assert table[1][RBP].arg == -16 and table[1][RIP].arg == -8
    assert (table[4]["cfa"].reg, table[4]["cfa"].offset) == (RBP, 16)
    table = {row["pc"] - BASE: row for row in second.get_decoded().table}
    assert table[32][RIP].arg == 0x80 and table[32][RSP].arg == 0x98 and table[32][RBP].arg == 0x20
    assert table[40][RIP].arg == 0 and table[40][RSP].arg == 0x18
    assert table[48][RIP].type == "UNDEFINED"
