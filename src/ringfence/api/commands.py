"""The commands of the control socket: each a function, with its arguments declared.

To add one, write a function that takes a `Call` and returns what is to be answered (plain data),
mark it with `command`, and if it is not in this file, name its module in `MODULES`. It runs in a
thread of its connection's: it may take its time, raise RingfenceErrors, and tell how far it is
with `Call.progress`. Other connections are served meanwhile.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ringfence.errors import UsageError

if TYPE_CHECKING:
    import socket

    from ringfence.machine import Machine

MODULES = tuple(f"ringfence.api.{name}" for name in ("commands", "consoles", "devices", "moving"))
"""Where commands are."""
PATIENCE = 3600.0
"""Seconds that ``wait`` waits at most; who wants more asks again."""


@dataclass(frozen=True, slots=True)
class Call:
    """One command on its way.

    Attributes
    ----------
    machine : Machine
        What it is for.
    about : mapping
        What the process that runs the machine says of it (name, image, …).
    arguments : mapping
        The command's arguments; those left out are absent.
    progress : callable
        Tell the client a stage's name and how much of it is done, 0.0 to 1.0.
    abandoned : callable
        Whether the client has gone away, to be asked now and then by what takes long.
    """

    machine: Machine
    about: Mapping[str, Any]
    arguments: Mapping[str, Any]
    progress: Callable[[str, float], None]
    abandoned: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that turns the connection into a stream of bytes.

    Attributes
    ----------
    result : dict
        What is answered first.
    serve : callable
        Called with the socket; the connection ends when it returns.
    """

    result: dict[str, Any]
    serve: Callable[[socket.socket], None]


Function = Callable[[Call], "dict[str, Any] | Stream"]


@dataclass(frozen=True, slots=True)
class Command:
    """A command's function, and the types of its arguments by name (all are optional)."""

    function: Function
    arguments: Mapping[str, type]

    def run(self, call: Call) -> dict[str, Any] | Stream:
        """Check the arguments, then call the function."""
        for name, value in call.arguments.items():
            wanted = self.arguments.get(name)
            if wanted is None:
                known = ", ".join(self.arguments) or "none"
                raise UsageError(f"argument {name!r} is unknown: expected {known}")
            given = int if wanted is float and type(value) is int else wanted
            if type(value) is not given:
                raise UsageError(f"argument {name!r} is {value!r}: expected a {wanted.__name__}")
        return self.function(call)


_commands: dict[str, Command] = {}


def command(name: str, **arguments: type) -> Callable[[Function], Function]:
    """Mark a function as the command ``name``, which takes ``arguments``."""

    def mark(function: Function) -> Function:
        _commands[name] = Command(function, arguments)
        return function

    return mark


def all_commands() -> Mapping[str, Command]:
    """Every command by name."""
    for module in MODULES:
        importlib.import_module(module)
    return MappingProxyType(_commands)


@command("status")
def status(call: Call) -> dict[str, Any]:
    """Say what the machine is and how it is; never waits for the guest."""
    machine = call.machine
    return {
        **call.about,
        "pid": os.getpid(),
        "state": machine.state.value,
        "outcome": machine.outcome.value if machine.outcome else None,
        "engine": machine.config.engine,
        "memory": machine.config.memory,
        "cpus": machine.config.engine_config.cpus,
        "vsock": str(vsock.absolute()) if (vsock := machine.config.vsock) else None,
        "seconds": machine.seconds,
        "commands": sorted(all_commands()),
    }


@command("stats")
def stats(call: Call) -> dict[str, Any]:
    """Give all counters."""
    return call.machine.stats()


@command("pause")
def pause(call: Call) -> dict[str, Any]:
    """Stop the vCPUs and the guest's time."""
    call.machine.pause()
    return {}


@command("resume")
def resume(call: Call) -> dict[str, Any]:
    """Let a paused guest go on."""
    call.machine.resume()
    return {}


@command("power-button")
def power_button(call: Call) -> dict[str, Any]:
    """Press the power button; what follows is up to the guest."""
    call.machine.press_power_button()
    return {}


@command("stop")
def stop(call: Call) -> dict[str, Any]:
    """End the machine as by pulling the plug."""
    call.machine.stop()
    return {}


@command("wait", timeout=float)
def wait(call: Call) -> dict[str, Any]:
    """Wait until the machine ends, at most ``timeout`` seconds, and say why: null if it has not."""
    left = min(call.arguments.get("timeout", PATIENCE), PATIENCE)
    while left > 0 and not call.abandoned():
        turn = min(left, 1.0)
        if call.machine.ended.wait(turn):
            break
        left -= turn
    outcome = call.machine.outcome
    return {"outcome": outcome.value if outcome else None}
