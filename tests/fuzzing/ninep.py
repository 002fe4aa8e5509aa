"""A hostile guest of a shared folder: messages that are nearly right, names that lead elsewhere.

The folder is a real one, in a temporary folder beside a file that the guest must never reach; on
the host's side it is changed at will, links to outside included.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path

from devices.virtio.backends import Inline
from devices.virtio.driver import BUFFERS, Segment
from fuzzing.virtio import BODIES, VirtioFuzzer
from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ninep import Virtio9p
from ringfence.memory.buffers import Buffers
from ringfence.pacing import Pacing
from ringfence.sharing.messages import HEADER, NO_FID, VERSION, Kind
from ringfence.sharing.options import ShareOptions
from ringfence.sharing.session import FolderServer
from sharing.client import pack

NAMES = (b"a", b"b", b"c", b"d", b"file", b"link", b"out")
BAD_NAMES = (b"", b".", b"..", b"/", b"../secret", b"a/b", b"\0", b"x" * 255, b"x" * 256, b"\xff")
FIELDS = {
    Kind.VERSION: "4s",
    Kind.AUTH: "4ss4",
    Kind.ATTACH: "44ss4",
    Kind.FLUSH: "2",
    Kind.WALK: "44n",
    Kind.CLUNK: "4",
    Kind.LOPEN: "44",
    Kind.READ: "484",
    Kind.READDIR: "484",
    Kind.READLINK: "4",
    Kind.GETATTR: "48",
    Kind.STATFS: "4",
    Kind.FSYNC: "44",
    Kind.LOCK: "414884s",
    Kind.GETLOCK: "41884s",
    Kind.XATTRWALK: "44s",
    Kind.XATTRCREATE: "4s84",
    Kind.REMOVE: "4",
    Kind.LCREATE: "4s444",
    Kind.SETATTR: "4444488888",
    Kind.MKDIR: "4s44",
    Kind.SYMLINK: "4ss4",
    Kind.MKNOD: "4s4444",
    Kind.LINK: "44s",
    Kind.RENAME: "44s",
    Kind.RENAMEAT: "4s4s",
    Kind.UNLINKAT: "4s4",
    Kind.WRITE: "484",
}
FREQUENT = (Kind.WALK, Kind.WALK, Kind.LOPEN, Kind.LCREATE, Kind.CLUNK, Kind.WRITE, Kind.READ)
SECRET = b"not for the guest"


class WatchedServer(FolderServer):
    """A server whose bugs are noted before the device makes them the guest's errors."""

    bug: Exception | None = None

    def handle(self, request: Buffers, reply: Buffers) -> int:
        try:
            written = super().handle(request, reply)
        except Exception as error:
            self.bug = error
            raise
        assert SECRET not in b"".join(reply)
        return written


