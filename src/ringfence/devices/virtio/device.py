"""What virtio devices of all types share.

A device type knows its feature bits, its queues, its configuration structure and what to do with a
chain. How the driver reaches it is the transport's matter: `Transport` is all that a device sees of
it. Everything runs with the board's lock held; what may take long is done by threads of the
device's backend, which take ``transport.lock`` to give chains back.

**Bounded work.** `VirtioDevice.drain` takes as many chains per notification as the queue is long;
if there are more, it lets others have the lock and goes on from the timers' thread.

**Reset with work in flight.** A chain that a backend still works on belongs to guest memory until
the backend is done. So a device counts such chains in ``busy``, and the transport does not call
itself reset before that is zero (4.1.4.3.1 has the driver wait for it).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

from ringfence.chipset.state import Saved
from ringfence.devices.natives import Natives
from ringfence.devices.virtio.queue import Queue
from ringfence.devices.virtio.ring import Chain, Ring
from ringfence.memory.ram import GuestMemory
from ringfence.memory.summons import Summons

VERSION_1 = 1 << 32


class Transport(Protocol):
    """What carries a device: how it reaches its driver."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """The board's lock."""

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""

    @property
    def natives(self) -> Natives:
        """Where native code is found."""

    @property
    def summons(self) -> Summons:
        """How native code calls a vCPU out of guest code."""

    @property
    def features(self) -> int:
        """What the driver has accepted."""

    def ring(self, number: int) -> Ring | None:
        """A queue that is enabled and may be worked on, or None."""

    def take(self, number: int) -> Chain | None:
        """Take the next chain of a queue, outside of a notification; None where there is none."""

    def publish(self, number: int) -> None:
        """Publish what was pushed to a queue; interrupt the driver if it wants that."""

    def broken(self) -> None:
        """Hear that a queue can't be worked on: the driver is asked for a reset."""

    def config_changed(self) -> None:
        """Tell the driver that the configuration structure has changed."""

    def finished(self) -> None:
        """Hear that ``busy`` has become zero."""

    def polls(self, number: int, found: int, size: int) -> bool:
        """Hear what a look into a queue has found; return whether to ask for no kicks.

        ``found`` is the number of chains, ``size`` the bytes of the first one's buffers. True:
        `VirtioDevice.notified` will be called without a kick.
        """

    def look(self, number: int) -> None:
        """Have `VirtioDevice.notified` called if the queue may be worked on."""

    def again(self, number: int) -> None:
        """Have `VirtioDevice.notified` called once more, after others had their turn."""


class VirtioDevice(Saved):
    """Base of all device types.

    Attributes
    ----------
    TYPE : int
        The device's number (5).
    CLASS_CODE : int
        What it is on a PCI bus.
    QUEUE : type[Queue]
        What its queues are to native code.
    FEW : int
        Chains that may come together without being worth a wait; see `devices.gathering`.
    features : int
        Feature bits of the type that are offered.
    queue_sizes : tuple[int, ...]
        The largest size of each queue.
    busy : int
        Chains that a backend works on.
    """

    TYPE: ClassVar[int]
    CLASS_CODE: ClassVar[int]
    QUEUE: ClassVar[type[Queue]] = Queue
    FEW: ClassVar[int] = 1

    def __init__(self, features: int, queue_sizes: tuple[int, ...]) -> None:
        self.features = features
        self.queue_sizes = queue_sizes
        self.busy = 0
        self.transport: Transport

    def attach(self, transport: Transport) -> None:
        """Meet the transport, once."""
        self.transport = transport

    # ---- what the transport calls

    def config(self) -> bytes:
        """Return the device configuration structure."""
        return b""

    def config_write(self, offset: int, data: bytes) -> None:
        """Take a write to the configuration structure."""

    def started(self) -> None:
        """Hear that the driver is ready (DRIVER_OK); queues may be used from now on."""

    def notified(self, number: int) -> None:
        """Hear that there may be chains in an enabled queue; RingError for a broken one."""

    def gathers(self, number: int) -> bool:
        """Tell whether notifications of a queue may be put off until there are more chains."""
        del number
        return False

    def reset(self) -> None:
        """Forget the driver; chains in flight are waited for by the transport."""

    def quiesce(self) -> None:
        """Wait until ``busy`` is zero, without the lock; the vCPUs stand still."""

    def close(self) -> None:
        """Let go of the backend, after `quiesce`."""

    # ---- what device types use

    def drain(self, number: int, handle: Callable[[Chain], int | None]) -> None:
        """Hand a queue's chains to ``handle`` and give them back.

        ``handle`` returns how many bytes it has written, or None to keep the chain and push it
        later.
        """
        ring = self.transport.ring(number)
        if ring is None:
            return
        ring.want_kicks(False)
        found = size = 0
        try:
            for _ in range(ring.size + 1):
                chain = ring.pop()
                if chain is None:
                    if self.transport.polls(number, found, size) or not ring.want_kicks(True):
                        return
                    continue
                if not found:
                    size = chain.readable_length + chain.writable_length
                found += 1
                written = handle(chain)
                if written is not None:
                    ring.push(chain, written)
            self.transport.again(number)
        finally:
            self.transport.publish(number)
