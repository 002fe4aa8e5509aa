"""How the VMM gives the CPU to the guest and gets it back: what every engine offers.

An engine runs a vCPU in the thread that calls `Engine.run` until the machine ends or its owner
wants the CPU back. Which technique it uses (binary translation, hardware virtualization,
trap-and-emulate) is its own matter; `create` finds one by name and imports nothing before it is
asked to, because the engines pull in a compiler.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ringfence.engine.capabilities import KVM, TRANSLATE, Capabilities
from ringfence.errors import HostError, UsageError

if TYPE_CHECKING:
    from ringfence.cpu.reset import EntryState
    from ringfence.engine.exits import TraceRecord
    from ringfence.memory.ram import GuestMemory


class StopReason(Enum):
    """Why `Engine.run` returned."""

    POWER_OFF = "power-off"
    RESET = "reset"
    CRASH = "crash"
    STOPPED = "stopped"
    PAUSED = "paused"


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
    """

    cpus: int = 1
    paravirtual: int = 0
    cache_dir: Path | None = None


class MsrDevice(Protocol):
    """What owns model-specific registers; both may raise ``cpu.faults.GeneralProtection``."""

    def msr_read(self, index: int) -> int:
        """Value of a register."""

    def msr_write(self, index: int, value: int) -> None:
        """Write a register."""


class Engine(Protocol):
    """One vCPU's way of running. Only the methods marked so may be called from any thread."""

    def set_boot_state(self, boot: EntryState | None) -> None:
        """Put the vCPU where a loader enters a kernel; None: where it is after RESET."""

    def attach_msrs(self, indexes: Iterable[int], device: MsrDevice) -> None:
        """Let a device answer for model-specific registers that are not the CPU's own."""

    def run(self) -> StopReason:
        """Run the vCPU in the calling thread until something in `StopReason` happens."""

    def request_stop(self) -> None:
        """Make `run` return STOPPED soon (any thread; remembered if `run` is not active)."""

    def request_pause(self) -> None:
        """Make `run` return PAUSED soon (any thread); a later `run` goes on from there."""

    def registers(self) -> dict[str, int]:
        """Registers of a vCPU that is not running, by the manual's lower-case names."""

    def set_registers(self, values: dict[str, int]) -> None:
        """Change some registers of a vCPU that is not running."""

    def read_virtual(self, address: int, length: int) -> bytes:
        """Bytes at a guest-virtual address as the paused vCPU sees them; IndexError if unmapped."""

    def stats(self) -> dict[str, Any]:
        """Counters as nested plain data (any thread).

        ``exits`` (reason to count and ns), ``interrupts`` (vector to count), ``translation``,
        ``tlb`` and ``time`` (guest, vmm, translation, idle; nanoseconds).
        """

    def set_trace(self, callback: Callable[[TraceRecord], None] | None) -> None:
        """Call ``callback`` with each exit, or with None stop doing so."""

    def crash_dump(self) -> str:
        """Registers and surroundings at a crash: text of several lines."""

    def close(self) -> None:
        """Free what the engine holds; `run` must be over."""


Factory = Callable[["GuestMemory", Any, EngineConfig], Engine]

AUTO = "auto"
_PLANNED = ("trap",)
_factories: dict[str, str | Factory] = {
    "translate": "ringfence.engine.translate.engine:TranslateEngine",
    "kvm": "ringfence.engine.kvm.engine:KvmEngine",
}
_capabilities = {"translate": TRANSLATE, "kvm": KVM}


def names() -> tuple[str, ...]:
    """All names that `create` knows, whether or not they are available yet."""
    return (AUTO, *_factories, *_PLANNED)


def register(name: str, factory: Factory, can: Capabilities | None = None) -> None:
    """Offer another engine under ``name``."""
    _factories[name] = factory
    _capabilities[name] = can or Capabilities()


def capabilities(name: str) -> Capabilities:
    """What an engine that `resolve` returned can do; nothing is loaded for the answer."""
    return _capabilities[name]


def resolve(name: str) -> str:
    """The engine that ``name`` stands for.

    ``auto`` is KVM where the host has the hardware for it, and binary translation elsewhere.

    Raises
    ------
    UsageError
        There is no such engine.
    HostError
        KVM was asked for by name, and this host's can't be used.
    """
    if name in _PLANNED:
        raise UsageError(f"engine '{name}' is not available yet: use 'translate' or 'auto'")
    if name != AUTO and name not in _factories:
        raise UsageError(f"unknown engine '{name}': expected one of {', '.join(names())}")
    if name not in (AUTO, "kvm"):
        return name
    from ringfence.engine.kvm.probe import Kind, verdict

    found = verdict()
    if name == AUTO:
        return "kvm" if found.kind is Kind.HARDWARE else "translate"
    if found.kind is Kind.NONE:
        raise HostError(found.detail)
    return name


def select(name: str, cpus: int) -> str:
    """The engine that ``name`` stands for, for a machine with ``cpus`` vCPUs.

    Raises
    ------
    UsageError
        There is no such engine, or it doesn't offer so many vCPUs.
    HostError
        See `resolve`.
    """
    engine = resolve(name)
    most = capabilities(engine).vcpus
    if not 1 <= cpus <= most:
        expected = "1" if most == 1 else f"1 to {most}"
        raise UsageError(
            f"{cpus} vCPUs are not available yet under engine '{engine}': expected {expected}"
        )
    return engine


def preload(name: str, config: EngineConfig) -> threading.Thread:
    """Start loading an engine's code in a thread of its own; join it before `create`."""

    def load() -> None:
        factory = _factories[resolve(name)]
        if isinstance(factory, str):
            module = importlib.import_module(factory.partition(":")[0])
            prepare = getattr(module, "prepare", None)
            if prepare is not None:
                prepare(config)

    thread = threading.Thread(target=load, name=f"preload-{name}", daemon=True)
    thread.start()
    return thread


def create(name: str, memory: GuestMemory, board: Any, config: EngineConfig) -> Engine:
    """Make the engine called ``name`` for one machine."""
    factory = _factories[resolve(name)]
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    made: Engine = factory(memory, board, config)
    return made


def tsc_source(name: str) -> Any:
    """The time-stamp counter that the board's timers and the guest share under this engine."""
    del name  # all engines read the host's
    from ringfence.engine.translate.tsc import host_tsc

    return host_tsc()
