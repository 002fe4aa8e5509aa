"""Commands and files for a guest in another process, by the agent in its image."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import support
from ringfence.images.store import Image, Store


@pytest.fixture(scope="module")
def home(cloud: Image, store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose RINGFENCE_HOME has the image, and nobody's machines."""
    folder = tmp_path_factory.mktemp("exec")
    (folder / "images").mkdir()
    shutil.copytree(cloud.folder, folder / "images" / "guest")
    return support.environment({"RINGFENCE_HOME": str(folder)})


@pytest.fixture(scope="module")
def web(home: dict[str, str], cache: Path) -> Iterator[None]:
    """A machine called "web" that runs detached."""
    done = subprocess.run(
        support.command(
            *("run", "guest", "--name", "web", "--detach"),
            *("--engine", "translate", "--cache-dir", cache),
        ),
        env=home,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"web\n"), done.stderr
    yield
    subprocess.run(
        support.command("stop", "--force", "web"), env=home, capture_output=True, check=False
    )


def call(
    home: dict[str, str], *arguments: str | Path, typed: bytes = b""
) -> tuple[int, bytes, bytes]:
    """Status, output and errors of a command line."""
    done = subprocess.run(
        support.command(*arguments),
        env=home,
        input=typed,
        capture_output=True,
        timeout=support.BOOT,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.boot
def test_commands(home: dict[str, str], web: None) -> None:
    """Streams are kept apart, input has an end, statuses and signals are a shell's."""
    script = "echo out; echo err >&2; pwd; exit 3"
    assert call(home, "exec", "web", "--", "sh", "-c", script) == (3, b"out\n/root\n", b"err\n")
    assert call(home, "exec", "web", "--", "sh", "-c", "kill -9 $$")[0] == 137
    assert call(home, "exec", "web", "no-such-program")[0] == 127
    assert call(home, "exec", "web", "--", "cat", typed=b"ignored") == (0, b"", b"")
    data = os.urandom(3 << 20)
    assert call(home, "exec", "-i", "web", "--", "cat", typed=data) == (0, data, b"")
    assert call(home, "exec", "-i", "web", "--", "head", "-c", "1", typed=data)[1] == data[:1]
    status, out, _ = call(home, "exec", "web", "--", "sh", "-c", "sleep 1000 & echo started")
    assert (status, out) == (0, b"started\n")


@pytest.mark.boot
@pytest.mark.parametrize(("typed", "status"), [(b"words\n", 5), (b"\x03", 130)])
def test_a_terminal(home: dict[str, str], web: None, typed: bytes, status: int) -> None:
    """It has a size, echoes, edits lines, and Ctrl-C reaches the program."""
    script = "tty; stty size; read -r line; echo got $line; exit 5"
    child, terminal = pty.fork()
    if child == 0:
        command = support.command("exec", "-t", "web", "--", "sh", "-c", script)
        os.execve(sys.executable, command, home)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("<4H", 33, 99, 0, 0))
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], support.BOOT)[0], seen
            seen += os.read(terminal, 4096)

    wait_for(b"/dev/pts/")
    wait_for(b"33 99\r\n")
    os.write(terminal, typed)
    wait_for(b"got words\r\n" if status == 5 else b"^C")
    _, ended = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(ended) == status


@pytest.mark.boot
def test_a_client_that_is_killed_takes_its_command_along(home: dict[str, str], web: None) -> None:
    client = subprocess.Popen(
        support.command("exec", "web", "--", "sh", "-c", "echo up; exec sleep 4321"),
        env=home,
        stdout=subprocess.PIPE,
    )
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.kill()
    gone = "while pgrep -f 'sleep 432[1]' > /dev/null; do sleep 0.05; done"
    assert call(home, "exec", "web", "--", "sh", "-c", gone)[0] == 0


@pytest.mark.boot
def test_files(home: dict[str, str], web: None, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_bytes(os.urandom(200_000))
    (folder / "sub" / "file").chmod(0o751)
    (folder / "link").symlink_to("/etc/passwd")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho copied\n")
    program.chmod(0o755)

    assert call(home, "cp", program, "web:/usr/bin/copied") == (0, b"", b"")
    assert call(home, "exec", "web", "copied")[1] == b"copied\n"
    assert call(home, "cp", folder, "web:/tmp/there") == (0, b"", b"")
    back = tmp_path / "back"
    back.mkdir()
    assert call(home, "cp", "web:/tmp/there", back) == (0, b"", b"")
    assert call(home, "cp", "web:/usr/bin/copied", back / "again") == (0, b"", b"")
    copy = back / "there" / "sub" / "file"
    assert copy.read_bytes() == (folder / "sub" / "file").read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o751
    assert (back / "there" / "link").readlink() == Path("/etc/passwd")
    assert (back / "again").read_text() == program.read_text()

    for arguments, message in (
        (("web:/nope", back), b"nope"),
        ((program, "web:/nope/x"), b"nope"),
        ((tmp_path / "nope", "web:/tmp"), b"nope"),
        ((program, back), b"NAME:PATH"),
        (("web:/tmp", "web:/x"), b"NAME:PATH"),
    ):
        status, _, errors = call(home, "cp", *arguments)
        assert status == 2
        assert message in errors


@pytest.mark.boot
def test_the_power_button_is_heard(home: dict[str, str], web: None) -> None:
    """Last of all: it ends the machine."""
    assert call(home, "stop", "web") == (0, b"", b"")
    status, _, errors = call(home, "exec", "web", "true")
    assert status == 2
    assert b"no machine named 'web'" in errors
