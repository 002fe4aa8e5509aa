"""User-mode networking: a private network per guest, behind a NAT in this process, by libslirp.

The guest sees 10.0.2.0/24 with a gateway (.2), a DHCP server that gives it .15, and a name server
(.3) that asks the host's. Its TCP and UDP connections become ordinary sockets of this process, its
pings ICMP sockets where the host permits them (``net.ipv4.ping_group_range``); so no privileges are
needed, and nobody outside reaches the guest but through forwards.

The host's own loopback interface is not the guest's business: services that listen there trust
whoever can connect. ``loopback=True`` opens it, as 10.0.2.2.

All calls of libslirp are made by whose turn it is (see `threaded`); those of `__init__` come before
there is a thread.
While the card has no room, nothing is read from sockets: what is meant for the guest waits in the
host's buffers, where TCP slows its sender down and a flood of datagrams is dropped at its own cost.

IPv6 is switched off: few hosts could route it, and guests would try it first.

When the guest moves, its connections stay here (see `succession`): the network then serves a guest
that is elsewhere, until none is left.

**Large segments.** libslirp ends the guest's TCP connections, so segments need not fit any wire. It
takes what guests send as large as it comes. What it sends is as large as the guest's option MSS
allows: where the card takes large segments, it is rewritten on its way to `LARGE_MSS`. That is a
quarter of a window, as libslirp has no window scaling: with larger ones it would tell too late, or
never, of a window that opens again (it waits for two segments' worth).
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from ringfence.errors import HostError
from ringfence.network import slirp
from ringfence.network.backend import NetworkCard
from ringfence.network.forward import Forward
from ringfence.network.offload import (
    ETHERNET,
    MTU,
    WIRE_MSS,
    fragments,
    segments,
    tcp_over_ipv4,
    with_mss,
)
from ringfence.network.peer import Peer
from ringfence.network.succession import Predecessor
from ringfence.network.threaded import ThreadedBackend

NETWORK, NETMASK = "10.0.2.0", "255.255.255.0"
GATEWAY, NAME_SERVER, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.15"
LARGE_MSS = 11 * WIRE_MSS
LARGE_MTU = LARGE_MSS + 60
"""What libslirp takes the wire for. It sends so much less payload to who hasn't said otherwise, and
doesn't listen to options while it waits for a connection to be made."""
LAST_ANSWERS = 5.0
"""Seconds for which answers without a connection may still come, when the guest has moved."""
LOOK_AROUND = 1000
"""Milliseconds between two looks whether there is anybody left to serve."""
_FOREVER = 0xFFFF_FFFF
_EVENTS = (
    (slirp.POLL_IN, select.POLLIN),
    (slirp.POLL_OUT, select.POLLOUT),
    (slirp.POLL_PRI, select.POLLPRI),
    (slirp.POLL_ERR, select.POLLERR),
    (slirp.POLL_HUP, select.POLLHUP),
)
_TO_HOST = [sum(host for ours, host in _EVENTS if events & ours) for events in range(32)]
_FROM_HOST = [sum(ours for ours, host in _EVENTS if events & host) for events in range(32)]
"""All sets of events, as poll(2) has them and as libslirp has them."""


