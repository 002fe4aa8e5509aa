"""Registers of devices that native code answers for: a table per window, filled in by the device.

An access to no RAM leaves guest code, for Python and the board's lock. Many registers need neither:
they are only read, or keep what is written, or a mask changes and nothing follows from it. A device
declares those of a window of its in a `RegisterBank`; the board says in its `RegisterMap` where
such windows are seen, and an engine may then carry accesses out by `read_register` and
`write_register`, on the spot. Whatever these don't know, or can't finish, they leave alone, and it
goes the ordinary way. An engine that never calls them loses nothing: **the table is the registers'
only home**, and Python reads and writes them there (`Register`, through `RegisterBank.add`).

What an access does is the register's *kind*, one for reading and one for writing:

| kind | |
|---|---|
| `READ` | gives the value |
| `TAKE` | gives the causes and forgets them (`causes`) |
| `STORE` | keeps what is written, of the bits that can be |
| `POST` | the same; done with if ``open`` says so, else the device has to hear of it, too |
| `UNMASK`, `MASK` | want causes, or no more |

**Who may change what.** Several vCPUs are here at once, and beside them Python, with the board's
lock. A plain value is one aligned store: the last one counts, as on a bus. Causes change by
compare-and-exchange. ``open`` belongs to Python: a device opens a register while it is going to
look at it anyway (there is a timer, or nothing waits for room). Here the value is stored *first*
and then ``open`` read; a device closes it, by a locked operation, *first* and then reads the value
(`RegisterBank.close`). So one of the two sees the other, and no doorbell is lost.

**Where they are seen** changes when the guest moves a window. Python makes ``sequence`` odd, writes
the new places, and makes it even again; who looks one up reads it before and after, and takes what
is between only if it is the same even number. Tables live as long as the map that has once shown
them, so that an access which has found its register before it moved ends well, as if it had come
before.

**Posted.** What an access has changed may leave the device something to do that nobody sees until
the guest reaches the board by another way. `RegisterMap.posted` says so; whoever leaves guest code
calls `RegisterMap.settle`, with the board's lock, before anything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Annotated, Any, cast

from ringfence.memory.causes import FELL, LEFT, mask_causes, take_causes, unmask_causes
from ringfence.native.atomics import compare_exchange
from ringfence.native.dialect import (
    address_of,
    atomic_cas64,
    atomic_or64,
    load32,
    native,
    native_inline,
    store8,
    store16,
    store32,
)
from ringfence.native.layout import Array, Struct, u8, u32, u64

ROWS, PLACES = 16, 16
"""The most registers of a bank, and places of a map: looking one up is a short walk."""

READ, TAKE = 1, 2
STORE, POST, UNMASK, MASK = 1, 2, 3, 4
"""Kinds; 0: native code leaves it alone."""


class Register(Struct):
    """A register: a row of its bank."""

    offset: Annotated[int, u32]
    """From the start of the window."""
    width: Annotated[int, u8]
    """Bytes: 1, 2 or 4. Accesses of any other size are left alone."""
    read: Annotated[int, u8]
    write: Annotated[int, u8]
    writable: Annotated[int, u32]
    """Bits that a write stores."""
    value: Annotated[int, u64]
    open: Annotated[int, u64]
    """1: a write is done with (POST)."""
    place: Annotated[int, u64]
    """Host address of the value, in this row or in another; of the causes' word."""


class Bank(Struct):
    """What is in front of a bank's rows."""

    count: Annotated[int, u64]


class Places(Struct):
    """Where banks are seen, by guest-physical address."""

    sequence: Annotated[int, u64]
    """Odd while Python changes what follows."""
    posted: Annotated[int, u64]
    count: Annotated[int, u64]
    first: Annotated[Array, u64, PLACES]
    length: Annotated[Array, u64, PLACES]
    """Bytes that are seen from there on."""
    base: Annotated[Array, u64, PLACES]
    """What offsets count from."""
    bank: Annotated[Array, u64, PLACES]
    """Host addresses."""


@native_inline
def find_in(bank: Bank, offset: int, size: int) -> int:
    """Host address of a register by offset and width; 0: there is none."""
    for number in range(bank.count):
        row: Register = cast(Register, address_of(bank) + Bank.size + number * Register.size)
        if row.offset == offset:
            return address_of(row) if row.width == size else 0
    return 0


@native
def find_register(places: Places, physical: int, size: int) -> int:
    """Host address of the register at a guest-physical address; 0: native code doesn't know it."""
    sequence = atomic_or64(address_of(places.sequence), 0)
    if sequence & 1:
        return 0
    found = 0
    for number in range(places.count):
        if physical - places.first[number] < places.length[number]:
            bank = places.bank[number]
            found = find_in(cast(Bank, bank), physical - places.base[number], size)
            break
    if not atomic_cas64(address_of(places.sequence), sequence, sequence):
        return 0
    return found


