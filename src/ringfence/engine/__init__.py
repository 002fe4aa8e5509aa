"""How the VMM gives the CPUs to the guest and gets them back: the door to all engines.

An engine runs a machine's vCPUs until the machine ends or its owner wants the CPUs back. Which
technique it uses (binary translation, hardware virtualization, trap-and-emulate) is its own matter;
it follows `protocol.VirtualCpu`. `create` finds one by name and imports nothing before it is asked
to, because the engines pull in a compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ringfence.engine.capabilities import KVM, TRANSLATE, Capabilities
from ringfence.engine.group import Engine
from ringfence.engine.protocol import EngineConfig, MsrDevice, Services, StopReason, VirtualCpu
from ringfence.errors import HostError, UsageError

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory

__all__ = [
    "AUTO",
    "Capabilities",
    "Engine",
    "EngineConfig",
    "MsrDevice",
    "Services",
    "StopReason",
    "VirtualCpu",
    "capabilities",
    "create",
    "names",
    "preload",
    "register",
    "resolve",
    "select",
]


Factory = Callable[["GuestMemory", Any, EngineConfig], Sequence[VirtualCpu]]
"""Makes all vCPUs of a machine, in order."""

AUTO = "auto"
_PLANNED = ("trap",)
_factories: dict[str, str | Factory] = {
    "translate": "ringfence.engine.translate.engine:create_vcpus",
    "kvm": "ringfence.engine.kvm.engine:create_vcpus",
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
    from ringfence.engine.kvm.verdict import Kind, hardware, verdict

    if name == AUTO:
        return "kvm" if hardware() else "translate"
    found = verdict()
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
            f"{cpus} vCPUs are not available under engine '{engine}': expected {expected}"
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
                # What goes wrong here goes wrong again in `create`, where somebody is told.
                with contextlib.suppress(Exception):
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
    return Engine(factory(memory, board, config), board)