class UserNetwork(ThreadedBackend):
    """A guest's private network.

    Parameters
    ----------
    forwards : Iterable[Forward]
        Ports of the host's to listen at.
    loopback : bool
        Whether the guest may connect to the host's 127.0.0.1, as 10.0.2.2.
    awaited : bool
        Whether the guest is on its way here, and its ports and connections are still elsewhere.

    Raises
    ------
    HostError
        libslirp is missing, or a port can't be had.
    """

    NAME = "user"
    takes_large = True

    def __init__(
        self, forwards: Iterable[Forward] = (), *, loopback: bool = False, awaited: bool = False
    ) -> None:
        library = slirp.library()
        super().__init__()
        self._library = library
        self._forwards = tuple(forwards)
        self._listening: list[Forward] = []
        self._past = Predecessor() if awaited else None
        self._successor: Peer | None = None
        self._served = threading.Event()
        self._since = 0.0
        self._polled: list[int] = []
        self._ready: dict[int, int] = {}
        self._brings_large = False
        self._counters["guest_errors"] = 0
        # The library keeps pointers into all of these: they must live as long as it does.
        self._add_poll = slirp.AddPoll(self._on_add_poll)
        self._get_revents = slirp.GetRevents(self._on_get_revents)
        self._callbacks = slirp.Callbacks(
            send_packet=slirp.SendPacket(self._on_packet),
            guest_error=slirp.GuestError(self._on_guest_error),
            clock_get_ns=slirp.ClockGetNs(lambda opaque: time.monotonic_ns()),
            # Timers serve IPv6's router advertisements only.
            timer_new=slirp.TimerNew(lambda callback, data, opaque: None),
            timer_free=slirp.TimerFree(lambda timer, opaque: None),
            timer_mod=slirp.TimerMod(lambda timer, when, opaque: None),
            register_poll_fd=slirp.PollFd(lambda descriptor, opaque: None),
            unregister_poll_fd=slirp.PollFd(lambda descriptor, opaque: None),
            notify=slirp.Notify(lambda opaque: None),
        )
        self._config = slirp.Config(
            version=slirp.CONFIG_VERSION,
            in_enabled=True,
            vnetwork=slirp.InAddr.of(NETWORK),
            vnetmask=slirp.InAddr.of(NETMASK),
            vhost=slirp.InAddr.of(GATEWAY),
            vdhcp_start=slirp.InAddr.of(GUEST),
            vnameserver=slirp.InAddr.of(NAME_SERVER),
            if_mtu=LARGE_MTU,
            if_mru=LARGE_MTU,
            disable_host_loopback=not loopback,
        )
        self._slirp = library.slirp_new(
            ctypes.byref(self._config), ctypes.byref(self._callbacks), None
        )
        if not self._slirp:
            raise HostError("libslirp refused to start: try --net none")
        if not awaited:
            try:
                self.reclaim()
            except HostError:
                self.close()
                raise

    # ---- ports of the host's

    def lend(self) -> None:
        """See `Heritable.lend`."""
        self._call(self._remove_forwards)

    def reclaim(self) -> None:
        """See `Heritable.reclaim`."""
        self._call(self._add_forwards)

    def _add_forwards(self) -> None:
        for forward in self._forwards:
            if forward not in self._listening:
                self._add_forward(forward)
                self._listening.append(forward)

    def _remove_forwards(self) -> None:
        while self._listening:
            forward = self._listening.pop()
            self._library.slirp_remove_hostfwd(
                self._slirp,
                forward.udp,
                slirp.InAddr.of(forward.host_address),
                forward.host_port,
            )

    def _add_forward(self, forward: Forward) -> None:
        ctypes.set_errno(0)
        failed = self._library.slirp_add_hostfwd(
            self._slirp,
            forward.udp,
            slirp.InAddr.of(forward.host_address),
            forward.host_port,
            slirp.InAddr.of(GUEST),
            forward.guest_port,
        )
        if failed:
            reason = os.strerror(ctypes.get_errno())
            raise HostError(f"forward {forward} is not possible ({reason}): choose another port")

    def bring_large(self, wanted: bool) -> None:
        """See `NetworkBackend.bring_large`; connections keep what they began with."""
        self._brings_large = wanted

    # ---- a guest that moves

    def follow(self, peer: Peer | None) -> None:
        """See `Heritable.follow`."""

        def begin() -> None:
            if peer is None:
                self._past = None
            elif self._past is not None:
                self._past.plug(peer)

        self._call(begin)

    def serve(self, peer: Peer) -> None:
        """See `Heritable.serve`."""

        def begin() -> None:
            self._successor = peer
            self._since = time.monotonic()

        self._call(begin)
        super().attach(_Elsewhere(peer))

    def served(self, timeout: float | None = None) -> bool:
        """See `Heritable.served`."""
        return self._successor is None or self._served.wait(timeout)

    def attach(self, card: NetworkCard) -> None:
        """See `NetworkBackend.attach`."""
        if self._successor is None:
            super().attach(card)

    def detach(self) -> None:
        """See `NetworkBackend.detach`; who has a successor goes on serving it."""
        if self._successor is None or self._served.is_set():
            super().detach()

    def close(self) -> None:
        """See `NetworkBackend.close`; while it has a successor, the network closes later."""
        if self.served(0):
            super().close()
        else:
            closing = threading.Thread(target=self._close_later, name="ringfence-served")
            closing.daemon = True
            closing.start()

    def _close_later(self) -> None:
        self._served.wait()
        super().close()

    def _left(self) -> bool:
        """Whether there is somebody left to serve."""
        if self._past is not None or time.monotonic() < self._since + LAST_ANSWERS:
            return True
        return any(line.lstrip().startswith(b"TCP[") for line in slirp.connections(self._slirp))

    def _talk(self, peer: Peer, ready: dict[int, int]) -> list[bytes] | None:
        """The frames that a peer has sent; None if it is gone."""
        events = ready.get(peer.connection.fileno(), 0)
        try:
            peer.flush()
            return peer.receive() if events & ~select.POLLOUT else []
        except OSError:
            peer.connection.close()
            return None

    def _talk_to_successor(self, peer: Peer, ready: dict[int, int]) -> None:
        frames = self._talk(peer, ready)
        for frame in frames or ():
            self._send(frame)
        if frames is None or not self._left():
            peer.connection.close()
            self._served.set()

    def _talk_to_predecessor(self, peer: Peer, ready: dict[int, int]) -> None:
        frames = self._talk(peer, ready)
        for frame in frames or ():
            self._deliver(frame)
        if frames is None:
            self._past = None

    # ---- the thread's turn

    def _interest(self) -> tuple[list[tuple[int, int]], float | None]:
        self._polled = []
        self._wanted: list[tuple[int, int]] = []
        timeout = ctypes.c_uint32(_FOREVER)
        self._library.slirp_pollfds_fill(self._slirp, ctypes.byref(timeout), self._add_poll, None)
        for peer in self._peers():
            # What a predecessor has for the card waits there while the card has no room.
            wanted = 0 if self._stalled and peer is not self._successor else select.POLLIN
            if peer.outgoing:
                wanted |= select.POLLOUT
            self._wanted.append((peer.connection.fileno(), wanted))
            timeout.value = min(timeout.value, LOOK_AROUND)
        return self._wanted, None if timeout.value == _FOREVER else timeout.value / 1000

    def _peers(self) -> Iterator[Peer]:
        """Other networks that this one talks to."""
        if self._past is not None and self._past.peer is not None:
            yield self._past.peer
        if self._successor is not None and not self._served.is_set():
            yield self._successor

    def _handle(self, ready: dict[int, int]) -> None:
        self._ready = ready
        self._library.slirp_pollfds_poll(self._slirp, 0, self._get_revents, None)
        for peer in list(self._peers()):
            if peer is self._successor:
                self._talk_to_successor(peer, ready)
            else:
                self._talk_to_predecessor(peer, ready)

    def _send(self, frame: bytes) -> None:
        past = self._past
        if past is not None and past.exhausted:
            past = self._past = None
        if past is not None and past.claims(frame):
            past.send(frame)
            return
        if self._brings_large:
            frame = with_mss(frame, LARGE_MSS)
        self._library.slirp_input(self._slirp, frame, len(frame))

    def _release(self) -> None:
        for peer in self._peers():
            peer.connection.close()
        self._library.slirp_cleanup(self._slirp)

    # ---- what libslirp calls

    def _on_packet(self, data: int, length: int, opaque: int | None) -> int:
        frame = with_mss(ctypes.string_at(data, length), WIRE_MSS)
        if self._past is not None:
            self._past.note(frame)
        tcp = tcp_over_ipv4(frame) if length > ETHERNET + MTU else None
        if length <= ETHERNET + MTU or (tcp is not None and self._brings_large):
            self._deliver(frame)
            return length
        cut = fragments(frame) if tcp is None else segments(frame, tcp, WIRE_MSS, version=4)
        for each in cut:
            self._deliver(each)
        return length

    def _on_guest_error(self, message: bytes, opaque: int | None) -> None:
        self._counters["guest_errors"] += 1

    def _on_add_poll(self, descriptor: int, events: int, opaque: int | None) -> int:
        if self._stalled:
            events &= ~(slirp.POLL_IN | slirp.POLL_PRI)
        self._wanted.append((descriptor, _TO_HOST[events & 31]))
        self._polled.append(descriptor)
        return len(self._polled) - 1

    def _on_get_revents(self, index: int, opaque: int | None) -> int:
        found = self._ready.get(self._polled[index], 0) if index < len(self._polled) else 0
        return _FROM_HOST[found & 31]


class _Elsewhere:
    """The card of a guest that has moved: the line to where it is now."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def receive(self, frames: Sequence[bytes]) -> int:
        """See `NetworkCard.receive`."""
        for taken, frame in enumerate(frames):
            if not self._peer.queue(frame):
                return taken
        return len(frames)

    def more(self) -> None:
        """See `NetworkCard.more`: the guest's frames come by the same line, and wait there."""
