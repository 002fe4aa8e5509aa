"""Transfers of a disk that go on beside the guest, in threads that need no Python meanwhile.

A *lane* is a ring of slots between whoever serves a queue and its workers. Who has the board's lock
fills a slot with all that a transfer needs and goes on (`hand_over`); a worker, native code in a
thread of the pool, does it by one system call (`work`); whoever has the lock next gives back what
is done (`bring_back`). A slot is a copy: nothing of a queue is looked at or touched by a worker, so
a driver may reset the device meanwhile; the device stays busy until all slots are empty again.

A slot's state goes from empty to waiting (by who has the lock), to done or failed (by the worker
that took it), to empty (by who has the lock). Workers take slots in order, by compare-and-exchange
on ``taken``. One that has finished calls a vCPU out of guest code, which gives back what is done;
if none runs, it leaves for Python to have that done, unless another worker is on its way there
already (``told``). One that finds nothing sleeps on the futex ``put``, whose low half changes with
each slot that is filled; who fills one looks for sleepers afterwards, and who sleeps has said so
before, so nobody is forgotten. One that has slept for long leaves, says so, and looks once more:
who hands over something and sees no worker has one sent.

A lane is *brisk* while its transfers take as long as copying does. Then one worker is enough, it
tells of some transfers at once, and the driver need not notify the device of further requests: they
are found when those under way are given back, or when a vCPU sleeps. Before one does, it waits for
what will end in a moment (`await_done`). A driver that asks for one at a time gains nothing by a
worker: its requests are *lonely*, and done by who takes them. Where transfers wait for the host's
disk, each has a worker, up to `CROWD` of them, is told of at once, and every request is taken when
the driver notifies. A worker that is never out of work makes room for other jobs now and then.
"""

from __future__ import annotations

import ctypes
import time
from typing import Annotated, cast

from ringfence.devices.virtio.layouts import give
from ringfence.devices.virtio.queue import RUNS, Queue
from ringfence.devices.virtio.rules import MAX_CHAIN
from ringfence.memory.summons import Door, is_awake, summon
from ringfence.native.dialect import (
    address_of,
    atomic_and64,
    atomic_cas64,
    atomic_or64,
    load8,
    load64,
    native,
    native_inline,
    rep_movsb,
    store8,
)
from ringfence.native.hostcall import host_call
from ringfence.native.layout import Array, Struct, u64

SLOTS = 32
"""Transfers that may be under way in one queue: a power of two."""
PARTS = 256
"""Buffers of a request that may have a slot."""
BRISK = 200_000
"""Nanoseconds that a transfer takes at most in a brisk lane."""
LINGER = 50_000
"""Nanoseconds that one may be done there before a vCPU that is awake is called for it."""
LONELY = 2
"""Requests in a row that had no company while they were under way, before the next ones are done
by the thread that asks, if they can be; one in `PROBE` is left to a worker to see."""
PROBE = 31
"""Odd, so that it doesn't meet the same one of two each time."""
CROWD = 4
"""Workers that a lane may have."""
LONGEST_TURN = 10_000_000
"""Nanoseconds that a worker goes on at most before others may have its thread."""
PATIENCE = 1_000_000
"""Nanoseconds that a worker sleeps before it leaves, so that others may have its thread."""
NOTHING, FAILED, FULL = 0, 1, 2
"""Why `bring_back` ends: all is given back that was done; a chain is for Python, as if just taken;
runs have to be told before it goes on."""
LEFT, TOLD, CROWDED, TURN = 0, 1, 2, 3
"""Why `work` ends: nothing came for a while; something is done that nobody else will bring back;
another worker, which is counted, should help; other jobs should have a turn. The lane counts the
worker until it has `LEFT`."""

_EMPTY, _WAITING, _DONE, _FAILED = 0, 1, 2, 4
"""Bits of a slot's state; done and failed ones keep the first."""
_STATUS_OK = 0
_FUTEX, _WAIT, _WAKE = 202, 128, 129
"""System call of x86-64 Linux; FUTEX_WAIT and FUTEX_WAKE within a process (futex(2))."""
_CLOCK_GETTIME, _MONOTONIC = 228, 1
_PRCTL, _TIMER_SLACK = 157, 29
_SCHED_YIELD = 24
"""System calls, with CLOCK_MONOTONIC and PR_SET_TIMERSLACK."""
_LOW = 0xFFFFFFFF


