"""Make a small read-only file system: ISO 9660 with Joliet names, one folder, plain files.

Layout, in sectors of 2048 bytes: 16 empty ones, the primary volume descriptor, Joliet's
supplementary one, the terminator; then for each of the two trees a path table in either byte order
and the root folder; then the files, which both trees point to. Section numbers are ECMA-119's (4th
edition); the Joliet specification says what differs in its tree: names are UCS-2, big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

SECTOR = 2048
FIRST = 16
"""Where volume descriptors begin (6.2.1)."""
PRIMARY, SUPPLEMENTARY, TERMINATOR = 1, 2, 255
"""Types of volume descriptors (8.1.1)."""
UCS2_LEVEL_3 = b"%/E"
"""Escape sequence of a Joliet descriptor."""
FOLDER = 1 << 1
"""File flag (9.1.6)."""
_LONG_AGO = bytes((70, 1, 1, 0, 0, 0, 0))
"""Recording date and time (9.1.5): equal contents make equal images."""
_NEVER = b"0" * 16 + b"\0"
"""A date and time that is not given (8.4.26.1)."""


@dataclass(frozen=True)
class _Extent:
    """Where something is: its first sector, its bytes."""

    sector: int
    length: int


def make_iso(label: str, files: Mapping[str, bytes]) -> bytes:
    """A file system image.

    Parameters
    ----------
    label : str
        The volume's name: up to 16 capital letters, digits and underscores.
    files : mapping
        Name to contents; few enough for their entries to fit into one sector, and with names that
        differ in their first eight letters, for readers that know short names only.
    """
    at = FIRST + 3
    tables = [(at, at + 1), (at + 2, at + 3)]
    roots = [_Extent(at + 4, SECTOR), _Extent(at + 5, SECTOR)]
    places: dict[str, _Extent] = {}
    at += 6
    for name in sorted(files):
        places[name] = _Extent(at, len(files[name]))
        at += -(-len(files[name]) // SECTOR)
    total = at
    path_table = [struct.pack(f"{order}BBIHBx", 1, 0, root.sector, 1, 0)
                  for root in roots for order in "<>"]  # fmt: skip
    parts = [
        bytes(FIRST * SECTOR),
        _descriptor(PRIMARY, label, total, tables[0], len(path_table[0]), roots[0]),
        _descriptor(SUPPLEMENTARY, label, total, tables[1], len(path_table[2]), roots[1]),
        bytes((TERMINATOR,)) + b"CD001\x01",
        *path_table,
        _folder(roots[0], {_short(name): place for name, place in places.items()}),
        _folder(roots[1], {f"{name};1".encode("utf-16-be"): p for name, p in places.items()}),
        *(files[name] for name in sorted(files)),
    ]
    return b"".join(part.ljust(-(-len(part) // SECTOR) * SECTOR, b"\0") for part in parts)


def _short(name: str) -> bytes:
    """A name as level 1 of interchange has it (10.1): ``user-data`` is ``USER_DAT.;1``."""
    stem, _, extension = name.upper().replace("-", "_").partition(".")
    return f"{stem[:8]}.{extension[:3]};1".encode("ascii")


def _both(form: str, number: int) -> bytes:
    """A number in both byte orders (7.2.3, 7.3.3)."""
    return struct.pack(f"<{form}", number) + struct.pack(f">{form}", number)


def _record(name: bytes, place: _Extent, flags: int = 0) -> bytes:
    """A directory record (9.1)."""
    body = (
        b"\0"
        + _both("I", place.sector)
        + _both("I", place.length)
        + _LONG_AGO
        + bytes((flags, 0, 0))
        + _both("H", 1)
        + bytes((len(name),))
        + name
    )
    if len(body) % 2 == 0:
        body += b"\0"
    return bytes((len(body) + 1,)) + body


def _folder(place: _Extent, files: Mapping[bytes, _Extent]) -> bytes:
    """The root folder: itself, its parent (itself), and files in order of names (9.3)."""
    records = [_record(b"\0", place, FOLDER), _record(b"\1", place, FOLDER)]
    records += [_record(name, files[name]) for name in sorted(files)]
    folder = b"".join(records)
    if len(folder) > SECTOR:
        raise ValueError(f"{len(files)} files are too many for one folder of {SECTOR} bytes")
    return folder


def _descriptor(
    kind: int, label: str, total: int, tables: tuple[int, int], table_size: int, root: _Extent
) -> bytes:
    """A primary or supplementary volume descriptor (8.4, 8.5)."""

    def text(value: str, length: int) -> bytes:
        if kind == PRIMARY:
            return value.encode("ascii").ljust(length)
        filled = value.encode("utf-16-be") + b"\0 " * (length // 2)
        return filled[: length & ~1].ljust(length, b"\0")

    return b"".join(
        (
            bytes((kind,)),
            b"CD001\x01\0",
            text("LINUX", 32),
            text(label, 32),
            bytes(8),
            _both("I", total),
            (UCS2_LEVEL_3 if kind == SUPPLEMENTARY else b"").ljust(32, b"\0"),
            _both("H", 1),  # volumes in the set
            _both("H", 1),  # this one's number
            _both("H", SECTOR),
            _both("I", table_size),
            struct.pack("<II", tables[0], 0),
            struct.pack(">II", tables[1], 0),
            _record(b"\0", root, FOLDER),
            *(text("", 128) for _ in range(4)),  # volume set, publisher, preparer, application
            *(text("", 37) for _ in range(3)),  # copyright, abstract, bibliography
            _NEVER * 4,
            b"\x01",  # of this standard's structure
        )
    )
