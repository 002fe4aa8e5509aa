"""User-mode networking: a private network per guest, behind a NAT in this process, by libslirp.

The guest sees 10.0.2.0/24 with a gateway (.2), a DHCP server that gives it .15, and a name server
(.3) that asks the host's. Its TCP and UDP connections become ordinary sockets of this process, its
pings ICMP sockets where the host permits them (``net.ipv4.ping_group_range``); so no privileges are
needed, and nobody outside reaches the guest but through forwards.

The host's own loopback interface is not the guest's business: services that listen there trust
whoever can connect. ``loopback=True`` opens it, as 10.0.2.2.

All calls of libslirp are made by the backend's thread; those of `__init__` come before it starts.
IPv6 is switched off: few hosts could route it, and guests would try it first.

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
import time
from collections.abc import Iterable

from ringfence.errors import HostError
from ringfence.network import slirp
from ringfence.network.forward import Forward
from ringfence.network.offload import (
    ETHERNET,
    MTU,
    fragments,
    segments,
    tcp_over_ipv4,
    with_mss,
)
from ringfence.network.threaded import ThreadedBackend

NETWORK, NETMASK = "10.0.2.0", "255.255.255.0"
GATEWAY, NAME_SERVER, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.15"
WIRE_MSS = 1460
"""Bytes of payload in a segment on a wire whose packets have `MTU` bytes."""
LARGE_MSS = 11 * WIRE_MSS
LARGE_MTU = LARGE_MSS + 60
"""What libslirp takes the wire for. It sends so much less payload to who hasn't said otherwise, and
doesn't listen to options while it waits for a connection to be made."""
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

    Raises
    ------
    HostError
        libslirp is missing, or a port can't be had.
    """

    NAME = "user"
    takes_large = True

    def __init__(self, forwards: Iterable[Forward] = (), *, loopback: bool = False) -> None:
        library = slirp.library()
        super().__init__()
        self._library = library
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
        try:
            for forward in forwards:
                self._add_forward(forward)
        except HostError:
            self.close()
            raise

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

    # ---- the thread's turn

    def _interest(self) -> tuple[list[tuple[int, int]], float | None]:
        self._polled = []
        self._wanted: list[tuple[int, int]] = []
        timeout = ctypes.c_uint32(_FOREVER)
        self._library.slirp_pollfds_fill(self._slirp, ctypes.byref(timeout), self._add_poll, None)
        return self._wanted, None if timeout.value == _FOREVER else timeout.value / 1000

    def _handle(self, ready: dict[int, int]) -> None:
        self._ready = ready
        self._library.slirp_pollfds_poll(self._slirp, 0, self._get_revents, None)

    def _send(self, frame: bytes) -> None:
        if self._brings_large:
            frame = with_mss(frame, LARGE_MSS)
        self._library.slirp_input(self._slirp, frame, len(frame))

    def _release(self) -> None:
        self._library.slirp_cleanup(self._slirp)

    # ---- what libslirp calls

    def _on_packet(self, data: int, length: int, opaque: int | None) -> int:
        frame = with_mss(ctypes.string_at(data, length), WIRE_MSS)
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
        self._wanted.append((descriptor, _TO_HOST[events & 31]))
        self._polled.append(descriptor)
        return len(self._polled) - 1

    def _on_get_revents(self, index: int, opaque: int | None) -> int:
        found = self._ready.get(self._polled[index], 0) if index < len(self._polled) else 0
        return _FROM_HOST[found & 31]
