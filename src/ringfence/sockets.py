"""Unix sockets of our own: at paths of any length, and none left behind by the dead.

A socket's address holds 107 bytes of path (unix(7)), which a folder of a test or a build easily
exceeds. So the folder is opened first, and the address names it by ``/proc/self/fd``.

A socket file stays when its process is killed. Nobody answers then, and `listen` takes its place;
one that is answered, and a file of another kind, is an error.

A process that is out of descriptors, which a guest with many connections can bring about, can't
accept, and whoever waits would keep its listener ready for ever. So a descriptor is kept for that
case, with which `accept` turns him away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ringfence.errors import HostError

_RETRY = 0.01


class _Spare:
    """A descriptor of nothing, to be given up for a moment where there is no other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = self._open()

    def turn_away(self, listener: socket.socket) -> None:
        """Accept who waits, only to hang up; does nothing where that is not possible either."""
        with self._lock, contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            try:
                listener.accept()[0].close()
            finally:
                self._fd = self._open()

    @staticmethod
    def _open() -> int:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


_spare = _Spare()


def accept(listener: socket.socket) -> socket.socket:
    """The connection of somebody who waits.

    Raises
    ------
    OSError
        There is nobody any more, or the process has no descriptor for him: he has been turned away.
    """
    try:
        return listener.accept()[0]
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            _spare.turn_away(listener)
        raise


def listen(path: Path, backlog: int) -> socket.socket:
    """Make a socket file, for its owner alone, and listen at it.

    Raises
    ------
    HostError
        The path can't be bound: it is taken, or its folder is not there or not ours to write.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _reachable(path) as address:
            _remove_dead(path, address)
            os.fchmod(listener.fileno(), 0o600)  # what the file will have
            listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise HostError(
            f"socket {path} can't be made ({error.strerror or error}): choose another path"
        ) from error
    return listener


def connect(path: Path, *, timeout: float) -> socket.socket:
    """Connect to a socket file, and set ``timeout`` (seconds) for all that follows, too.

    Raises
    ------
    OSError
        Nobody listens, or nothing is there. BlockingIOError: the listener takes no more for now;
        this is tried again until the time is over.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    deadline = time.monotonic() + timeout
    try:
        with _reachable(path) as address:
            while True:
                try:
                    connection.connect(address)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_RETRY)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """Give a short address of ``path``, as long as the block lasts."""
    folder = os.open(path.absolute().parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _remove_dead(path: Path, address: str) -> None:
    """Remove a socket that nobody listens at; FileExistsError for what must stay."""
    if not os.path.lexists(path):
        return
    if path.is_socket() and not path.is_symlink():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full backlog is a living one
            try:
                probe.connect(address)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
                return
            except BlockingIOError:
                pass
    raise FileExistsError(errno.EEXIST, "it is in use, or another kind of file")
