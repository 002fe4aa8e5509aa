"""Ports of the host's that lead to the guest's."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.errors import UsageError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Forward:
    """Connections to a port of the host's that end at a port of the guest's."""

    host_port: int
    guest_port: int
    host_address: str = LOOPBACK
    udp: bool = False

    def __str__(self) -> str:
        kind = "udp:" if self.udp else ""
        return f"{kind}{self.host_address}:{self.host_port}:{self.guest_port}"


def parse_forward(text: str) -> Forward:
    """Return the forward that ``[udp:|tcp:][ADDRESS:]HOST_PORT:GUEST_PORT`` describes.

    Raises
    ------
    UsageError
        It describes none, or the address is not an IPv4 one.
    """
    parts = text.split(":")
    udp = parts[0] == "udp"
    if parts[0] in ("udp", "tcp"):
        parts = parts[1:]
    address = parts.pop(0) if len(parts) == 3 else LOOPBACK
    numbers = [_number(part, 65535) for part in parts]
    octets = [_number(part, 255) for part in address.split(".")]
    if len(numbers) != 2 or len(octets) != 4 or -1 in octets or not min(numbers) > 0:
        raise UsageError(
            f"forward {text!r} is none: expected [udp:][ADDRESS:]HOST_PORT:GUEST_PORT,"
            " such as 8080:80"
        )
    host, guest = numbers
    return Forward(host, guest, address, udp)


def _number(text: str, largest: int) -> int:
    """Return a decimal number up to ``largest``, or -1."""
    good = text.isascii() and text.isdigit() and len(text) <= 5
    return int(text) if good and int(text) <= largest else -1
