"""A guest's connections when it moves: those that it has stay with the network it left behind.

libslirp keeps connections to itself, and the sockets behind them belong to a host. So the network
of the machine that was left goes on for as long as it has connections, and the line over which the
machine came carries their frames: the *successor* is where frames for the guest go from the old
network, the *predecessor* where the new one sends what belongs to connections from before. All
others begin in the new network. A guest that moves on and on leaves a chain of networks behind it,
each of which ends with its last connection.

**Which is whose.** A TCP connection that was seen to begin in the new network is the new one's, any
other is the old one's. A new beginning with the same addresses and ports is new. All that is not
TCP goes to the new network: answers to requests under way still come from the old one, a dialogue
over UDP goes on from another port of the host's, as behind any address translation.
"""

from __future__ import annotations

from ringfence.network.offload import ETHERNET, tcp_over_ipv4
from ringfence.network.peer import Peer

MAX_FLOWS = 1 << 16
"""Connections remembered as the new network's; where there are more, the old one is given up."""
MAX_EARLY = 256
"""Frames that wait until the line to the old network is there."""
_SYN, _ACK = 0x02, 0x10


class Predecessor:
    """What a network knows of the one that came before it."""

    def __init__(self) -> None:
        self.peer: Peer | None = None
        """The line to it, once it is there."""
        self._early: list[bytes] = []
        """Frames from before that."""
        self._ours: set[bytes] = set()

    def plug(self, peer: Peer) -> None:
        """The line is there."""
        self.peer = peer
        for frame in self._early:
            peer.queue(frame)
        self._early.clear()

    @property
    def exhausted(self) -> bool:
        """Whether the guest has begun more connections than can be told apart from old ones."""
        return len(self._ours) >= MAX_FLOWS

    def claims(self, frame: bytes) -> bool:
        """Whether a frame of the guest's belongs to a connection from before the move."""
        flow, flags = _tcp(frame, incoming=False)
        if flow is None:
            return False
        if flags & (_SYN | _ACK) == _SYN:
            self._ours.add(flow)
        return flow not in self._ours

    def note(self, frame: bytes) -> None:
        """A frame for the guest comes from the new network: a connection may begin with it."""
        flow, flags = _tcp(frame, incoming=True)
        if flow is not None and flags & (_SYN | _ACK) == _SYN:
            self._ours.add(flow)

    def send(self, frame: bytes) -> None:
        """Send a frame of the guest's; what finds no room is lost, as on any wire."""
        if self.peer is not None:
            self.peer.queue(frame)
        elif len(self._early) < MAX_EARLY:
            self._early.append(frame)


def _tcp(frame: bytes, *, incoming: bool) -> tuple[bytes | None, int]:
    """Addresses and ports of a TCP segment, the guest's first, and its flags; None for others."""
    at = tcp_over_ipv4(frame)
    if at is None:
        return None, 0
    source, target = frame[ETHERNET + 12 : ETHERNET + 16], frame[ETHERNET + 16 : ETHERNET + 20]
    near, far = frame[at : at + 2], frame[at + 2 : at + 4]
    if incoming:
        source, target, near, far = target, source, far, near
    return source + near + target + far, frame[at + 13]
