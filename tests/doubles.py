"""A machine whose guest is a Python generator: to test what is around the engine.

Run as a script, it is the ``ringfence`` command with such a guest: ``doubles.py GUEST ARGUMENT...``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any, TypeAlias

from ringfence.assembly import Devices, Origin, Parts
from ringfence.engine import Engine, StopReason
from ringfence.engine.debug import DebugPoints, DebugStop
from ringfence.engine.exits import ExitCounters, PortOut, Reason, TraceRecord
from ringfence.machine import Machine
from ringfence.memory.ram import GuestMemory

Life: TypeAlias = Generator[None, None, StopReason]
Script: TypeAlias = "Callable[[ScriptedCpu], Life]"


class ScriptedCpu:
    """A vCPU whose guest is a generator; it sees requests at every ``yield``."""

    index = 0

    def __init__(self, script: Script, sink: Callable[[bytes], None]) -> None:
        self.life = script(self)
        self.sink = sink
        self.input = b""
        self.stop = False
        self.pause = False
        self.button = False
        self.closed = False
        self.counters = ExitCounters()
        self.trace: Callable[[TraceRecord], None] | None = None
        self.values = {"rip": 0x1000, "rax": 7}

    def write(self, data: bytes) -> None:
        """What the guest does to write on its console."""
        for byte in data:
            self.counters.add(Reason.PORT_OUT, 500)
            if self.trace:
                self.trace(TraceRecord(PortOut(0x3F8, 1, byte), self.values["rip"], 500))
        self.sink(data)

    def read(self) -> Generator[None, None, bytes]:
        """What the guest does to wait for input."""
        while not self.input:
            time.sleep(0.002)
            yield
        data, self.input = self.input, b""
        return data

    def attach_msrs(self, indexes: Any, device: Any) -> None:
        """The scripted guest touches no MSRs."""

    def attach_services(self, services: Any) -> None:
        """Nor does it make hypercalls."""

    def kick(self) -> None:
        """It never halts."""

    def set_boot_state(self, boot: Any) -> None:
        """Nothing to boot."""

    def run(self) -> StopReason:
        while not self.stop:
            if self.pause:
                self.pause = False
                return StopReason.PAUSED
            try:
                next(self.life)
            except StopIteration as end:
                reason: StopReason = end.value
                return reason
        return StopReason.STOPPED

    def request_stop(self) -> None:
        self.stop = True

    def request_pause(self) -> None:
        self.pause = True

    def signal(self, kind: int, vector: int) -> None:
        """The scripted guest hears nothing."""

    def forget_pause(self) -> None:
        self.pause = False

    def registers(self) -> dict[str, int]:
        return dict(self.values)

    def set_registers(self, values: dict[str, int]) -> None:
        self.values.update(values)

    def arm(self, points: DebugPoints) -> None:
        """The scripted guest has no addresses."""

    def step(self, wanted: bool) -> None:
        """Nor instructions."""

    def debug_stop(self) -> DebugStop | None:
        return None

    def vector_state(self) -> bytes:
        return bytes(832)

    def set_vector_state(self, area: bytes) -> None:
        """Nor vectors."""

    def translate(self, address: int) -> int | None:
        return None

    def stats(self) -> dict[str, Any]:
        return {
            "exits": self.counters.by_reason(),
            "interrupts": {"32": 4},
            "time": {"guest": 3_000_000, "vmm": 1_000_000, "translation": 0, "idle": 0},
        }

    def set_trace(self, callback: Callable[[TraceRecord], None] | None) -> None:
        self.trace = callback

    def crash_dump(self) -> str:
        return "rip=0000000000001000 rax=0000000000000007\ncr2=0000000000000000"

    def close(self) -> None:
        self.closed = True


def hello(guest: ScriptedCpu) -> Life:
    guest.write(b"hello\r\n\x00\xff end")
    yield
    return StopReason.POWER_OFF


def echo(guest: ScriptedCpu) -> Life:
    guest.write(b"ready\n")
    data = b""
    while b"q" not in data:
        data = yield from guest.read()
        guest.write(data)
    return StopReason.POWER_OFF


def hang(guest: ScriptedCpu) -> Life:
    guest.write(b"ready\n")
    while True:
        time.sleep(0.002)
        yield


def obedient(guest: ScriptedCpu) -> Life:
    guest.write(b"ready\n")
    while not guest.button:
        time.sleep(0.002)
        yield
    guest.write(b"bye\n")
    return StopReason.POWER_OFF


def flood(guest: ScriptedCpu) -> Life:
    while True:
        guest.write(b"x" * 1000)
        yield


def large(guest: ScriptedCpu) -> Life:
    for number in range(2000):
        guest.write(b"%08d" % number * 100)
        yield
    return StopReason.POWER_OFF


def crash(guest: ScriptedCpu) -> Life:
    guest.write(b"oh")
    yield
    return StopReason.CRASH


def reset(guest: ScriptedCpu) -> Life:
    guest.write(b"again ")
    yield
    return StopReason.RESET


def boom(guest: ScriptedCpu) -> Life:
    yield
    raise RuntimeError("a bug\nof ours")


GUESTS = {
    each.__name__: each for each in (hello, echo, hang, flood, large, crash, reset, boom, obedient)
}


class ScriptedMachine(Machine):
    """A real machine around a scripted engine and no board to speak of."""

    script: Script = staticmethod(hello)

    def _assemble(self, origin: Origin | None = None) -> Parts:
        engine = ScriptedCpu(type(self).script, self.console.feed)

        def receive(data: bytes) -> None:
            engine.input += data

        idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
        uart = SimpleNamespace(pending_input=lambda: len(engine.input))

        def press_power_button() -> None:
            engine.button = True

        board = SimpleNamespace(
            tsc=SimpleNamespace(read=lambda: 0),
            uart=uart,
            timers=idle,
            receive=receive,
            press_power_button=press_power_button,
            flush=lambda: None,
            close=lambda: None,
        )
        clock = SimpleNamespace(pause=lambda: None, resume=lambda: None)
        memory = GuestMemory(self.config.memory)
        devices = Devices(card=SimpleNamespace(receive=len))
        return Parts(memory, clock, board, Engine([engine], board), None, None, devices)  # type: ignore[arg-type]


def scripted(script: Script, **options: Any) -> ScriptedMachine:
    """A machine that runs ``script``."""
    kind = type("Scripted", (ScriptedMachine,), {"script": staticmethod(script)})
    machine: ScriptedMachine = kind(**{"kernel": b"none", "memory": "1M", **options})
    return machine


if __name__ == "__main__":
    import ringfence.machine
    from ringfence.cli.app import main

    ScriptedMachine.script = staticmethod(GUESTS[sys.argv[1]])
    ringfence.machine.Machine = ScriptedMachine  # type: ignore[misc]
    main(sys.argv[2:])
