"""The host's ends of a socket device's streams: Unix sockets, in the manner of Firecracker.

A program on the host connects to the machine's socket, writes ``CONNECT <port>`` and a newline,
reads ``OK <port>`` and a newline, and then talks to whoever listens at that port in the guest. A
program in the guest that connects to port P of the host reaches who listens at the same path with
``_P`` behind it.

One thread does all reading and writing, with non-blocking sockets and a selector. What the device
tells it (with the board's lock held) goes through a queue and a wake-up; what it tells the device,
it tells without holding any lock of its own. So there is no order of locks to keep.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ringfence import sockets
from ringfence.devices.virtio.vsock import BUFFER, MAX_CONNECTIONS, Key, Shut, VirtioVsock

FIRST_HOST_PORT = 1 << 30
"""Ports of the host's for connections that the host begins."""
GREETING_LIMIT = 32
BACKLOG = 64
BEHIND = 1024
"""Things to do from which on the guest has to wait."""


class _Stream:
    """A Unix socket and what waits to be written to it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.key: Key | None = None
        self.greeting = bytearray()
        self.open = False
        """Whether data may pass."""
        self.ended = False
        """Whether there is nothing more to read."""
        self.out = bytearray()
        self.uncounted = 0
        """Bytes of ``out`` that are not the guest's."""
        self.shut = Shut(0)


