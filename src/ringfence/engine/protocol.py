"""What an engine's vCPU offers to whoever runs it, and what the owner may choose about it.

`VirtualCpu` is the seam between the machine and the technique behind it. A vCPU runs in the thread
that calls `VirtualCpu.run`, until the machine ends or its owner wants the CPU back; all vCPUs of a
machine together are an `Engine` (see `group`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ringfence.cpu.reset import EntryState
    from ringfence.engine.debug import DebugPoints, DebugStop
    from ringfence.engine.exits import TraceRecord


class StopReason(Enum):
    """Why `Engine.run` returned."""

    POWER_OFF = "power-off"
    RESET = "reset"
    CRASH = "crash"
    STOPPED = "stopped"
    PAUSED = "paused"
    MIGRATED = "migrated"
    GUEST_EXIT = "guest-exit"
    """The guest wrote an exit status to a test device."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the owner of a machine may choose about its engine.

    Attributes
    ----------
    cpus : int
        Number of vCPUs.
    paravirtual : int
        Paravirtual services offered, as EAX of CPUID leaf 0x40000001 has them.
    cache_dir : Path or None
        Folder of the engine's own compiled code; None keeps it in memory only.
    features : frozenset of str, optional
        CPU features that the guest has been promised, by the names in ``cpu.cpuid``: it gets these
        and no others, or HostError where the host lacks one. By default all that the host has.
    direct : bool
        Under translation: let user code that computes for long run directly where that is possible.
    """

    cpus: int = 1
    paravirtual: int = 0
    cache_dir: Path | None = None
    features: frozenset[str] | None = None
    direct: bool = True


class MsrDevice(Protocol):
    """What owns model-specific registers; both may raise ``cpu.faults.GeneralProtection``."""

    def msr_read(self, index: int) -> int:
        """Value of a register."""

    def msr_write(self, index: int, value: int) -> None:
        """Write a register."""


class Services(Protocol):
    """What a vCPU has for a guest that knows that it is one."""

    def begin(self) -> None:
        """The calling thread runs the vCPU from now on."""

    def end(self) -> None:
        """It runs it no more."""

    def helped(self, process: int) -> None:
        """A process of this number runs guest code in turn with the calling thread."""

    def refresh(self) -> None:
        """Bring what the guest may read up to date, before an interrupt is delivered."""

    def hypercall(self, cpl: int, number: int, arguments: Sequence[int], bits: int) -> int:
        """Answer VMCALL or VMMCALL at privilege level ``cpl``: the new RAX.

        ``bits``: width of the registers, 64 or 32.
        """


class VirtualCpu(Protocol):
    """One vCPU's way of running. Only the methods marked so may be called from any thread.

    Attributes
    ----------
    index : int
        Its number, which is its APIC ID; 0 is the boot CPU.
    features : frozenset of str
        CPU features that the guest is offered, by the names in ``cpu.cpuid``.
    """

    index: int
    features: frozenset[str]

    def set_boot_state(self, boot: EntryState | None) -> None:
        """Put the vCPU where a loader enters a kernel; None: where it is after RESET."""

    def attach_msrs(self, indexes: Iterable[int], device: MsrDevice) -> None:
        """Let a device answer for model-specific registers that are not the CPU's own."""

    def attach_services(self, services: Services) -> None:
        """Let an object answer hypercalls; without one, there are none."""

    def run(self) -> StopReason:
        """Run the vCPU in the calling thread until something in `StopReason` happens."""

    def request_stop(self) -> None:
        """Make `run` return STOPPED soon (any thread; remembered if `run` is not active)."""

    def request_pause(self) -> None:
        """Make `run` return PAUSED soon (any thread); a later `run` goes on from there."""

    def signal(self, kind: int, vector: int) -> None:
        """Take a message for the CPU itself (``cpu.signals``; any thread, one at a time)."""

    def forget_pause(self) -> None:
        """Drop a request to pause that `run` has not seen; the vCPU is not running."""

    def kick(self) -> None:
        """End the present HLT, or if there is none the next, without an interrupt (any thread)."""

    def registers(self) -> dict[str, int]:
        """Registers of a vCPU that is not running, by the manual's lower-case names."""

    def set_registers(self, values: dict[str, int]) -> None:
        """Change some registers of a vCPU that is not running."""

    def arm(self, points: DebugPoints) -> None:
        """Stop at these breakpoints and watchpoints from now on; the vCPU is not running.

        UsageError if there are more than the engine can have; the old ones stay then.
        """

    def step(self, wanted: bool) -> None:
        """Whether to stop behind the next instruction; the vCPU is not running.

        External interrupts wait meanwhile; HLT does not.
        """

    def debug_stop(self) -> DebugStop | None:
        """Why `run` returned PAUSED, if it was for a breakpoint, a watchpoint or a step."""

    def vector_state(self) -> bytes:
        """x87, SSE and AVX state as an XSAVE area in standard format (SDM vol. 1, 13.4)."""

    def set_vector_state(self, area: bytes) -> None:
        """Change it; the vCPU is not running."""

    def translate(self, address: int) -> int | None:
        """Guest-physical address of a guest-virtual one; None where nothing is mapped."""

    def save(self) -> dict[str, Any]:
        """State of a vCPU that is not running, as plain data that any engine can restore.

        ``cpu`` (see ``cpu.saved``), and ``interrupt``: a vector that the board has given out and
        the vCPU has not taken yet, or -1. Its time-stamp counter is saved with the machine's time.
        """

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned, in a vCPU that has not run. RAM is there already.

        Raises
        ------
        ImageError
            The state is of another version or shape, or impossible.
        """

    def log_dirty(self, enabled: bool) -> None:
        """Mark the pages that the vCPU writes, in RAM's `dirty` log, or stop it; not running."""

    def fetch_dirty(self) -> None:
        """Bring RAM's `dirty` log up to date; the vCPU is not running.

        Who takes the marks behind this, before any vCPU goes on, misses no write: what is written
        later marks its page anew.
        """

    def stats(self) -> dict[str, Any]:
        """Counters as nested plain data (any thread).

        ``exits`` (reason to count and ns, and ``native``: how many of them were handled without
        leaving guest code), ``interrupts`` (vector to count), ``translation``,
        ``tlb`` and ``time`` (guest, vmm, translation, idle; nanoseconds).
        """

    def set_trace(self, callback: Callable[[TraceRecord], None] | None) -> None:
        """Call ``callback`` with each exit, or with None stop doing so."""

    def crash_dump(self) -> str:
        """Registers and surroundings at a crash: text of several lines."""

    def close(self) -> None:
        """Free what the engine holds; `run` must be over."""
