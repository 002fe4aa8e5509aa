"""Hypercalls: what a guest can ask of the VMM directly, by VMCALL or VMMCALL.

The ABI is KVM's: the number in RAX, up to four arguments in RBX, RCX, RDX and RSI (their low halves
outside 64-bit mode), the result in RAX, all other registers kept. Either instruction works. Only
the guest's kernel may: user mode gets -EPERM. Results from -4095 to -1 are errors, -ENOSYS for a
number that nobody answers.

A table (`Hypercalls`) belongs to a machine. KVM's own numbers come from the services that implement
them, `PAUSE_CLOCK` is ours, and the owner may add functions of his own (``Machine.hypercall``) from
`FIRST_FREE` on. A function is given a `Call`: arguments, and guest memory by copies only. Addresses
are guest-physical; each copy is checked against RAM and counted, `COPY_MAX` bytes a call, so that
no guest can make one call long or reach beyond its memory. What a function has copied it owns:
another vCPU that changes the memory meanwhile changes nothing. Larger or typed things are named by
handles (`Handle`): an array of records in guest memory, bounds-checked once as a whole, copied by
element.

Source: Linux, Documentation/virt/kvm/x86/hypercalls.rst.
"""

from __future__ import annotations

import struct
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import TypeAlias

from ringfence.errors import UsageError
from ringfence.memory.ram import GuestMemory

MASK64 = (1 << 64) - 1
COPY_MAX = 1 << 20
"""Bytes that one call may copy from and to guest memory, together."""
SEGMENTS_MAX = 256
"""Pieces that a list of segments may have."""
FIRST_FREE, LAST_FREE = 0x1000, 0xFFFF
"""Numbers that the machine's owner may use."""


class Number(IntEnum):
    """Numbers with a meaning: KVM's, and from 0x5246_0000 on Ringfence's."""

    VAPIC_POLL_IRQ = 1
    """Nothing: a chance to deliver interrupts, which we need not."""
    KICK_CPU = 5
    """a0 0, a1 APIC ID: wake that CPU from a HLT that interrupts may not end."""
    CLOCK_PAIRING = 9
    """a0 address of 64 bytes, a1 0: write the host's wall clock and the TSC of one moment."""
    SEND_IPI = 10
    """a0, a1 bitmap of CPUs, a2 APIC ID of its first bit, a3 ICR: send; gives how many got it."""
    SCHED_YIELD = 11
    """a0 APIC ID: let that CPU run rather than this one."""
    PAUSE_CLOCK = 0x5246_0000
    """a0 0: time stops over a pause of the machine, 1: it runs on, 2: keep; gives what it was."""


class Error(IntEnum):
    """Errors that guests know (uapi/linux/kvm_para.h); a call gives them negated."""

    EPERM = 1
    E2BIG = 7
    EFAULT = 14
    EBUSY = 16
    EINVAL = 22
    EOPNOTSUPP = 95
    ENOSYS = 1000


