"""The machine's end of the control socket.

One thread accepts, and each connection has a thread: commands may take long, and one that does
holds up nobody else. Nothing here waits for the guest. Whoever may connect is the machine's owner
already (the folder is his alone), but a confused client should not hurt either: lines, connections
and waiting times are bounded. When there are too many connections, the one that has asked nothing
for the longest time makes room.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ringfence import sockets
from ringfence.api import names, protocol
from ringfence.api.commands import Call, Stream, all_commands
from ringfence.errors import UsageError

if TYPE_CHECKING:
    from ringfence.machine import Machine

CONNECTIONS = 32
SENDING = 10.0
"""Seconds that a client may leave an answer unread."""
DRAINING = 1.0
"""Seconds that streams get to bring the machine's last words to their readers."""


class _Connection:
    """A client, and the thread that serves it."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server = server
        self._socket = connection
        self.idle_since: float | None = time.monotonic()
        """When it became idle; None while a command runs."""
        self.thread = threading.Thread(target=self._run, name="ringfence-control", daemon=True)

    def hang_up(self) -> None:
        """End it, from another thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            with self._socket, self._socket.makefile("rb") as lines:
                self._socket.settimeout(None)
                while line := lines.readline(protocol.LINE_LIMIT):
                    self.idle_since = None
                    if not self._answer(line):
                        break
                    self.idle_since = time.monotonic()
        except OSError:
            pass  # it went away
        finally:
            self._server.gone(self)

    def _answer(self, line: bytes) -> bool:
        """Do what a line asks; False if the connection has to end."""
        stream = None
        try:
            if not line.endswith(b"\n"):
                raise UsageError(
                    f"a control message is cut off or too long: expected a line of at most"
                    f" {protocol.LINE_LIMIT} bytes"
                )
            found = self._run_command(protocol.decode(line))
        except Exception as error:
            self._send(protocol.failure(error))
            return line.endswith(b"\n")
        if isinstance(found, Stream):
            stream, answer = found, {"result": found.result, "stream": True}
        else:
            answer = {"result": found}
        self._send(answer)
        if stream is not None:
            stream.serve(self._socket)
        return stream is None

    def _run_command(self, message: protocol.Message) -> dict[str, Any] | Stream:
        name, arguments = protocol.parse_request(message)
        commands = all_commands()
        if name not in commands:
            raise UsageError(f"command {name!r} is unknown: expected one of {', '.join(commands)}")
        server = self._server
        return commands[name].run(
            Call(server.machine, server.about, arguments, self._progress, self._abandoned)
        )

    def _progress(self, stage: str, fraction: float) -> None:
        self._send({"progress": {"stage": stage, "fraction": fraction}})

    def _abandoned(self) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _send(self, message: protocol.Message) -> None:
        self._socket.settimeout(SENDING)
        try:
            self._socket.sendall(protocol.encode(message))
        finally:
            self._socket.settimeout(None)


class Server:
    """Serves one machine's control socket until it is closed.

    Parameters
    ----------
    machine : Machine
        What commands are for.
    place : Place
        Where the socket goes.
    about : mapping
        Plain data that ``status`` gives beside what the machine knows of itself.

    Raises
    ------
    HostError
        The socket can't be made.
    """

    def __init__(self, machine: Machine, place: names.Place, about: Mapping[str, Any]) -> None:
        self.machine = machine
        self.about = {"name": place.name, **about}
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._listener = sockets.listen(place.control, CONNECTIONS)
        self._thread = threading.Thread(target=self._accept, name="ringfence-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let streams bring their last bytes, hang up, and remove the socket's file."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        deadline = time.monotonic() + DRAINING
        with self._lock:
            left = list(self._connections)
        for connection in left:
            if connection.idle_since is None:
                connection.thread.join(max(0.0, deadline - time.monotonic()))
            connection.hang_up()

    def gone(self, connection: _Connection) -> None:
        """Forget a connection (called by its thread)."""
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        while not self._closing:
            try:
                accepted = sockets.accept(self._listener)
            except OSError:
                if not self._closing:
                    time.sleep(0.1)  # out of descriptors, say
                continue
            connection = _Connection(self, accepted)
            with self._lock:
                room = len(self._connections) < CONNECTIONS or self._make_room()
                if room:
                    self._connections.add(connection)
            if room:
                connection.thread.start()
            else:
                self._refuse(accepted)

    def _make_room(self) -> bool:
        """Drop the connection that has been idle for the longest; False if none is."""
        idle = [each for each in self._connections if each.idle_since is not None]
        if not idle:
            return False
        longest = min(idle, key=lambda each: each.idle_since or 0.0)
        self._connections.discard(longest)
        longest.hang_up()
        return True

    def _refuse(self, accepted: socket.socket) -> None:
        busy = UsageError(f"{CONNECTIONS} clients are at work on this machine: try again later")
        with contextlib.suppress(OSError), accepted:
            accepted.setblocking(False)
            accepted.send(protocol.encode(protocol.failure(busy)))


@contextlib.contextmanager
def published(machine: Machine, place: names.Place, **about: Any) -> Iterator[Server]:
    """Have a machine reachable in its place, which is claimed, for the length of a block.

    ``about`` is what ``status`` tells beside the machine's own.
    """
    server = Server(machine, place, about)
    try:
        yield server
    finally:
        server.close()
