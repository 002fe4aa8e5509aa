"""Whether a device acts on a notification at once, or waits for more of them.

A device that serves each request before the driver can submit the next one never sees two of them,
and each costs an exit and an interrupt. So where requests come together, work is put off until a
vCPU sleeps (its guest has submitted all that it can, see `chipset.spare`), or a moment has passed.
Whether they do is found out by putting off one notification in `PROBE`: a guest that waits for each
answer loses next to nothing by that.

A `Gatherer` belongs to one queue and is called with the board's lock held. What was put off need
not be saved: a device that is restored looks at all of its queues.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.spare import Waiting

PROBE = 64
"""One in so many notifications is put off to see whether more requests come."""
SMALL = 8192
"""Bytes of a request: larger ones cost so much themselves that an exit more doesn't matter."""
PATIENCE = 2
"""Looks that found no more than a few, one after the other, before the wait is given up."""

PutOff = Callable[[Callable[[], None], int], Waiting | None]
"""Has something done when a vCPU sleeps, or in so many nanoseconds."""


class Gatherer:
    """Whether a queue's notifications are put off.

    Parameters
    ----------
    longest : int
        For how many nanoseconds; 0: never.
    put_off : PutOff
        Has the queue looked at.
    look : Callable[[], None]
        Looks.
    few : int
        Requests that may come together without being worth a wait.
    """

    def __init__(
        self, longest: int, put_off: PutOff, look: Callable[[], None], *, few: int = 1
    ) -> None:
        self._longest = longest
        self._few = few
        self._put_off = put_off
        self._look = look
        self._waiting: Waiting | None = None
        self._looking = False
        self._gathering = False
        self._seen = 0
        """Notifications since the last one that was put off to see."""
        self._alone = 0
        """Looks in a row that have found only a few requests."""

    def notified(self) -> bool:
        """Hear of a notification; return whether it is put off."""
        if self._waiting is not None:
            return True
        if not self._gathering:
            self._seen += 1
            if self._seen < PROBE:
                return False
        self._seen = 0
        self._waiting = self._put_off(self._wake, self._longest) if self._longest else None
        return self._waiting is not None

    def found(self, chains: int, size: int) -> None:
        """Hear what a look has found: how many chains, and how large the first one is."""
        if not self._looking:
            return
        self._looking = False
        together = chains > self._few and size <= SMALL
        self._alone = 0 if together else self._alone + 1
        self._gathering = together or (self._gathering and self._alone < PATIENCE)

    def forget(self) -> None:
        """Put nothing off any more: the driver has reset the device."""
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None
        self._gathering = self._looking = False
        self._seen = self._alone = 0

    def _wake(self) -> None:
        self._waiting = None
        self._looking = True
        self._look()
