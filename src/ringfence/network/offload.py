"""What a driver leaves to its network card, and frames that are larger than the wire's.

A frame costs about the same whatever its length. So a driver hands over TCP segments of up to
64 KiB and leaves checksums and cutting to the card (`segments`); a backend that takes them whole
need not see them cut (`uncut`). The other way round, a backend that ends TCP connections itself
sends large segments to guests that take them: it is told by the guest's own first segment, whose
option MSS is rewritten on the way (`with_mss`).

Nothing in a frame is trusted: an offset that is not inside it makes the frame `Malformed`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ringfence.network.checksum import add, checksum, fold

ETHERNET = 14
MTU = 1500
"""Bytes of an IP packet on the wire."""
WIRE_MSS = MTU - 40
"""Bytes of payload in a TCP segment there, by default."""
MINIMUM_MSS = 64
"""Bytes per segment at least: what bounds the number of segments."""
IP = b"\x08\x00"
"""IPv4 in an Ethernet header."""
TCP = 6
IPV4_HEADER, TCP_HEADER = 20, 20
TCP_CHECKSUM = 16
"""Where in its header TCP has its checksum."""

_FIN, _SYN, _PSH, _CWR = 0x01, 0x02, 0x08, 0x80
"""TCP flags; the last segment has the first and third, the first one CWR (RFC 9293, RFC 3168)."""
_END, _NOP, _MSS = 0, 1, 2
"""TCP options (RFC 9293, 3.2)."""
_MORE, _OFFSET = 0x2000, 0x1FFF
"""Flag and field of IPv4 fragments (RFC 791)."""


class Malformed(ValueError):
    """A frame that can't be what its driver says."""


def finish_checksum(frame: bytearray, start: int, offset: int) -> None:
    """Sum from ``start`` to the end; store it at ``offset`` behind ``start``.

    The field holds the pseudo header's sum before.
    """
    field = start + offset
    if start < ETHERNET or start > len(frame) or field + 2 > len(frame):
        raise Malformed(f"a checksum at {field} of {len(frame)} bytes")
    struct.pack_into(">H", frame, field, checksum(frame, start) or 0xFFFF)


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
    minimum = ETHERNET + (IPV4_HEADER if version == 4 else 40)
    if not minimum <= tcp <= len(frame) - TCP_HEADER or frame[ETHERNET] >> 4 != version:
        raise Malformed(f"a TCP header at {tcp} of {len(frame)} bytes")
    if mss < MINIMUM_MSS:
        raise Malformed(f"segments of {mss} bytes")
    start = tcp + (frame[tcp + 12] >> 4) * 4
    if start < tcp + TCP_HEADER or start > len(frame):
        raise Malformed(f"a TCP header of {start - tcp} bytes")
    payload = memoryview(frame)[start:]
    (sequence,) = struct.unpack_from(">I", frame, tcp + 4)
    (identification,) = struct.unpack_from(">H", frame, ETHERNET + 4)
    flags = frame[tcp + 13]
    length_at = ETHERNET + (2 if version == 4 else 4)
    # What is the same in all of them, and its sums: in `header`, what differs is zero.
    header = bytearray(frame[:start])
    header[length_at : length_at + 2] = header[tcp + TCP_CHECKSUM : tcp + TCP_CHECKSUM + 2] = (
        b"\0\0"
    )
    header[tcp + 4 : tcp + 8], header[tcp + 13] = bytes(4), 0
    addresses = (ETHERNET + 12, ETHERNET + 20) if version == 4 else (ETHERNET + 8, ETHERNET + 40)
    network = 0
    if version == 4:
        header[ETHERNET + 4 : ETHERNET + 6] = header[ETHERNET + 10 : ETHERNET + 12] = b"\0\0"
        network = add(header, ETHERNET, tcp)
    transport = add(header, *addresses) + TCP + add(header, tcp)
    for number, at in enumerate(range(0, max(len(payload), 1), mss)):
        part = payload[at : at + mss]
        out = bytearray(header)
        last = at + mss >= len(payload)
        kept = flags & ~(0 if last else _FIN | _PSH) & ~(_CWR if number else 0)
        out[tcp + 13] = kept
        place = sequence + at & 0xFFFF_FFFF
        struct.pack_into(">I", out, tcp + 4, place)
        length = start - tcp + len(part)
        if version == 4:
            whole = tcp - ETHERNET + length & 0xFFFF
            name = identification + number & 0xFFFF
            value = 0xFFFF - fold(network + whole + name)
            struct.pack_into(">HH", out, length_at, whole, name)
            struct.pack_into(">H", out, ETHERNET + 10, value)
        else:
            struct.pack_into(">H", out, length_at, tcp - ETHERNET - 40 + length & 0xFFFF)
        total = transport + length + place + kept
        total += add(frame, start + at, start + at + len(part))
        struct.pack_into(">H", out, tcp + TCP_CHECKSUM, 0xFFFF - fold(total))
        yield b"".join((out, part))


