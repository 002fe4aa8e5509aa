"""Interrupt causes, mask, throttling and delay timers (3.2.7, 3.4.3, 13.4.17 to 13.4.21).

Causes gather in ICR, which reading clears. They, the mask and the pin are one word, which native
code changes for the driver (`memory.causes`): what it can't finish comes here. The pin is asserted
while a cause is not masked, but no sooner than ITR's interval after it was asserted last. What
arrives or was sent may be told later: each such event restarts the packet timer, and the absolute
timer bounds the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringfence.chipset.clock import Deadline, TimerQueue
from ringfence.chipset.state import Saved, State
from ringfence.devices.e1000.registers import ICR, ITR, Delay
from ringfence.memory.causes import LINE, CauseWord, unmasked

WORTHWHILE_NS = 20_000
"""A shorter wait costs more than it saves: it is over before a thread of the host's is awake."""
_NEVER = -1


class DelayedCause:
    """A cause that is raised when its packet timer or its absolute timer expires.

    Each event puts the packet timer off. The board's timer is not moved for that: when it fires too
    early, it is armed once more. A delay that is shorter than `WORTHWHILE_NS` is none: Linux's
    driver asks for 8 us, which would be a timer and a thread's wake-up per frame.

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
        if self.packet * Delay.UNIT_NS < WORTHWHILE_NS:
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
        if self.due != _NEVER:
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
    word : CauseWord
        ICR, the mask, and how the pin is driven.
    throttle : view of `memory.registers.Register`
        ITR.
    """

    FIELDS = ("icr", "ims", "itr", "asserted", "earliest")

    def __init__(
        self, queue: TimerQueue, pin: Callable[[bool], None], word: CauseWord, throttle: Any
    ) -> None:
        self._clock = queue.clock
        self._pin = pin
        self._word = word
        self._itr = throttle
        self._throttle = Deadline(queue, self.update)
        self.received = DelayedCause(queue, lambda: self.cause(ICR.RXT0))
        self.transmitted = DelayedCause(queue, lambda: self.cause(ICR.TXDW))
        self.earliest = 0
        """Before this time ITR forbids the next interrupt."""

    @property
    def itr(self) -> int:
        """ITR; what is written holds from the next interrupt on."""
        return int(self._itr.value)

    @itr.setter
    def itr(self, value: int) -> None:
        self._itr.value = value & ITR.INTERVAL

    @property
    def icr(self) -> int:
        """The causes."""
        return self._word.causes

    @icr.setter
    def icr(self, value: int) -> None:
        self._word.put(value & ICR.IMPLEMENTED, self._word.mask, self._word.line)

    @property
    def ims(self) -> int:
        """The mask: causes that interrupt."""
        return self._word.mask

    @ims.setter
    def ims(self, value: int) -> None:
        self._word.put(self._word.causes, value & ICR.IMPLEMENTED, self._word.line)

    @property
    def asserted(self) -> bool:
        """How the pin is driven."""
        return self._word.line

    @asserted.setter
    def asserted(self, value: bool) -> None:
        self._word.put(self._word.causes, self._word.mask, value)

    def reset(self) -> None:
        """Be as after power-on."""
        self.icr = self.ims = self.itr = self.earliest = 0
        for delayed in (self.received, self.transmitted):
            delayed.packet = delayed.absolute = 0
            delayed.stop()
        self.update()

    def cause(self, bits: int) -> None:
        """Note causes, and interrupt if one is wanted."""
        bits &= ICR.IMPLEMENTED
        word = self._word.value
        if not bits & ~word and (word & LINE or not unmasked(word)):
            return  # as many frames find it
        self._word.note(bits)
        self.update()

    def read_icr(self) -> int:
        """Read ICR, which clears it."""
        value = self._word.forget(ICR.IMPLEMENTED)
        self.update()
        return value

    def write_icr(self, value: int) -> None:
        """Write ICR: ones clear."""
        self._word.forget(value)
        self.update()

    def read_ims(self) -> int:
        """Read IMS: the mask."""
        return self._word.mask

    def write_ims(self, value: int) -> None:
        """Write IMS: ones unmask."""
        self._word.want(value & ICR.IMPLEMENTED)
        self.update()

    def write_imc(self, value: int) -> None:
        """Write IMC: ones mask."""
        self._word.refuse(value)
        self.update()

    def read_itr(self) -> int:
        """Read ITR."""
        return self.itr

    def write_itr(self, value: int) -> None:
        """Write ITR."""
        self.itr = value

    def update(self) -> None:
        """Drive the pin, or wait until throttling permits it."""
        word, now = self._word, 0
        if not unmasked(word.value):
            self._throttle.set(None)
        elif not word.line:
            now = self._clock.now()
            if now < self.earliest:
                if not self._throttle.armed:
                    self._throttle.set(self.earliest)
                return
        driven = word.drive()
        if driven:
            self.earliest = now + self.itr * ITR.UNIT_NS
        if driven is not None:
            self._pin(driven)

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
        self.update()
