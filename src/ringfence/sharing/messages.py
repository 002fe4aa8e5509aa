"""9P2000.L on the wire: kinds of messages, what is in them, bounds.

A message is size[4] type[1] tag[2] and a body; all numbers are little-endian, strings have a
length[2] before them (intro(5)). A body's fields are described by a text, a character each:
``1 2 4 8`` are numbers of so many bytes, ``s`` is a string, ``n`` a count[2] and so many strings.
Strings stay bytes: what a name means is the guest's matter.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import Any

VERSION = b"9P2000.L"
UNKNOWN_VERSION = b"unknown"
NO_FID = 0xFFFFFFFF
MIN_MSIZE, MAX_MSIZE = 4096, 512 << 10
"""Bytes of a message, headers included, that a session may be set to."""
MAX_NAMES = 16
"""In one WALK (walk(5))."""
MAX_BODY = 64 << 10
"""Bytes of a message that may be copied: all but what is written to files."""
HEADER = struct.Struct("<IBH")
"""size, type, tag."""
READ_HEADER = struct.Struct("<IBHI")
"""Of the answer to READ and READDIR: a header, and count."""
QID = struct.Struct("<BIQ")
"""type, version, path."""


class Kind(IntEnum):
    """Requests; the answer to each has the next number."""

    LERROR = 6  # only as an answer, 7
    STATFS = 8
    LOPEN = 12
    LCREATE = 14
    SYMLINK = 16
    MKNOD = 18
    RENAME = 20
    READLINK = 22
    GETATTR = 24
    SETATTR = 26
    XATTRWALK = 30
    XATTRCREATE = 32
    READDIR = 40
    FSYNC = 50
    LOCK = 52
    GETLOCK = 54
    LINK = 70
    MKDIR = 72
    RENAMEAT = 74
    UNLINKAT = 76
    VERSION = 100
    AUTH = 102
    ATTACH = 104
    FLUSH = 108
    WALK = 110
    READ = 116
    WRITE = 118
    CLUNK = 120
    REMOVE = 122


class QidType(IntEnum):
    """Kinds of files, as a qid tells them (``P9_QT`` of the client)."""

    FILE = 0x00
    SYMLINK = 0x02
    DIRECTORY = 0x80


WRITE_HEADER = HEADER.size + 16
"""Bytes of a WRITE before its data: header, fid, offset, count."""


def malformed() -> OSError:
    """What a message that makes no sense is answered with."""
    return OSError(errno.EPROTO, "malformed message")


_NUMBERS = {
    "1": struct.Struct("<B"),
    "2": struct.Struct("<H"),
    "4": struct.Struct("<I"),
    "8": struct.Struct("<Q"),
}


def unpack(fields: str, body: bytes) -> list[Any]:
    """Values of a body's fields; OSError where it is too short. More may follow."""
    values: list[Any] = []
    at = 0
    try:
        for field in fields:
            if field == "s":
                text, at = _string(body, at)
                values.append(text)
            elif field == "n":
                names, at = _strings(body, at)
                values.append(names)
            else:
                number = _NUMBERS[field]
                values += number.unpack_from(body, at)
                at += number.size
    except struct.error as error:
        raise malformed() from error
    return values


def _string(body: bytes, at: int) -> tuple[bytes, int]:
    (length,) = _NUMBERS["2"].unpack_from(body, at)
    end = at + 2 + length
    if end > len(body):
        raise malformed()
    return body[at + 2 : end], end


def _strings(body: bytes, at: int) -> tuple[list[bytes], int]:
    (count,) = _NUMBERS["2"].unpack_from(body, at)
    at += 2
    if count > MAX_NAMES:
        raise malformed()
    found = []
    for _ in range(count):
        text, at = _string(body, at)
        found.append(text)
    return found, at


def string(text: bytes) -> bytes:
    """A string as it is on the wire."""
    return _NUMBERS["2"].pack(len(text)) + text