class Lane(Struct):
    """What a queue and its workers share."""

    put: Annotated[int, u64]
    """Slots filled so far."""
    taken: Annotated[int, u64]
    """Slots that workers have taken so far."""
    told: Annotated[int, u64]
    """Whether somebody is on the way to bring back what is done."""
    sleepers: Annotated[int, u64]
    workers: Annotated[int, u64]
    """Workers that sleep, and all of them."""
    summons: Annotated[int, u64]
    """Where `memory.summons.summon` finds a vCPU to give back what is done."""
    returned: Annotated[int, u64]
    """Slots emptied since Python last looked."""
    took: Annotated[int, u64]
    """Nanoseconds that the last transfers took; a long one is forgotten over the next ones."""
    began: Annotated[int, u64]
    """When one began that has not ended, or 0."""
    last: Annotated[int, u64]
    """When the last one ended."""
    time: Annotated[Array, u64, 2]
    """A clock for who has the lock (struct timespec)."""
    under_way: Annotated[int, u64]
    """Slots that are not empty."""
    alone: Annotated[int, u64]
    """Requests in a row that had no company."""
    probe: Annotated[int, u64]
    """Lonely requests so far."""
    untold: Annotated[int, u64]
    """Whether something is done since somebody came to bring it back."""
    linger: Annotated[Array, u64, 2]
    patience: Annotated[Array, u64, 2]
    """`LINGER` and `PATIENCE` (struct timespec)."""
    slots: Annotated[int, u64]
    """Host address of the slots."""
    states: Annotated[Array, u64, SLOTS]


class Slot(Struct):
    """A transfer, and the chain that asks for it (see `queue.Queue`)."""

    call: Annotated[int, u64]
    """The system call: number, descriptor, struct iovec and how many, offset."""
    fd: Annotated[int, u64]
    vector: Annotated[int, u64]
    vectors: Annotated[int, u64]
    offset: Annotated[int, u64]
    time: Annotated[Array, u64, 2]
    """What the worker's clock says (struct timespec)."""
    length: Annotated[int, u64]
    """Bytes that have to be moved."""
    written: Annotated[int, u64]
    """Bytes that the device will have written to the chain."""
    identifier: Annotated[int, u64]
    count: Annotated[int, u64]
    readable: Annotated[int, u64]
    parts_used: Annotated[int, u64]
    parts: Annotated[Array, u64, 2 * PARTS]


_SLOT = Slot.size


@native_inline
def slot_at(lane: Lane, number: int) -> int:
    """Host address of a slot."""
    return lane.slots + (number & (SLOTS - 1)) * _SLOT


@native_inline
def seen(place: int) -> int:
    """A number that other threads change, after all that was stored before."""
    return atomic_or64(place, 0)


@native
def count_on(place: int, by: int) -> int:
    """Add to a number that other threads change."""
    while 1:
        now = load64(place)
        if atomic_cas64(place, now, now + by):
            return now
    return 0


@native
def hand_over(
    lane: Lane, queue: Queue, call: int, fd: int, first: int, end: int, offset: int, length: int
) -> int:
    """Leave the transfer of some parts of the chain taken last, which have ``length`` bytes, to a
    worker; 0 without room.
    """
    number = lane.put & (SLOTS - 1)
    if lane.states[number] != _EMPTY or queue.parts_used > PARTS:
        return 0
    slot: Slot = cast(Slot, slot_at(lane, number))
    slot.call = call
    slot.fd = fd
    slot.vector = address_of(slot.parts[2 * first])
    slot.vectors = end - first
    slot.offset = offset
    slot.length = length
    slot.written = 1 if first < queue.readable else length + 1
    slot.identifier = queue.identifier
    slot.count = queue.count
    slot.readable = queue.readable
    slot.parts_used = queue.parts_used
    rep_movsb(address_of(slot.parts[0]), address_of(queue.parts[0]), 16 * queue.parts_used)
    if lane.under_way:
        lane.alone = 0
    lane.under_way += 1
    lane.states[number] = _WAITING
    count_on(address_of(lane.put), 1)
    if seen(address_of(lane.sleepers)):
        host_call(_FUTEX, address_of(lane.put), _WAKE, 1, 0, 0, 0)
    return 1


