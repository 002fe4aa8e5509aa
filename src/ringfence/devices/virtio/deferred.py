"""Devices whose chains are worked on by threads that may block, and how the chains come back.

A worker that has finished appends its chain to a list, waits for the board's lock and gives back
all chains that are on that list by then: whoever has the lock does it for all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain, Ring


class Job(Protocol):
    """Something to do."""

    def __call__(self) -> None:
        """Do it."""


class Workers(Protocol):
    """Threads that may block; see ``storage.pool.IoPool``."""

    def submit(self, job: Job) -> None:
        """Do something soon."""


class DeferringDevice(VirtioDevice):
    """Base of such devices.

    Parameters
    ----------
    features, queue_sizes
        See `VirtioDevice`.
    workers : Workers
        Who waits for the host.
    """

    def __init__(self, features: int, queue_sizes: tuple[int, ...], workers: Workers) -> None:
        super().__init__(features, queue_sizes)
        self._workers = workers
        self._done: deque[tuple[int, Ring, Chain, int]] = deque()
        self._settled: threading.Event | None = None
        """Set when nothing is under way any more, if somebody waits for that."""

    def defer(self, number: int, ring: Ring, chain: Chain, perform: Callable[[Chain], int]) -> None:
        """Have a worker do what a chain asks for; the lock is held.

        ``perform`` returns how many bytes it has written, and raises nothing.
        """

        def work() -> None:
            written = perform(chain)
            self._done.append((number, ring, chain, written))
            self._give_back()

        self.begun(1)
        self._workers.submit(work)

    def begun(self, chains: int) -> None:
        """Count chains that are under way from now on; the lock is held."""
        self.busy += chains

    def ended(self, chains: int) -> None:
        """Count chains that are under way no longer; the lock is held."""
        self.busy -= chains
        if chains and not self.busy:
            self.transport.finished()
            if self._settled is not None:
                self._settled.set()
                self._settled = None

    def quiesce(self) -> None:
        """See `VirtioDevice.quiesce`."""
        with self.transport.lock:
            if not self.busy:
                return
            settled = self._settled = self._settled or threading.Event()
        settled.wait()

    def _give_back(self) -> None:
        """Return finished chains to the driver."""
        with self.transport.lock:
            numbers = set()
            chains = 0
            while self._done:
                number, ring, chain, written = self._done.popleft()
                chains += 1
                if self.transport.ring(number) is ring:
                    ring.push(chain, written)
                    numbers.add(number)
            for number in numbers:
                self.transport.publish(number)
            self.ended(chains)
