"""What people write about networks, and the backends that come of it.

Text on the command line and arguments of `Machine` become one checked `NetworkConfig`; `connect`
makes the backend, once per machine: it lives on through a guest's resets. The libraries that a
backend needs are loaded only then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UsageError
from ringfence.network.backend import Heritable, NetworkBackend
from ringfence.network.forward import Forward, parse_forward
from ringfence.pacing import OPTIONS, Pacing

NICS = ("virtio", "e1000")
"""Network cards that a machine may have; the first is what it has unless told otherwise."""
KINDS = "none, user, user:loopback, socket:PATH or tap:NAME"


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One backend to be: ``kind`` is ``user``, ``socket`` or ``tap``.

    ``target`` is the socket's path or the interface's name; ``loopback`` and ``forwards`` are
    those of `ringfence.network.user`; ``capture`` is a file for what goes over the wire.
    """

    kind: str
    target: str = ""
    loopback: bool = False
    forwards: tuple[Forward, ...] = ()
    capture: Path | None = None


def parse_network(
    text: str | None, forwards: Iterable[str] = (), capture: str | Path | None = None
) -> NetworkConfig | None:
    """Return what ``text`` describes (see `KINDS`); None for no network.

    Raises
    ------
    UsageError
        It describes nothing, or forwards or a capture go with it that have no place there.
    """
    kind, separator, target = (text or "none").partition(":")
    parsed = tuple(parse_forward(each) for each in forwards)
    if parsed and kind != "user":
        raise UsageError(f"forwards need user-mode networking, not {kind!r}: expected --net user")
    folder = Path(capture) if capture is not None else None
    if kind == "none" and not separator:
        if folder is not None:
            raise UsageError(f"there is nothing to capture without a network: expected {KINDS}")
        return None
    if kind == "user" and (not separator or target == "loopback"):
        return NetworkConfig(kind, "", bool(target), parsed, folder)
    if kind in ("socket", "tap") and target:
        return NetworkConfig(kind, target, capture=folder)
    raise UsageError(f"network {text!r} is unknown: expected {KINDS}")


def parse_nic(text: str) -> tuple[str, Pacing]:
    """Return what ``KIND[,OPTION...]`` says: one of `NICS`, and a virtio card's switches.

    Raises
    ------
    UsageError
        There is no such card or option, or the card has no options.
    """
    kind, *options = text.split(",")
    if kind not in NICS:
        raise UsageError(f"network card {kind!r} is unknown: expected one of {', '.join(NICS)}")
    pacing = Pacing()
    for option in options:
        paced = pacing.with_option(option) if kind == "virtio" else None
        if paced is None:
            expected = OPTIONS if kind == "virtio" else "none, its driver sets what it has"
            raise UsageError(f"option {option!r} of card {kind}: expected {expected}")
        pacing = paced
    return kind, pacing


def parse_mac(text: str | None) -> bytes:
    """Return an Ethernet address from its text; without one, a random one of our own range.

    Raises
    ------
    UsageError
        It is no address that a card may have.
    """
    if text is None:
        return b"\x02RF" + os.urandom(3)
    try:
        mac = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise UsageError(f"{text!r} is no card's address: expected one like 02:00:00:00:00:01")
    return mac


def open_network(
    network: str | NetworkBackend | None,
    forwards: Sequence[str],
    capture: str | Path | None,
    *,
    awaited: bool = False,
) -> NetworkBackend | None:
    """Return the backend that `Machine`'s arguments ask for, which may be the caller's own.

    One whose guest is ``awaited`` from elsewhere leaves its ports to others until `reclaim`.
    """
    if network is not None and not isinstance(network, str):
        if forwards or capture is not None:
            raise UsageError("forwards and capture are for networks by name, not for a backend")
        return network
    config = parse_network(network, forwards, capture)
    return None if config is None else connect(config, awaited=awaited)


def heritable(network: NetworkBackend | None) -> Heritable | None:
    """Return the network that a guest can leave behind with its connections, if it is such a one.

    What goes on for a guest that has left is not captured.
    """
    if network is None:
        return None
    from ringfence.network.capture import Capture
    from ringfence.network.user import UserNetwork

    inner = network.backend if isinstance(network, Capture) else network
    return inner if isinstance(inner, UserNetwork) else None


def connect(config: NetworkConfig, *, awaited: bool = False) -> NetworkBackend:
    """Make the backend; HostError where the host lacks what it needs."""
    backend: NetworkBackend
    match config.kind:
        case "user":
            from ringfence.network.user import UserNetwork

            backend = UserNetwork(config.forwards, loopback=config.loopback, awaited=awaited)
        case "socket":
            from ringfence.network.stream import SocketNetwork

            backend = SocketNetwork(config.target)
        case _:
            from ringfence.network.tap import TapNetwork

            backend = TapNetwork(config.target)
    if config.capture is None:
        return backend
    from ringfence.network.capture import Capture

    try:
        return Capture(backend, config.capture)
    except BaseException:
        backend.close()
        raise
