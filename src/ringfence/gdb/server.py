"""Where GDB connects: one thread that listens, reads packets and sends replies.

One GDB at a time is served, another one that connects is turned away. The machine's threads tell of
stops by writing to an eventfd; everything else happens in the thread here, which sleeps in one
``poll``. When the machine ends, its last word to GDB is how.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import HostError, RingfenceError, UsageError
from ringfence.gdb.packets import PacketReader, ProtocolError, Signal, frame
from ringfence.gdb.stub import Stub
from ringfence.life import State
from ringfence.sockets import accept, listen

if TYPE_CHECKING:
    from ringfence.machine import Machine

LOOPBACK = "127.0.0.1"
UNIX = "unix:"
SEND_PATIENCE = 10.0
"""Seconds that GDB may take to read a reply."""
CHUNK = 1 << 16


def parse_place(text: str) -> Path | tuple[str, int]:
    """Where to listen: ``unix:PATH``, or ``[HOST]:PORT`` with the loopback by default.

    Raises
    ------
    UsageError
        It is neither.
    """
    if text.startswith(UNIX):
        return Path(text.removeprefix(UNIX))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise UsageError(f"--gdb {text}: expected :PORT, HOST:PORT or unix:PATH")
    return host.strip("[]") or LOOPBACK, int(port)


class GdbServer:
    """Listens for GDB as long as it is open; see the module's text.

    Parameters
    ----------
    machine : Machine
        What is debugged; it outlives the server.
    place : str
        As `parse_place` takes it.

    Attributes
    ----------
    address : str
        Where to connect, as GDB's ``target remote`` takes it.

    Raises
    ------
    UsageError, HostError
        ``place`` makes no sense, or can't be had.
    """

    def __init__(self, machine: Machine, place: str) -> None:
        self._machine = machine
        where = parse_place(place)
        self._path = where if isinstance(where, Path) else None
        if isinstance(where, Path):
            self._listener = listen(where, 1)
            self.address = str(where)
        else:
            self._listener = _listen(*where)
            host, port = self._listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self.address = f"{'' if host == LOOPBACK else shown}:{port}"
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()
        self._closing = False
        self._forget = machine.debug.when_stopped(self._poke)
        machine.when_ended(self._poke)
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up and listen no more. Safe to repeat."""
        if self._closing:
            return
        self._closing = True
        self._poke()
        self._thread.join()
        self._forget()
        self._listener.close()
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> GdbServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _poke(self) -> None:
        """Wake the thread (any thread, and after `close`, too)."""
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        while not self._closing:
            if self._listener in self._ready(self._listener):
                with contextlib.suppress(OSError), accept(self._listener) as connection:
                    _Connection(connection, self).run()

    def _ready(self, *sockets: socket.socket) -> list[socket.socket]:
        """Wait for something to do; the sockets that can be read."""
        poll = select.poll()
        for descriptor in (self._wake, *(each.fileno() for each in sockets)):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return [each for each in sockets if each.fileno() in ready]


class _Connection:
    """One GDB."""

    def __init__(self, connection: socket.socket, server: GdbServer) -> None:
        self._socket = connection
        self._server = server
        self._stub = Stub(server._machine)
        self._reader = PacketReader()
        connection.settimeout(SEND_PATIENCE)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        """Serve it to its end."""
        server, stub = self._server, self._stub
        with contextlib.suppress(OSError, ProtocolError, RingfenceError):
            stub.attach()
            while not stub.over and not server._closing:
                ready = server._ready(self._socket, server._listener)
                if stub.running and server._machine.state is not State.RUNNING:
                    self._send(stub.stop_reply())
                if self._socket in ready and not self._receive():
                    break
                if server._listener in ready:
                    accept(server._listener).close()
        with contextlib.suppress(RingfenceError):
            if not stub.over and not server._closing:
                stub.release()
        if stub.running and server._machine.state is State.ENDED:
            with contextlib.suppress(OSError):
                self._send(stub.stop_reply())

    def _receive(self) -> bool:
        """Take what there is and answer; False at the end."""
        data = self._socket.recv(CHUNK)
        for packet in self._reader.feed(data):
            if packet is Signal.INTERRUPT:
                self._stub.interrupt()
                continue
            if isinstance(packet, Signal):
                self._socket.sendall(b"-")
                continue
            if self._stub.acknowledge:
                self._socket.sendall(b"+")
            reply = self._stub.handle(packet)
            self._reader.checked = self._stub.acknowledge
            if reply is not None:
                self._send(reply)
            if self._stub.over:
                break
        return bool(data)

    def _send(self, payload: bytes) -> None:
        self._socket.sendall(frame(payload))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise HostError(
            f"--gdb {host}:{port} can't be had ({error.strerror or error}): choose another port"
        ) from error
    return listener
