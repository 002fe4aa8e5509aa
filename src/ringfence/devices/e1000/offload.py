"""What the card does to frames so that the guest need not: checksums, segmentation, VLAN tags.

Functions of bytes only; the rings are elsewhere. All offsets come from the guest and may be
anything: what would lie outside the frame is not done.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ringfence.devices.e1000.registers import TxDescriptor
from ringfence.network.checksum import add, checksum
from ringfence.network.offload import tcp_over_ipv4, uncut

IPV4, IPV6, VLAN = 0x0800, 0x86DD, 0x8100
TCP, UDP = 6, 17
ETHERNET = 14
LARGEST = ETHERNET + 0xFFFF
"""Bytes of a frame whose IP packet has a length that its header can tell."""
_FIN_PSH = 0x09
_CONTEXT = struct.Struct("<BBHBBHII")
Bytes = bytes | bytearray | memoryview


def insert(frame: bytearray, start: int, offset: int, end: int, *, udp: bool = False) -> None:
    """Store the checksum of ``frame[start..end]`` at ``offset``; ``end`` 0 is the frame's.

    UDP has no checksum of 0: that would mean that there is none (RFC 768).
    """
    stop = min(end + 1, len(frame)) if end else len(frame)
    if start >= stop or offset + 2 > len(frame):
        return
    value = checksum(frame, start, stop)
    struct.pack_into(">H", frame, offset, value or (0xFFFF if udp else 0))


@dataclass(frozen=True, slots=True)
class Context:
    """A context descriptor (3.3.6): where checksums go, and how to segment."""

    ipcss: int = 0
    ipcso: int = 0
    ipcse: int = 0
    tucss: int = 0
    tucso: int = 0
    tucse: int = 0
    command: int = 0
    """PAYLEN and TUCMD."""
    layout: int = 0
    """STA, HDRLEN and MSS."""

    @classmethod
    def unpack(cls, descriptor: Bytes) -> Context:
        """Return the context that sixteen bytes describe."""
        return cls(*_CONTEXT.unpack(descriptor))

    def pack(self) -> bytes:
        """Return the descriptor."""
        return _CONTEXT.pack(
            *(self.ipcss, self.ipcso, self.ipcse, self.tucss, self.tucso, self.tucse),
            *(self.command, self.layout),
        )

    @property
    def header(self) -> int:
        """HDRLEN: bytes that each segment begins with."""
        return self.layout >> TxDescriptor.HDRLEN_SHIFT & 0xFF

    @property
    def mss(self) -> int:
        """MSS: bytes of payload per segment."""
        return self.layout >> TxDescriptor.MSS_SHIFT

    @property
    def tcp(self) -> bool:
        """Whether the transport is TCP, else UDP."""
        return bool(self.command & TxDescriptor.TUCMD_TCP)

    @property
    def ipv4(self) -> bool:
        """Whether the network layer is IPv4, else IPv6."""
        return bool(self.command & TxDescriptor.TUCMD_IP)

    def finish(self, frame: bytearray, options: int) -> None:
        """Insert the checksums that POPTS asks for."""
        if options & TxDescriptor.TXSM:
            insert(frame, self.tucss, self.tucso, self.tucse, udp=not self.tcp)
        if options & TxDescriptor.IXSM:
            insert(frame, self.ipcss, self.ipcso, self.ipcse)

    def uncut(self, packet: bytearray, options: int) -> bytes | None:
        """Return a packet whole, where cutting it would give plain TCP segments over IPv4.

        None where its headers, or what is asked for, are anything else.
        """
        both = TxDescriptor.TXSM | TxDescriptor.IXSM
        if not self.tcp or not self.ipv4 or options & both != both or self.ipcss != ETHERNET:
            return None
        tcp = tcp_over_ipv4(bytes(packet[: self.header]))
        fields = (self.ipcso, self.tucso, self.ipcse, self.tucse)
        if tcp is None or tcp != self.tucss or self.header != tcp + (packet[tcp + 12] >> 4) * 4:
            return None
        if fields != (ETHERNET + 10, tcp + 16, tcp - 1, 0) or len(packet) > LARGEST:
            return None
        return uncut(bytes(packet), tcp, version=4)

    def segment(self, packet: bytearray, number: int, options: int) -> bytearray:
        """Return segment ``number`` of a packet that begins with its prototype header (3.5)."""
        header, mss = self.header, self.mss
        first = header + number * mss
        frame = packet[:header] + packet[first : first + mss]
        length = len(frame)
        if self.ipv4:
            _add(frame, self.ipcss + 4, number)
            _put(frame, self.ipcss + 2, length - self.ipcss)
        else:
            _put(frame, self.ipcss + 4, length - self.ipcss - 40)
        if self.tcp:
            at = self.tucss + 4
            if at + 4 <= length:
                sequence = int.from_bytes(frame[at : at + 4], "big") + number * mss
                frame[at : at + 4] = (sequence & 0xFFFF_FFFF).to_bytes(4, "big")
            if first + mss < len(packet) and self.tucss + 13 < length:
                frame[self.tucss + 13] &= ~_FIN_PSH
        else:
            _put(frame, self.tucss + 4, length - self.tucss)
        if options & TxDescriptor.TXSM:
            # Software's pseudo-header sum lacks the length, which only we know (3.5.7).
            _add(frame, self.tucso, length - self.tucss, carry=True)
        self.finish(frame, options)
        return frame


def _put(frame: bytearray, at: int, value: int) -> None:
    if at + 2 <= len(frame):
        struct.pack_into(">H", frame, at, value & 0xFFFF)


def _add(frame: bytearray, at: int, value: int, *, carry: bool = False) -> None:
    """Add to a 16-bit field; with ``carry``, as checksums are added."""
    if at + 2 <= len(frame):
        total = struct.unpack_from(">H", frame, at)[0] + value
        if carry:
            total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into(">H", frame, at, total & 0xFFFF)


def insert_tag(frame: bytes, ethertype: int, tag: int) -> bytes:
    """Return the frame with a VLAN tag behind its addresses."""
    return b"%b%b%b" % (frame[:12], struct.pack(">HH", ethertype, tag), frame[12:])


def verify(frame: bytes) -> tuple[bool | None, bool | None]:
    """Tell of a received frame whether its (IPv4, TCP or UDP) checksums are good (3.2.9).

    None where there is no such checksum, or no way to tell: fragments, IPv6 with extension
    headers, other protocols.
    """
    kind = frame[12] << 8 | frame[13]
    if kind == IPV4 and len(frame) >= ETHERNET + 20:
        return _verify_ipv4(frame)
    if kind == IPV6 and len(frame) >= ETHERNET + 40:
        length = frame[18] << 8 | frame[19]
        pseudo = frame[22:54] + struct.pack(">II", length, frame[20])
        return None, _verify_transport(frame, frame[20], ETHERNET + 40, length, pseudo)
    return None, None


def _verify_ipv4(frame: bytes) -> tuple[bool | None, bool | None]:
    header = (frame[ETHERNET] & 0x0F) * 4
    total = frame[16] << 8 | frame[17]
    if frame[ETHERNET] >> 4 != 4 or header < 20 or total < header:
        return None, None
    if len(frame) < ETHERNET + total:
        return None, None
    good = checksum(frame, ETHERNET, ETHERNET + header) == 0
    if (frame[20] << 8 | frame[21]) & 0x3FFF:  # more fragments, or not the first
        return good, None
    protocol, length = frame[23], total - header
    pseudo = frame[26:34] + struct.pack(">HH", protocol, length)
    return good, _verify_transport(frame, protocol, ETHERNET + header, length, pseudo)


def _verify_transport(
    frame: bytes, protocol: int, start: int, length: int, pseudo: bytes
) -> bool | None:
    if protocol not in (TCP, UDP) or length < (20 if protocol == TCP else 8):
        return None
    if len(frame) < start + length:
        return None
    if protocol == UDP and frame[start + 6 : start + 8] == b"\0\0":
        return None
    return checksum(frame, start, start + length, add(pseudo)) == 0
