"""What backends with file descriptors share: one thread, one poll, two bounded queues.

``_outgoing`` has frames from the card on their way to the thread; an eventfd wakes the poller, once
for many frames. ``_held`` has frames on their way to the card. A subclass says what to poll, and is
told what is ready; while the card has no room (``_stalled``) it should not ask for input, so that
the kernel's or the peer's own flow control takes over.

**Batches.** Frames are handed to the card at a turn's end, or when a batch is full. As long as each
look at the descriptors brings some, there is another look in the same turn, which doesn't wait: a
socket gives one datagram at a time, and a card that is told of them one by one interrupts its guest
for each.

**Room.** A card that finds ``_outgoing`` full waits (``_awaited``) and is told when half of it is
empty, or when nothing has left for `PATIENCE` seconds. `room` sets the flag *before* it looks at
the queue, the thread looks at the flag *behind* it, so that one of the two sees the other. The card
is told in the thread's turn: what it then transmits is the thread's.

**Whose turn it is.** Whoever works on the subclass's state holds ``_turn``: the thread, but for its
sleep, or a card's thread that ends a small batch (`carry`). The latter only tries to get it: its
board's lock is what the thread may be waiting for, in the middle of its turn, to deliver a frame.
Then the batch is the thread's. What the subclass waits for may have changed by a turn, so the
thread is woken after it all the same; but nobody waits for that.

The eventfd is written with Python's global lock held. Were the lock given away for the call, as
`os.eventfd_write` does, the thread that it wakes would take it and go to work, and the vCPU, which
holds the board's lock, would wait until that thread needs the board's lock itself.

Why frames are queued *before* they are offered: the card may find room, and say `resume`, between
its refusal and our noting it. `resume` sees the frames in the queue and wakes the thread.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from ringfence.errors import HostError
from ringfence.network.backend import (
    BATCH,
    FEW,
    MAXIMUM_FRAME,
    MINIMUM_FRAME,
    SHORT,
    NetworkCard,
)

QUEUE = 1024
"""Frames that there is room for in either direction."""
MOST = 2 * QUEUE
"""Frames of a card's that wait at most, `room` or not; what comes on top is dropped and counted."""
PATIENCE = 0.5
"""Seconds without a frame that leaves, after which they are dropped: Linux takes an e1000 for hung
when it has had a frame for one second."""

_count_up = ctypes.PyDLL(None).eventfd_write
_count_up.argtypes = [ctypes.c_int, ctypes.c_uint64]