class NinepFuzzer(VirtioFuzzer):
    """A shared folder."""

    def __init__(self, seed: int, *, packed: bool, pacing: Pacing) -> None:
        self.outside = Path(tempfile.mkdtemp(prefix="ringfence-fuzz-"))
        self.folder = self.outside / "shared"
        self.folder.mkdir()
        (self.outside / "secret").write_bytes(SECRET)
        self.server = WatchedServer(ShareOptions(self.folder, "fuzz"))
        super().__init__(seed, packed=packed, pacing=pacing)

    def device(self) -> VirtioDevice:
        self.pool = Inline()
        return Virtio9p(self.server, self.pool)

    def close(self) -> None:
        super().close()
        self.server.close()
        shutil.rmtree(self.outside)

    # ---- what the guest says

    def name(self) -> bytes:
        return self.pick(*BAD_NAMES) if self.chance(0.1) else self.pick(*NAMES)

    def fid(self) -> int:
        """A handle's number, mostly of one that there is."""
        there = list(self.server._fids._fids)
        if there and self.chance(0.7):
            return self.source.choice(there)
        return self.pick(0, 1, 2, 3, 4, 5, 6, 7, 8, NO_FID)

    def field(self, kind: Kind, position: int, field: str) -> object:
        """A value for one field, mostly one that could be meant."""
        source = self.source
        if field == "s":
            return VERSION if kind == Kind.VERSION and self.chance(0.9) else self.name()
        if field == "n":
            return [self.name() for _ in range(self.pick(0, 1, 1, 1, 2, 3, 16, 17))]
        if position == 0 and kind != Kind.VERSION:
            return self.fid() & (1 << 8 * int(field)) - 1
        if field == "8":
            return self.pick(0, 0, source.randrange(1 << 20), self.value(64))
        if field == "4":
            flags = self.pick(0, 1, 2, 2, 0x40, 0x200, 0x241, 0x402)
            mode = self.pick(stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK) | 0o644
            return self.pick(self.fid(), flags, mode, source.getrandbits(9), self.value())
        return self.value(8 * int(field))

    def body(self, queue: int) -> bytes:
        kind = self.pick(*FREQUENT) if self.chance(0.5) else self.pick(*FIELDS)
        if self.chance(0.02):
            kind = self.pick(Kind.VERSION, Kind.ATTACH)
        values = [self.field(kind, at, field) for at, field in enumerate(FIELDS[kind])]
        if kind == Kind.VERSION:
            values[0] = self.pick(8192, 65536, self.value())
        elif kind == Kind.ATTACH and self.chance(0.9):
            values[1:4] = [NO_FID, b"root", b""]
        body = pack(FIELDS[kind], *values)
        if kind == Kind.WRITE:
            body += self.source.randbytes(self.pick(0, 1, 100, 4000, 70000))
        if self.chance(0.05):
            body = body[: self.source.randrange(len(body) + 1)]
        size = HEADER.size + len(body) if self.chance(0.95) else self.value()
        number = self.value(8) if self.chance(0.02) else kind
        return HEADER.pack(size, number, self.value(16)) + body

    def segments(self, body: bytes) -> list[Segment]:
        found = super().segments(body)
        if self.chance(0.7):
            found.append((BUFFERS + self.source.randrange(BODIES), 9000, True))
        return found

    # ---- what happens on the host

    def host(self) -> None:
        name = self.folder / os.fsdecode(self.pick(*NAMES))
        kind = self.source.randrange(6)
        if kind == 0:
            self.pool.held = [] if self.pool.held is None else self.pool.held
        elif kind == 1:
            self.calm()
        elif kind == 2:
            remove(name)
        elif kind == 3:
            remove(name)
            name.symlink_to(self.pick(self.outside, self.outside / "secret", Path("/etc")))
        elif kind == 4:
            remove(name)
            (name / os.fsdecode(self.pick(*NAMES))).mkdir(parents=True)
        else:
            remove(name)
            name.write_bytes(self.source.randbytes(1000))

    def calm(self) -> None:
        held, self.pool.held = self.pool.held or [], None
        for job in held:
            job()

    def after(self) -> None:
        if self.server.bug is not None:
            raise self.server.bug
        super().after()

    def check(self) -> None:
        super().check()
        assert sorted(path.name for path in self.outside.iterdir()) == ["secret", "shared"]
        assert (self.outside / "secret").read_bytes() == SECRET
        for path in self.folder.iterdir():
            remove(path)

    # ---- honest messages

    def say(self, kind: Kind, *values: object, data: bytes = b"") -> bytes | None:
        """The body of an answer; None if there is none."""
        body = pack(FIELDS[kind], *values) + data
        request = HEADER.pack(HEADER.size + len(body), kind, 9) + body
        self.driver.memory.write(BUFFERS, request)
        segments = [(BUFFERS, len(request), False), (BUFFERS + 0x1000, 100, True)]
        if len(self.driver.request(0, segments)) != 1:
            return None
        size, answer, tag = HEADER.unpack(self.driver.memory.read(BUFFERS + 0x1000, HEADER.size))
        assert (answer, tag) == (kind + 1, 9)
        return self.driver.memory.read(BUFFERS + 0x1000 + HEADER.size, size - HEADER.size)

    def start(self, *, honest: bool = False) -> None:
        """Mostly with a session that has begun."""
        super().start(honest=honest)
        if honest or self.chance(0.9):
            self.say(Kind.VERSION, 65536, VERSION)
            self.say(Kind.ATTACH, 0, NO_FID, b"root", b"", 0)

    def works(self) -> None:
        remove(self.folder / "proof")
        assert self.say(Kind.WALK, 0, 1, []) == b"\0\0"
        assert self.say(Kind.LCREATE, 1, b"proof", 2, 0o600, 0)
        assert self.say(Kind.WRITE, 1, 0, 5, data=b"proof") == struct.pack("<I", 5)
        assert (self.folder / "proof").read_bytes() == b"proof"


def remove(path: Path) -> None:
    """Remove whatever has this name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
