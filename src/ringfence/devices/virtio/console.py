"""The console device (5.3): several named ports of bytes, the first of which is a console (hvc0).

Each port has a queue either way; two more queues carry control messages, by which driver and device
tell each other of ports. A driver that doesn't know of several ports has the first one only.

Output goes to the port's ``sink`` at once. Input waits, up to `INPUT_LIMIT` bytes a port, until the
guest has opened the port and added buffers; `VirtioConsole.send` says how much it has taken.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ringfence.chipset.state import State
from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain
from ringfence.errors import ImageError
from ringfence.memory.buffers import split

QUEUE_SIZE = 64
INPUT_LIMIT = 64 << 10
MAX_OUTPUT = 1 << 20
"""Bytes of one buffer that are looked at."""
CONTROL_IN, CONTROL_OUT = 2, 3

# Feature bits (5.3.3)
MULTIPORT = 1 << 1

CONFIG = struct.Struct("<HHII")
"""cols, rows, max_nr_ports, emerg_wr (5.3.4)."""
CONTROL = struct.Struct("<IHH")
"""id, event, value (5.3.6.2)."""
DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(
    8
)


@dataclass(slots=True)
class Port:
    """One stream of bytes.

    Attributes
    ----------
    name : str
        Its name in the guest (/dev/virtio-ports/NAME); empty for the console.
    sink : Callable[[bytes], None]
        Takes what the guest writes, with the board's lock held.
    on_open : Callable[[bool], None]
        Hears that the guest's side was opened or closed, with the lock held.
    """

    name: str
    sink: Callable[[bytes], None]
    on_open: Callable[[bool], None] = lambda opened: None
    open: bool = False
    waiting: bytearray = field(default_factory=bytearray)


class VirtioConsole(VirtioDevice):
    """Ports of bytes.

    Parameters
    ----------
    ports : sequence of Port
        The first one is a console.
    """

    TYPE = 3
    CLASS_CODE = 0x078000

    def __init__(self, ports: Sequence[Port]) -> None:
        count = len(ports)
        super().__init__(MULTIPORT, (QUEUE_SIZE,) * (2 * count + 2))
        self.ports = list(ports)
        self._messages: list[bytes] = []
        """Control messages for which the driver has no buffers yet; at most a few per port."""

    def config(self) -> bytes:
        """See `VirtioDevice.config`."""
        return CONFIG.pack(80, 25, len(self.ports), 0)

    def reset(self) -> None:
        """See `VirtioDevice.reset`."""
        self._messages.clear()
        for port in self.ports:
            port.waiting.clear()
            self._set_open(port, False)

    def started(self) -> None:
        """See `VirtioDevice.started`: without control messages the only port is simply open."""
        if not self.transport.features & MULTIPORT:
            self._set_open(self.ports[0], True)

    def send(self, number: int, data: bytes) -> int:
        """Give bytes to a port (any thread); return how many were taken."""
        with self.transport.lock:
            port = self.ports[number]
            taken = data[: INPUT_LIMIT - len(port.waiting)]
            port.waiting += taken
            self._deliver(number)
            return len(taken)

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`."""
        if number == CONTROL_OUT:
            self.drain(number, self._control)
            self._tell()
        elif number == CONTROL_IN:
            self._tell()
        elif number % 2:
            port = self.ports[_port_of(number)]
            self.drain(number, lambda chain: self._output(port, chain))
        else:
            self._deliver(_port_of(number))

    # ---- data

    def _output(self, port: Port, chain: Chain) -> int:
        port.sink(b"".join(split(chain.readable, MAX_OUTPUT)[0]))
        return 0

    def _deliver(self, number: int) -> None:
        """Fill buffers with what waits for a port."""
        port = self.ports[number]
        queue = _queue_of(number)
        ring = self.transport.ring(queue)
        if ring is None or not port.open:
            return
        while port.waiting:
            chain = self.transport.take(queue)
            if chain is None:
                break
            written = chain.write(bytes(port.waiting[: chain.writable_length]))
            del port.waiting[:written]
            ring.push(chain, written)
        self.transport.publish(queue)

    # ---- control messages

    def _control(self, chain: Chain) -> int:
        raw = b"".join(split(chain.readable, CONTROL.size)[0])
        if len(raw) < CONTROL.size:
            return 0
        number, event, value = CONTROL.unpack(raw)
        if event == DEVICE_READY and value == 1:
            self._messages.clear()
            for each in range(len(self.ports)):
                self._say(each, PORT_ADD, 1)
        elif number >= len(self.ports):
            return 0
        elif event == PORT_READY and value == 1:
            self._introduce(number)
        elif event == PORT_OPEN:
            self._set_open(self.ports[number], bool(value))
            self._deliver(number)
        return 0

    def _introduce(self, number: int) -> None:
        """Tell what a port is, once the driver is ready for it."""
        port = self.ports[number]
        if number == 0:
            self._say(number, CONSOLE_PORT, 1)
        if port.name:
            self._say(number, PORT_NAME, 1, port.name.encode())
        self._say(number, PORT_OPEN, 1)

    def _say(self, number: int, event: int, value: int, more: bytes = b"") -> None:
        message = CONTROL.pack(number, event, value) + more
        if message not in self._messages:  # however often the driver asks
            self._messages.append(message)

    def _tell(self) -> None:
        """Send control messages as far as there are buffers."""
        ring = self.transport.ring(CONTROL_IN)
        if ring is None:
            return
        while self._messages:
            chain = self.transport.take(CONTROL_IN)
            if chain is None:
                break
            ring.push(chain, chain.write(self._messages.pop(0)))
        self.transport.publish(CONTROL_IN)

    def _set_open(self, port: Port, opened: bool) -> None:
        if port.open != opened:
            port.open = opened
            port.on_open(opened)

    # ---- state

    def save(self) -> State:
        """See `Saved.save`."""
        return super().save() | {
            "ports": [[port.open, bytes(port.waiting)] for port in self.ports],
            "messages": list(self._messages),
        }

    def restore(self, state: State) -> None:
        """See `Saved.restore`."""
        super().restore(state)
        rows = state.get("ports", [])
        if len(rows) != len(self.ports):
            raise ImageError("saved console has other ports: restore it into one alike")
        for port, (opened, waiting) in zip(self.ports, rows, strict=True):
            port.open, port.waiting = opened, bytearray(waiting)
        self._messages = list(state["messages"])


def _port_of(queue: int) -> int:
    """5.3.2: queues 0 and 1 are port 0's, 2 and 3 for control, 4 and 5 port 1's, and so on."""
    return 0 if queue < CONTROL_IN else queue // 2 - 1


def _queue_of(port: int) -> int:
    """The queue of a port's input."""
    return 0 if port == 0 else 2 * port + 2
