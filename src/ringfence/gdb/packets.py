"""The framing of GDB's remote serial protocol: packets, acknowledgements, the interrupt byte.

A packet is ``$payload#checksum``; in its payload ``}`` escapes a byte, and ``*`` repeats one, which
we never send. `PacketReader` is fed whatever comes out of the socket and takes nothing on trust: a
packet that is too long ends the connection, one with a wrong checksum is asked for again, and noise
between packets is skipped.

Source: GDB manual, appendix E.1 (Overview of the Remote Serial Protocol).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

PACKET_MAX = 0x4000
"""Bytes of a packet's payload, either way, as they are sent."""
INTERRUPT = 3
_START = re.compile(rb"[$\x03]")
_ESCAPED = b"#$}*"


class Signal(Enum):
    """What is no packet."""

    INTERRUPT = "interrupt"
    DAMAGED = "damaged"
    """A packet with a wrong checksum; the other side sends it again when it is told."""


class ProtocolError(Exception):
    """What the other side sends can't be followed any more."""


def frame(payload: bytes) -> bytes:
    """A packet around a payload, which is escaped already where it has to be."""
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def escape(data: bytes) -> bytes:
    """Binary data as a payload may hold them."""
    out = bytearray()
    for byte in data:
        if byte in _ESCAPED:
            out += bytes((ord("}"), byte ^ 0x20))
        else:
            out.append(byte)
    return bytes(out)


def unescape(data: bytes) -> bytes:
    """The data behind an escaped payload."""
    out = bytearray()
    stream = iter(data)
    for byte in stream:
        out.append(next(stream, 0) ^ 0x20 if byte == ord("}") else byte)
    return bytes(out)


class PacketReader:
    """Takes bytes, gives payloads and signals."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self.checked = True
        """Whether checksums count: until both sides agree to do without acknowledgements."""

    def feed(self, data: bytes) -> Iterator[bytes | Signal]:
        """Give what is complete; ProtocolError if what is not grows too long."""
        waiting = self._waiting
        waiting += data
        while True:
            # Acknowledgements, which we don't wait for, and noise are skipped.
            start = _START.search(waiting)
            del waiting[: start.start() if start else len(waiting)]
            if not waiting:
                return
            if waiting[0] == INTERRUPT:
                del waiting[0]
                yield Signal.INTERRUPT
                continue
            end = waiting.find(b"#")
            if (end if end >= 0 else len(waiting)) > PACKET_MAX + 1:
                raise ProtocolError(f"a packet of more than {PACKET_MAX} bytes")
            if end < 0 or len(waiting) < end + 3:
                return
            payload, check = bytes(waiting[1:end]), bytes(waiting[end + 1 : end + 3])
            del waiting[: end + 3]
            if self.checked and check.lower() != b"%02x" % (sum(payload) & 0xFF):
                yield Signal.DAMAGED
            else:
                yield payload
