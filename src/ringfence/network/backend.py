"""The seam between a network card and the host: what a card calls, and what calls the card.

A backend takes frames from a card (`transmit`) and brings frames to it (`NetworkCard.receive`),
from a thread of its own. Neither knows what the other is. A frame is
an Ethernet frame from destination address to payload, without preamble and frame check sequence;
its length is whatever the sender made it, so both sides check.

Batches: what came together is brought together, in order. A card can then tell its guest of many
frames by one interrupt; and where the guest's CPU and the backend's thread share one of the host's,
each interrupt takes it away from the thread.

Flow: a card that has no room for a frame keeps nothing of it, nor of those behind it, and says
`resume` as soon as it has room again. The backend then offers these frames once more, or counts
them as dropped. The other way it is the card that asks, for `room`, and leaves in its guest's ring
what finds none, until the backend says `NetworkCard.more`: so a flood waits where it comes from,
and takes no other connection's room. A backend that gets rid of nothing for a while has room all
the same, and drops: no driver takes a card for dead because of it.

No call waits: `transmit` queues or drops, and `carry`, which ends a batch, sees to what was queued.
A few short frames are mostly acknowledgements and questions, for which somebody waits: those a
backend may deal with at once, on the card's thread, and hand the answers over while it is at it.
Waking another thread for them takes longer than they do.

Large frames: a frame costs about the same whatever its length. A backend that ends TCP connections
itself may take, and bring, TCP segments larger than the wire's frames, with all checksums right.
Each side says whether it takes them, and who makes one cuts it for a side that doesn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ringfence.network.peer import Peer

BATCH = 64
"""Frames that are brought to a card at once, at most."""
FEW, SHORT = 4, 4096
"""Frames, and bytes of them together, that may be dealt with on the card's thread."""
HEADER = 14
"""Bytes of an Ethernet header: destination, source, type."""
MINIMUM_FRAME = HEADER
MAXIMUM_FRAME = 65536 + HEADER + 4
"""What any backend carries at most: an IP packet of any length with a VLAN tag."""


class NetworkCard(Protocol):
    """The other end, as far as the backend and the machine that joins the two know it."""

    def receive(self, frames: Sequence[bytes]) -> int:
        """Take frames in order, from the backend's thread; how many there was room for.

        At most `BATCH` of them: the card's locks are held until all are stored.
        """

    def more(self) -> None:
        """Go on with what found no `NetworkBackend.room`, from the backend's thread."""


class NetworkBackend(Protocol):
    """One end of a wire. All methods may be called from any thread, and none of them blocks long.

    `room`, `transmit`, `carry` and `resume` are called with the card's locks held. Of these only
    `carry` may call the card, which therefore calls it with nothing half done.
    """

    @property
    def takes_large(self) -> bool:
        """Whether `transmit` takes TCP segments of any size."""

    def bring_large(self, wanted: bool) -> None:
        """Hear whether the card takes TCP segments that are larger than the wire's."""

    def attach(self, card: NetworkCard) -> None:
        """Bring frames to ``card``, from a thread of the backend's own, starting now."""

    def detach(self) -> None:
        """Stop; when this returns, no call of the card is under way or will come.

        The caller holds no lock that the card's methods take. `attach` starts anew.
        """

    def resume(self) -> None:
        """Offer frames again: the card, which was without room, has some."""

    def room(self) -> int:
        """How many frames may be transmitted now; after a 0, `NetworkCard.more` is called.

        A card whose packets fall into many frames may exceed it by those of a few packets.
        """

    def transmit(self, frame: bytes) -> None:
        """Take a frame from the card; one that is too short, too long or too much is dropped.

        Nothing need happen to it before `carry`.
        """

    def carry(self) -> None:
        """See to the frames that `transmit` took since the last time, now or soon."""

    def stats(self) -> dict[str, int]:
        """Return counters by name: frames and bytes either way, and what was dropped."""

    def close(self) -> None:
        """Give back what the backend has of the host's. Safe to repeat."""


class Heritable(Protocol):
    """A network that a guest can leave behind, with its connections (see `succession`)."""

    def lend(self) -> None:
        """Give up what only one network can have, ports of the host's, until `reclaim`."""

    def reclaim(self) -> None:
        """Have it, again or at last; HostError if somebody else has it."""

    def follow(self, peer: Peer | None) -> None:
        """Connections from before go on over there, or, with None, nowhere."""

    def serve(self, peer: Peer) -> None:
        """The guest is over there from now on: go on for its connections, and for no others."""

    def served(self, timeout: float | None = None) -> bool:
        """Wait until there is nothing left to `serve`; whether that is so."""
