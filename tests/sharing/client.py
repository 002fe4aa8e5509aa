"""The guest's side of 9P2000.L: requests made by hand, answers taken apart."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

from ringfence.sharing.messages import HEADER, NO_FID, VERSION, Kind, string, unpack
from ringfence.sharing.session import FolderServer

MSIZE = 64 << 10
NUMBERS = {"1": "<B", "2": "<H", "4": "<I", "8": "<Q"}


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


def pack(fields: str, *values: Any) -> bytes:
    """A body, as `messages.unpack` describes it."""
    body = b""
    for field, value in zip(fields, values, strict=True):
        if field == "s":
            body += string(value)
        elif field == "n":
            body += struct.pack("<H", len(value)) + b"".join(string(name) for name in value)
        else:
            body += struct.pack(NUMBERS[field], value)
    return body


@dataclass(frozen=True)
class Attributes:
    """What GETATTR tells, but for times."""

    qid: bytes
    mode: int
    uid: int
    gid: int
    links: int
    size: int


class Client:
    """A session with a server; handle 0 is the shared folder's."""

    def __init__(self, server: FolderServer, *, attach: bool = True) -> None:
        self.server = server
        self.fids = 100
        if attach:
            said = self.call(Kind.VERSION, "4s", MSIZE, VERSION)
            assert unpack("4s", said) == [MSIZE, VERSION]
            self.call(Kind.ATTACH, "44ss4", 0, NO_FID, b"root", b"", 0)

    def call(self, kind: int, fields: str, *values: Any) -> bytes:
        """The body of a request's answer; Refused if that is an error."""
        return self.send(kind, pack(fields, *values))

    def send(self, kind: int, body: bytes, size: int | None = None) -> bytes:
        """The same, of any body and a size that may be a lie."""
        length = HEADER.size + len(body) if size is None else size
        request = HEADER.pack(length, kind, 7) + body
        reply = bytearray(MSIZE)
        half = len(request) // 2
        parts = [memoryview(request)[:half], memoryview(request)[half:]]
        room = [memoryview(reply)[:5], memoryview(reply)[5:]]
        written = self.server.handle_now(parts, room)
        if written is None:
            written = self.server.handle(parts, room)
        size, answer, tag = HEADER.unpack_from(reply)
        assert (size, tag) == (written, 7)
        said = bytes(reply[HEADER.size : size])
        if answer == Kind.LERROR + 1:
            raise Refused(unpack("4", said)[0])
        assert answer == kind + 1
        return said

    # ---- what tests do often

    def walk(self, *names: bytes, start: int = 0) -> int:
        """A new handle of what is there."""
        self.fids += 1
        said = self.call(Kind.WALK, "44n", start, self.fids, names)
        assert struct.unpack_from("<H", said) == (len(names),)
        return self.fids

    def open(self, *names: bytes, flags: int = os.O_RDONLY) -> int:
        """A new handle, open."""
        fid = self.walk(*names)
        self.call(Kind.LOPEN, "44", fid, flags)
        return fid

    def create(self, name: bytes, *, mode: int = 0o644, flags: int = os.O_RDWR) -> int:
        """A new file in the shared folder, open."""
        fid = self.walk()
        self.call(Kind.LCREATE, "4s444", fid, name, flags, mode, 0)
        return fid

    def write(self, fid: int, offset: int, data: bytes) -> int:
        """How much was written."""
        said = self.send(Kind.WRITE, pack("484", fid, offset, len(data)) + data)
        return int(unpack("4", said)[0])

    def read(self, fid: int, offset: int, count: int) -> bytes:
        """What is there."""
        said = self.call(Kind.READ, "484", fid, offset, count)
        (length,) = unpack("4", said)
        assert len(said) == 4 + length
        return said[4:]

    def attributes(self, fid: int) -> Attributes:
        """What is told of a handle."""
        said = self.call(Kind.GETATTR, "48", fid, 0x7FF)
        assert len(said) == 8 + 13 + 12 + 8 * 15
        _, qid, mode, uid, gid, links, _, size = struct.unpack_from("<Q13sIIIQQQ", said)
        return Attributes(qid, mode, uid, gid, links, size)

    def set(self, fid: int, valid: int, *, mode: int = 0, owner: int = 0, size: int = 0) -> None:
        """Change attributes, times to a millisecond after the epoch."""
        times = (0, 1_000_000, 0, 1_000_000)
        self.call(Kind.SETATTR, "4444488888", fid, valid, mode, owner, owner, size, *times)

    def entries(self, fid: int, count: int = 4096) -> list[bytes]:
        """All names in an open folder."""
        found: list[bytes] = []
        offset = 0
        while True:
            said = self.call(Kind.READDIR, "484", fid, offset, count)[4:]
            if not said:
                return found
            while said:
                *_, offset, _, name = unpack("1488" + "1s", said)
                said = said[24 + len(name) :]
                found.append(name)
