"""Packets with right checksums, computed the slow way, to compare the card's with."""

from __future__ import annotations

import struct

from devices.e1000.driver import MAC, PEER


def slow_checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def transport(protocol: int, payload: bytes, pseudo: bytes) -> bytes:
    """A TCP or UDP segment; other protocols are bare payload."""
    if protocol == 6:
        head, at = (
            bytearray(struct.pack(">HHIIBBHHH", 1234, 80, 1000, 0, 0x50, 0x18, 512, 0, 0)),
            16,
        )
    elif protocol == 17:
        head, at = bytearray(struct.pack(">HHHH", 1234, 53, 8 + len(payload), 0)), 6
    else:
        return payload
    value = slow_checksum(pseudo + bytes(head) + payload)
    head[at : at + 2] = (value or 0xFFFF).to_bytes(2, "big")
    return bytes(head) + payload


def ipv4(protocol: int, payload: bytes, fragment: int = 0) -> bytes:
    """A frame with an IPv4 packet."""
    length = len(payload) + {6: 20, 17: 8}.get(protocol, 0)
    source, target = bytes([10, 0, 2, 2]), bytes([10, 0, 2, 15])
    body = transport(protocol, payload, source + target + struct.pack(">HH", protocol, length))
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + length, 7, fragment, 64, protocol, 0, source, target
    )
    head = head[:10] + slow_checksum(head).to_bytes(2, "big") + head[12:]
    return MAC + PEER + b"\x08\x00" + head + body


def ipv6(protocol: int, payload: bytes) -> bytes:
    """A frame with an IPv6 packet."""
    length = len(payload) + {6: 20, 17: 8}[protocol]
    addresses = bytes(range(32))
    body = transport(protocol, payload, addresses + struct.pack(">II", length, protocol))
    head = struct.pack(">IHBB", 6 << 28, length, protocol, 64)
    return MAC + PEER + b"\x86\xdd" + head + addresses + body