class HypercallError(Exception):
    """Raised by a function to give the guest an error."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"-{error.name}")
        self.error = error


class Call:
    """One hypercall: its arguments, and the guest's memory.

    Parameters
    ----------
    memory : GuestMemory
        Guest RAM.
    vcpu : int
        The vCPU that calls.
    number : int
        Which function.
    arguments : sequence of int
        a0 to a3.
    bits : int
        Width of the caller's registers: 64, or 32 outside 64-bit mode.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vcpu: int,
        number: int,
        arguments: Sequence[int],
        bits: int = 64,
    ) -> None:
        self._memory = memory
        self._left = COPY_MAX
        self.vcpu = vcpu
        self.number = number
        self.arguments = tuple(arguments)
        self.bits = bits

    def read(self, address: int, length: int) -> bytes:
        """Copy bytes out of guest memory.

        Raises
        ------
        HypercallError
            EFAULT where not all of it is RAM, E2BIG beyond `COPY_MAX`; no need to catch it.
        """
        self._spend(length)
        try:
            return self._memory.read(address, length)
        except IndexError:
            raise HypercallError(Error.EFAULT) from None

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into guest memory; as `read`. All or nothing is written."""
        self._spend(len(data))
        try:
            self._memory.dma_write(address, data)
        except IndexError:
            raise HypercallError(Error.EFAULT) from None

    def handle(self, address: int, record: str | struct.Struct, count: int = 1) -> Handle:
        """``count`` records of a `struct` format at an address; as `read`."""
        return Handle(self, address, record, count)

    def read_segments(self, address: int, count: int) -> bytes:
        """What a list of ``count`` pairs (address, length), 64 bits each, points to, joined."""
        if count > SEGMENTS_MAX:
            raise HypercallError(Error.E2BIG)
        return b"".join(self.read(*segment) for segment in self.handle(address, "<QQ", count))

    def check(self, address: int, length: int) -> None:
        """Raise HypercallError if these bytes are not all RAM, or too many."""
        if length > COPY_MAX:
            raise HypercallError(Error.E2BIG)
        try:
            self._memory.offset(address, length)
        except IndexError:
            raise HypercallError(Error.EFAULT) from None

    def _spend(self, length: int) -> None:
        if not 0 <= length <= self._left:
            raise HypercallError(Error.E2BIG)
        self._left -= length


class Handle:
    """An array of records in guest memory, whose bounds have been checked.

    Each access copies anew: what the guest changes in between is seen, so take what is to be
    checked and used once.
    """

    def __init__(self, call: Call, address: int, record: str | struct.Struct, count: int) -> None:
        self._call = call
        self._record = record if isinstance(record, struct.Struct) else struct.Struct(record)
        self.address = address
        self._count = count
        call.check(address, count * self._record.size)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, ...]:
        """A copy of one record's fields."""
        return self._record.unpack(self._call.read(self._at(index), self._record.size))

    def __setitem__(self, index: int, fields: Sequence[int | bytes]) -> None:
        """Write one record."""
        self._call.write(self._at(index), self._record.pack(*fields))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """All records, copied in one go."""
        return self._record.iter_unpack(self.read())

    def read(self) -> bytes:
        """A copy of all records' bytes."""
        return self._call.read(self.address, self._count * self._record.size)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write bytes from the first record on; EFAULT if they are more than the records."""
        if len(data) > self._count * self._record.size:
            raise HypercallError(Error.EFAULT)
        self._call.write(self.address, data)

    def _at(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"record {index} of {self._count}")
        return self.address + index * self._record.size


Function: TypeAlias = Callable[[Call], int | None]


class Functions:
    """What the owner of a machine has added; it outlives the machine's resets."""

    def __init__(self) -> None:
        self.by_number: dict[int, Function] = {}
        self.failed: dict[int, BaseException] = {}
        """The first error of each function that let one escape."""

    def add(self, number: int, function: Function) -> None:
        """Have ``function`` answer hypercall ``number``.

        Raises
        ------
        UsageError
            The number is not free.
        """
        if not FIRST_FREE <= number <= LAST_FREE:
            raise UsageError(
                f"hypercall {number:#x} is not for owners:"
                f" expected {FIRST_FREE:#x} to {LAST_FREE:#x}"
            )
        if number in self.by_number:
            raise UsageError(f"hypercall {number:#x} has a function already")
        self.by_number[number] = function


class Hypercalls:
    """The table of one machine.

    Parameters
    ----------
    memory : GuestMemory
        Guest RAM.
    owners : Functions
        What its owner has added, or will.
    """

    def __init__(self, memory: GuestMemory, owners: Functions) -> None:
        self._memory = memory
        self._owners = owners
        self._own: dict[int, Function] = {Number.VAPIC_POLL_IRQ: lambda call: 0}
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        """Calls by name; unknown numbers together."""

    def provide(self, number: Number, function: Function) -> None:
        """Have a service answer one of the numbers that have a meaning."""
        self._own[number] = function

    def call(
        self, vcpu: int, cpl: int, number: int, arguments: Sequence[int], bits: int = 64
    ) -> int:
        """Carry out a hypercall; the result is RAX, modulo 2**64. See `Call` for ``bits``."""
        function = self._own.get(number) or self._owners.by_number.get(number)
        name = f"{number:#x}" if function else "unknown"
        if number in self._own:
            name = Number(number).name.lower()
        with self._lock:
            self.counts[name if not cpl else "from user mode"] += 1
        if cpl:
            return -Error.EPERM & MASK64
        if function is None:
            return -Error.ENOSYS & MASK64
        try:
            return (function(Call(self._memory, vcpu, number, arguments, bits)) or 0) & MASK64
        except HypercallError as refused:
            return -refused.error & MASK64
        except Exception as error:
            self._failed(number, error)
            return -Error.EINVAL & MASK64

    def _failed(self, number: int, error: Exception) -> None:
        """Show the first error that a function let escape: the guest may cause it without end."""
        if number not in self._owners.failed:
            self._owners.failed[number] = error
            sys.stderr.write(f"hypercall {number:#x} failed (shown once):\n")
            traceback.print_exception(error)
