"""What goes over the line when a machine moves: messages, and the link that carries them.

A message is a header of 16 bytes (magic, kind, encoding, length, checksum) and its
payload: plain data as JSON, or pages. Every length is checked before anything is allocated, every
payload against its checksum before it is believed. An end of the link at whatever byte, silence for
longer than `Link.patience`, and noise are all a `LinkError` that says so.

The conversation, in order (the source speaks first):

| source | target | means |
|---|---|---|
| HELLO | | what machine comes, how large it is |
| | ACCEPT or FAILED | it can be had here, or why not |
| IMAGE | | the kernel and the like, where they may be needed again |
| | READY or FAILED | all of the machine is made but what it holds |
| DISK | | with ``--mirror``: the disks, while the guest goes on; again what it wrote meanwhile |
| PAGES, ZEROES | | RAM, likewise |
| STATE | | the guest stands still: the rest; disks are let go of |
| | RESTORED or FAILED | the machine could run here at once |
| GO | | from here on the source never runs it again |
| | RUNNING | it runs |

If both sides have a user-mode network (READY and GO say so), the link carries frames of connections
that the guest had before, from then on; see `network.succession`.

**RAM that follows.** With ``--postcopy`` (HELLO and READY agree on it) a guest that writes faster
than the line carries moves without the pages that it keeps writing. MISSING, before STATE, says
which. The source brings them over a connection of its own:

| source | target | means |
|---|---|---|
| FOLLOW | | which machine it is |
| | MISSING | what is still missing; again where more is |
| | WANT | somebody waits for these pages |
| PAGES, ZEROES | | pages, as above |
| | DONE | all are there |

Either side may send FAILED with a reason instead. Before GO, whatever goes wrong leaves the machine
at the source; who has received GO owns it. If the answer to GO is lost, the source can't know, so
it connects once more and sends QUERY with the token of HELLO; the target answers what became of it.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import lz4.block

from ringfence.errors import HostError, ImageError, UsageError
from ringfence.memory.dirty import PAGE, Run
from ringfence.network.peer import Peer
from ringfence.state import plain
from ringfence.state.pages import MAX_RUN

PROTOCOL = 2
MAGIC = b"RfMv"
HEADER = struct.Struct("<4sBBHII")
"""Magic, kind, encoding, zero, length of the payload, CRC-32 of kind, encoding and payload."""
PLACE = struct.Struct("<QI")
"""First page and how many, at the start of PAGES and repeated in ZEROES."""
MAX_PAGES = MAX_RUN
"""Pages in one message."""
FAREWELL = 2.0
"""Seconds that the other side is listened to, and not heard, after a failure."""
PATIENCE = 30.0
"""Seconds of silence until the other side is given up."""


class Kind(IntEnum):
    """Kinds of messages."""

    HELLO = 1
    ACCEPT = 2
    PAGES = 3
    ZEROES = 4
    STATE = 5
    RESTORED = 6
    GO = 7
    RUNNING = 8
    FAILED = 9
    QUERY = 10
    ANSWER = 11
    IMAGE = 12
    READY = 13
    MISSING = 14
    FOLLOW = 15
    WANT = 16
    DONE = 17
    DISK = 18


class Encoding(IntEnum):
    """How the bytes of PAGES are packed."""

    PLAIN = 0
    LZ4 = 1


MAX_PIECE = 1 << 20
"""Bytes of an image in one message."""
_MOST = {
    Kind.HELLO: 1 << 20,
    Kind.IMAGE: MAX_PIECE,
    Kind.MISSING: 64 << 20,
    Kind.DISK: (256 << 10) + 64,
    Kind.STATE: 64 << 20,
    Kind.PAGES: MAX_PAGES * PAGE + PLACE.size,
}
_MOST_OTHERS = 64 << 10


class LinkError(HostError):
    """The link was cut, fell silent, or carried something that is no message."""


class MoveFailed(HostError):
    """The machine did not move; the message says why and where it is."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for TLS with certificates on both sides: our own, its key, and whom we trust.

    Both sides have to present a certificate signed by ``authority``; names in them don't matter.
    """

    certificate: Path
    key: Path
    authority: Path

    def context(self, server: bool) -> ssl.SSLContext:
        """The context of one side; UsageError where the files are no such thing."""
        side = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key, _no_passphrase)
            context.load_verify_locations(self.authority)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"TLS with {self.certificate} is not possible: {error}") from error
        return context


def _no_passphrase() -> str:
    # OpenSSL would ask for it at the terminal, in the middle of a move.
    raise UsageError("TLS is not possible: the key has a passphrase, expected one without")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect or to listen: ``tcp://HOST:PORT`` or ``unix://PATH``."""

    family: socket.AddressFamily
    place: Any

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            return f"unix://{self.place}"
        host, port = self.place[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    @property
    def local(self) -> bool:
        """Whether descriptors can be passed."""
        return self.family == socket.AF_UNIX

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket; OSError."""
        if self.family != socket.AF_UNIX:
            return socket.create_connection(self.place[:2], timeout)
        made = socket.socket(self.family)
        try:
            made.settimeout(timeout)
            made.connect(self.place)
        except BaseException:
            made.close()
            raise
        return made

    def listen(self) -> socket.socket:
        """A listening socket; HostError."""
        try:
            if self.family != socket.AF_UNIX:
                return socket.create_server(self.place[:2], family=self.family)
            path = Path(self.place)
            if path.is_socket() and self._is_stale():
                path.unlink()
            made = socket.socket(self.family)
            made.bind(self.place)
            path.chmod(0o600)
            made.listen(4)
            return made
        except OSError as error:
            raise HostError(f"can't listen at {self} ({error.strerror or error})") from error

    def _is_stale(self) -> bool:
        try:
            self.connect(1).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def parse_address(text: str) -> Address:
    """Read an address; UsageError if it is none."""
    kind, separator, rest = text.partition("://")
    if kind == "unix" and separator and rest:
        return Address(socket.AF_UNIX, rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 1 << 16:
        host = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return Address(family, (host, int(port)))
    raise UsageError(f"{text!r} is no address: expected tcp://HOST:PORT or unix://PATH")


@dataclass(frozen=True, slots=True)
class Message:
    """A message that was received whole: ``data`` as it is, `content` as plain data."""

    kind: Kind
    encoding: int
    data: bytes

    def content(self) -> dict[str, Any]:
        """The payload as a dict; LinkError if it is none."""
        try:
            found = plain.loads(self.data, "message")
        except ImageError as error:
            raise LinkError(f"the other side sent noise ({error})") from error
        if not isinstance(found, dict):
            raise LinkError("the other side sent noise (no object)")
        return found


class Link:
    """A connection that carries messages.

    Parameters
    ----------
    connected : socket.socket
        The connection, which belongs to the link now.
    patience : float
        Seconds of silence until `LinkError`.
    """

    def __init__(self, connected: socket.socket, patience: float = PATIENCE) -> None:
        self._socket = connected
        self._given = False
        self.patience = patience
        connected.settimeout(patience)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = 0
        """Bytes."""

    def close(self) -> None:
        """Hang up, unless the connection was given away. Safe to repeat."""
        if not self._given:
            self._socket.close()

    def give_away(self) -> Peer:
        """The connection, for frames of a network from now on; no message may follow."""
        self._given = True
        self._socket.setblocking(False)
        again = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        return Peer(self._socket, again)

    def fileno(self) -> int:
        """The descriptor, to wait for what comes."""
        return self._socket.fileno()

    def fail(self, reason: str) -> None:
        """Say why this ends; what is on its way here is read, lest a reset overtake the reason."""
        self.send(Kind.FAILED, {"reason": reason})
        deadline = time.monotonic() + FAREWELL
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(FAREWELL)
            while self._socket.recv(1 << 20) and time.monotonic() < deadline:
                pass

    @property
    def buffered(self) -> bool:
        """Whether some of what has come is here already, of which its descriptor tells nothing."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def heard(self, seconds: float) -> bool:
        """Whether the other side says something, within so many seconds."""
        come = select.poll()
        come.register(self._socket, select.POLLIN)
        return self.buffered or bool(come.poll(seconds * 1000))

    def look(self) -> None:
        """Hear of a failure of the other side's, who says nothing else now; see `receive`."""
        if self.heard(0):
            self.receive()

    def send(self, kind: Kind, content: dict[str, Any] | None = None) -> None:
        """Send plain data."""
        self.send_raw(kind, plain.dumps({} if content is None else content))

    def send_raw(self, kind: Kind, data: bytes, encoding: int = 0) -> None:
        """Send bytes."""
        header = pack_header(kind, data, encoding)
        try:
            self._socket.sendall(header + data if len(data) < 4096 else header)
            if len(data) >= 4096:
                self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error
        self.sent += HEADER.size + len(data)

    def send_descriptor(self, fd: int) -> None:
        """Pass a file descriptor along (Unix sockets only)."""
        try:
            socket.send_fds(self._socket, [b"\0"], [fd])
        except OSError as error:
            raise self._lost(error) from error

    def receive_descriptor(self) -> int:
        """Take a file descriptor that was passed along."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        except OSError as error:
            raise self._lost(error) from error
        if len(data) != 1 or len(descriptors) != 1:
            raise LinkError("the other side passed no descriptor")
        return descriptors[0]

    def receive(self, *wanted: Kind) -> Message:
        """Wait for one of some kinds of messages.

        Raises
        ------
        LinkError
            It did not come, or something else did.
        MoveFailed
            The other side says that it failed.
        """
        magic, number, encoding, zero, length, checksum = HEADER.unpack(self._read(HEADER.size))
        if magic != MAGIC or zero or number not in Kind.__members__.values():
            raise LinkError("the other side sent noise: is it a Ringfence of this release?")
        kind = Kind(number)
        if length > _MOST.get(kind, _MOST_OTHERS):
            raise LinkError(f"the other side sent {length} bytes of {kind.name}")
        data = self._read(length)
        if _checksum(kind, encoding, data) != checksum:
            raise LinkError(f"{kind.name} was damaged on its way")
        message = Message(kind, encoding, data)
        if kind is Kind.FAILED and kind not in wanted:
            raise MoveFailed(str(message.content().get("reason"))[:1000])
        if kind not in wanted:
            raise LinkError(f"the other side sent {kind.name} out of turn")
        return message

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        try:
            while len(view):
                done = self._socket.recv_into(view)
                if not done:
                    raise LinkError("the link was cut")
                view = view[done:]
        except TimeoutError as error:
            raise LinkError(f"the other side was silent for {self.patience:g} s") from error
        except OSError as error:
            raise self._lost(error) from error
        return bytes(data)

    @staticmethod
    def _lost(error: OSError) -> LinkError:
        return LinkError(f"the link was cut ({error.strerror or error})")


def pack_header(kind: int, data: bytes, encoding: int = 0) -> bytes:
    """The header of a message."""
    return HEADER.pack(MAGIC, kind, encoding, 0, len(data), _checksum(kind, encoding, data))


def _checksum(kind: int, encoding: int, data: bytes) -> int:
    """CRC-32 of what a message says."""
    return zlib.crc32(data, zlib.crc32(bytes((kind, encoding))))


def secure(connected: socket.socket, context: ssl.SSLContext | None) -> socket.socket:
    """The connection with TLS, if that is wanted; LinkError if the other side isn't trusted.

    ``context`` is that of our side (`Tls.context`).
    """
    if context is None:
        return connected
    server = context.protocol is ssl.PROTOCOL_TLS_SERVER
    try:
        return context.wrap_socket(connected, server_side=server)
    except OSError as error:
        connected.close()
        raise LinkError(f"TLS with the other side failed: {error}") from error


def pack_places(runs: Iterable[Run]) -> bytes:
    """Runs as ZEROES, MISSING and WANT have them."""
    return b"".join(PLACE.pack(run.first, run.count) for run in runs)


def unpack_pages(message: Message, pages: int) -> tuple[Run, bytes | memoryview]:
    """Where the contents of PAGES belong, inside of ``pages`` pages, and themselves; LinkError."""
    if len(message.data) < PLACE.size:
        raise LinkError("the other side sent noise (a place cut off)")
    run = checked(Run(*PLACE.unpack_from(message.data)), pages)
    data = memoryview(message.data)[PLACE.size :]
    if message.encoding == Encoding.LZ4:
        try:
            data = memoryview(lz4.block.decompress(data, uncompressed_size=run.length))
        except lz4.block.LZ4BlockError as error:
            raise LinkError("the other side sent pages that can't be unpacked") from error
    elif message.encoding != Encoding.PLAIN:
        raise LinkError(f"the other side sent pages in encoding {message.encoding}")
    if len(data) != run.length:
        raise LinkError(f"the other side sent {len(data)} bytes for {run.length}")
    return run, data


def unpack_places(data: bytes, pages: int) -> list[Run]:
    """The runs that a message names, all of them inside RAM; LinkError otherwise."""
    if len(data) % PLACE.size:
        raise LinkError("the other side sent noise (a place cut off)")
    return [checked(Run(*place), pages) for place in PLACE.iter_unpack(data)]


def checked(run: Run, pages: int) -> Run:
    """A run that is inside ``pages`` pages; LinkError otherwise."""
    if not run.count or run.first + run.count > pages:
        raise LinkError(f"the other side sent pages {run.first} to {run.first + run.count}")
    return run
