"""A function's configuration space: registers by name, and what a guest may change of them.

`ConfigSpace` is 256 bytes with two masks beside them: bits that a write stores, and bits that a
write of one clears. That is all there is to most registers; what more a write does (moving a BAR,
raising an interrupt) is done by the device after the write, from the bytes as they then are.

Bits are ``IntEnum`` members and not flags: they are plain numbers to ``&`` and ``|``, which every
notification of a device goes through, while flags would make objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, overload

from ringfence.errors import UsageError

SIZE = 256
"""Bytes of configuration space of a conventional function (6.1)."""
BARS = 6
FIRST_CAPABILITY = 0x40


class Command(IntEnum):
    """Command register (6.2.2)."""

    IO_SPACE = 1 << 0
    MEMORY_SPACE = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY_ERROR_RESPONSE = 1 << 6
    SERR_ENABLE = 1 << 8
    INTERRUPT_DISABLE = 1 << 10


COMMAND_WRITABLE = sum(Command)


class Status(IntEnum):
    """Status register (6.2.3)."""

    INTERRUPT = 1 << 3
    CAPABILITIES_LIST = 1 << 4
    MASTER_DATA_PARITY_ERROR = 1 << 8
    SIGNALED_TARGET_ABORT = 1 << 11
    RECEIVED_TARGET_ABORT = 1 << 12
    RECEIVED_MASTER_ABORT = 1 << 13
    SIGNALED_SYSTEM_ERROR = 1 << 14
    DETECTED_PARITY_ERROR = 1 << 15


STATUS_CLEARED = 0xF900
"""The error bits, cleared by writing ones."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a function says it is: 16-bit IDs, the 24-bit class code (appendix D), a revision."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class Register:
    """Descriptor of a little-endian register: ``offset`` and ``size`` in bytes."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size

    @overload
    def __get__(self, owner: None, kind: type[Any]) -> Register: ...
    @overload
    def __get__(self, owner: ConfigSpace, kind: type[Any]) -> int: ...

    def __get__(self, owner: ConfigSpace | None, kind: type[Any]) -> int | Register:
        return self if owner is None else owner.get(self)

    def __set__(self, owner: ConfigSpace, value: int) -> None:
        owner.set(self, value)

    def touched(self, offset: int, size: int) -> bool:
        """Tell whether an access meets this register."""
        return offset < self.offset + self.size and self.offset < offset + size


class ConfigSpace:
    """256 bytes of type 0 configuration space (figure 6-1).

    Attributes
    ----------
    raw : bytearray
        What reads give.
    writable, cleared : bytearray
        Per bit: a write stores it; writing a one clears it.
    """

    vendor_id = Register(0x00, 2)
    device_id = Register(0x02, 2)
    command = Register(0x04, 2)
    status = Register(0x06, 2)
    revision_id = Register(0x08, 1)
    class_code = Register(0x09, 3)
    cache_line_size = Register(0x0C, 1)
    latency_timer = Register(0x0D, 1)
    header_type = Register(0x0E, 1)
    base_addresses = Register(0x10, 4 * BARS)
    subsystem_vendor_id = Register(0x2C, 2)
    subsystem_id = Register(0x2E, 2)
    capabilities_pointer = Register(0x34, 1)
    interrupt_line = Register(0x3C, 1)
    interrupt_pin = Register(0x3D, 1)

    def __init__(self, identity: Identity, *, pin: int = 0) -> None:
        self.raw = bytearray(SIZE)
        self.writable = bytearray(SIZE)
        self.cleared = bytearray(SIZE)
        self.vendor_id, self.device_id = identity.vendor, identity.device
        self.revision_id, self.class_code = identity.revision, identity.class_code
        self.subsystem_vendor_id = identity.subsystem_vendor
        self.subsystem_id = identity.subsystem
        self.interrupt_pin = pin
        self._end = FIRST_CAPABILITY
        self._link = ConfigSpace.capabilities_pointer.offset
        self.allow(ConfigSpace.command, COMMAND_WRITABLE)
        self.allow(ConfigSpace.cache_line_size, 0xFF)
        self.allow(ConfigSpace.latency_timer, 0xF8)
        self.allow(ConfigSpace.interrupt_line, 0xFF)
        self.cleared[0x06:0x08] = STATUS_CLEARED.to_bytes(2, "little")

    def allow(self, register: Register, mask: int) -> None:
        """Let the guest write these bits of a register."""
        at = register.offset
        self.writable[at : at + register.size] = mask.to_bytes(register.size, "little")

    def get(self, register: Register) -> int:
        """Return a register's value."""
        return self.read(register.offset, register.size)

    def set(self, register: Register, value: int) -> None:
        """Change a register, writable or not."""
        at = register.offset
        self.raw[at : at + register.size] = value.to_bytes(register.size, "little")

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes at ``offset``."""
        return int.from_bytes(self.raw[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Do a guest's write: stores what is writable, clears what ones clear."""
        for at in range(offset, min(offset + size, SIZE)):
            byte, value = value & 0xFF, value >> 8
            mask = self.writable[at]
            self.raw[at] = (self.raw[at] & ~mask | byte & mask) & ~(byte & self.cleared[at])

    def add_capability(self, identifier: int, body: bytes) -> int:
        """Append a capability (6.7) of ID, link and ``body``; return its offset."""
        at = self._end
        if at + 2 + len(body) > SIZE:
            raise UsageError(f"capability {identifier:#x} does not fit into configuration space")
        self.raw[at : at + 2 + len(body)] = bytes([identifier, 0]) + body
        self.raw[self._link] = at
        self._link = at + 1
        self._end = (at + 2 + len(body) + 3) & ~3
        self.status |= Status.CAPABILITIES_LIST
        return at
