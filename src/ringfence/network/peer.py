"""Frames over a stream of bytes: a 32-bit big-endian length, then the frame, as QEMU has it.

Used between machines on one wire (`stream`), and between a machine that has moved and the network
that it left behind (`succession`).
"""

from __future__ import annotations

from typing import Protocol

from ringfence.network.backend import MAXIMUM_FRAME

PREFIX = 4
BACKLOG = 1 << 20
"""Bytes that wait for a slow peer at most."""
READ = 1 << 18
"""Bytes taken from a peer at once."""
TURN = 4
"""Times that a peer is read from before others have their turn."""


class NoFrames(ConnectionError):
    """What a peer says is not in frames."""


class Connection(Protocol):
    """What a peer needs of a socket; it is non-blocking."""

    def fileno(self) -> int:
        """The descriptor to poll."""

    def recv(self, length: int) -> bytes:
        """Take bytes; empty at the end."""

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Give bytes."""

    def close(self) -> None:
        """Hang up."""


class Peer:
    """One connection: what came of the next frame, and what waits to be sent.

    Parameters
    ----------
    connection : Connection
        It belongs to the peer from now on.
    again : tuple of exception types
        What the connection raises where it would have to wait (TLS has exceptions of its own).
    """

    def __init__(
        self, connection: Connection, again: tuple[type[OSError], ...] = (BlockingIOError,)
    ) -> None:
        self.connection = connection
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self._again = again

    def receive(self) -> list[bytes]:
        """The frames that have come; OSError if the connection is broken, ended or talks noise."""
        ended = False
        try:
            for _ in range(TURN):
                data = self.connection.recv(READ)
                if not data:
                    ended = True
                    break
                self.incoming += data
        except self._again:
            pass
        frames = self.frames()
        if frames is None:
            raise NoFrames
        if ended and not frames:
            raise ConnectionResetError
        return frames

    def frames(self) -> list[bytes] | None:
        """Cut whole frames off ``incoming``; None if the peer doesn't keep to the format."""
        found: list[bytes] = []
        at, data = 0, self.incoming
        while len(data) - at >= PREFIX:
            length = int.from_bytes(data[at : at + PREFIX], "big")
            if not 0 < length <= MAXIMUM_FRAME:
                return None
            if len(data) - at - PREFIX < length:
                break
            at += PREFIX + length
            found.append(bytes(data[at - length : at]))
        del data[:at]
        return found

    @property
    def full(self) -> bool:
        """True if the next frame may not find room."""
        return len(self.outgoing) + PREFIX + MAXIMUM_FRAME > BACKLOG

    def queue(self, frame: bytes) -> bool:
        """Note a frame for sending; False if too much waits already."""
        if len(self.outgoing) + PREFIX + len(frame) > BACKLOG:
            return False
        self.outgoing += len(frame).to_bytes(PREFIX, "big") + frame
        return True

    def flush(self) -> None:
        """Send what the socket takes; OSError if the connection is broken."""
        try:
            while self.outgoing:
                del self.outgoing[: self.connection.send(self.outgoing)]
        except self._again:
            pass
