"""How native code of devices calls a vCPU out of guest code, without Python and its lock.

A thread that finishes something beside the guest needs somebody who gives it to the driver, and a
vCPU that runs is the cheapest: it leaves guest code at the next trace, has the devices bring back
what is done (`Summons.collect`), and takes the interrupt in the same visit. Where no vCPU runs, or
its engine has no door, `summon` says so, and the thread goes through Python by itself.

A vCPU says that it is INSIDE, then runs guest code; that it is ABOUT, when it deals with what
ended that; that it is ASLEEP, and has the devices asked once before it sleeps. Who has finished
says so in its own memory *first* and looks where the vCPUs are *then*, both with full barriers. So
either it finds nobody awake, or the vCPU that it finds will ask before it sleeps; a late request
costs no more than a visit for nothing.

Before it sleeps, a vCPU that finds something about to end waits for that (`Summons.await_done`): to
be put to sleep and woken would take longer. It is ABOUT meanwhile.
"""

from __future__ import annotations

import ctypes
from typing import Annotated, Protocol, cast

from ringfence.native.dialect import address_of, atomic_or64, load64, native, store8
from ringfence.native.hostcall import host_call
from ringfence.native.layout import Array, Struct, u64

ASLEEP, ABOUT, INSIDE = 0, 1, 2
"""Where a vCPU is; one that isn't run counts as asleep."""
_KILL, _SIGURG = 62, 23
"""System call of x86-64 Linux, and the signal that ends what a process runs directly."""


class Door(Struct):
    """A vCPU, seen from outside."""

    following: Annotated[int, u64]
    """Host address of the next vCPU's, or 0."""
    place: Annotated[int, u64]
    """Where it is."""
    request: Annotated[int, u64]
    attention: Annotated[int, u64]
    """Host addresses of the bytes to set, in this order."""
    running: Annotated[int, u64]
    """Host address of the number of the process that runs its user code; 0 there: none does."""
    time: Annotated[Array, u64, 2]
    """A clock for its thread (struct timespec)."""


@native
def summon(first: int) -> int:
    """Have a vCPU leave guest code; 0 where none is inside. ``first``: host address of a door's."""
    at = load64(first)
    while at:
        door: Door = cast(Door, at)
        if atomic_or64(address_of(door.place), 0) == INSIDE:
            store8(door.request, 1)
            atomic_or64(address_of(door.place), 0)
            store8(door.attention, 1)
            process = atomic_or64(door.running, 0)
            if process:
                host_call(_KILL, process, _SIGURG, 0, 0, 0, 0)
            return 1
        at = door.following
    return 0


@native
def is_awake(first: int) -> int:
    """Whether a vCPU will come by before it sleeps."""
    at = load64(first)
    while at:
        door: Door = cast(Door, at)
        if atomic_or64(address_of(door.place), 0) != ASLEEP:
            return 1
        at = door.following
    return 0


class Collected(Protocol):
    """A device that has things done beside the vCPUs."""

    def bring_back(self) -> None:
        """Give back what is done; the board's lock is held."""

    def await_done(self, door: int) -> bool:
        """See `Summons.await_done`."""


class Summons:
    """The doors of a machine's vCPUs, and who brings back what is done.

    Attributes
    ----------
    at : int
        What `summon` is given.
    """

    def __init__(self) -> None:
        self._first = ctypes.c_uint64(0)
        self.at = ctypes.addressof(self._first)
        self._doors: list[ctypes.Array[ctypes.c_char]] = []
        self._devices: list[Collected] = []

    def add_door(self, request: int, attention: int, running: int) -> tuple[int, ctypes.c_uint64]:
        """Make a vCPU known; its `Door`'s address, and what says where it is."""
        place = ctypes.create_string_buffer(Door.size)
        self._doors.append(place)
        at = ctypes.addressof(place)
        door = Door.at(at)
        door.request, door.attention, door.running = request, attention, running
        door.following = self._first.value
        self._first.value = at
        return at, ctypes.c_uint64.from_address(at + Door.offset_of("place"))

    def add_device(self, device: Collected) -> None:
        """Have a device asked for what is done."""
        self._devices.append(device)

    def remove_device(self, device: Collected) -> None:
        """Ask it no more."""
        self._devices.remove(device)

    def await_done(self, door: int) -> bool:
        """Wait for what devices will have done at once, but no longer than until the vCPU of that
        door is called; whether there is anything to collect. The board's lock is not held.
        """
        return any(device.await_done(door) for device in tuple(self._devices))

    def collect(self) -> None:
        """Have all devices give back what is done; the board's lock is held."""
        for device in self._devices:
            device.bring_back()