class ThreadedBackend:
    """Base of backends; a subclass implements `_interest`, `_handle`, `_send` and `_release`."""

    NAME = "network"
    takes_large = False

    def __init__(self) -> None:
        self._card: NetworkCard | None = None
        self._turn = threading.Lock()
        self._delivering = threading.Lock()
        self._outgoing: deque[bytes] = deque()
        self._left_at = 0.0
        """When one of these has left last, or, if that is later, the first of them came."""
        self._awaited = False
        """Whether the card waits for room."""
        self._held: deque[bytes] = deque()
        self._arrived = 0
        """Frames that were put there so far."""
        self._stalled = False
        """Whether the card has no room: no more input, please."""
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signalled = False
        self._closing = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        self._registered: dict[int, int] = {}
        """Of the poller, by descriptor: what is waited for."""
        self._counters = {
            "sent": 0,
            "sent_bytes": 0,
            "received": 0,
            "received_bytes": 0,
            "dropped_sending": 0,
            "dropped_receiving": 0,
        }

    # ---- what the card and the machine call

    def attach(self, card: NetworkCard) -> None:
        """See `NetworkBackend.attach`."""
        with self._delivering:
            self._card = card
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(
                target=self._run, name=f"ringfence-{self.NAME}", daemon=True
            )
            self._thread.start()
        self._notify()

    def detach(self) -> None:
        """See `NetworkBackend.detach`."""
        with self._delivering:
            self._card = None

    def resume(self) -> None:
        """See `NetworkBackend.resume`."""
        if self._held:
            self._notify()

    def bring_large(self, wanted: bool) -> None:
        """See `NetworkBackend.bring_large`; what comes from a wire is not larger."""

    def room(self) -> int:
        """See `NetworkBackend.room`."""
        outgoing = self._outgoing
        if len(outgoing) < QUEUE:
            return QUEUE - len(outgoing)
        if self._patience <= 0:
            return QUEUE
        self._awaited = True
        self._notify()
        return max(QUEUE - len(outgoing), 0)

    def transmit(self, frame: bytes) -> None:
        """See `NetworkBackend.transmit`."""
        counters, outgoing = self._counters, self._outgoing
        if len(outgoing) >= MOST or not MINIMUM_FRAME <= len(frame) <= MAXIMUM_FRAME:
            counters["dropped_sending"] += 1
            return
        counters["sent"] += 1
        counters["sent_bytes"] += len(frame)
        if not outgoing:
            self._left_at = time.monotonic()
        outgoing.append(frame)

    def carry(self) -> None:
        """See `NetworkBackend.carry`."""
        outgoing = self._outgoing
        if not outgoing:
            return
        short = len(outgoing) <= FEW and sum(map(len, tuple(outgoing))) <= SHORT
        if short and self._thread is not None and self._turn.acquire(blocking=False):
            try:
                if not self._closing:
                    self._send_outgoing()
                    self._offer()
            finally:
                self._turn.release()
        self._notify()

    def stats(self) -> dict[str, int]:
        """See `NetworkBackend.stats`."""
        return dict(self._counters)

    def close(self) -> None:
        """See `NetworkBackend.close`."""
        if self._closed:
            return
        self._closing = True
        self.detach()
        if self._thread is not None:
            self._signalled = False
            self._notify()
            self._thread.join()
        self._closed = True
        self._release()
        os.close(self._wake)

    def _call(self, job: Callable[[], None]) -> None:
        """Have something done in the thread, or here while there is none; its errors are ours."""
        if self._thread is None:
            job()
            return
        done, failed = threading.Event(), list[Exception]()

        def do() -> None:
            try:
                job()
            except Exception as error:
                failed.append(error)
            done.set()

        self._jobs.append(do)
        self._notify()
        while not done.wait(0.1):
            if not self._thread.is_alive():
                raise HostError("the network was closed meanwhile")
        if failed:
            raise failed[0]

    # ---- what a subclass implements; called by whose turn it is

    def _interest(self) -> tuple[list[tuple[int, int]], float | None]:
        """Return (descriptor, poll(2) events) to wait for, and seconds at most (None: forever)."""
        raise NotImplementedError

    def _handle(self, ready: dict[int, int]) -> None:
        """Deal with what poll reported, as events by descriptor; may be empty."""
        raise NotImplementedError

    def _send(self, frame: bytes) -> None:
        """Carry a frame of the card's away."""
        raise NotImplementedError

    def _release(self) -> None:
        """Give back descriptors and the like; the thread has ended."""
        raise NotImplementedError

    @property
    def _jammed(self) -> bool:
        """True while frames of the card's had better wait in the queue."""
        return False

    # ---- what a subclass calls, in its turn

    def _deliver(self, frame: bytes) -> None:
        """Have a frame handed to the card, or drop it."""
        held = self._held
        if len(held) >= QUEUE or not MINIMUM_FRAME <= len(frame) <= MAXIMUM_FRAME:
            self._counters["dropped_receiving"] += 1
            return
        held.append(frame)
        self._arrived += 1
        if len(held) >= BATCH and not self._stalled:
            self._offer()

    def _offer(self) -> None:
        """Hand frames to the card as long as it takes them."""
        held, counters = self._held, self._counters
        with self._delivering:
            card = self._card
            while card is not None and held:
                batch = list(islice(held, BATCH))
                taken = card.receive(batch)
                for _ in range(taken):
                    counters["received_bytes"] += len(held.popleft())
                counters["received"] += taken
                if taken < len(batch):
                    break
            self._stalled = bool(held)

    # ---- the thread

    def _notify(self) -> None:
        if not self._signalled and not self._closed:
            self._signalled = True
            _count_up(self._wake, 1)

    def _run(self) -> None:
        while True:
            ready = self._sleep()
            with self._turn:
                while self._jobs:
                    self._jobs.popleft()()
                if self._closing:
                    return
                self._take_turn(ready)
                self._tell_of_room()

    def _take_turn(self, ready: dict[int, int]) -> None:
        """Deal with what is ready, and with what comes meanwhile."""
        self._offer()
        enough = self._arrived + BATCH
        while True:
            before = self._arrived
            self._handle(ready)
            self._send_outgoing()
            if self._arrived == before or self._arrived >= enough or self._stalled:
                break
            self._watch()
            ready = dict(self._poller.poll(0))
            ready.pop(self._wake, None)  # left for the next sleep: there is more to do then
            if not ready:
                break
        self._offer()

    def _send_outgoing(self) -> None:
        outgoing = self._outgoing
        for _ in range(len(outgoing)):
            if self._jammed:
                break
            self._send(outgoing.popleft())
            self._left_at = time.monotonic()

    @property
    def _patience(self) -> float:
        """Seconds for which the card waits, if nothing leaves."""
        return self._left_at + PATIENCE - time.monotonic()

    def _tell_of_room(self) -> None:
        if self._awaited and (len(self._outgoing) <= QUEUE // 2 or self._patience <= 0):
            with self._delivering:
                if self._card is not None:
                    self._awaited = False
                    self._card.more()

    def _sleep(self) -> dict[int, int]:
        with self._turn:
            timeout = self._watch()
        if self._awaited and self._card is not None:
            patience = max(self._patience, 0.0)
            timeout = patience if timeout is None else min(timeout, patience)
        ready = dict(self._poller.poll(None if timeout is None else timeout * 1000))
        if ready.pop(self._wake, 0):
            # First the counter, then the flag, then (our caller) the queue. A frame that finds the
            # flag still up is in the queue before we look there; one that finds it down counts up
            # the counter, which is not read again before the next sleep.
            os.eventfd_read(self._wake)
            self._signalled = False
        return ready

    def _watch(self) -> float | None:
        """Have the poller wait for what the subclass does; seconds to wait at most."""
        listed, timeout = self._interest()
        wanted = dict(listed)
        if wanted != self._registered:
            for descriptor in self._registered.keys() - wanted.keys():
                self._poller.unregister(descriptor)
            for descriptor, events in wanted.items():
                self._poller.register(descriptor, events)
            self._registered = wanted
        return timeout
