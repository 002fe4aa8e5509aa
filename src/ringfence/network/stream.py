"""Virtual machines on one wire: a Unix socket with frames in it, each behind its length.

The stream is that of QEMU's ``-netdev stream`` and ``socket`` (see `peer`). Whoever comes first
listens, and is the *hub* for those who come later: it repeats each frame to all others and to its
own card, as an Ethernet repeater does. When the hub goes, its peers
try again every second; the first of them becomes the new hub.

What a peer may do: send frames of any content. A length that no frame has ends its connection. For
a peer that doesn't read, at most `BACKLOG` bytes are kept. With one peer the card's frames then
wait (and are dropped only when that queue is full, too); with several, frames for the slow one are
dropped, so that the others don't wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import time
from pathlib import Path

from ringfence.errors import HostError, UsageError
from ringfence.network.backend import MINIMUM_FRAME
from ringfence.network.peer import NoFrames, Peer
from ringfence.network.threaded import ThreadedBackend
from ringfence.sockets import accept

PEERS = 64
RETRY = 1.0
"""Seconds between two attempts to find a hub, or become one."""
PATIENCE = 5.0
"""Seconds to wait at first for others that are joining at the same moment."""
PATH_LIMIT = 107
"""Bytes of ``sun_path`` without its NUL (unix(7))."""


class SocketNetwork(ThreadedBackend):
    """A place on the wire at ``path``.

    Raises
    ------
    UsageError, HostError
        The path is no place for a socket.
    """

    NAME = "socket"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if len(os.fsencode(self.path)) > PATH_LIMIT:
            raise UsageError(f"socket {path} is too long: expected at most {PATH_LIMIT} bytes")
        super().__init__()
        self._listener: socket.socket | None = None
        self._peers: dict[int, Peer] = {}
        self._retry_at = 0.0
        self._counters["dropped_peers"] = 0
        try:
            self._join(PATIENCE)
        except OSError as error:
            self.close()
            raise HostError(
                f"socket {path} can't be used ({error.strerror or error}): expected a path in a"
                " folder that you may write to"
            ) from error

    @property
    def hub(self) -> bool:
        """True if this end repeats frames to the others."""
        return self._listener is not None

    # ---- finding the others

    def _join(self, patience: float = 0.0) -> None:
        """Connect to the hub, or become it. A lock keeps two from becoming it at once."""
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.01)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                connection.connect(str(self.path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                self._listen()
            except BaseException:
                connection.close()
                raise
            else:
                self._welcome(connection)
        finally:
            os.close(lock)

    def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise FileExistsError(errno.EEXIST, "there is another file of that name")
            self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            os.fchmod(listener.fileno(), 0o600)  # what the socket's file will have
            listener.bind(str(self.path))
            listener.listen(PEERS)
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    def _welcome(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._peers[connection.fileno()] = Peer(connection)

    def _drop(self, descriptor: int) -> None:
        peer = self._peers.pop(descriptor)
        peer.connection.close()
        self._retry_at = time.monotonic() + RETRY

    # ---- the thread's turn

    def _interest(self) -> tuple[list[tuple[int, int]], float | None]:
        wanted = []
        timeout = None
        if self._listener is not None:
            if len(self._peers) < PEERS:
                wanted.append((self._listener.fileno(), select.POLLIN))
        elif not self._peers:
            timeout = max(0.0, self._retry_at - time.monotonic())
        for descriptor, peer in self._peers.items():
            events = 0 if self._stalled else select.POLLIN
            wanted.append((descriptor, events | (select.POLLOUT if peer.outgoing else 0)))
        return wanted, timeout

    def _handle(self, ready: dict[int, int]) -> None:
        if self._listener is None and not self._peers:
            self._try_again()
        for descriptor in ready:
            peer = self._peers.get(descriptor)
            if peer is not None:
                self._serve(descriptor, peer, ready[descriptor])
            elif self._listener is not None:
                self._accept()

    def _try_again(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + RETRY
            with contextlib.suppress(OSError):
                self._join()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._welcome(accept(self._listener))

    def _serve(self, descriptor: int, peer: Peer, events: int) -> None:
        try:
            if events & select.POLLOUT:
                peer.flush()
            come = events & (select.POLLIN | select.POLLHUP | select.POLLERR)
            frames = peer.receive() if come else []
        except NoFrames:
            self._counters["dropped_peers"] += 1
            self._drop(descriptor)
            return
        except OSError:
            self._drop(descriptor)
            return
        for frame in frames:
            self._repeat(frame, descriptor)
            self._deliver(frame)

    @property
    def _jammed(self) -> bool:
        return len(self._peers) == 1 and next(iter(self._peers.values())).full

    def _send(self, frame: bytes) -> None:
        self._repeat(frame, None)

    def _repeat(self, frame: bytes, origin: int | None) -> None:
        """Send a frame to all peers but the one that it came from."""
        for descriptor, peer in list(self._peers.items()):
            if descriptor == origin or len(frame) < MINIMUM_FRAME:
                continue
            idle = not peer.outgoing
            if not peer.queue(frame):
                self._counters["dropped_sending"] += 1
            elif idle:
                try:
                    peer.flush()
                except OSError:
                    self._drop(descriptor)

    def _release(self) -> None:
        for descriptor in list(self._peers):
            self._drop(descriptor)
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
