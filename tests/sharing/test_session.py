"""Each message of 9P2000.L on a real folder: what it does, and what is left on the host."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from pathlib import Path

import pytest

from ringfence.sharing.attributes import Valid
from ringfence.sharing.messages import MAX_MSIZE, NO_FID, VERSION, Kind, string, unpack
from ringfence.sharing.session import AT_REMOVEDIR
from sharing.client import Client, Refused
from sharing.conftest import MakeServer


def refused(number: int) -> pytest.RaisesContext[Refused]:
    """What fails with an error number."""
    return pytest.raises(Refused, match=os.strerror(number))


def test_version(serve: MakeServer) -> None:
    client = Client(serve(), attach=False)
    with refused(errno.EPROTO):
        client.call(Kind.ATTACH, "44ss4", 0, NO_FID, b"", b"", 0)
    assert unpack("4s", client.call(Kind.VERSION, "4s", 8192, b"9P2000")) == [8192, b"unknown"]
    with refused(errno.EPROTO):
        client.call(Kind.VERSION, "4s", 100, VERSION)
    said = client.call(Kind.VERSION, "4s", 1 << 30, VERSION)
    assert unpack("4s", said) == [MAX_MSIZE, VERSION]
    client.call(Kind.ATTACH, "44ss4", 5, NO_FID, b"", b"/sub", 0)
    assert client.attributes(5).mode & stat.S_IFDIR
    client.call(Kind.VERSION, "4s", 8192, VERSION)
    with refused(errno.EBADF):
        client.attributes(5)


def test_walk(client: Client) -> None:
    assert client.attributes(client.walk(b"sub", b"inner")).size == 5
    inside = client.walk(b"sub", b"deep")
    assert client.attributes(client.walk(b"..", b"inner", start=inside)).size == 5
    said = client.call(Kind.WALK, "44n", 0, 50, [b"sub", b"nothing", b"deep"])
    assert struct.unpack_from("<H", said) == (1,)
    with refused(errno.EBADF):
        client.attributes(50)
    with refused(errno.ENOENT):
        client.walk(b"nothing")
    with refused(errno.EBADF):
        client.call(Kind.WALK, "44n", 0, inside, [])
    client.call(Kind.WALK, "44n", inside, inside, [b".."])
    assert client.attributes(client.walk(b"inner", start=inside)).size == 5
    client.call(Kind.CLUNK, "4", inside)
    with refused(errno.EBADF):
        client.call(Kind.CLUNK, "4", inside)


def test_files(client: Client, folder: Path) -> None:
    """Random reads and writes give what the same on a bytearray gives."""
    source = random.Random(3)
    image = bytearray()
    fid = client.create(b"new", mode=0o640)
    for _ in range(200):
        at, size = source.randrange(100_000), source.randrange(1, 20_000)
        kind = source.randrange(5)
        if kind == 0:
            client.set(fid, Valid.SIZE, size=at)
            image = image[:at].ljust(at, b"\0")
        elif kind < 3:
            data = source.randbytes(size)
            assert client.write(fid, at, data) == size
            image = image.ljust(at, b"\0")
            image[at : at + size] = data
        else:
            assert client.read(fid, at, size) == image[at : at + size]
    client.call(Kind.FSYNC, "44", fid, 0)
    client.call(Kind.FSYNC, "44", fid, 1)
    assert (folder / "new").read_bytes() == image
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o640
    reader = client.open(b"new")
    with refused(errno.EBADF):
        client.write(reader, 0, b"x")
    with refused(errno.EBADF):
        client.call(Kind.LOPEN, "44", reader, os.O_RDWR)
    client.open(b"new", flags=os.O_WRONLY | os.O_TRUNC)
    assert client.read(reader, 0, 10) == b""
    appender = client.open(b"file", flags=os.O_WRONLY | os.O_APPEND)
    client.write(appender, 0, b"!")
    assert (folder / "file").read_text() == "contents!"


def test_create(client: Client, folder: Path) -> None:
    with refused(errno.EEXIST):
        client.create(b"file", flags=os.O_RDWR | os.O_EXCL)
    fid = client.create(b"file", flags=os.O_RDONLY)
    assert client.read(fid, 0, 100) == b"contents"
    with refused(errno.EISDIR):
        client.create(b"sub", flags=os.O_RDWR)
    client.create(b"program", mode=0o6755)
    assert stat.S_IMODE((folder / "program").stat().st_mode) == 0o755


def test_folders(client: Client, folder: Path) -> None:
    qid = client.call(Kind.MKDIR, "4s44", 0, b"made", 0o1777, 0)
    assert qid[0] == 0x80
    assert stat.S_IMODE((folder / "made").stat().st_mode) == 0o1777
    with refused(errno.EEXIST):
        client.call(Kind.MKDIR, "4s44", 0, b"made", 0o755, 0)
    for number in range(1000):
        (folder / "made" / f"{number:03}").touch()
    fid = client.open(b"made")
    expected = sorted([b".", b"..", *(b"%03d" % number for number in range(1000))])
    for count in (50, 333, 4096, MAX_MSIZE):
        assert sorted(client.entries(fid, count)) == expected
    with refused(errno.EINVAL):
        client.call(Kind.READDIR, "484", fid, 0, 10)
    with refused(errno.EISDIR):
        client.read(fid, 0, 10)
    with refused(errno.ENOTDIR):
        client.entries(client.open(b"file"))
    with refused(errno.ENOTEMPTY):
        client.call(Kind.UNLINKAT, "4s4", 0, b"made", AT_REMOVEDIR)
    with refused(errno.EISDIR):
        client.call(Kind.UNLINKAT, "4s4", 0, b"made", 0)
    client.call(Kind.UNLINKAT, "4s4", 0, b"file", 0)
    assert not (folder / "file").exists()
    client.call(Kind.REMOVE, "4", client.walk(b"sub", b"deep"))
    assert not (folder / "sub" / "deep").exists()


def test_links(client: Client, folder: Path) -> None:
    qid = client.call(Kind.SYMLINK, "4ss4", 0, b"link", b"/etc/passwd", 0)
    assert qid[0] == 0x02
    fid = client.walk(b"link")
    assert unpack("s", client.call(Kind.READLINK, "4", fid)) == [b"/etc/passwd"]
    assert stat.S_ISLNK(client.attributes(fid).mode)
    with refused(errno.ENOENT):  # so says readlinkat(2) of what is open
        client.call(Kind.READLINK, "4", client.walk(b"file"))
    client.call(Kind.LINK, "44s", 0, client.walk(b"file"), b"second")
    assert client.attributes(client.walk(b"second")).links == 2
    client.call(Kind.LINK, "44s", 0, fid, b"link2")
    assert (folder / "link2").is_symlink()
    with refused(errno.EPERM):
        client.call(Kind.LINK, "44s", 0, 0, b"again")
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG):
        client.call(Kind.MKNOD, "4s4444", 0, b"node%d" % kind, kind | 0o600, 0, 0, 0)
        assert stat.S_IFMT((folder / f"node{kind}").stat().st_mode) == kind
    for kind in (stat.S_IFBLK, stat.S_IFCHR, stat.S_IFDIR):
        with refused(errno.EPERM):
            client.call(Kind.MKNOD, "4s4444", 0, b"device", kind | 0o600, 1, 3, 0)


def test_attributes(client: Client, folder: Path) -> None:
    fid = client.walk(b"file")
    client.set(fid, Valid.MODE, mode=0o4604)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o604
    client.set(fid, Valid.SIZE, size=3)
    assert (folder / "file").read_text() == "con"
    client.set(fid, Valid.ATIME | Valid.ATIME_SET | Valid.MTIME | Valid.MTIME_SET)
    assert (folder / "file").stat().st_mtime_ns == 1_000_000
    client.set(fid, Valid.MTIME)
    assert (folder / "file").stat().st_mtime_ns > 1_000_000
    assert (folder / "file").stat().st_atime_ns == 1_000_000
    assert (client.attributes(fid).uid, client.attributes(fid).gid) == (0, 0)
    client.set(fid, Valid.UID | Valid.GID, owner=0)
    assert (folder / "file").stat().st_uid == os.geteuid()
    client.call(Kind.SYMLINK, "4ss4", 0, b"link", b"file", 0)
    link = client.walk(b"link")
    client.set(link, Valid.MTIME | Valid.MTIME_SET)
    assert (folder / "link").lstat().st_mtime_ns == 1_000_000
    assert (folder / "file").stat().st_mtime_ns > 1_000_000
    with refused(errno.EOPNOTSUPP):
        client.set(link, Valid.MODE, mode=0o777)
    kind, _, blocks = struct.unpack_from("<IIQ", client.call(Kind.STATFS, "4", 0))
    assert (kind, blocks > 0) == (0x01021997, True)


def test_owner(serve: MakeServer, folder: Path) -> None:
    client = Client(serve(uid=1000, gid=100))
    fid = client.walk(b"file")
    assert (client.attributes(fid).uid, client.attributes(fid).gid) == (1000, 100)
    client.set(fid, Valid.UID, owner=1000)
    assert (folder / "file").stat().st_uid == os.geteuid()


def test_renaming(client: Client, folder: Path) -> None:
    """Handles move along with what they stand for; those of what was replaced are stale."""
    inner, sub = client.walk(b"sub", b"inner"), client.walk(b"sub")
    client.call(Kind.RENAMEAT, "4s4s", 0, b"sub", 0, b"other")
    assert client.attributes(inner).size == 5
    assert client.attributes(client.walk(b"deep", start=sub)).mode & stat.S_IFDIR
    client.call(Kind.RENAME, "44s", inner, 0, b"top")
    assert (folder / "top").read_text() == "inner"
    assert client.attributes(inner).size == 5
    victim = client.walk(b"file")
    client.call(Kind.RENAMEAT, "4s4s", 0, b"top", 0, b"file")
    assert client.attributes(inner).size == 5
    with refused(errno.ESTALE):
        client.attributes(victim)
    with refused(errno.EINVAL):
        client.call(Kind.RENAMEAT, "4s4s", 0, b"other", sub, b"itself")
    with refused(errno.EBUSY):
        client.call(Kind.RENAME, "44s", 0, sub, b"root")
    client.call(Kind.LINK, "44s", 0, inner, b"hard")
    hard = client.walk(b"hard")
    client.call(Kind.RENAMEAT, "4s4s", 0, b"hard", 0, b"file")  # does nothing (rename(2))
    assert client.attributes(hard).links == 2


def test_what_is_removed_stays_open(client: Client, folder: Path) -> None:
    fid, unopened = client.create(b"gone"), client.walk(b"gone")
    client.write(fid, 0, b"still here")
    client.call(Kind.UNLINKAT, "4s4", 0, b"gone", 0)
    (folder / "gone").write_text("another")
    assert client.read(fid, 0, 100) == b"still here"
    assert client.attributes(fid).links == 0
    client.set(fid, Valid.SIZE, size=5)
    client.set(fid, Valid.MODE, mode=0o600)
    assert client.read(fid, 0, 100) == b"still"
    with refused(errno.ESTALE):
        client.attributes(unopened)
    with refused(errno.ESTALE):
        client.call(Kind.LOPEN, "44", unopened, 0)
    assert (folder / "gone").read_text() == "another"


def test_locks_and_what_is_not_offered(client: Client) -> None:
    fid = client.open(b"file")
    lock = client.call(Kind.LOCK, "414884s", fid, 1, 0, 0, 0, 77, b"guest")
    assert lock == b"\0"
    said = client.call(Kind.GETLOCK, "41884s", fid, 1, 5, 6, 77, b"guest")
    assert said == struct.pack("<BQQI", 2, 5, 6, 77) + string(b"guest")
    client.call(Kind.FLUSH, "2", 3)
    for kind, fields, values in (
        (Kind.AUTH, "4ss4", (1, b"", b"", 0)),
        (Kind.XATTRWALK, "44s", (0, 60, b"user.x")),
        (Kind.XATTRCREATE, "4s84", (fid, b"user.x", 3, 0)),
        (99, "", ()),
        (255, "", ()),
    ):
        with refused(errno.EOPNOTSUPP):
            client.call(kind, fields, *values)


def test_read_only(serve: MakeServer, folder: Path) -> None:
    client = Client(serve(read_only=True))
    before = sorted(folder.rglob("*"))
    fid = client.open(b"file")
    assert client.read(fid, 0, 100) == b"contents"
    assert b"file" in client.entries(client.open())
    for kind, fields, values in (
        (Kind.LCREATE, "4s444", (client.walk(), b"new", os.O_RDWR, 0o644, 0)),
        (Kind.LOPEN, "44", (client.walk(b"file"), os.O_WRONLY)),
        (Kind.LOPEN, "44", (client.walk(b"file"), os.O_TRUNC)),
        (Kind.SETATTR, "4444488888", (fid, 8, 0, 0, 0, 0, 0, 0, 0, 0)),
        (Kind.MKDIR, "4s44", (0, b"new", 0o755, 0)),
        (Kind.SYMLINK, "4ss4", (0, b"new", b"target", 0)),
        (Kind.MKNOD, "4s4444", (0, b"new", stat.S_IFREG, 0, 0, 0)),
        (Kind.LINK, "44s", (0, fid, b"new")),
        (Kind.RENAME, "44s", (fid, 0, b"new")),
        (Kind.RENAMEAT, "4s4s", (0, b"file", 0, b"new")),
        (Kind.UNLINKAT, "4s4", (0, b"file", 0)),
        (Kind.REMOVE, "4", (client.walk(b"file"),)),
    ):
        with refused(errno.EROFS):
            client.call(kind, fields, *values)
    with refused(errno.EBADF):
        client.write(fid, 0, b"x")
    assert sorted(folder.rglob("*")) == before
    assert (folder / "file").read_text() == "contents"


def test_state(serve: MakeServer, folder: Path) -> None:
    """Files are opened again by name; one that is another by then is stale, and can be let go."""
    first = serve()
    client = Client(first)
    kept, lost = client.open(b"file", flags=os.O_RDWR), client.open(b"sub", b"inner")
    closed, listing = client.walk(b"sub"), client.open()
    gone = client.create(b"gone")
    client.call(Kind.UNLINKAT, "4s4", 0, b"gone", 0)
    state = first.save()
    (folder / "sub" / "inner").rename(folder / "moved")
    (folder / "sub" / "inner").write_text("another")
    second = serve()
    second.restore(state)
    client.server = second
    client.write(kept, 0, b"CON")
    assert client.read(kept, 0, 100) == b"CONtents"
    assert client.attributes(closed).mode & stat.S_IFDIR
    assert b"file" in client.entries(listing)
    for number in (lost, gone):
        with refused(errno.ESTALE):
            client.read(number, 0, 10)
        with refused(errno.ESTALE):
            client.attributes(number)
    assert second.save()["fids"] == second.save()["fids"]
    third = serve()
    third.restore(second.save())
    client.server = third
    with refused(errno.ESTALE):
        client.read(lost, 0, 10)
    client.call(Kind.CLUNK, "4", lost)
