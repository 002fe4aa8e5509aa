"""How often a guest and a virtio device tell each other of work: switches, as people write them.

Each message costs: a notification is an exit, an interrupt makes the guest stop what it does. Fewer
of them mean more throughput, and a packet that waits longer. What the switches do is in
`devices.virtio.moderation`; here is only what a user may say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringfence.errors import UsageError

MAX_PACKETS = 1024
MAX_MICROSECONDS = 100_000
SHORTEST_POLL = 20
"""Microseconds; more often nobody looks."""
OPTIONS = (
    "event-idx=on|off, gather=off|MICROSECONDS, coalesce=PACKETS:MICROSECONDS or poll=MICROSECONDS"
)


@dataclass(frozen=True, slots=True)
class Pacing:
    """The switches of one device.

    Attributes
    ----------
    event_idx : bool
        Whether EVENT_IDX is offered (virtio 1.2, 2.7.10, 2.8.10): either side says at which index
        it wants to hear of the other; without it there is only "always" and "never".
    packets, microseconds : int
        An interrupt waits for so many chains, but no longer than this; 0: it never waits.
    poll : int
        A queue that was busy is looked at again unasked, at pauses of up to so many microseconds;
        0: never.
    gather : int
        Where requests come together, a notification waits until the guest has nothing to do, but
        no longer than so many microseconds; 0: it never waits.
    """

    event_idx: bool = True
    packets: int = 0
    microseconds: int = 0
    poll: int = 0
    gather: int = 200

    def with_option(self, text: str) -> Pacing | None:
        """These switches and one more (see `OPTIONS`); None if ``text`` is none of them.

        Raises
        ------
        UsageError
            It is one, with a value that makes no sense.
        """
        name, _, value = text.partition("=")
        if name == "event-idx" and value in ("on", "off"):
            return replace(self, event_idx=value == "on")
        if name == "gather":
            gather = 0 if value == "off" else _number(text, value, 1, MAX_MICROSECONDS)
            return replace(self, gather=gather)
        if name == "coalesce":
            packets, _, microseconds = value.partition(":")
            return replace(
                self,
                packets=_number(text, packets, 1, MAX_PACKETS),
                microseconds=_number(text, microseconds, 1, MAX_MICROSECONDS),
            )
        if name == "poll":
            return replace(self, poll=_number(text, value, SHORTEST_POLL, MAX_MICROSECONDS))
        return None


def _number(option: str, text: str, least: int, most: int) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 8 and least <= int(text) <= most:
        return int(text)
    raise UsageError(
        f"option {option!r}: {text!r} is no number from {least} to {most}; expected {OPTIONS}"
    )
