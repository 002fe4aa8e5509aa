"""A guest that wants out of the folder, or to break its server."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from pathlib import Path

import pytest

from ringfence.errors import HostError, ImageError, UsageError
from ringfence.sharing import files
from ringfence.sharing.messages import HEADER, NO_FID, Kind
from ringfence.sharing.options import ShareOptions, parse_share, parse_shares, relocated
from ringfence.sharing.session import FolderServer
from ringfence.sharing.tree import Place, Tree
from sharing.client import Client, Refused, pack
from sharing.conftest import MakeServer

BAD_NAMES = (b"", b"..", b".", b"../secret", b"/etc", b"a/b", b"a\0b", b"x" * 256)


def refused(*numbers: int) -> pytest.RaisesContext[Refused]:
    """What fails with one of these error numbers."""
    return pytest.raises(Refused, match="|".join(map(os.strerror, numbers)))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere(client: Client, folder: Path, name: bytes) -> None:
    bad = errno.EINVAL, errno.ENAMETOOLONG
    before = sorted(folder.parent.rglob("*"))
    if name not in (b"..", b"."):
        with refused(*bad):
            client.walk(name)
    for kind, fields, values in (
        (Kind.LCREATE, "4s444", (client.walk(), name, os.O_RDWR, 0o644, 0)),
        (Kind.MKDIR, "4s44", (0, name, 0o755, 0)),
        (Kind.SYMLINK, "4ss4", (0, name, b"target", 0)),
        (Kind.MKNOD, "4s4444", (0, name, 0o100644, 0, 0, 0)),
        (Kind.LINK, "44s", (0, client.walk(b"file"), name)),
        (Kind.RENAME, "44s", (client.walk(b"file"), 0, name)),
        (Kind.RENAMEAT, "4s4s", (0, b"file", 0, name)),
        (Kind.RENAMEAT, "4s4s", (0, name, 0, b"new")),
        (Kind.UNLINKAT, "4s4", (0, name, 0)),
        (Kind.UNLINKAT, "4s4", (0, name, 0x200)),
    ):
        with refused(*bad):
            client.call(kind, fields, *values)
    assert sorted(folder.parent.rglob("*")) == before


def test_the_folder_has_no_parent(client: Client, folder: Path) -> None:
    up = client.walk(b"..", b"..", b"sub", b"..", b"..")
    assert client.attributes(up).qid == client.attributes(0).qid
    with refused(errno.ENOENT):
        client.walk(b"secret", start=client.walk(b".."))
    for number in (1, 2):
        with refused(errno.EINVAL, errno.ENOENT):
            client.call(Kind.ATTACH, "44ss4", number, NO_FID, b"", b"../secret", 0)


def test_links_are_not_followed(client: Client, folder: Path) -> None:
    (folder / "out").symlink_to(folder.parent)
    (folder / "file-out").symlink_to(folder.parent / "secret")
    out, file_out = client.walk(b"out"), client.walk(b"file-out")
    with refused(errno.ENOTDIR):
        client.walk(b"secret", start=out)
    with refused(errno.ENOTDIR):
        client.call(Kind.MKDIR, "4s44", out, b"made", 0o755, 0)
    for fid in (out, file_out):
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with refused(errno.ENXIO):
                client.call(Kind.LOPEN, "44", fid, flags)
        with refused(errno.ENXIO):
            client.set(fid, 8, size=0)
    with refused(errno.ENXIO):
        client.create(b"file-out", flags=os.O_RDWR | os.O_TRUNC)
    client.call(Kind.REMOVE, "4", file_out)
    assert (folder.parent / "secret").read_text() == "secret"


def test_special_files_are_not_opened(client: Client, folder: Path) -> None:
    os.mkfifo(folder / "fifo")  # to open it would wait for somebody
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with refused(errno.ENXIO):
            client.open(b"fifo", flags=flags)
        with refused(errno.ENXIO):
            client.create(b"fifo", flags=flags)
    if os.geteuid() == 0:
        os.mknod(folder / "null", 0o020666, os.makedev(1, 3))
        with refused(errno.ENXIO):
            client.open(b"null")


def test_the_hosts_processes_are_closed() -> None:
    """Our own memory is a file in /proc; who shares / shares no such file."""
    server = FolderServer(ShareOptions(Path("/"), "root", read_only=True))
    client = Client(server)
    try:
        with refused(errno.EACCES):
            client.walk(b"proc")
        assert client.attributes(client.walk(b"etc")).mode
    finally:
        server.close()


def test_swapped_under_way(client: Client, folder: Path) -> None:
    """While a folder is a link to outside now and then, nobody gets there."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "inner").write_text("outside")
    done = threading.Event()

    def swap() -> None:
        sub, link, aside = folder / "sub", folder / "link", folder / "aside"
        link.symlink_to(outside)
        while not done.is_set():
            sub.rename(aside)
            link.rename(sub)
            sub.rename(link)
            aside.rename(sub)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        for number in range(2000):
            try:
                fid = client.open(b"sub", b"inner")
                seen.add(client.read(fid, 0, 100))
                client.call(Kind.CLUNK, "4", fid)
                inside = client.walk(b"sub")
                client.call(Kind.MKNOD, "4s4444", inside, b"%d" % number, 0o100644, 0, 0, 0)
            except (Refused, AssertionError):
                seen.add(b"refused")
    finally:
        done.set()
        thread.join()
    assert seen <= {b"inner", b"refused"}
    assert [path.name for path in outside.iterdir()] == ["inner"]


