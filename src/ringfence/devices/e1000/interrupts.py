"""Interrupt causes, mask, throttling and delay timers (3.2.7, 3.4.3, 13.4.17 to 13.4.21).

Causes gather in ICR, which reading clears. The pin is asserted while a cause is not masked, but no
sooner than ITR's interval after it was asserted last. What arrives or was sent may be told later:
each such event restarts the packet timer, and the absolute timer bounds the wait.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.clock import Deadline, TimerQueue
from ringfence.chipset.state import Saved, State
from ringfence.devices.e1000.registers import ICR, ITR, Delay

_NEVER = -1


class DelayedCause:
    """A cause that is raised when its packet timer or its absolute timer expires.

    Each event puts the packet timer off. The board's timer is not moved for that: when it fires too
    early, it is armed once more.

    Attributes
    ----------
    packet, absolute : int
        The registers: RDTR and RADV, or TIDV and TADV.
    """

    def __init__(self, queue: TimerQueue, raise_cause: Callable[[], None]) -> None:
        self._clock = queue.clock
        self._timer = Deadline(queue, self._fired)
        self._raise = raise_cause
        self.packet = 0
        self.absolute = 0
        self.limit = _NEVER
        """When the absolute timer expires, if it runs."""
        self.due = _NEVER
        """When the cause will be raised, if it will."""

    def event(self) -> None:
        """Note that a frame came or went."""
        if not self.packet:
            self.expire()
            return
        now = self._clock.now()
        if self.limit == _NEVER and self.absolute:
            self.limit = now + self.absolute * Delay.UNIT_NS
        due = now + self.packet * Delay.UNIT_NS
        self.due = due if self.limit == _NEVER else min(due, self.limit)
        if not self._timer.armed:
            self._timer.set(self.due)

    def _fired(self) -> None:
        if self._clock.now() < self.due:
            self._timer.set(self.due)
        else:
            self.expire()

    def expire(self) -> None:
        """Raise the cause now, and stop both timers."""
        self.stop()
        self._raise()

    def stop(self) -> None:
        """Stop both timers, the cause not raised."""
        self.limit = self.due = _NEVER
        self._timer.set(None)

    def read_packet(self) -> int:
        """Read RDTR or TIDV."""
        return self.packet

    def write_packet(self, value: int) -> None:
        """Write RDTR or TIDV; FPD raises at once what waits."""
        self.packet = value & Delay.VALUE
        if value & Delay.FPD and self.due != _NEVER:
            self.expire()

    def read_absolute(self) -> int:
        """Read RADV or TADV."""
        return self.absolute

    def write_absolute(self, value: int) -> None:
        """Write RADV or TADV."""
        self.absolute = value & Delay.VALUE

    def values(self) -> list[int]:
        """Return the state."""
        return [self.packet, self.absolute, self.limit, self.due]

    def set_values(self, values: list[int]) -> None:
        """Take over what `values` returned."""
        self.packet, self.absolute, self.limit, self.due = values
        self._timer.set(None if self.due == _NEVER else self.due)


class Interrupts(Saved):
    """The card's interrupt logic.

    Parameters
    ----------
    queue : TimerQueue
        The board's timers.
    pin : Callable[[bool], None]
        Drives INTA#.
    """

    FIELDS = ("icr", "ims", "itr", "asserted", "earliest")

    def __init__(self, queue: TimerQueue, pin: Callable[[bool], None]) -> None:
        self._clock = queue.clock
        self._pin = pin
        self._throttle = Deadline(queue, self._update)
        self.received = DelayedCause(queue, lambda: self.cause(ICR.RXT0))
        self.transmitted = DelayedCause(queue, lambda: self.cause(ICR.TXDW))
        self.icr = self.ims = self.itr = 0
        self.asserted = False
        self.earliest = 0
        """Before this time ITR forbids the next interrupt."""

    def reset(self) -> None:
        """Be as after power-on."""
        self.icr = self.ims = self.itr = 0
        self.earliest = 0
        for delayed in (self.received, self.transmitted):
            delayed.packet = delayed.absolute = 0
            delayed.stop()
        self._update()

    def cause(self, bits: int) -> None:
        """Note causes, and interrupt if one is wanted."""
        self.icr |= bits & ICR.IMPLEMENTED
        self._update()

    def read_icr(self) -> int:
        """Read ICR, which clears it."""
        value, self.icr = self.icr, 0
        self._update()
        return value

    def write_icr(self, value: int) -> None:
        """Write ICR: ones clear."""
        self.icr &= ~value
        self._update()

    def read_ims(self) -> int:
        """Read IMS: the mask."""
        return self.ims

    def write_ims(self, value: int) -> None:
        """Write IMS: ones unmask."""
        self.ims |= value & ICR.IMPLEMENTED
        self._update()

    def write_imc(self, value: int) -> None:
        """Write IMC: ones mask."""
        self.ims &= ~value
        self._update()

    def read_itr(self) -> int:
        """Read ITR."""
        return self.itr

    def write_itr(self, value: int) -> None:
        """Write ITR; it holds from the next interrupt on."""
        self.itr = value & ITR.INTERVAL

    def _update(self) -> None:
        """Drive the pin, or wait until throttling permits it."""
        if not self.icr & self.ims:
            self._throttle.set(None)
            if self.asserted:
                self.asserted = False
                self._pin(False)
            return
        if self.asserted:
            return
        now = self._clock.now()
        if now < self.earliest:
            if not self._throttle.armed:
                self._throttle.set(self.earliest)
            return
        self.asserted = True
        self.earliest = now + self.itr * ITR.UNIT_NS
        self._pin(True)

    def save(self) -> State:
        """See `Saved.save`."""
        delays = {"received": self.received.values(), "transmitted": self.transmitted.values()}
        return super().save() | delays

    def restore(self, state: State) -> None:
        """See `Saved.restore`."""
        super().restore(state)
        self.received.set_values(state["received"])
        self.transmitted.set_values(state["transmitted"])
        self._throttle.set(None)
        self._update()
