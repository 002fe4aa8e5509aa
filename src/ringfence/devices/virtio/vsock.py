"""The socket device (5.10): streams between programs in the guest and programs on the host.

The device speaks the packets: connections by pair of ports, credit either way, resets. What is at
the host's end of a stream is a `HostSide`'s matter (see `vsock_unix`); it calls from a thread of
its own, and every method of the device takes the board's lock.

**Bounds.** The guest may send `BUFFER` bytes ahead of what the host's end has taken; who sends more
is reset. Data for the guest are only asked of the host's end when the guest has credit for them.
Packets for which the driver has no buffers wait; while `MAX_PENDING` do, or while the host's end is
behind, none of the driver's are looked at: no flood of packets makes a flood of answers.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

from ringfence.chipset.state import State
from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain
from ringfence.errors import UsageError
from ringfence.memory.buffers import split

RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 128
HOST_CID = 2
"""The host's address (5.10.4)."""
ANY_CID = 0xFFFF_FFFF
"""No address; those above are reserved (5.10.4)."""
BUFFER = 64 << 10
MAX_CONNECTIONS = 256
MAX_PENDING = 256
MAX_PAYLOAD = 64 << 10
MASK32 = 0xFFFF_FFFF

HEADER = struct.Struct("<QQIIIHHIII")
"""src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt (5.10.6)."""
STREAM = 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
EVENT_TRANSPORT_RESET = struct.pack("<I", 0)

Key = tuple[int, int]
"""A connection: the guest's port, the host's port."""


class Shut(IntFlag):
    """Flags of SHUTDOWN: what its sender will do no more (5.10.6.5)."""

    RECEIVE = 1
    SEND = 2


class HostSide(Protocol):
    """The host's end. Called with the board's lock held; must not block, nor call the device."""

    @property
    def behind(self) -> bool:
        """Whether so much is still to be done that the guest has to wait for `resume`."""

    def attach(self, device: VirtioVsock) -> None:
        """Meet the device."""

    def connect(self, key: Key) -> None:
        """The guest asks for a connection: answer with `VirtioVsock.accept` or ``end``."""

    def established(self, key: Key) -> None:
        """The guest has accepted what `VirtioVsock.request` asked for."""

    def data(self, key: Key, data: bytes) -> None:
        """Bytes from the guest; say `VirtioVsock.taken` when they are gone."""

    def credit(self, key: Key) -> None:
        """The guest can take more than before."""

    def shut(self, key: Key, flags: Shut) -> None:
        """The guest will send, or receive, no more."""

    def ended(self, key: Key) -> None:
        """The connection is no more."""

    def close(self) -> None:
        """End everything. Not called with the lock held."""


@dataclass(slots=True)
class _Connection:
    """What the device knows of a connection; counters are modulo 2^32 as in packets."""

    established: bool = False
    received: int = 0
    taken: int = 0
    told: int = 0
    sent: int = 0
    peer_room: int = 0
    peer_taken: int = 0
    starved: bool = False
    shut: int = 0

    @property
    def credit(self) -> int:
        """Bytes that the guest can take."""
        return max(0, self.peer_room - (self.sent - self.peer_taken & MASK32))


