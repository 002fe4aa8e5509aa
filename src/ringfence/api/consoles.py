"""The console of a running machine over its control socket: any number may read and type.

What the guest writes is appended to each reader's own buffer, by the guest's thread, which never
waits for a reader: who is more than `BEHIND` bytes late loses the oldest of them, and is told.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import Any

from ringfence.api.commands import Call, Stream, command
from ringfence.console import Console
from ringfence.errors import UsageError

BEHIND = 1 << 20
"""Bytes that may wait for a reader."""
CHUNK = 4096
UNREAD = 16 << 10
"""Bytes typed that may wait for the guest; a client that types more has to wait."""
HISTORY = 64 << 10
_RETRY_MS = 20


@command("console", history=int)
def console(call: Call) -> Stream:
    """Open the console; ``history`` bytes of what the guest wrote before come first."""
    history = call.arguments.get("history", HISTORY)
    if history < 0:
        raise UsageError(f"history {history}: expected a number of bytes")
    attached = _Attached(call.machine.console, history)
    return Stream({}, attached.serve)


@command("type", text=str)
def type_text(call: Call) -> dict[str, Any]:
    """Type ``text`` at the console."""
    text = call.arguments.get("text", "")
    if call.machine.console.unread > UNREAD:
        raise UsageError("the guest has not read what was typed before: try again later")
    call.machine.console.send(text)
    return {}


class _Attached:
    """One reader: a buffer that the guest's threads fill and the connection's thread empties."""

    def __init__(self, console: Console, history: int) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._lost = 0
        self._history = history
        self._wake = -1

    def serve(self, connection: socket.socket) -> None:
        """Move bytes both ways until the client goes away or the machine has ended."""
        connection.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            with self._lock:  # nothing new may come before the history
                self._waiting += self._console.listen(self._feed, history=self._history)
            try:
                self._loop(connection)
            finally:
                self._console.unlisten(self._feed)
        finally:
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def _feed(self, data: bytes) -> None:
        """Take output of the guest, in one of its threads; b"" when it ended."""
        with self._lock:
            self._waiting += data
            excess = len(self._waiting) - BEHIND
            if excess > 0:
                del self._waiting[:excess]
                self._lost += excess
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _loop(self, connection: socket.socket) -> None:
        out = bytearray()
        while True:
            if not out:
                ended = self._console.ended  # first: what came before it is in the buffer
                out += self._take()
                if ended and not out:
                    return
            held = self._console.unread > UNREAD
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            events = (0 if held else select.POLLIN) | (select.POLLOUT if out else 0)
            poll.register(connection, events)
            ready = dict(poll.poll(_RETRY_MS if held else None))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            found = ready.get(connection.fileno(), 0)
            try:
                if found & select.POLLOUT:
                    del out[: connection.send(out[:CHUNK])]
                if found & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    typed = connection.recv(CHUNK)
                    if not typed:
                        return
                    self._console.send(typed)
            except BlockingIOError:
                continue
            except OSError:
                return

    def _take(self) -> bytes:
        with self._lock:
            data, self._waiting = bytes(self._waiting), bytearray()
            lost, self._lost = self._lost, 0
        note = b"\r\n[ringfence: %d bytes were too many for this reader]\r\n" % lost
        return note + data if lost else data