@native
def clock(time: int) -> int:
    """Nanoseconds of CLOCK_MONOTONIC, by way of a struct timespec (clock_gettime(2))."""
    host_call(_CLOCK_GETTIME, _MONOTONIC, time, 0, 0, 0, 0)
    return load64(time) * 1_000_000_000 + load64(time + 8)


@native
def is_lonely(lane: Lane) -> int:
    """Whether a worker would do no request while the guest prepares the next."""
    if lane.under_way or lane.alone < LONELY:
        return 0
    lane.probe += 1
    return 1 if lane.probe % PROBE else 0


@native
def is_brisk(lane: Lane) -> int:
    """Whether transfers are under way that will soon have been brought back."""
    if lane.under_way == 0 or lane.took > BRISK:
        return 0
    began = seen(address_of(lane.began))
    return 1 if began == 0 or clock(address_of(lane.time[0])) - began < BRISK else 0


@native
def await_done(lane: Lane, door: Door) -> int:
    """Wait for a transfer that will end about now, until the vCPU of that door is called; whether
    something is done.
    """
    until = 0
    while seen(address_of(lane.untold)) == 0:
        if lane.under_way == 0 or lane.took > BRISK or load8(door.attention):
            return 0
        now = clock(address_of(door.time[0]))
        if until == 0:
            until = now + lane.took + LINGER
        if now > until:
            return 0
        host_call(_SCHED_YIELD, 0, 0, 0, 0, 0, 0)
    return 1


@native
def lacks_worker(lane: Lane) -> int:
    """Whether a worker is to be sent; it counts as one from now on."""
    workers = seen(address_of(lane.workers))
    if workers:
        waiting = seen(address_of(lane.put)) - seen(address_of(lane.taken))
        if workers >= CROWD or waiting <= seen(address_of(lane.sleepers)) or is_brisk(lane):
            return 0
    count_on(address_of(lane.workers), 1)
    return 1


@native
def transfer(slot: Slot) -> int:
    """Do it, and set the request's status; the slot's new state."""
    done = host_call(slot.call, slot.fd, slot.vector, slot.vectors, slot.offset, 0, 0)
    if done != slot.length:
        return _FAILED
    store8(slot.parts[2 * slot.parts_used - 2], _STATUS_OK)
    return _DONE


@native
def tell(lane: Lane) -> int:
    """Have somebody bring back what is done; whether that is the worker's own affair."""
    if summon(lane.summons):
        return 0
    return 1 if atomic_or64(address_of(lane.told), 1) == 0 else 0


@native
def note_time(lane: Lane, took: int) -> int:
    """Hear how long a transfer took."""
    faded = lane.took - lane.took // 4
    lane.took = took if took > faded else faded
    return 0


@native_inline
def may_linger(lane: Lane) -> int:
    """Whether the driver loses nothing if what is done is told of a little later."""
    return 1 if lane.took <= BRISK and is_awake(lane.summons) else 0


@native
def nap(lane: Lane, taken: int, patience: int) -> int:
    """Sleep until a slot is filled, or for as long as a struct timespec says."""
    count_on(address_of(lane.sleepers), 1)
    host_call(_FUTEX, address_of(lane.put), _WAIT, taken & _LOW, patience, 0, 0)
    count_on(address_of(lane.sleepers), 0xFFFFFFFFFFFFFFFF)
    return 0


