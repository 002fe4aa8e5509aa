"""What a driver leaves to its network card: checksums, and cutting large TCP segments.

The internet checksum (RFC 1071) is a sum modulo 65535, and 65536 is 1 modulo 65535: so the sum of a
buffer's 16-bit words is the whole buffer, taken as one large number, modulo 65535. That is one
division in C where a loop would be thousands of steps.

Nothing in a frame is trusted: an offset that is not inside it makes the frame `Malformed`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

ETHERNET = 14
MINIMUM_MSS = 64
"""Bytes per segment at least: what bounds the number of segments."""

_FIN, _PSH, _CWR = 0x01, 0x08, 0x80
"""TCP flags that belong to the last segments, and to the first (RFC 9293, RFC 3168)."""
TCP = 6


class Malformed(ValueError):
    """A frame that can't be what its driver says."""


def checksum(data: bytes | bytearray | memoryview) -> int:
    """Return the internet checksum of ``data``, its own field included as it is.

    It is 0 if that field is right: a sum that is not zero folds to 65535 where it is a multiple.
    """
    value = int.from_bytes(data, "big")
    if len(data) % 2:
        value <<= 8
    return 0xFFFF - (value % 0xFFFF or (0xFFFF if value else 0))


def finish_checksum(frame: bytearray, start: int, offset: int) -> None:
    """Sum from ``start`` to the end; store it at ``offset`` behind ``start``.

    The field holds the pseudo header's sum before.
    """
    field = start + offset
    if start < ETHERNET or field + 2 > len(frame):
        raise Malformed(f"a checksum at {field} of {len(frame)} bytes")
    value = checksum(memoryview(frame)[start:])
    struct.pack_into(">H", frame, field, value or 0xFFFF)


def segments(frame: bytes, tcp: int, mss: int, *, version: int) -> Iterator[bytes]:
    """Cut a TCP frame into ones of at most ``mss`` bytes of payload, with all checksums.

    Parameters
    ----------
    frame : bytes
        Ethernet, IP header of ``version`` (4 or 6), TCP header, any amount of payload.
    tcp : int
        Where the TCP header is.
    mss : int
        Bytes of payload per segment.

    Raises
    ------
    Malformed
        That is not what the frame is like.
    """
    minimum = ETHERNET + (20 if version == 4 else 40)
    if not minimum <= tcp <= len(frame) - 20 or frame[ETHERNET] >> 4 != version:
        raise Malformed(f"a TCP header at {tcp} of {len(frame)} bytes")
    if mss < MINIMUM_MSS:
        raise Malformed(f"segments of {mss} bytes")
    start = tcp + (frame[tcp + 12] >> 4) * 4
    if start < tcp + 20 or start > len(frame):
        raise Malformed(f"a TCP header of {start - tcp} bytes")
    payload = memoryview(frame)[start:]
    (sequence,) = struct.unpack_from(">I", frame, tcp + 4)
    (identification,) = struct.unpack_from(">H", frame, ETHERNET + 4)
    flags = frame[tcp + 13]
    for number, at in enumerate(range(0, max(len(payload), 1), mss)):
        part = payload[at : at + mss]
        out = bytearray(frame[:start])
        last = at + mss >= len(payload)
        kept = flags & ~(0 if last else _FIN | _PSH) & ~(_CWR if number else 0)
        out[tcp + 13] = kept
        struct.pack_into(">I", out, tcp + 4, sequence + at & 0xFFFF_FFFF)
        length = start - tcp + len(part)
        if version == 4:
            struct.pack_into(">H", out, ETHERNET + 2, tcp - ETHERNET + length & 0xFFFF)
            struct.pack_into(">H", out, ETHERNET + 4, identification + number & 0xFFFF)
            struct.pack_into(">H", out, ETHERNET + 10, 0)
            header = bytes(out[ETHERNET:tcp])
            struct.pack_into(">H", out, ETHERNET + 10, checksum(header))
            addresses = frame[ETHERNET + 12 : ETHERNET + 20]
        else:
            struct.pack_into(">H", out, ETHERNET + 4, tcp - ETHERNET - 40 + length & 0xFFFF)
            addresses = frame[ETHERNET + 8 : ETHERNET + 40]
        struct.pack_into(">H", out, tcp + 16, 0)
        out += part
        pseudo = addresses + struct.pack(">II", length, TCP)
        value = checksum(pseudo + out[tcp:])
        struct.pack_into(">H", out, tcp + 16, value)
        yield bytes(out)
