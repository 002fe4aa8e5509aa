"""``ringfence exec`` and ``ringfence cp``: commands and files for a guest that runs elsewhere.

Both ask the machine's process where its guest's sockets are reached, and then talk to the agent
themselves. Copying is tar in the guest at one end of a pipe, and a tar reader or writer of ours at
the other.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from ringfence.agent import wire
from ringfence.agent.client import Command
from ringfence.api.client import Client
from ringfence.cli.machines import write_all
from ringfence.cli.terminal import RawTerminal
from ringfence.errors import UsageError

STDIN, STDOUT, STDERR = 0, 1, 2
ENVIRONMENT = {
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
_IN_HOME = 'cd "$HOME" 2>/dev/null; exec "$@"'


def run_command(name: str, command: list[str], *, tty: bool, stdin: bool) -> int:
    """Run a command in a machine's guest, as root; its exit status."""
    environment = dict(ENVIRONMENT)
    terminal = None
    if tty:
        environment["TERM"] = os.environ.get("TERM", "linux")
        terminal = _size()
    request = wire.request(
        ["/bin/sh", "-c", _IN_HOME, "sh", *command], environment, terminal=terminal
    )
    remote = Command(agent_socket(name), request)
    try:
        with RawTerminal(STDIN if tty else -1):
            return _converse(remote, STDIN if stdin or tty else None, watch_size=tty)
    finally:
        remote.close()


def agent_socket(name: str) -> Path:
    """Where the sockets of a machine's guest are reached.

    Raises
    ------
    UsageError
        There is no such machine, or it has no vsock device.
    """
    with Client(name) as client:
        path = client.call("status").get("vsock")
    if not isinstance(path, str):
        raise UsageError(
            f"machine {name!r} has no way in for commands: start it with --agent, or a --name"
        )
    return Path(path)


def _converse(remote: Command, source: int | None, *, watch_size: bool) -> int:
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if watch_size:

            def resized(number: int, frame: object) -> None:
                remote.resize(*_size())
                os.write(wake_write, b"x")

            signal.signal(signal.SIGWINCH, resized)
        return remote.run(
            source,
            lambda data: write_all(STDOUT, data),
            lambda data: write_all(STDERR, data),
            wake_read,
        )
    finally:
        if watch_size:
            signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        os.close(wake_read)
        os.close(wake_write)


def _size() -> tuple[int, int]:
    columns, rows = shutil.get_terminal_size()
    return rows, columns


def copy(source: str, target: str) -> int:
    """Copy a file or folder into a guest or out of it: one side is ``NAME:PATH``.

    Raises
    ------
    UsageError
        Neither or both sides are a guest's, or the host's is not there.
    """
    from ringfence.agent.files import receive, send

    inside, outside = _split(target), _split(source)
    if (inside is None) == (outside is None):
        raise UsageError("cp needs one path of a guest's, NAME:PATH, and one of the host's")
    if inside is not None:
        name, path = inside
        send(agent_socket(name), Path(source), path, ENVIRONMENT)
    elif outside is not None:
        name, path = outside
        receive(agent_socket(name), path, Path(target), ENVIRONMENT)
    sys.stdout.flush()
    return 0


def _split(text: str) -> tuple[str, str] | None:
    """Machine and path of ``NAME:PATH``; None for a path of the host's (``./a:b`` is one)."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or not name:
        return None
    if not path:
        raise UsageError(f"{text!r} names no path: expected NAME:PATH")
    return name, path
