"""Flash memory as firmware keeps its variables in: an Intel command set chip, and a plain ROM.

`Flash` is an array of bytes that reads as such until a command is written to any of its addresses;
programming can only clear bits, erasing sets a block of 4 KiB to ones. What changes is handed to
``store``, by offset, before the chip says that it is done; should that fail, the chip says so in
its status register, and keeps what it had.

Commands and status bits are those of Intel's 28F128J3A data sheet, as far as UEFI's drivers use
them. One thing is QEMU's: after "clear status" the status reads 0, without the ready bit, by which
firmware tells a chip from RAM and ROM.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.state import Saved

BLOCK = 4096
"""Bytes that are erased at once."""

READ_ARRAY, READ_ID, READ_STATUS, CLEAR_STATUS = 0xFF, 0x90, 0x70, 0x50
PROGRAM, PROGRAM_ALTERNATE, WRITE_BUFFER = 0x40, 0x10, 0xE8
ERASE, CONFIRM, LOCK = 0x20, 0xD0, 0x60
READY, ERASE_ERROR, PROGRAM_ERROR = 0x80, 0x20, 0x10
MANUFACTURER, DEVICE = 0x89, 0x18
BUFFER_MAXIMUM = 256
"""Bytes that "write to buffer" takes at once."""


class Rom:
    """Memory that writes don't change; what the engines don't read from memory themselves."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, offset: int, size: int) -> int:
        """Read the array."""
        return int.from_bytes(self._content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes are lost."""


class Flash(Saved):
    """A flash chip.

    Parameters
    ----------
    content : bytes
        What is in it; a multiple of BLOCK.
    store : Callable[[int, bytes], None]
        Keeps changes (offset, bytes); an OSError becomes an error of the chip's.
    """

    FIELDS = ("content", "command", "status", "awaited", "gathered", "gathered_at")

    def __init__(self, content: bytes, store: Callable[[int, bytes], None]) -> None:
        self._store = store
        self.content = bytearray(content)
        self.command = READ_ARRAY
        """What reads give, or whose second cycle comes next."""
        self.status = READY
        self.awaited = 0
        """Bytes that a write to buffer still takes; 1 more than that, its confirmation."""
        self.gathered = bytearray()
        self.gathered_at = -1

    def read(self, offset: int, size: int) -> int:
        """Read array, status or identity."""
        if self.command == READ_ARRAY:
            return int.from_bytes(self.content[offset : offset + size], "little")
        if self.command == READ_ID:
            return (MANUFACTURER, DEVICE)[offset & 1]
        return self.status

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a command or its data; the chip's width is a byte, wider writes are data only."""
        if self.command in (PROGRAM, PROGRAM_ALTERNATE):
            self._program(offset, value.to_bytes(size, "little"))
            self.command = READ_STATUS
        elif self.command == ERASE:
            if value & 0xFF == CONFIRM:
                self._keep(offset - offset % BLOCK, b"\xff" * BLOCK, ERASE_ERROR)
            else:
                self.status |= ERASE_ERROR | PROGRAM_ERROR
            self.command = READ_STATUS
        elif self.command == WRITE_BUFFER:
            self._buffer(offset, size, value)
        elif self.command == LOCK:
            self.command = READ_STATUS  # blocks are never locked
        else:
            self._begin(value & 0xFF)

    def restored(self) -> None:
        """The content is the chip's again, wherever it is kept."""
        self._keep(0, bytes(self.content), PROGRAM_ERROR)

    def _begin(self, command: int) -> None:
        if command == CLEAR_STATUS:
            self.status = 0
            self.command = READ_ARRAY
        elif command == WRITE_BUFFER:
            self.status |= READY
            self.awaited, self.gathered, self.gathered_at = 0, bytearray(), -1
            self.command = command
        elif command in (READ_ID, READ_STATUS, PROGRAM, PROGRAM_ALTERNATE, ERASE, LOCK):
            self.command = command
        else:
            self.command = READ_ARRAY

    def _buffer(self, offset: int, size: int, value: int) -> None:
        """Count, data, confirmation."""
        if not self.awaited:
            count = (value & 0xFF) + 1
            self.awaited = count + 1
        elif self.awaited > 1:
            data = value.to_bytes(size, "little")[: self.awaited - 1]
            if self.gathered_at < 0:
                self.gathered_at = offset
            self.gathered += data
            self.awaited -= len(data)
        else:
            if value & 0xFF == CONFIRM:
                self._program(self.gathered_at, bytes(self.gathered))
            else:
                self.status |= PROGRAM_ERROR
            self.awaited = 0
            self.command = READ_STATUS

    def _program(self, offset: int, data: bytes) -> None:
        data = data[: len(self.content) - offset]
        present = self.content[offset : offset + len(data)]
        self._keep(offset, bytes(a & b for a, b in zip(present, data, strict=True)), PROGRAM_ERROR)

    def _keep(self, offset: int, data: bytes, error: int) -> None:
        self.status |= READY
        try:
            self._store(offset, data)
        except OSError:
            self.status |= error
            return
        self.content[offset : offset + len(data)] = data