def uncut(frame: bytes, tcp: int, *, version: int) -> bytes:
    """Return a TCP frame uncut, with all checksums; see `segments`."""
    (only,) = segments(frame, tcp, max(len(frame), MINIMUM_MSS), version=version)
    return only


def tcp_over_ipv4(frame: bytes) -> int | None:
    """Return where the TCP header of an IPv4 frame is; None if this is none, or a fragment."""
    if len(frame) < ETHERNET + IPV4_HEADER + TCP_HEADER:
        return None
    if frame[12:14] != IP or frame[ETHERNET] >> 4 != 4 or frame[ETHERNET + 9] != TCP:
        return None
    if struct.unpack_from(">H", frame, ETHERNET + 6)[0] & (_MORE | _OFFSET):
        return None
    tcp = ETHERNET + 4 * (frame[ETHERNET] & 0xF)
    return tcp if ETHERNET + IPV4_HEADER <= tcp <= len(frame) - TCP_HEADER else None


def pseudo_sum(frame: bytes, tcp: int) -> int:
    """Return the sum of an IPv4 TCP frame's pseudo header, its length included."""
    return fold(add(frame, ETHERNET + 12, ETHERNET + 20) + TCP + len(frame) - tcp)


def with_mss(frame: bytes, mss: int) -> bytes:
    """Return a frame whose TCP option MSS, if it has one, says ``mss`` (RFC 9293, 3.7.1)."""
    tcp = tcp_over_ipv4(frame)
    if tcp is None or not frame[tcp + 13] & _SYN:
        return frame
    end = min(tcp + 4 * (frame[tcp + 12] >> 4), len(frame))
    at = tcp + TCP_HEADER
    while at + 4 <= end and frame[at] != _END:
        if frame[at] == _NOP:
            at += 1
        elif frame[at] == _MSS and frame[at + 1] == 4:
            return _replaced(frame, tcp, at + 2, mss)
        else:
            at += max(frame[at + 1], 2)
    return frame


def _replaced(frame: bytes, tcp: int, at: int, value: int) -> bytes:
    """Return a frame with another word in its TCP header, the checksum kept right (RFC 1624)."""
    out = bytearray(frame)
    struct.pack_into(">H", out, at, value)
    # A word at an odd place is two halves of words, and so is the difference.
    shift = 8 * ((at - tcp) % 2)
    (old,) = struct.unpack_from(">H", frame, at)
    (kept,) = struct.unpack_from(">H", frame, tcp + TCP_CHECKSUM)
    changed = (0xFFFF - kept) + ((0xFFFF - old) << shift) + (value << shift)
    struct.pack_into(">H", out, tcp + TCP_CHECKSUM, 0xFFFF - fold(changed))
    return bytes(out)


def fragments(frame: bytes) -> Iterator[bytes]:
    """Cut an IPv4 frame into fragments that the wire takes (RFC 791, 2.3); others pass as they are.

    Options are repeated in all of them, which is more than the RFC asks for.
    """
    header = ETHERNET + 4 * (frame[ETHERNET] & 0xF) if len(frame) > ETHERNET else 0
    if frame[12:14] != IP or not ETHERNET + IPV4_HEADER <= header < len(frame):
        yield frame
        return
    end = min(len(frame), ETHERNET + struct.unpack_from(">H", frame, ETHERNET + 2)[0])
    (place,) = struct.unpack_from(">H", frame, ETHERNET + 6)
    step = (ETHERNET + MTU - header) // 8 * 8
    for at in range(header, end, step):
        out = bytearray(frame[:header])
        stop = min(at + step, end)
        more = _MORE if stop < end else place & _MORE
        struct.pack_into(">H", out, ETHERNET + 2, header - ETHERNET + stop - at)
        struct.pack_into(
            ">H", out, ETHERNET + 6, more | ((place & _OFFSET) + (at - header) // 8) & _OFFSET
        )
        _sum_ipv4(out, header)
        yield b"".join((out, memoryview(frame)[at:stop]))


def _sum_ipv4(header: bytearray, end: int) -> None:
    struct.pack_into(">H", header, ETHERNET + 10, 0)
    struct.pack_into(">H", header, ETHERNET + 10, checksum(header, ETHERNET, end))
