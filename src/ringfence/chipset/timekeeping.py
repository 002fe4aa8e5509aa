"""The machine's time as one thing: its clock and its time-stamp counter stop and go on together.

The two are read by different parts of the house (timers by `clock`, guests by `cpu.tsc`), and a
guest that compares them must not see a pause in one only. Whether time stands still over a pause,
or jumps to where it would be without it, is a policy that may change at any time; the end of the
pause applies it. A restore is the end of a pause, too, one that began in another process: `restore`
takes over the readings, and `resume` goes on from there, by the host's wall clock if time shall
jump.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from ringfence.chipset.clock import NS_PER_SECOND, HostClock
from ringfence.chipset.state import State, check_version
from ringfence.cpu.tsc import MASK64, Tsc
from ringfence.errors import ImageError


class PauseClock(StrEnum):
    """What the guest's time does over a pause."""

    STOP = "stop"
    """It stands still; the guest doesn't notice, and its wall clock is late afterwards."""
    RUN = "run"
    """It jumps; timers that were due in between fire at once."""


class Timekeeper:
    """Stops, moves, saves and restores a machine's time.

    Parameters
    ----------
    clock : HostClock
        What timers and devices go by.
    tsc : Tsc
        What guests read.
    policy : PauseClock
        What a pause means to begin with.

    Attributes
    ----------
    policy : PauseClock
        What the next end of a pause does.
    on_resume : list of Callable[[bool], None]
        Called at the end of each pause, while vCPUs stand still, with whether time has jumped.
    """

    VERSION = 1

    def __init__(self, clock: HostClock, tsc: Tsc, policy: PauseClock = PauseClock.STOP) -> None:
        self.clock = clock
        self.tsc = tsc
        self.policy = policy
        self.on_resume: list[Callable[[bool], None]] = []
        self._wall: Callable[[], int] = time.monotonic_ns
        """The clock that tells how long the pause has been."""
        self._began: int | None = None

    def pause(self) -> None:
        """Stop time; the vCPUs must stand still. A second pause changes nothing."""
        if self._began is None:
            self.tsc.pause()
            self.clock.pause()
            self._wall = time.monotonic_ns
            self._began = self._wall()

    def resume(self) -> None:
        """Let time go on as the policy says; without a pause nothing happens."""
        if self._began is None:
            return
        away, self._began = max(0, self._wall() - self._began), None
        jump = self.policy is PauseClock.RUN
        if jump:
            self.clock.set_now(self.clock.now() + away)
            self.tsc.set_now(self.tsc.read() + away * self.tsc.hz // NS_PER_SECOND)
        self.tsc.resume()
        self.clock.resume()
        for told in self.on_resume:
            told(jump)

    def save(self, cpus: int) -> State:
        """Readings as plain data, for ``cpus`` vCPUs; the machine must be paused.

        ``now`` nanoseconds, ``ticks`` of ``hz`` and, per vCPU, how far its counter is ahead of
        them; ``wall`` is the host's at the pause, ``host_hz`` its counter's rate.
        """
        away = 0 if self._began is None else self._wall() - self._began
        line = self.tsc
        return {
            "version": self.VERSION,
            "policy": self.policy.value,
            "now": self.clock.now(),
            "wall": time.time_ns() - away,
            "ticks": line.read(),
            "hz": line.hz,
            "host_hz": line.host.hz,
            "ahead": [line.vcpu(cpu).offset - line.offset & MASK64 for cpu in range(cpus)],
        }

    def restore(self, state: State) -> None:
        """Take over what `save` returned, as a pause that `resume` ends.

        The machine's `Tsc` must have been made for the saved ``hz``, and its vCPUs exist. Restore
        vCPUs first, as they carry the offsets of the old host, and the board behind this.

        Raises
        ------
        ImageError
            The state is of another version or shape.
        """
        check_version("time", state, self.VERSION)
        try:
            policy = PauseClock(state["policy"])
            now, ticks, wall = (int(state[name]) for name in ("now", "ticks", "wall"))
            ahead = [int(each) for each in state["ahead"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError(
                f"saved time is damaged ({error!r}): take the snapshot anew"
            ) from error
        self.pause()
        self.policy = policy
        self.clock.set_now(now)
        self.tsc.set_now(ticks)
        for cpu, more in enumerate(ahead):
            self.tsc.vcpu(cpu).set_offset(self.tsc.offset + more)
        self._wall, self._began = time.time_ns, wall
