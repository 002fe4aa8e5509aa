"""The escape key, and that the terminal is given back whatever happens."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.terminal import Escape, EscapeFilter

DOUBLES = Path(__file__).parents[1] / "doubles.py"
SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([b"plain"], [b"plain"]),
        ([b""], []),
        ([b"\x01x"], [Escape.QUIT]),
        ([b"\x01", b"X"], [Escape.QUIT]),
        ([b"a\x01hb"], [b"a", Escape.HELP, b"b"]),
        ([b"a\x01\x01b"], [b"a\x01b"]),
        ([b"\x01\x01\x01x"], [b"\x01", Escape.QUIT]),
        ([b"\x01zq"], [b"q"]),
        ([b"\x01s\x01?"], [Escape.STATS, Escape.HELP]),
        ([b"\x01"], []),
    ],
)
def test_escapes(typed: list[bytes], meant: list[object]) -> None:
    escapes = EscapeFilter()
    assert [piece for data in typed for piece in escapes.feed(data)] == meant


class Terminal:
    """A run of the command on a pseudo-terminal, from its user's seat."""

    def __init__(self, guest: str, *arguments: str) -> None:
        self.master, self.slave = os.openpty()
        self.before = self.mode()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, str(DOUBLES), guest, "run", "--kernel=k", "--memory=1M", *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            start_new_session=True,
        )

    def mode(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, wanted: bytes, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted!r} not in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536)

    def ended(self) -> int:
        """Exit status; the output is read on meanwhile, as a terminal does."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.02)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(guest: str, *arguments: str) -> Terminal:
            made = Terminal(guest, *arguments)
            stack.callback(made.close)
            return made

        yield start


def test_keys_go_to_the_guest_and_ctrl_a_x_leaves(terminal: Any) -> None:
    user = terminal("echo")
    user.expect(b"ready\n")
    assert user.mode()[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    user.type(b"\x03\x1a\x04\x01\x01ab")
    user.expect(b"\x03\x1a\x04\x01ab")
    user.type(b"\x01h")
    user.expect(b"Ctrl-A x       end the machine and leave\r\n")
    user.type(b"\x01s")
    user.expect(b"port_out")
    user.type(b"\x01x")
    assert user.ended() == 0
    assert user.mode() == user.before


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
)
def test_signals_give_the_terminal_back(terminal: Any, number: signal.Signals, status: int) -> None:
    user = terminal("hang")
    user.expect(b"ready\n")
    user.process.send_signal(number)
    assert user.ended() == status
    assert user.mode() == user.before


@pytest.mark.parametrize(
    ("guest", "arguments", "status", "said"),
    [
        ("hello", (), 0, b"hello"),
        ("crash", (), 4, b"error: the guest crashed"),
        ("reset", (), 7, b"asked for a reset"),
        ("boom", (), 70, b"internal error: RuntimeError: a bug of ours"),
        ("hang", ("--timeout", "0.3"), 5, b"within 0.3 s"),
        ("hello", ("--stats", "-"), 0, b"port_out"),
    ],
)
def test_endings_give_the_terminal_back(
    terminal: Any, guest: str, arguments: tuple[str, ...], status: int, said: bytes
) -> None:
    user = terminal(guest, *arguments)
    user.expect(said)
    assert user.ended() == status
    assert user.mode() == user.before


def test_raw_again_after_a_suspension(terminal: Any) -> None:
    user = terminal("echo")
    user.expect(b"ready\n")
    termios.tcsetattr(user.slave, termios.TCSANOW, user.before)
    user.process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 10
    while user.mode()[3] & termios.ICANON:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    user.type(b"q")
    assert user.ended() == 0
    assert user.mode() == user.before
