"""What a guest sends instead of a copy of its files; and agents that are none."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.agent import files, wire
from ringfence.agent.client import Command
from ringfence.agent.wire import Kind
from ringfence.errors import HostError, RingfenceError, UsageError

EXIT = wire.frame(Kind.EXIT, wire.NUMBER.pack(0))


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """Frames of a tar archive: name, type, contents or target."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
            else:
                info.linkname = content
                tar.addfile(info)
    return wire.frame(Kind.STDOUT, out.getvalue()) + EXIT


@pytest.mark.parametrize(
    "members",
    [
        [("x", tarfile.DIRTYPE, ""), ("x/../../outside", tarfile.REGTYPE, "evil")],
        [("../outside", tarfile.REGTYPE, "evil")],
        [("x", tarfile.SYMTYPE, ".."), ("x/outside", tarfile.REGTYPE, "evil")],
        [
            ("x", tarfile.DIRTYPE, ""),
            ("x/s", tarfile.SYMTYPE, "../.."),
            ("x/s/outside", tarfile.REGTYPE, "evil"),
        ],
        [("x", tarfile.SYMTYPE, "../outside"), ("x", tarfile.REGTYPE, "harmless")],
        [("/x", tarfile.DIRTYPE, ""), ("/x/f", tarfile.LNKTYPE, "../../outside")],
        [("x", tarfile.CHRTYPE, ""), ("x", tarfile.FIFOTYPE, "")],
        [("a", tarfile.REGTYPE, "1"), ("outside", tarfile.REGTYPE, "evil")],
    ],
)
def test_nothing_is_written_outside_the_target(
    members: list[tuple[str, bytes, str]],
    answering: Callable[[bytes], Path],
    tmp_path: Path,
) -> None:
    room = tmp_path / "room"
    inner = room / "inner"
    inner.mkdir(parents=True)
    with contextlib.suppress(RingfenceError):
        files.receive(answering(archive(*members)), "/x", inner / "target", {})
    assert not (room / "outside").exists()
    assert not (inner / "outside").exists()
    assert not (tmp_path / "outside").exists()
    assert {path.name for path in inner.iterdir()} <= {"target"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "went away"),
        (b"x" * 100, "no agent"),
        (wire.FRAME.pack(1 << 30, Kind.STDOUT), "no agent"),
        (wire.frame(Kind.STDIN, b"?"), "no agent"),
        (wire.frame(Kind.EXIT, b"1"), "no agent"),
        (wire.frame(Kind.STDOUT, b"half")[:-1], "went away"),
    ],
)
def test_agents_that_are_none(
    answer: bytes, message: str, answering: Callable[[bytes], Path]
) -> None:
    command = Command(answering(answer), wire.request(["/bin/true"], {}))
    with pytest.raises(HostError, match=message):
        command.run(None, lambda data: None, lambda data: None)
    command.close()


def test_a_program_that_ends_before_its_input_is_read(tmp_path: Path) -> None:
    """The pipe is broken then; what the program had said before still counts."""
    path = tmp_path / "vsock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def agent() -> None:
            stream, _ = listener.accept()
            with stream:
                while not stream.recv(1).endswith(b"\n"):
                    pass
                stream.sendall(b"OK 1\n")
                stream.sendall(wire.frame(Kind.STDOUT, b"said") + EXIT)

        thread = threading.Thread(target=agent)
        thread.start()
        command = Command(path, wire.request(["/bin/head"], {}))
        thread.join()
    said: list[bytes] = []
    with Path("/dev/zero").open("rb") as endless:
        assert command.run(endless.fileno(), said.append, said.append) == 0
    assert said == [b"said"]
    command.close()


def test_a_copy_that_is_no_archive(answering: Callable[[bytes], Path], tmp_path: Path) -> None:
    noise = wire.frame(Kind.STDOUT, os.urandom(2000)) + EXIT
    with pytest.raises(HostError, match="no tar archive"):
        files.receive(answering(noise), "/x", tmp_path / "x", {})
    refusal = wire.frame(Kind.STDERR, b"tar: no") + wire.frame(Kind.EXIT, wire.NUMBER.pack(256))
    with pytest.raises(UsageError, match="tar: no"):
        files.receive(answering(refusal), "/x", tmp_path / "x", {})


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no agent answers"):
        Command(tmp_path / "nothing", b"", patience=0.01)


def test_requests_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="NUL"):
        wire.request(["a\0b"], {})
    with pytest.raises(UsageError, match="too long"):
        wire.request(["x" * wire.PAYLOAD], {})
