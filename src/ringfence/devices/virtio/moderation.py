"""When a queue's interrupt is sent, and when its device looks for work: waiting on purpose.

`InterruptModerator` holds an interrupt back until some chains have gone the same way, or some time
has passed: a guest is interrupted once for many packets. What the device gives back is in the ring
at once; only telling of it waits.

`Poller` decides when a queue is looked at again without a notification. While it polls, the driver
is asked for none, so its packets cost no exits. Pauses adapt: a look that finds work halves them,
another one doubles them, and one that would be longer than allowed ends the polling: an idle queue
costs nothing, a busy one a timer per handful of packets.

Both belong to one queue and are called with the board's lock held.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.clock import Timer
from ringfence.pacing import SHORTEST_POLL, Pacing

Later = Callable[[Callable[[], None], int], Timer | None]
"""Has something done in so many nanoseconds."""


class InterruptModerator:
    """A queue's interrupts.

    Parameters
    ----------
    pacing : Pacing
        Chains and microseconds that an interrupt waits for.
    later : Later
        For the end of the wait.
    interrupt : Callable[[], None]
        Sends it.
    """

    def __init__(self, pacing: Pacing, later: Later, interrupt: Callable[[], None]) -> None:
        self._packets = pacing.packets
        self._wait = 1000 * pacing.microseconds
        self._later = later
        self._interrupt = interrupt
        self._timer: Timer | None = None
        self._chains = 0
        """Chains that the interrupt which waits will tell of."""

    def published(self, chains: int, wanted: bool) -> None:
        """Hear that chains were given back, and whether the driver wants an interrupt for them."""
        waiting = self._timer is not None
        if not (wanted or waiting):
            return
        self._chains += chains
        if self._chains >= self._packets:
            self.send()
        elif not waiting:
            self._timer = self._later(self.send, self._wait)

    def send(self) -> None:
        """Send the interrupt now, whatever it waits for."""
        self.forget()
        self._interrupt()

    def settle(self) -> None:
        """Send the interrupt if one waits."""
        if self._timer is not None:
            self.send()

    def forget(self) -> None:
        """Let none wait: the driver has reset the device."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._chains = 0


class Poller:
    """When a queue is looked at again.

    Parameters
    ----------
    pacing : Pacing
        The longest pause.
    later : Later
        For the next look.
    look : Callable[[], None]
        Looks.
    """

    def __init__(self, pacing: Pacing, later: Later, look: Callable[[], None]) -> None:
        self._longest = 1000 * pacing.poll
        self._later = later
        self._look = look
        self._pause = 0
        """Nanoseconds; 0 while notifications are waited for."""
        self._timer: Timer | None = None

    def found(self, chains: int) -> bool:
        """Hear how many chains a look has found; return whether there will be another, unasked."""
        if not self._longest:
            return False
        if self._timer is None:
            if chains:
                pause = (self._pause or self._longest) // 2
                self._pause = max(pause, 1000 * SHORTEST_POLL)
            else:
                self._pause *= 2
            if not 0 < self._pause <= self._longest:
                self._pause = 0
                return False
            self._timer = self._later(self._wake, self._pause)
        return True

    def forget(self) -> None:
        """Poll no more: the driver has reset the device."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._pause = 0

    def _wake(self) -> None:
        self._timer = None
        self._look()
