"""``ringfence list``, ``stop``, ``pause``, ``resume``, ``console``: what runs elsewhere.

Each is a few words with the machine's process over its control socket.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

from ringfence.api.client import Client, list_machines
from ringfence.api.names import running
from ringfence.cli.terminal import ATTACHED, ATTACHED_HELP, Escape, EscapeFilter, RawTerminal
from ringfence.errors import GuestTimeout, HostError, UsageError

STDIN, STDOUT = 0, 1
CHUNK = 4096
PENDING = 64 << 10
"""Bytes typed that may wait for a guest that doesn't read; the rest is dropped."""
STOPPING = 15.0
"""Seconds that a process gets to stop its vCPUs, or to end when its machine has."""


def show_machines(*, as_json: bool) -> None:
    """Print the machines that run."""
    rows = list_machines()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("ringfence: no machine runs", file=sys.stderr)
        return
    heads = ("NAME", "STATE", "PID", "MEMORY", "CPUS", "ENGINE", "UP", "IMAGE")
    table = [heads, *(_row(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _row(row: dict[str, object]) -> tuple[str, ...]:
    memory, seconds = row.get("memory"), row.get("seconds")
    return (
        str(row.get("name")),
        str(row.get("state")),
        str(row.get("pid")),
        f"{memory >> 20}M" if isinstance(memory, int) else "",
        str(row.get("cpus", "")),
        str(row.get("engine", "")),
        _duration(seconds) if isinstance(seconds, (int, float)) else "",
        str(row.get("image") or ""),
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def stop(name: str, *, force: bool, timeout: float) -> None:
    """Shut a machine down, and wait until its process has ended.

    Raises
    ------
    UsageError
        It is paused, so that it can't shut down.
    GuestTimeout
        The guest did not follow within ``timeout`` seconds; it is left running.
    """
    with Client(name) as client:
        if force:
            client.call("stop", patience=STOPPING)
        else:
            if client.call("status")["state"] == "paused":
                raise UsageError(f"machine {name!r} is paused: resume it first, or use --force")
            client.call("power-button")
            answer = client.call("wait", patience=timeout + STOPPING, timeout=timeout)
            if answer["outcome"] is None:
                raise GuestTimeout(
                    f"machine {name!r} did not shut down within {timeout:g} s"
                    " (some guests have no ear for the power button):"
                    f" 'ringfence stop --force {name}' pulls the plug"
                )
    deadline = time.monotonic() + STOPPING
    while any(place.name == name for place in running()):
        if time.monotonic() >= deadline:
            raise HostError(f"machine {name!r} ended, but its process is still there")
        time.sleep(0.02)


def order(name: str, command: str) -> None:
    """Have a machine do something that takes no arguments and needs no words."""
    with Client(name) as client:
        client.call(command, patience=STOPPING)


def attach(name: str, *, history: int) -> int:
    """Join a machine's console until the user detaches or the machine ends; the exit status.

    In a pipe, the end of stdin is no end, as with ``run``.
    """
    with Client(name) as client, RawTerminal(STDIN) as terminal:
        stream = client.stream("console", history=history)
        if terminal.active:
            terminal.say(f"ringfence: this is {name}; Ctrl-A d detaches, Ctrl-A h shows more\n")
        ended = _Attachment(stream, terminal).run()
        if terminal.active:
            terminal.say("\nringfence: the machine ended\n" if ended else "\n")
    return 0


class _Attachment:
    """Moves bytes between stdin, stdout and a console.

    What is typed may have to wait for the guest; meanwhile a terminal is still listened to, so that
    the user can detach.
    """

    def __init__(self, stream: socket.socket, terminal: RawTerminal) -> None:
        self._stream = stream
        self._terminal = terminal
        self._escapes = EscapeFilter(ATTACHED)
        self._pending = bytearray()
        self._listening = True

    def run(self) -> bool:
        """Go on until one side ends it; True if it was the machine's."""
        stream, terminal = self._stream, self._terminal
        stream.setblocking(False)
        while True:
            poll = select.poll()
            poll.register(stream, select.POLLIN | (select.POLLOUT if self._pending else 0))
            if self._listening and (terminal.active or not self._pending):
                poll.register(STDIN, select.POLLIN)
            ready = dict(poll.poll())
            found = ready.pop(stream.fileno(), 0)
            try:
                if found & ~select.POLLOUT:
                    data = stream.recv(CHUNK)
                    if not data:
                        return True
                    write_all(STDOUT, data)
                if found & select.POLLOUT:
                    del self._pending[: stream.send(self._pending)]
            except BlockingIOError:
                continue
            except ConnectionError:
                return True
            if STDIN in ready and not self._typed(ready[STDIN]):
                return False

    def _typed(self, events: int) -> bool:
        """Take what was typed; False if the user wants to leave."""
        typed = os.read(STDIN, CHUNK) if not events & select.POLLNVAL else b""
        if not typed:
            self._listening = False
            return not self._terminal.active
        for piece in self._escapes.feed(typed) if self._terminal.active else [typed]:
            if piece is Escape.DETACH:
                return False
            if not isinstance(piece, bytes):
                self._terminal.say("\n" + ATTACHED_HELP)
            elif len(self._pending) < PENDING:
                self._pending += piece
        return True


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``, however slowly it is read."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