class VirtioVsock(VirtioDevice):
    """A socket device.

    Parameters
    ----------
    cid : int
        The guest's address, 3 or more; after a restore it may be another one, which the driver
        learns with the news that its connections are gone.
    host : HostSide
        The other end of its streams. It is not closed with the device.
    """

    TYPE = 19
    CLASS_CODE = 0x028000

    def __init__(self, cid: int, host: HostSide) -> None:
        if not HOST_CID < cid < ANY_CID:
            raise UsageError(f"CID {cid}: expected {HOST_CID + 1} to {ANY_CID - 1}")
        super().__init__(0, (QUEUE_SIZE, QUEUE_SIZE, 16))
        self._cid = cid
        self._host = host
        self._connections: dict[Key, _Connection] = {}
        self._pending: deque[bytes] = deque()
        self._blocked = False
        """Whether packets of the driver's wait for room for answers."""
        self._lost = False
        """Whether the driver has yet to hear that all connections are gone."""
        self._awaited = False
        """Whether it has been told, and has not looked yet which address it has now."""
        host.attach(self)

    def config(self) -> bytes:
        """See `VirtioDevice.config`; a driver that has heard of a reset reads it (5.10.6.7)."""
        self._awaited = False
        return struct.pack("<Q", self._cid)

    def reset(self) -> None:
        """See `VirtioDevice.reset`."""
        for key in list(self._connections):
            self._forget(key)
        self._pending.clear()
        self._blocked = self._lost = self._awaited = False

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`."""
        if number == RX:
            self._flush()
            self.resume()
        elif number == TX:
            self._serve()
        if self._lost:
            self._tell_reset()

    # ---- what the host's end calls, from any thread

    def resume(self) -> None:
        """Look at the driver's packets again, if they had to wait."""
        with self.transport.lock:
            if self._blocked and not self._full:
                self._blocked = False
                self._serve()

    def request(self, key: Key) -> bool:
        """Ask the guest for a connection; False if there can't be one now.

        What the guest is asked for before it has heard that its connections are gone, and perhaps
        which address it has now, would go the same way.
        """
        with self.transport.lock:
            full = len(self._connections) >= MAX_CONNECTIONS or self._lost or self._awaited
            if full or key in self._connections or self.transport.ring(TX) is None:
                return False
            self._connections[key] = _Connection()
            self._send(key, REQUEST)
            return True

    def accept(self, key: Key) -> None:
        """Give the guest the connection that it has asked for."""
        with self.transport.lock:
            connection = self._connections.get(key)
            if connection is not None:
                connection.established = True
                self._send(key, RESPONSE)

    def room(self, key: Key) -> int:
        """Return how much the guest can take now; if that is 0, ``credit`` will be called."""
        with self.transport.lock:
            connection = self._connections.get(key)
            if connection is None or not connection.established:
                return 0
            room = connection.credit if len(self._pending) < MAX_PENDING else 0
            connection.starved = room == 0
            return min(room, MAX_PAYLOAD)

    def send(self, key: Key, data: bytes) -> None:
        """Send bytes to the guest: at most what `room` has said."""
        with self.transport.lock:
            connection = self._connections.get(key)
            if connection is not None:
                connection.sent = connection.sent + len(data) & MASK32
                self._send(key, RW, data)

    def taken(self, key: Key, length: int) -> None:
        """Say that the host's end has taken bytes of the guest's."""
        with self.transport.lock:
            connection = self._connections.get(key)
            if connection is not None:
                connection.taken = connection.taken + length & MASK32
                if connection.taken - connection.told & MASK32 >= BUFFER // 2:
                    self._send(key, CREDIT_UPDATE)

    def shutdown(self, key: Key, flags: Shut) -> None:
        """Say that the host's end will send, or receive, no more."""
        with self.transport.lock:
            if key in self._connections:
                self._send(key, SHUTDOWN, flags=int(flags))

    def end(self, key: Key) -> None:
        """Reset a connection, or refuse it."""
        with self.transport.lock:
            if key in self._connections:
                self._send(key, RST)
                del self._connections[key]

    # ---- packets from the driver

    @property
    def _full(self) -> bool:
        return len(self._pending) >= MAX_PENDING or self._host.behind

    def _serve(self) -> None:
        ring = self.transport.ring(TX)
        if ring is None:
            return
        for _ in range(ring.size):
            if self._full:
                self._blocked = True
                break
            chain = self.transport.take(TX)
            if chain is None:
                if self.transport.ring(TX) is not ring or not ring.want_kicks(True):
                    break
                continue
            self._packet(chain)
            ring.push(chain, 0)
        else:
            self.transport.again(TX)
        self.transport.publish(TX)

    def _packet(self, chain: Chain) -> None:
        head, body = split(chain.readable, HEADER.size)
        raw = b"".join(head)
        if len(raw) < HEADER.size:
            return
        source, target, guest_port, host_port, length, kind, op, flags, room, taken = HEADER.unpack(
            raw
        )
        key = (guest_port, host_port)
        if source != self._cid or target != HOST_CID:
            return
        connection = self._connections.get(key)
        if kind != STREAM:
            if op != RST:
                self._send(key, RST, kind=kind)
            return
        if connection is not None:
            connection.peer_room, connection.peer_taken = room, taken
        if op == RST:
            if connection is not None:
                self._forget(key)
        elif op == REQUEST:
            self._requested(key, room, taken)
        elif connection is None:
            self._send(key, RST)
        elif op == RESPONSE and not connection.established:
            connection.established = True
            self._host.established(key)
        elif op == RW and connection.established:
            self._data(key, connection, b"".join(split(body, min(length, MAX_PAYLOAD))[0]), length)
        elif op == SHUTDOWN:
            connection.shut |= flags & 3
            self._host.shut(key, Shut(connection.shut))
        elif op == CREDIT_REQUEST:
            self._send(key, CREDIT_UPDATE)
        elif op != CREDIT_UPDATE:
            self._break(key)
            return
        if connection is not None and connection.starved and connection.credit:
            connection.starved = False
            self._host.credit(key)

    def _requested(self, key: Key, room: int, taken: int) -> None:
        if key in self._connections or len(self._connections) >= MAX_CONNECTIONS:
            if key in self._connections:
                self._forget(key)
            self._send(key, RST)
            return
        self._lost = self._awaited = False  # or else it would use its old address
        self._connections[key] = _Connection(peer_room=room, peer_taken=taken)
        self._host.connect(key)

    def _data(self, key: Key, connection: _Connection, data: bytes, length: int) -> None:
        ahead = connection.received - connection.taken + len(data) & MASK32
        if len(data) != length or ahead > BUFFER or connection.shut & Shut.SEND:
            self._break(key)
            return
        connection.received = connection.received + len(data) & MASK32
        self._host.data(key, data)

    def _break(self, key: Key) -> None:
        """End a connection whose driver doesn't keep to the rules."""
        self._send(key, RST)
        self._forget(key)

    def _forget(self, key: Key) -> None:
        del self._connections[key]
        self._host.ended(key)

    # ---- packets to the driver

    def _send(
        self, key: Key, op: int, data: bytes = b"", *, flags: int = 0, kind: int = STREAM
    ) -> None:
        connection = self._connections.get(key)
        taken = 0
        if connection is not None:
            taken = connection.told = connection.taken
        guest_port, host_port = key
        header = HEADER.pack(
            HOST_CID, self._cid, host_port, guest_port, len(data), kind, op, flags, BUFFER, taken
        )
        self._pending.append(header + data)
        self._flush()

    def _flush(self) -> None:
        """Put what waits into the driver's buffers; a long one goes in several packets."""
        ring = self.transport.ring(RX)
        if ring is None:
            return
        waited = len(self._pending) >= MAX_PENDING
        for _ in range(ring.size + 1):
            if not self._pending:
                break
            chain = self.transport.take(RX)
            if chain is None:
                if self.transport.ring(RX) is ring and ring.want_kicks(True):
                    continue
                break
            packet = self._pending[0]
            room = chain.writable_length
            if room >= len(packet):
                self._pending.popleft()
            elif room <= HEADER.size:
                ring.push(chain, 0)
                continue
            else:
                packet, self._pending[0] = _cut(packet, room)
            ring.push(chain, chain.write(packet))
        else:
            self.transport.again(RX)
        self.transport.publish(RX)
        if waited and len(self._pending) < MAX_PENDING:
            for key, connection in self._connections.items():
                if connection.starved:
                    self._host.credit(key)

    def _tell_reset(self) -> None:
        """Have the driver drop its connections (5.10.6.7): they did not come along."""
        ring = self.transport.ring(EVENT)
        chain = self.transport.take(EVENT)
        if ring is not None and chain is not None:
            self._lost, self._awaited = False, True
            ring.push(chain, chain.write(EVENT_TRANSPORT_RESET))
            self.transport.publish(EVENT)

    # ---- state

    def restore(self, state: State) -> None:
        """See `Saved.restore`: the other ends of connections can't be saved, so they are gone."""
        super().restore(state)
        self.reset()
        self._lost = True


def _cut(packet: bytes, room: int) -> tuple[bytes, bytes]:
    """Make two packets of one: the first takes ``room`` bytes."""
    fields = list(HEADER.unpack_from(packet))
    part = room - HEADER.size
    length = fields[4]
    fields[4] = part
    first = HEADER.pack(*fields) + packet[HEADER.size : room]
    fields[4] = length - part
    return first, HEADER.pack(*fields) + packet[room:]
