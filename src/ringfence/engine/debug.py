"""What a machine's owner asks of an engine when debugging, and what comes back.

Breakpoints and watchpoints are at linear addresses and invisible to the guest: its own debug
registers and its memory stay as they are. A vCPU that meets one makes `Engine.run` return PAUSED
and says why in a `DebugStop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag


class Access(IntFlag):
    """What a watchpoint watches for; with both, either."""

    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Watchpoint:
    """``length`` bytes of data from linear address ``address`` on."""

    address: int
    length: int
    access: Access = Access.WRITE


@dataclass(frozen=True, slots=True)
class DebugPoints:
    """All that a machine's owner wants its vCPUs to stop at."""

    breakpoints: frozenset[int] = frozenset()
    watchpoints: tuple[Watchpoint, ...] = ()


class StopKind(Enum):
    """Why a vCPU stopped for its owner."""

    BREAKPOINT = "breakpoint"
    WATCHPOINT = "watchpoint"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class DebugStop:
    """A vCPU stopped for its owner.

    Attributes
    ----------
    kind : StopKind
        Why it did.
    cpu : int
        Which one.
    rip : int
        Address of the next instruction. A breakpoint stops before its instruction, a watchpoint
        behind the one that made the access.
    watchpoint : Watchpoint or None
        The one that was hit.
    """

    kind: StopKind
    cpu: int
    rip: int
    watchpoint: Watchpoint | None = None
