"""Answers without waiting for the host: what may be one, and that it is the same as the other."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ringfence.sharing import cached
from ringfence.sharing.messages import HEADER, Kind
from ringfence.sharing.session import AT_ONCE, FolderServer
from sharing.client import Client, pack
from sharing.conftest import MakeServer

hasty = pytest.mark.parametrize("serve", ["hasty"], indirect=True)


@pytest.fixture
def server(serve: MakeServer) -> FolderServer:
    """A server that can; elsewhere there is nothing to be tested."""
    made = serve()
    if not made._tree.remembers:
        pytest.skip("the host offers no paths from its cache for temporary files")
    return made


def ask(server: FolderServer, kind: int, body: bytes, room: int = 8192) -> bytes | None:
    """The answer to a request, if there is one at once."""
    request = HEADER.pack(HEADER.size + len(body), kind, 7) + body
    reply = bytearray(room)
    done = server.handle_now([memoryview(request)], [memoryview(reply)])
    return None if done is None else bytes(reply[:done])


@hasty
def test_what_was_just_seen_is_answered_at_once(server: FolderServer, folder: Path) -> None:
    """And as it would be otherwise."""
    (folder / "link").symlink_to("sub")
    client = Client(server)
    file = client.open(b"file")
    ways = ([], [b"sub"], [b"sub", b"deep"], [b"sub", b"..", b"file"], [b"link"])
    asked = [(Kind.WALK, pack("44n", 0, 50, names)) for names in ways]
    asked += [(Kind.GETATTR, pack("48", number, 0x7FF)) for number in (0, file, 77)]
    asked += [(Kind.READ, pack("484", file, at, 100)) for at in (0, 3, 8, 1 << 40)]
    asked += [(Kind.CLUNK, pack("4", 77)), (Kind.XATTRWALK, pack("44s", 0, 60, b"x"))]
    asked += [(Kind.READ, b""), (Kind.WALK, pack("44n", 0, 53, [b"a/b"]))]
    for kind, body in asked:
        answers = []
        for handle in (server.handle, server.handle_now):
            reply = bytearray(8192)
            request = HEADER.pack(HEADER.size + len(body), kind, 7) + body
            done = handle([memoryview(request)], [memoryview(reply)])
            answers.append(bytes(reply[:done]))
            if reply[4] == Kind.WALK + 1:
                client.call(Kind.CLUNK, "4", 50)
        assert answers[0] == answers[1] != b"", kind


@hasty
def test_what_changes_something_waits(server: FolderServer, folder: Path) -> None:
    client = Client(server)
    opened = client.walk(b"file")
    client.call(Kind.LOPEN, "44", opened, os.O_RDWR)
    before = server.save()
    for kind in Kind:
        if kind not in AT_ONCE:
            assert ask(server, kind, pack("4s44444", 0, b"new", 0, 0, 0, 0, 0)) is None
    assert ask(server, Kind.CLUNK, pack("4", opened)) is None, "to close may take long"
    assert server.save() == before
    assert not (folder / "new").exists()


@hasty
def test_a_session_at_work_is_not_waited_for(server: FolderServer) -> None:
    Client(server)
    with server._lock:
        assert ask(server, Kind.GETATTR, pack("48", 0, 0x7FF)) is None
    assert ask(server, Kind.GETATTR, pack("48", 0, 0x7FF)) is not None


def test_no_step_out_of_the_folder(folder: Path) -> None:
    """Links, mounts and parents are left to who goes name by name."""
    (folder / "out").symlink_to(folder.parent)
    (folder / "sub" / "loop").symlink_to("loop")
    at = os.open(folder, os.O_PATH)
    try:
        if not cached.offered(at):
            pytest.skip("the host offers no paths from its cache for temporary files")
        for path in (b"out/secret", b"..", b"../secret", b"/etc", b"sub/loop/x", b"file/x"):
            with pytest.raises(cached.NotNow):
                cached.look(at, path)
        link = cached.look(at, b"out")
        assert os.readlink(b"", dir_fd=link) == str(folder.parent).encode()
        os.close(link)
    finally:
        os.close(at)
    root = os.open("/", os.O_PATH)
    try:
        with pytest.raises(cached.NotNow):
            cached.look(root, b"proc/self/status")
    finally:
        os.close(root)


def test_not_offered_by_what_is_not_the_hosts_own() -> None:
    for path in ("/proc", "/sys"):
        at = os.open(path, os.O_PATH)
        assert not cached.offered(at)
        os.close(at)


def test_data_that_are_not_in_memory(tmp_path: Path) -> None:
    """What the host would have to fetch is not read; all else is, as by preadv."""
    path, source = tmp_path / "data", random.Random(3)
    path.write_bytes(source.randbytes(70_000))
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(5000)
        for offset in (0, 60_000, 69_990, 70_000):
            try:
                done = cached.read(file, [memoryview(buffer)], offset)
            except cached.NotNow:
                continue
            assert buffer[:done] == path.read_bytes()[offset:][:5000]
        with pytest.raises(cached.NotNow):
            cached.read(file, [memoryview(bytearray(cached.LARGEST + 1))], 0)
    finally:
        os.close(file)
    with pytest.raises(cached.NotNow):
        cached.read(file, [memoryview(bytearray(10))], 0)
