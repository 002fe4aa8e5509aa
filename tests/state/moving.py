"""A small guest that moves, who receives it, and a line between them that does as it is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ringfence import Machine
from ringfence.errors import RingfenceError
from ringfence.state.receive import Allowed, Receiver
from ringfence.state.wire import MAGIC, Kind, Tls, parse_address


def guest(memory: str = "4M", **options: object) -> Machine:
    """The built-in guest at its prompt."""
    machine = Machine(image="builtin", engine="translate", memory=memory, cache=False, **options)  # type: ignore[arg-type]
    machine.start()
    machine.console.wait_for("> ", 90)
    return machine


def lives(machine: Machine) -> bool:
    """Whether the guest answers."""
    machine.console.send("echo alive\n")
    machine.console.wait_for("alive\r\n", 90)
    machine.console.wait_for("> ", 90)
    return True


def allow(*disks: Path) -> Allowed:
    """What tests allow: one compiled library per process, as in `guest`, and some disks."""
    return Allowed(engine="translate", disks=disks, cache_dir=None)


class Target:
    """Who receives, in a thread: one attempt after the other until a machine has come."""

    def __init__(
        self, address: str, allowed: Allowed | None = None, tls: Tls | None = None
    ) -> None:
        self.receiver = Receiver(parse_address(address), allowed or allow(), Machine.resumed, tls)
        self.address = str(self.receiver.address)
        self.machine: Machine | None = None
        self.failures: list[str] = []
        self.arrived = threading.Event()
        self.failed = threading.Event()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        while self.machine is None:
            try:
                self.machine = self.receiver.receive()
            except RingfenceError as error:
                self.failures.append(str(error))
                self.failed.set()
                if "listen" in str(error):
                    return
        self.arrived.set()

    def take(self) -> Machine:
        """The machine that has come."""
        assert self.arrived.wait(90)
        assert self.machine is not None
        return self.machine

    def close(self) -> None:
        """Stop listening; end the machine, if one has come."""
        if self.machine is not None:
            self.machine.close()
        else:
            with suppress(OSError):  # wakes the thread
                self.receiver._listener.shutdown(socket.SHUT_RDWR)
        self.receiver.close()
        self._thread.join(60)


Change = Callable[[bytes, int], tuple[bytes, bool]]
"""Given bytes and where in the stream they begin: what is carried instead, whether more will be."""


def nothing(data: bytes, at: int) -> tuple[bytes, bool]:
    """The line is good."""
    del at
    return data, True


class Line:
    """A Unix socket that leads to a target, with somebody in between.

    ``forth`` and ``back`` see the bytes of the first connection; later ones are good, unless
    ``once`` is set: then there are none.
    `changes` has a pair for each connection, the first one last.
    """

    def __init__(
        self, folder: Path, target: str, forth: Change = nothing, back: Change = nothing,
        *, once: bool = False,
    ) -> None:  # fmt: skip
        self._target = parse_address(target)
        self.changes = [(forth, back)]
        self._once = once
        self.carried = [0, 0]
        path = folder / f"line{len(list(folder.iterdir()))}"
        self.address = f"tcp://127.0.0.1:{self._listen(path)}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _listen(self, path: Path) -> int:
        path.touch()
        self._listener = socket.create_server(("127.0.0.1", 0))
        return int(self._listener.getsockname()[1])

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._once and not self.changes:
                near.close()
                continue
            near.settimeout(60)
            forth, back = self.changes.pop() if self.changes else (nothing, nothing)
            far = self._target.connect(60)
            # The ways of one connection may end long after the next has begun.
            ended: list[int] = []
            for source, sink, change, way in ((near, far, forth, 0), (far, near, back, 1)):
                threading.Thread(
                    target=self._carry, args=(source, sink, change, way, ended), daemon=True
                ).start()

    def _carry(
        self, source: socket.socket, sink: socket.socket, change: Change, way: int,
        ended: list[int],
    ) -> None:  # fmt: skip
        at = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                changed, goes_on = change(data, at)
                at += len(data)
                self.carried[way] = at
                sink.sendall(changed)
                if not goes_on:
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        ended.append(way)
        if len(ended) == 2:
            source.close()
            sink.close()

    def close(self) -> None:
        """Nobody gets through any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def cut_at(position: int) -> Change:
    """Carry so many bytes, then cut."""

    def change(data: bytes, at: int) -> tuple[bytes, bool]:
        return data[: position - at], at + len(data) < position

    return change


def cut_in(kind: Kind) -> Change:
    """Cut in the middle of the first message of a kind that stands alone, as answers do."""
    start = MAGIC + bytes((kind,))

    def change(data: bytes, at: int) -> tuple[bytes, bool]:
        if data.startswith(start):
            return data[:10], False
        return data, True

    return change


def flip_at(position: int) -> Change:
    """Change one bit of the byte at a position."""

    def change(data: bytes, at: int) -> tuple[bytes, bool]:
        if not at <= position < at + len(data):
            return data, True
        index = position - at
        return data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :], True

    return change