class UnixHost:
    """A listening Unix socket, and the thread that serves it.

    Parameters
    ----------
    path : Path
        Where to listen; what is there already is an error, unless it is a dead socket of ours.

    Raises
    ------
    HostError
        The path can't be bound.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = sockets.listen(path, BACKLOG)
        self._listener.setblocking(False)
        self._device: VirtioVsock | None = None
        self._selector = selectors.DefaultSelector()
        self._streams: dict[Key, _Stream] = {}
        self._greeting: set[_Stream] = set()
        self._next_port = FIRST_HOST_PORT
        self._work: deque[Callable[[], None]] = deque()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing = False
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        self._thread = threading.Thread(target=self._run, name="ringfence-vsock", daemon=True)
        self._thread.start()

    # ---- what the device calls (see vsock.HostSide)

    @property
    def behind(self) -> bool:
        """See `HostSide.behind`."""
        return len(self._work) > BEHIND

    def attach(self, device: VirtioVsock) -> None:
        """See `HostSide.attach`; after a reset of the machine there is another device."""
        self._device = device

    def connect(self, key: Key) -> None:
        """See `HostSide.connect`."""
        self._later(lambda: self._connect(key))

    def established(self, key: Key) -> None:
        """See `HostSide.established`."""
        self._later(lambda: self._established(key))

    def data(self, key: Key, data: bytes) -> None:
        """See `HostSide.data`."""
        self._later(lambda: self._write(key, data))

    def credit(self, key: Key) -> None:
        """See `HostSide.credit`."""
        self._later(lambda: self._watch(key))

    def shut(self, key: Key, flags: Shut) -> None:
        """See `HostSide.shut`."""
        self._later(lambda: self._shut(key, flags))

    def ended(self, key: Key) -> None:
        """See `HostSide.ended`."""
        self._later(lambda: self._drop(key))

    def close(self) -> None:
        """See `HostSide.close`."""
        self._later(self._finish)
        self._thread.join()
        for stream in (*self._streams.values(), *self._greeting):
            stream.socket.close()
        self._listener.close()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)
        self._path.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._closing = True

    def _later(self, action: Callable[[], None]) -> None:
        if self._closing:
            return
        self._work.append(action)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_out, b"x")

    # ---- the thread

    def _run(self) -> None:
        while not self._closing:
            for key, mask in self._selector.select():
                key.data(mask)
                if self._closing:
                    return

    def _woken(self, mask: int) -> None:
        del mask
        os.read(self._wake_in, 4096)
        while self._work and not self._closing:
            self._work.popleft()()
        if self._device is not None and not self._closing:
            self._device.resume()

    def _accept(self, mask: int) -> None:
        del mask
        with contextlib.suppress(OSError):
            connection = sockets.accept(self._listener)
            connection.setblocking(False)
            if len(self._streams) + len(self._greeting) >= MAX_CONNECTIONS:
                connection.close()
                return
            stream = _Stream(connection)
            self._greeting.add(stream)
            self._selector.register(
                connection, selectors.EVENT_READ, lambda mask: self._greet(stream)
            )

    def _greet(self, stream: _Stream) -> None:
        """Read a CONNECT line, and not a byte more."""
        try:
            start = stream.socket.recv(GREETING_LIMIT, socket.MSG_PEEK)
            line, newline, _ = start.partition(b"\n")
            stream.socket.recv(len(line) + len(newline))
        except OSError:
            start = line = newline = b""
        stream.greeting += line
        if start and not newline and len(stream.greeting) < GREETING_LIMIT:
            return
        words = bytes(stream.greeting).split()
        port = int(words[1]) if len(words) == 2 and words[1].isdigit() else -1
        self._greeting.discard(stream)
        self._selector.unregister(stream.socket)
        if not newline or not 0 <= port < 1 << 32 or words[0] != b"CONNECT":
            stream.socket.close()
            return
        key = (port, self._free_port())
        stream.key = key
        self._streams[key] = stream
        if self._device is None or not self._device.request(key):
            self._drop(key)

    def _free_port(self) -> int:
        self._next_port = (
            FIRST_HOST_PORT + (self._next_port + 1 - FIRST_HOST_PORT) % FIRST_HOST_PORT
        )
        return self._next_port

    def _connect(self, key: Key) -> None:
        """Reach who listens for the guest; nobody may."""
        assert self._device is not None
        try:
            connection = sockets.connect(Path(f"{self._path}_{key[1]}"), timeout=0)
        except OSError:
            self._device.end(key)
            return
        stream = _Stream(connection)
        stream.key, stream.open = key, True
        self._streams[key] = stream
        self._device.accept(key)
        self._watch(key)

    def _established(self, key: Key) -> None:
        stream = self._streams.get(key)
        if stream is not None:
            stream.open = True
            answer = b"OK %d\n" % key[1]
            stream.uncounted = len(answer)
            stream.out += answer
            self._flush(stream)

    def _write(self, key: Key, data: bytes) -> None:
        stream = self._streams.get(key)
        if stream is not None:
            stream.out += data
            self._flush(stream)

    def _flush(self, stream: _Stream) -> None:
        """Write what waits, tell the device how much is gone, and do what comes then."""
        assert self._device is not None
        assert stream.key is not None
        try:
            while stream.out:
                done = stream.socket.send(stream.out[:BUFFER])
                del stream.out[:done]
                own = min(stream.uncounted, done)
                stream.uncounted -= own
                if done > own:
                    self._device.taken(stream.key, done - own)
        except BlockingIOError:
            pass
        except OSError:
            self._end(stream.key)
            return
        if not stream.out and stream.shut:
            if stream.shut == Shut.SEND | Shut.RECEIVE:
                self._end(stream.key)
                return
            if stream.shut & Shut.SEND:
                with contextlib.suppress(OSError):
                    stream.socket.shutdown(socket.SHUT_WR)
        self._watch(stream.key)

    def _shut(self, key: Key, flags: Shut) -> None:
        stream = self._streams.get(key)
        if stream is not None:
            stream.shut = flags
            self._flush(stream)

    def _watch(self, key: Key) -> None:
        """Wait for what can be done now with a stream."""
        stream = self._streams.get(key)
        if stream is None or not stream.open or self._device is None:
            return
        mask = selectors.EVENT_WRITE if stream.out else 0
        if not stream.ended and not stream.shut & Shut.RECEIVE and self._device.room(key):
            mask |= selectors.EVENT_READ
        registered = stream.socket in self._selector.get_map()
        if registered and not mask:
            self._selector.unregister(stream.socket)
        elif mask:
            change = self._selector.modify if registered else self._selector.register
            change(stream.socket, mask, lambda events: self._ready(stream, events))

    def _ready(self, stream: _Stream, events: int) -> None:
        key = stream.key
        assert key is not None
        assert self._device is not None
        if self._streams.get(key) is not stream:
            return
        if events & selectors.EVENT_READ:
            room = self._device.room(key)
            try:
                data = stream.socket.recv(room) if room else None
            except BlockingIOError:
                data = None
            except OSError:
                self._end(key)
                return
            if data:
                self._device.send(key, data)
            elif data is not None:
                stream.ended = True
                self._device.shutdown(key, Shut.SEND)
        self._flush(stream)

    def _end(self, key: Key) -> None:
        assert self._device is not None
        self._device.end(key)
        self._drop(key)

    def _drop(self, key: Key) -> None:
        stream = self._streams.pop(key, None)
        if stream is not None:
            if stream.socket in self._selector.get_map():
                self._selector.unregister(stream.socket)
            stream.socket.close()
