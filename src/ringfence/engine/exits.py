"""Why the guest stopped running: the one vocabulary of exits that every engine speaks.

Shape: an integer code per reason (`Reason`), which is all that a hot loop and its counters
need, and one small frozen dataclass per reason that carries the details for whoever wants to
read them (the trace, the slow paths, a test). An engine that handles port writes by code never
has to build a `PortOut`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar, TypeAlias


class Reason(IntEnum):
    """Code of an exit; dense from 0, so that it indexes arrays of counters."""

    PORT_IN = 0
    PORT_OUT = 1
    MMIO_READ = 2
    MMIO_WRITE = 3
    HALT = 4
    CPUID = 5
    MSR_READ = 6
    MSR_WRITE = 7
    HYPERCALL = 8
    SHUTDOWN = 9
    INTERRUPT_WINDOW = 10
    DEBUG = 11
    UNSUPPORTED = 12
    STOP = 13

    @property
    def label(self) -> str:
        """The name that tables, traces and JSON show, such as ``port_in``."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class PortIn:
    """``in``: ``size`` bytes (1, 2, 4) wanted from an I/O port."""

    port: int
    size: int
    reason: ClassVar[Reason] = Reason.PORT_IN


@dataclass(frozen=True, slots=True)
class PortOut:
    """``out``: ``value`` of ``size`` bytes (1, 2, 4) for an I/O port."""

    port: int
    size: int
    value: int
    reason: ClassVar[Reason] = Reason.PORT_OUT


@dataclass(frozen=True, slots=True)
class MmioRead:
    """A load of ``size`` bytes from a guest-physical address that is not RAM."""

    address: int
    size: int
    reason: ClassVar[Reason] = Reason.MMIO_READ


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """A store of ``size`` bytes to a guest-physical address that is not RAM."""

    address: int
    size: int
    value: int
    reason: ClassVar[Reason] = Reason.MMIO_WRITE


@dataclass(frozen=True, slots=True)
class Halt:
    """``hlt``: nothing to do until the next interrupt."""

    reason: ClassVar[Reason] = Reason.HALT


@dataclass(frozen=True, slots=True)
class Cpuid:
    """``cpuid`` with the leaf in EAX and the subleaf in ECX."""

    leaf: int
    subleaf: int
    reason: ClassVar[Reason] = Reason.CPUID


@dataclass(frozen=True, slots=True)
class MsrRead:
    """``rdmsr`` of the register with number ``index``."""

    index: int
    reason: ClassVar[Reason] = Reason.MSR_READ


@dataclass(frozen=True, slots=True)
class MsrWrite:
    """``wrmsr`` of a 64-bit ``value`` to the register with number ``index``."""

    index: int
    value: int
    reason: ClassVar[Reason] = Reason.MSR_WRITE


@dataclass(frozen=True, slots=True)
class Hypercall:
    """``vmmcall`` or ``vmcall``: function ``number`` (RAX) with its register arguments."""

    number: int
    arguments: tuple[int, ...] = ()
    reason: ClassVar[Reason] = Reason.HYPERCALL


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault: exception ``vector`` was the last that could not be delivered."""

    vector: int
    reason: ClassVar[Reason] = Reason.SHUTDOWN


@dataclass(frozen=True, slots=True)
class InterruptWindow:
    """The guest can take an interrupt; ``vector`` is delivered, or -1 where none was due."""

    vector: int = -1
    reason: ClassVar[Reason] = Reason.INTERRUPT_WINDOW


@dataclass(frozen=True, slots=True)
class Debug:
    """A breakpoint or single step that the debugger asked for."""

    dr6: int = 0
    reason: ClassVar[Reason] = Reason.DEBUG


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A CPU mode or instruction that the engine does not offer; ``what`` says which."""

    what: str
    reason: ClassVar[Reason] = Reason.UNSUPPORTED


@dataclass(frozen=True, slots=True)
class Stop:
    """The owner of the machine wants the CPU back (stop, pause), or the board ended the run."""

    reason: ClassVar[Reason] = Reason.STOP


Exit: TypeAlias = (
    PortIn
    | PortOut
    | MmioRead
    | MmioWrite
    | Halt
    | Cpuid
    | MsrRead
    | MsrWrite
    | Hypercall
    | Shutdown
    | InterruptWindow
    | Debug
    | Unsupported
    | Stop
)

_DECIMAL = {"size", "vector"}


def describe(event: Exit) -> str:
    """One line about an exit, such as ``port_out port=0x3f8 size=1 value=0x41``."""
    parts = [event.reason.label]
    for each in fields(event):
        value = getattr(event, each.name)
        if isinstance(value, tuple):
            shown = ",".join(f"{item:#x}" for item in value)
        elif isinstance(value, int) and each.name not in _DECIMAL:
            shown = f"{value:#x}"
        else:
            shown = str(value)
        parts.append(f"{each.name}={shown}")
    return " ".join(parts)


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One exit as the trace shows it.

    Attributes
    ----------
    event : Exit
        What the guest wanted.
    rip : int
        Guest-virtual address of the instruction that caused it.
    nanoseconds : int
        What handling it took in the VMM.
    """

    event: Exit
    rip: int
    nanoseconds: int

    def __str__(self) -> str:
        micros = self.nanoseconds / 1000
        return f"{self.rip:#018x} {describe(self.event)} ({micros:.1f} us)"


class ExitCounters:
    """How often each reason occurred and how long the VMM took, in nanoseconds.

    The two arrays are plain 64-bit unsigned integers indexed by `Reason`; native code may
    count into them through ``counts.buffer_info()``.
    """

    __slots__ = ("counts", "nanoseconds")

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * len(Reason)))
        self.nanoseconds = array("Q", bytes(8 * len(Reason)))

    def add(self, reason: int, nanoseconds: int, count: int = 1) -> None:
        """Account for ``count`` exits that took ``nanoseconds`` together."""
        self.counts[reason] += count
        self.nanoseconds[reason] += nanoseconds

    def by_reason(self, inside: Mapping[Reason, int] | None = None) -> dict[str, dict[str, int]]:
        """Plain data for statistics: label to ``{"count": n, "ns": n}``, zeros left out.

        ``inside``: exits that were handled without leaving guest code. They are counted, too, and
        once more as ``native``; their time is the guest's.
        """
        found = {
            reason.label: {"count": self.counts[reason], "ns": self.nanoseconds[reason]}
            for reason in Reason
            if self.counts[reason]
        }
        for reason, count in (inside or {}).items():
            if count:
                one = found.setdefault(reason.label, {"count": 0, "ns": 0})
                one["count"] += count
                one["native"] = count
        return found