def test_malformed_messages(client: Client) -> None:
    """Cut at every byte, of any size, of no kind, with numbers at their ends."""
    good = {
        Kind.WALK: pack("44n", 0, 50, [b"sub", b"inner"]),
        Kind.LCREATE: pack("4s444", 0, b"new", 2, 0o644, 0),
        Kind.RENAMEAT: pack("4s4s", 0, b"file", 0, b"other"),
        Kind.GETLOCK: pack("41884s", 0, 1, 5, 6, 7, b"guest"),
        Kind.SETATTR: pack("4444488888", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    for kind, body in good.items():
        for length in range(len(body)):
            with refused(errno.EPROTO):
                client.send(kind, body[:length])
            with refused(errno.EPROTO):
                client.send(kind, body, HEADER.size + length)
    for size in (0, 1, 6):
        with refused(errno.EPROTO):
            client.send(Kind.WALK, good[Kind.WALK], size)
    with refused(errno.EPROTO):
        client.call(Kind.WALK, "44n", 0, 50, [b"sub"] * 17)
    fid = client.open(b"file", flags=os.O_RDWR)
    for offset in (1 << 63, (1 << 64) - 1):
        with refused(errno.EINVAL):
            client.read(fid, offset, 10)
        with refused(errno.EINVAL):
            client.write(fid, offset, b"data")
        with refused(errno.EINVAL):
            client.set(fid, 8, size=offset)
        with refused(errno.EINVAL):
            client.call(Kind.READDIR, "484", client.open(), offset, 1000)
        with refused(errno.EINVAL):
            times = (offset, 0, offset, 0)
            client.call(Kind.SETATTR, "4444488888", fid, 0x1B0, 0, 0, 0, 0, *times)
    with refused(errno.EPROTO):
        client.send(Kind.WRITE, b"")
    assert client.send(Kind.WRITE, pack("484", fid, 0, 1 << 31) + b"xy") == struct.pack("<I", 2)
    assert client.read(fid, 0, (1 << 32) - 1) == b"xyntents"


def test_no_room_for_an_answer(client: Client) -> None:
    for kind, body in ((Kind.GETATTR, pack("48", 0, 0)), (Kind.READ, pack("484", 0, 0, 9))):
        request = HEADER.pack(HEADER.size + len(body), kind, 1) + body
        for room in range(12):
            reply = bytearray(room)
            written = client.server.handle([memoryview(request)], [memoryview(reply)])
            assert written <= room
            if room >= 11:
                assert reply[4] == Kind.LERROR + 1
    assert client.server.handle([memoryview(b"123456")], [memoryview(bytearray(20))]) == 0
    assert client.server.handle([], []) == 0


def test_bounds(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FIDS", 50)
    for _ in range(49):
        client.walk(b"file")
    with refused(errno.ENFILE):
        client.walk(b"file")
    with refused(errno.ENFILE):
        client.call(Kind.ATTACH, "44ss4", 9, NO_FID, b"", b"", 0)
    client.server._fids._most = 10
    opened = 0
    with refused(errno.ENFILE):
        for fid in range(101, 140):
            client.call(Kind.LOPEN, "44", fid, 0)
            opened += 1
    assert opened == 10
    client.server.reset()
    assert client.server._fids._open == 0


def test_long_paths(client: Client, folder: Path) -> None:
    """A path that the host would refuse is refused, wherever it was made."""
    fid = client.walk()
    with refused(errno.ENAMETOOLONG):
        for _ in range(30):
            client.call(Kind.MKDIR, "4s44", fid, b"d" * 200, 0o755, 0)
            fid = client.walk(b"d" * 200, start=fid)


def test_places() -> None:
    """Folders that others move in circles don't make circles of ours."""
    root = Place(None, b"")
    a = root.child(b"a")
    b = a.child(b"b")
    assert root.child(b"a") is a
    root.moved(b"a", b, b"c")
    assert a.gone
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        b.names()


def test_noise(serve: MakeServer, folder: Path) -> None:
    """Messages of random bytes, and good ones with some of them changed."""
    source = random.Random(11)
    client = Client(serve())
    for _ in range(3000):
        kind = source.choice(list(Kind))
        body = source.randbytes(source.choice((0, 4, 12, 23, 60)))
        if source.random() < 0.7:
            body = struct.pack("<I", source.choice((0, 1, 0, NO_FID))) + body
        request = HEADER.pack(source.choice((7, 30, 7 + len(body), 1 << 31)), kind, 1) + body
        reply = bytearray(source.choice((0, 11, 200, 9000)))
        assert client.server.handle([memoryview(request)], [memoryview(reply)]) <= len(reply)
    assert (folder.parent / "secret").read_text() == "secret"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["secret", "shared"]


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"msize": 1 << 30},
        {"msize": "x"},
        {"fids": 5},
        {"fids": [{}]},
        {"fids": [{"fid": 1, "names": [b".."], "gone": False, "flags": 0, "inode": 1}]},
        {"fids": [{"fid": 1, "names": ["text"], "gone": False, "flags": 0, "inode": 1}]},
        {"fids": [{"fid": 1, "names": [b"a/b"], "gone": False, "flags": 0, "inode": 1}]},
        {"fids": [{"fid": "x", "names": [], "gone": False, "flags": 0, "inode": 1}]},
    ],
)
def test_forged_state(serve: MakeServer, damage: dict[str, object]) -> None:
    server = serve()
    state = server.save()
    with pytest.raises(ImageError, match="damaged"):
        server.restore(state | damage)


def test_options(tmp_path: Path) -> None:
    assert parse_share("/some/src") == ShareOptions(Path("/some/src"), "src")
    assert parse_share("a,,b,tag=t,ro,owner=5:6") == ShareOptions(Path("a,b"), "t", True, 5, 6)
    assert parse_share("/").tag == "root"
    assert parse_share(f"{tmp_path},owner=7").gid == 7
    for text in ("", ",ro", "a,tag=", "a,what", "a,owner=me", "a,ro=maybe", f"a,tag={'x' * 32}"):
        with pytest.raises(UsageError):
            parse_share(text)
    with pytest.raises(UsageError, match="two shares"):
        parse_shares(["/a/src", "/b/src"])
    shares = parse_shares(["/a,tag=a", "/b,tag=b,ro"])
    assert relocated(shares, ["/c,tag=b"]) == parse_shares(["/a,tag=a", "/c,tag=b"])
    with pytest.raises(UsageError, match="'c': expected a, b"):
        relocated(shares, ["/c"])
    with pytest.raises(UsageError, match="No such file"):
        Tree(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises((UsageError, HostError), match="Not a directory"):
        Tree(tmp_path / "file")
