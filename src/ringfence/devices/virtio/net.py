"""The network device (5.1): frames between a backend and the driver's queues.

Backends deal in Ethernet frames with all checksums. What the driver leaves to the card (checksums,
cutting large TCP segments: that saves the guest most of its work) is done here before a frame is
handed over, see `network.offload`; but segments stay as large as they are for a backend that takes
them so. What comes in is complete and correct, and the driver is told so; large TCP segments go to
a driver that takes them (GUEST_TSO4, unless it has switched that off since) as one frame.

Transmission: frames go to the backend in order, within the notification, as long as it has room.
What finds none stays in the queue, which needs no notifications then, until the backend calls
`VirtioNet.more`. Reception: the backend calls `VirtioNet.receive` from any thread; where a frame
finds no room, the backend keeps it and hears `resume` when the driver has added buffers. With
mergeable buffers a frame may take several.

With several queue pairs (MQ) the driver says by command how many it uses; received frames are
spread by a hash of their addresses, so that a conversation stays on one queue.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import zlib
from collections.abc import Iterable, Sequence

from ringfence.devices.virtio.device import Transport, VirtioDevice
from ringfence.devices.virtio.frames import (
    HEADER,
    MAX_FRAME,
    QUEUE_SIZE,
    RECORD,
    ROOM,
    FrameQueue,
)
from ringfence.devices.virtio.queue import BROKEN, FOUND, NOTHING
from ringfence.devices.virtio.ring import Chain, RingError
from ringfence.memory.buffers import split
from ringfence.network.backend import FEW, NetworkBackend
from ringfence.network.offload import (
    MTU,
    TCP_CHECKSUM,
    Malformed,
    finish_checksum,
    pseudo_sum,
    segments,
    tcp_over_ipv4,
    uncut,
)

CONTROL_QUEUE_SIZE = 64
ETHERNET = 14

# Feature bits (5.1.3)
CSUM, GUEST_CSUM, CTRL_GUEST_OFFLOADS, MTU_FEATURE, MAC, GUEST_TSO4, HOST_TSO4, HOST_TSO6 = (
    1 << bit for bit in (0, 1, 2, 3, 5, 7, 11, 12)
)
OFFLOADS = GUEST_CSUM | GUEST_TSO4
"""Features that a driver may switch off and on again (5.1.6.5.6)."""
MRG_RXBUF, STATUS, CTRL_VQ, CTRL_RX, MQ = (1 << bit for bit in (15, 16, 17, 18, 22))
LINK_UP = 1
"""Status in the configuration structure."""

CONFIG = struct.Struct("<6sHHH")
"""mac, status, max_virtqueue_pairs, mtu (5.1.4)."""

NEEDS_CSUM, DATA_VALID = 1, 2
"""Header flags."""
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80

# Control commands (5.1.6.5)
CTRL_RX_CLASS, CTRL_MQ_CLASS, CTRL_GUEST_OFFLOADS_CLASS = 0, 4, 5
MQ_VQ_PAIRS_SET, GUEST_OFFLOADS_SET = 0, 0
CTRL_OK, CTRL_ERR = 0, 1


class VirtioNet(VirtioDevice):
    """A network card.

    Parameters
    ----------
    backend : NetworkBackend
        Where frames go to and come from. It is not closed with the device, which a reset of the
        machine replaces.
    mac : bytes
        The card's address, 6 bytes.
    pairs : int
        Pairs of receive and transmit queues.
    """

    TYPE = 1
    CLASS_CODE = 0x020000
    QUEUE = FrameQueue
    FEW = FEW
    FIELDS = ("active_pairs", "offloads", "received", "sent", "dropped")

    def __init__(self, backend: NetworkBackend, mac: bytes, *, pairs: int = 1) -> None:
        features = CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS | GUEST_TSO4 | HOST_TSO4 | HOST_TSO6
        features |= MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | MTU_FEATURE
        sizes = (QUEUE_SIZE,) * (2 * pairs) + (CONTROL_QUEUE_SIZE,)
        super().__init__(features | (MQ if pairs > 1 else 0), sizes)
        self._backend = backend
        self._mac = mac
        self._pairs = pairs
        self.active_pairs = 1
        self.offloads = 0
        """Of `OFFLOADS`, what the driver takes now."""
        self.received = 0
        self.sent = 0
        self.dropped = 0
        """Frames that were malformed, or too large for the driver's buffers."""
        self._room = mmap.mmap(-1, ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        """Where frames are fetched to and stored from; memory of the host's once it is used."""
        self._room_at = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self._starved = False
        """Whether the backend waits for `resume`."""
        self._full: set[int] = set()
        """Queues with frames that the backend has no room for."""

    def attach(self, transport: Transport) -> None:
        """See `VirtioDevice.attach`: only now there is somewhere to put frames."""
        super().attach(transport)
        self._backend.attach(self)

    def config(self) -> bytes:
        """See `VirtioDevice.config`."""
        return CONFIG.pack(self._mac, LINK_UP, self._pairs, MTU)

    def started(self) -> None:
        """See `VirtioDevice.started`."""
        self._set_offloads(self.transport.features & OFFLOADS)

    def reset(self) -> None:
        """See `VirtioDevice.reset`."""
        self.active_pairs = 1
        self._full.clear()
        self._set_offloads(0)

    def restored(self) -> None:
        """See `Saved.restored`: the backend is another one."""
        self._set_offloads(self.offloads)

    def _set_offloads(self, value: int) -> None:
        self.offloads = value
        self._backend.bring_large(bool(value & GUEST_TSO4))

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`: receive queues are looked at when a frame comes."""
        if number == self._control_queue:
            self.drain(number, self._command)
        elif number % 2:
            self._transmit(number)
        else:
            ring = self.transport.ring(number)
            if ring is not None:
                ring.want_kicks(False)
            if self._starved:
                self._starved = False
                self._backend.resume()

    def gathers(self, number: int) -> bool:
        """See `VirtioDevice.gathers`: what is to be sent."""
        return bool(number % 2)

    def close(self) -> None:
        """See `VirtioDevice.close`."""
        self._backend.detach()

    @property
    def _control_queue(self) -> int:
        """Its number depends on whether the driver knows of several pairs (5.1.2)."""
        return 2 * self._pairs if self.transport.features & MQ else 2

    # ---- from the driver

    def _transmit(self, number: int) -> None:
        """Hand the frames of a queue to the backend."""
        ring = self.transport.ring(number)
        if ring is None:
            return
        queue = ring.queue
        queue.data = self._room_at
        found = size = 0
        ring.want_kicks(False)
        try:
            while found <= ring.size:
                queue.budget = min(ring.size + 1 - found, self._backend.room())
                if not queue.budget:
                    self._full.add(number)
                    return
                end = ring.work("fetch")
                found += queue.frames
                first = self._hand_over(queue.length)
                size = size or first
                if end == BROKEN:
                    raise ring.error()
                if end == NOTHING:
                    quiet = self.transport.polls(number, found, size)
                    if quiet or not ring.want_kicks(True):
                        return
            self.transport.again(number)
        finally:
            self.transport.publish(number)
            self._backend.carry()

    def more(self) -> None:
        """See `NetworkCard.more`."""
        with self.transport.lock:
            waiting, self._full = sorted(self._full), set()
            for number in waiting:
                try:
                    self._transmit(number)
                except RingError:
                    self.transport.broken()

    def _hand_over(self, end: int) -> int:
        """Hand fetched frames to the backend; the length of the first."""
        at = first = 0
        while at < end:
            length = int.from_bytes(self._room[at : at + RECORD], "little")
            first = first or length
            start = at + RECORD
            header = self._room[start : start + HEADER.size]
            frame = self._room[start + HEADER.size : start + length]
            at = start + length + 7 & ~7
            if len(header) == HEADER.size and ETHERNET <= len(frame) <= MAX_FRAME:
                try:
                    for each in self._finished(header, frame):
                        self.sent += 1
                        self._backend.transmit(each)
                    continue
                except Malformed:
                    pass
            self.dropped += 1
        return first

    def _finished(self, raw: bytes, frame: bytes) -> Iterable[bytes]:
        """Do what the header asks for (5.1.6.2)."""
        flags, gso_type, _, gso_size, csum_start, csum_offset, _ = HEADER.unpack(raw)
        kind = gso_type & ~GSO_ECN
        if kind in (GSO_TCPV4, GSO_TCPV6):
            version = 4 if kind == GSO_TCPV4 else 6
            if self._backend.takes_large:
                return (uncut(frame, csum_start, version=version),)
            return segments(frame, csum_start, gso_size, version=version)
        if kind != GSO_NONE:
            raise Malformed(f"segmentation of type {kind}")
        if flags & NEEDS_CSUM:
            whole = bytearray(frame)
            finish_checksum(whole, csum_start, csum_offset)
            frame = bytes(whole)
        return (frame,)

    def _command(self, chain: Chain) -> int:
        command = b"".join(split(chain.readable, 64)[0])
        result = CTRL_ERR
        if command[:1] == bytes([CTRL_RX_CLASS]) and len(command) >= 3:
            result = CTRL_OK  # the backend filters nothing: all that comes is delivered
        elif command[:2] == bytes([CTRL_MQ_CLASS, MQ_VQ_PAIRS_SET]) and len(command) >= 4:
            wanted = int.from_bytes(command[2:4], "little")
            if 1 <= wanted <= self._pairs:
                self.active_pairs = wanted
                result = CTRL_OK
        elif command[:2] == bytes([CTRL_GUEST_OFFLOADS_CLASS, GUEST_OFFLOADS_SET]):
            wanted = int.from_bytes(command[2:10], "little")
            if len(command) >= 10 and not wanted & ~(self.transport.features & OFFLOADS):
                self._set_offloads(wanted)
                result = CTRL_OK
        return chain.write(bytes([result]))

    # ---- to the driver

    def receive(self, frames: Sequence[bytes]) -> int:
        """Give the driver frames (any thread); how many it had buffers for."""
        taken = 0
        with self.transport.lock:
            touched = set()
            for frame in frames:
                number = 0
                if self.active_pairs > 1:
                    number = 2 * (zlib.crc32(frame[:ETHERNET] + frame[26:38]) % self.active_pairs)
                touched.add(number)
                if not ETHERNET <= len(frame) <= MAX_FRAME:
                    self.dropped += 1
                elif not self._deliver(number, frame):
                    break
                taken += 1
            for number in touched:
                self.transport.publish(number)
        return taken

    def _deliver(self, number: int, frame: bytes) -> bool:
        ring = self.transport.ring(number)
        if ring is None:
            self._starved = True
            return False
        self._put(frame)
        queue = ring.queue
        queue.data, queue.length = self._room_at, HEADER.size + len(frame)
        queue.mergeable = bool(self.transport.features & MRG_RXBUF)
        end = ring.work("store")
        ring.settle()
        if end in (BROKEN, NOTHING):
            ring.tell_kicks(True)
            if end == BROKEN:
                self.transport.broken()
            self._starved = True
            return False
        if end == FOUND:
            self.received += 1
        else:
            self.dropped += 1
        return True

    def _put(self, frame: bytes) -> None:
        """Put a frame where it is stored from, as the driver wants to see it (5.1.6.4)."""
        room = self._room
        room[HEADER.size : HEADER.size + len(frame)] = frame
        offloads = self.offloads
        tcp = None
        if len(frame) > ETHERNET + MTU and offloads & GUEST_TSO4:
            tcp = tcp_over_ipv4(frame)
        if tcp is None:
            valid = DATA_VALID if offloads & GUEST_CSUM else 0
            room[: HEADER.size] = HEADER.pack(valid, 0, 0, 0, 0, 0, 0)
            return
        start = min(tcp + 4 * (frame[tcp + 12] >> 4), len(frame))
        segment = max(ETHERNET + MTU - start, 1)
        room[: HEADER.size] = HEADER.pack(
            NEEDS_CSUM, GSO_TCPV4, start, segment, tcp, TCP_CHECKSUM, 0
        )
        field = HEADER.size + tcp + TCP_CHECKSUM
        room[field : field + 2] = pseudo_sum(frame, tcp).to_bytes(2, "big")