@native
def work(lane: Lane, until: int) -> int:
    """Do what waits in a lane, a worker's life; its turn ends ``until`` (CLOCK_MONOTONIC)."""
    host_call(_PRCTL, _TIMER_SLACK, 1, 0, 0, 0, 0)
    since = 0
    lingered = 0
    while 1:
        taken = seen(address_of(lane.taken))
        waits = 1 if taken != seen(address_of(lane.put)) else 0
        if since and seen(address_of(lane.untold)) == 0:
            since = 0
        elif since and waits == 0 and lingered == 0 and may_linger(lane):
            lingered = 1
            nap(lane, taken, address_of(lane.linger[0]))
        elif since and (waits == 0 or lane.took > BRISK or lane.last - since > LINGER):
            since = 0
            lingered = 0
            if tell(lane):
                return TOLD
            if waits and lacks_worker(lane):
                return CROWDED
        elif since == 0 and lane.last > until:
            return TURN
        elif waits:
            if atomic_cas64(address_of(lane.taken), taken, taken + 1):
                slot: Slot = cast(Slot, slot_at(lane, taken))
                began = clock(address_of(slot.time[0]))
                lane.began = began
                state = transfer(slot)
                ended = clock(address_of(slot.time[0]))
                lane.began = 0
                note_time(lane, ended - began)
                atomic_or64(address_of(lane.states[taken & (SLOTS - 1)]), state)
                atomic_or64(address_of(lane.untold), 1)
                lane.last = ended
                if since == 0:
                    since = ended
                    lingered = 0
        else:
            nap(lane, taken, address_of(lane.patience[0]))
            if seen(address_of(lane.put)) == taken:
                count_on(address_of(lane.workers), 0xFFFFFFFFFFFFFFFF)
                if seen(address_of(lane.put)) == seen(address_of(lane.taken)):
                    return LEFT
                count_on(address_of(lane.workers), 1)
    return LEFT


@native
def bring_back(lane: Lane, queue: Queue, alive: int) -> int:
    """Give back the chains of all slots that are done; drop them where the queue is gone."""
    atomic_and64(address_of(lane.told), 0)
    atomic_and64(address_of(lane.untold), 0)
    for number in range(SLOTS):
        state = seen(address_of(lane.states[number]))
        if state > _WAITING:
            if alive and queue.runs_used > RUNS - MAX_CHAIN:
                return FULL
            lane.states[number] = _EMPTY
            lane.under_way -= 1
            lane.returned += 1
            if lane.under_way == 0:
                lane.alone += 1
            if alive:
                slot: Slot = cast(Slot, slot_at(lane, number))
                note_runs(queue, slot)
                if state & _FAILED:
                    reopen(queue, slot)
                    return FAILED
                give(queue, slot.identifier, slot.count, slot.written)
                if slot.written == 1:  # of the writable parts only the status was
                    last = queue.runs_used + slot.parts_used - slot.readable - 1
                    queue.runs[2 * queue.runs_used] = queue.runs[2 * last]
                    queue.runs[2 * queue.runs_used + 1] = 1
                    queue.runs_used += 1
                else:
                    queue.runs_used += slot.parts_used - slot.readable
    return NOTHING


@native
def note_runs(queue: Queue, slot: Slot) -> int:
    """Put the writable parts of a slot's chain behind the queue's runs."""
    for part in range(slot.readable, slot.parts_used):
        run = queue.runs_used + part - slot.readable
        queue.runs[2 * run] = slot.parts[2 * part] - queue.ram_host
        queue.runs[2 * run + 1] = slot.parts[2 * part + 1]
    return 0


@native
def reopen(queue: Queue, slot: Slot) -> int:
    """Make a slot's chain the one that was taken last."""
    queue.identifier = slot.identifier
    queue.count = slot.count
    queue.readable = slot.readable
    queue.parts_used = slot.parts_used
    rep_movsb(address_of(queue.parts[0]), address_of(slot.parts[0]), 16 * slot.parts_used)
    return 0


class Beside:
    """A queue's lane, for as long as somebody refers to it.

    Attributes
    ----------
    at : int
        Host address of the `Lane`.
    lane : Any
        A view of it.
    unasked : bool
        Whether the driver was not asked for notifications, as the queue will be looked at anyway
        when what is under way is given back.
    """

    def __init__(self, summons: int) -> None:
        self._place = ctypes.create_string_buffer(Lane.size + SLOTS * _SLOT)
        self.at = ctypes.addressof(self._place)
        self.lane = Lane.at(self.at)
        self.lane.slots = self.at + Lane.size
        self.lane.patience[1] = PATIENCE
        self.lane.linger[1] = LINGER
        self.lane.summons = summons
        self.unasked = False

    def close(self) -> None:
        """Wait until no worker is in the lane; nothing is handed over any more."""
        while self.lane.workers:
            time.sleep(PATIENCE / 1e9)

    def take_returned(self) -> int:
        """How many slots were emptied since the last call."""
        returned = int(self.lane.returned)
        self.lane.returned = 0
        return returned
