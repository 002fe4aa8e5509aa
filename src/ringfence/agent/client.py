"""The host's end of the agent: start a program in a guest, be its terminal, get its status.

One loop polls the input and the stream. What is read from the input waits, one piece at a time,
until the stream has taken it, and the stream is always read: the agent relies on that. A guest may
have replaced the agent by something else; so frames are bounded and their order is checked, and all
that they can do is write to the two outputs and name a status.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ringfence import sockets
from ringfence.agent import wire
from ringfence.agent.wire import Kind
from ringfence.errors import HostError

Output = Callable[[bytes], None]
READY = 30.0
"""Seconds that a guest gets to have its agent up."""
_RETRY = 0.1
_ANSWER = 10.0
_CHUNK = 16 << 10


class Command:
    """A program in a guest.

    Parameters
    ----------
    path : Path
        The machine's vsock socket.
    request : bytes
        What `wire.request` made.
    patience : float
        Seconds until there has to be an agent.

    Raises
    ------
    HostError
        No agent answers.
    """

    def __init__(self, path: Path, request: bytes, *, patience: float = READY) -> None:
        self._stream = _reach(path, patience)
        self._out = bytearray(request)
        self._in = bytearray()
        self._deaf = False
        """Whether the guest takes no more bytes."""
        self._stream.setblocking(False)

    def close(self) -> None:
        """Hang up; a program that still runs gets SIGHUP."""
        self._stream.close()

    def resize(self, rows: int, columns: int) -> None:
        """Tell the size of the terminal; from the thread of `run`, or a signal handler of it."""
        self._out += wire.frame(Kind.RESIZE, wire.SIZE.pack(rows, columns))

    def run(self, source: int | None, out: Output, err: Output, wake: int | None = None) -> int:
        """Move bytes until the program has ended; its exit status as a shell gives it.

        Parameters
        ----------
        source : int or None
            The descriptor of its input; None for none.
        out, err : callable
            Take its output.
        wake : int, optional
            A descriptor that is readable when `resize` was called from elsewhere; it is emptied.

        Raises
        ------
        HostError
            The guest went away, or what answers is no agent of ours.
        """
        if source is None:
            self._out += wire.frame(Kind.STDIN)
        while True:
            poll = select.poll()
            if self._deaf:
                self._out.clear()
                source = None
            poll.register(self._stream, select.POLLIN | (select.POLLOUT if self._out else 0))
            if source is not None and not self._out:
                poll.register(source, select.POLLIN)
            if wake is not None:
                poll.register(wake, select.POLLIN)
            ready = dict(poll.poll())
            if wake is not None and wake in ready:
                os.read(wake, 512)
            if source is not None and source in ready:
                data = _read(source)
                self._out += wire.frame(Kind.STDIN, data)
                source = source if data else None
            status = self._exchange(ready.get(self._stream.fileno(), 0), out, err)
            if status is not None:
                return status

    def _exchange(self, events: int, out: Output, err: Output) -> int | None:
        try:
            if events & select.POLLOUT:
                self._send()
            if events & ~select.POLLOUT:
                data = self._stream.recv(1 << 16)
                if not data:
                    raise HostError("the guest's agent went away before the command had ended")
                self._in += data
                return self._take(out, err)
        except BlockingIOError:
            return None
        except OSError as error:
            raise HostError(f"the guest's agent went away ({error.strerror})") from error
        return None

    def _send(self) -> None:
        """Send what the stream takes.

        A program may end before it has read its input; then nobody takes it any more, but what it
        wrote and its status are still to be read.
        """
        try:
            del self._out[: self._stream.send(self._out)]
        except (BrokenPipeError, ConnectionResetError):
            self._deaf = True
            self._out.clear()

    def _take(self, out: Output, err: Output) -> int | None:
        """Follow the frames that are whole."""
        while len(self._in) >= wire.FRAME.size:
            length, kind = wire.FRAME.unpack_from(self._in)
            if length > wire.PAYLOAD or kind not in (Kind.STDOUT, Kind.STDERR, Kind.EXIT):
                raise HostError("what answers in the guest is no agent of this release's")
            end = wire.FRAME.size + length
            if len(self._in) < end:
                break
            payload = bytes(self._in[wire.FRAME.size : end])
            del self._in[:end]
            if kind == Kind.EXIT:
                return _status(payload)
            (out if kind == Kind.STDOUT else err)(payload)
        return None


def _status(payload: bytes) -> int:
    if len(payload) != wire.NUMBER.size:
        raise HostError("what answers in the guest is no agent of this release's")
    code = os.waitstatus_to_exitcode(wire.NUMBER.unpack(payload)[0] & 0xFFFF)
    return code if code >= 0 else 128 - code


def _read(source: int) -> bytes:
    try:
        return os.read(source, _CHUNK)
    except OSError:
        return b""


def _reach(path: Path, patience: float) -> socket.socket:
    """Connect to the agent, as soon as it listens."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            stream = sockets.connect(path, timeout=_ANSWER)
            try:
                stream.sendall(b"CONNECT %d\n" % wire.PORT)
                answer = bytearray()
                while not answer.endswith(b"\n"):
                    piece = stream.recv(1)
                    if not piece:
                        break
                    answer += piece
                if answer.startswith(b"OK "):
                    return stream
            except BaseException:
                stream.close()
                raise
            stream.close()
        if time.monotonic() >= deadline:
            raise HostError(
                "no agent answers in the guest: it is not up yet, or its image has none"
                " (pull it again)"
            )
        time.sleep(_RETRY)