@native_inline
def settled(places: Places, outcome: int) -> int:
    """Say that Python has something left to do, if so; whether the access is done."""
    if outcome == FELL:
        places.posted = 1
    return 0 if outcome == LEFT else 1


@native
def read_register(places: Places, physical: int, size: int, result: int) -> int:
    """Read ``size`` bytes at a guest-physical address: 1 with them at the host address ``result``.

    0: it is not for native code, and nothing has happened.
    """
    found = find_register(places, physical, size)
    if found == 0:
        return 0
    row: Register = cast(Register, found)
    if row.read == TAKE:
        return settled(places, take_causes(row.place, result))
    if row.read != READ:
        return 0
    value = load32(row.place)
    if size == 4:
        store32(result, value)
    elif size == 2:
        store16(result, value)
    else:
        store8(result, value)
    return 1


@native
def write_register(places: Places, physical: int, size: int, value: int) -> int:
    """Write ``size`` bytes at a guest-physical address: 1 where that is all, 0 for Python to do it.

    Which may be done to some degree then; doing it again changes nothing.
    """
    found = find_register(places, physical, size)
    if found == 0:
        return 0
    row: Register = cast(Register, found)
    bits = value & row.writable
    if row.write == UNMASK:
        return settled(places, unmask_causes(row.place, bits))
    if row.write == MASK:
        return settled(places, mask_causes(row.place, bits))
    if row.write == STORE:
        store32(row.place, bits)
        return 1
    if row.write == POST:
        store32(row.place, bits)
        return atomic_or64(address_of(row.open), 0)  # behind the store, for all to see
    return 0


class RegisterBank:
    """The registers of one window, from Python.

    Parameters
    ----------
    settle : Callable[[], None]
        Does what accesses have left to do, the board's lock held.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.settle = settle
        self._memory = ctypes.create_string_buffer(Bank.size + ROWS * Register.size + 8)
        self.address = -(-ctypes.addressof(self._memory) // 8) * 8
        self._head = Bank.at(self.address)

    def add(
        self,
        offset: int,
        *,
        read: int = 0,
        write: int = 0,
        writable: int = 0xFFFF_FFFF,
        width: int = 4,
        place: int = 0,
    ) -> Any:
        """Declare a register; return the view of its row (`Register`), for good.

        ``place`` is where its value is, if not in the row. Before the window is mapped.
        """
        number = self._head.count
        if number == ROWS:
            raise ValueError(f"a bank has room for {ROWS} registers")
        row = Register.at(self.address + Bank.size + number * Register.size)
        row.offset, row.width, row.writable = offset, width, writable
        row.read, row.write = read, write
        row.place = place or place_of(row)
        self._head.count = number + 1
        return row

    @staticmethod
    def close(register: Any) -> None:
        """Hear of writes to a register from now on; its value, read behind this, is the last."""
        if register.open:
            compare_exchange()(ctypes.addressof(register) + Register.offset_of("open"), 1, 0)


def place_of(register: Any) -> int:
    """Host address of a row's value."""
    return ctypes.addressof(register) + Register.offset_of("value")


class RegisterMap:
    """Where the banks of a board are seen, and what accesses have left to do.

    Attributes
    ----------
    address : int
        What `read_register` and `write_register` take: the host address of `Places`.
    """

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(Places.size + 8)
        self.address = -(-ctypes.addressof(self._memory) // 8) * 8
        self._view = Places.at(self.address)
        self._exchange = compare_exchange()
        self._banks: list[RegisterBank] = []

    @property
    def posted(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._view.posted)

    def settle(self) -> None:
        """Do what accesses have left to do; the board's lock is held."""
        self._exchange(self.address + Places.offset_of("posted"), 1, 0)
        for bank in self._banks:
            bank.settle()

    def show(self, seen: Iterable[tuple[int, int, int, RegisterBank]]) -> None:
        """Answer from now on where these are seen, and nowhere else; the board's lock is held.

        Parameters
        ----------
        seen : iterable of tuple
            First guest-physical address and the one behind the last, the address that offsets
            count from, the bank. What there is no room for goes the ordinary way.
        """
        view = self._view
        self._step()
        number = 0
        for first, end, base, bank in seen:
            if number == PLACES:
                break
            view.first[number], view.length[number] = first, end - first
            view.base[number], view.bank[number] = base, bank.address
            if bank not in self._banks:
                self._banks.append(bank)
            number += 1
        view.count = number
        self._step()

    def _step(self) -> None:
        """Count the sequence on, for all to see before what comes next."""
        now = self._view.sequence
        self._exchange(self.address + Places.offset_of("sequence"), now, now + 1)
