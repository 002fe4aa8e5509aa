"""QEMU's firmware configuration device: how firmware and test kernels are told about the machine.

A directory of items by 16-bit key, some of them files with names. The guest writes a key to port
0x510 and reads the item byte by byte from port 0x511, or has it copied by a DMA command whose
address goes, big-endian, to ports 0x514 and 0x518. Reads beyond an item give zeroes. Nothing can be
written.

An item may be a function, asked whenever the item is selected: ACPI tables depend on what firmware
has set up by then.

Source: QEMU, docs/specs/fw_cfg.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ringfence.chipset.bus import PortBus
from ringfence.chipset.state import Saved
from ringfence.errors import UsageError

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory

BASE, LENGTH = 0x510, 12
DATA, DMA_HIGH, DMA_LOW = 1, 4, 8
"""Offsets: the selector is a word at 0, the data register overlaps its second byte."""
FILE_FIRST = 0x20
FILES_MAXIMUM = 0x4000 - FILE_FIRST
NAME_BYTES = 56
BEYOND_MAXIMUM = 1 << 20
"""Zero bytes behind an item that one DMA command may ask for."""

# Keys
SIGNATURE, ID, RAM_SIZE, CPUS, MAXIMUM_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0F
KERNEL_SIZE, KERNEL_DATA = 0x08, 0x11
INITRD_SIZE, INITRD_DATA = 0x0B, 0x12
CMDLINE_SIZE, CMDLINE_DATA = 0x14, 0x15
SETUP_SIZE, SETUP_DATA = 0x17, 0x18
FILE_DIRECTORY = 0x19
ID_TRADITIONAL, ID_DMA = 1 << 0, 1 << 1

# Control bits of a DMA command
DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = (1 << bit for bit in range(5))
_DMA_SIGNATURE = int.from_bytes(b"QEMU CFG", "big")
_COMMAND = struct.Struct(">IIQ")
"""Control, length, address."""

Item = bytes | Callable[[], bytes]


def number(value: int, size: int) -> bytes:
    """An item that is a number of ``size`` bytes."""
    return value.to_bytes(size, "little")


def machine_items(memory: GuestMemory, cpus: int) -> dict[int, Item]:
    """The items that every machine has: sizes of RAM, numbers of CPUs."""
    return {
        RAM_SIZE: number(memory.size, 8),
        CPUS: number(cpus, 2),
        MAXIMUM_CPUS: number(cpus, 2),
    }


def ram_map(memory: GuestMemory) -> bytes:
    """The file etc/e820: a row for each run of RAM (base, size, type 1)."""
    rows = (struct.pack("<QQI", region.base, region.size, 1) for region in memory.regions)
    return b"".join(rows)


class FwCfg(Saved):
    """The device at ports 0x510 to 0x51b.

    Parameters
    ----------
    memory : GuestMemory
        Where DMA goes.
    items : mapping of int to bytes or callable
        What is behind the keys; signature, ID and directory are made here.
    files : mapping of str to bytes or callable
        What has a name; keys are given in order.
    """

    FIELDS = ("selected", "offset", "dma_high")

    def __init__(
        self, memory: GuestMemory, items: Mapping[int, Item], files: Mapping[str, Item]
    ) -> None:
        self._memory = memory
        if len(files) > FILES_MAXIMUM or any(len(name) >= NAME_BYTES for name in files):
            raise UsageError(f"firmware files: names have less than {NAME_BYTES} characters")
        self._files = dict(enumerate(files, FILE_FIRST))
        self._items: dict[int, Item] = {
            **items,
            SIGNATURE: b"QEMU",
            ID: number(ID_TRADITIONAL | ID_DMA, 4),
            FILE_DIRECTORY: self._directory,
            **{key: files[name] for key, name in self._files.items()},
        }
        self.selected = SIGNATURE
        self.offset = 0
        """Bytes of the selected item that have been read."""
        self.dma_high = 0
        self._data = b"QEMU"

    def attach(self, ports: PortBus) -> None:
        """Take the ports."""
        ports.register(BASE, LENGTH, self, widths=(1, 2, 4))

    def read(self, offset: int, size: int) -> int:
        """Read the next byte of the selected item, or the DMA registers' signature."""
        if offset == DATA and size == 1:
            return self._take(1)[0]
        if offset >= DMA_HIGH:
            signature = _DMA_SIGNATURE.to_bytes(8, "big")[offset - DMA_HIGH :][:size]
            return int.from_bytes(signature, "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or start a DMA command."""
        if offset == 0 and size == 2:
            self._select(value)
        elif size == 4 and offset >= DMA_HIGH:
            swapped = int.from_bytes(value.to_bytes(4, "little"), "big")
            if offset == DMA_HIGH:
                self.dma_high = swapped
            elif offset == DMA_LOW:
                high, self.dma_high = self.dma_high, 0
                self._command(high << 32 | swapped)

    def restored(self) -> None:
        """Fetch the selected item again."""
        self._data = self._item(self.selected)

    def _item(self, key: int) -> bytes:
        item = self._items.get(key, b"")
        return item if isinstance(item, bytes) else item()

    def _select(self, key: int) -> None:
        self.selected, self.offset = key, 0
        self._data = self._item(key)

    def _take(self, count: int) -> bytes:
        """The next bytes; zeroes beyond the end."""
        found = self._data[self.offset : self.offset + count]
        self.offset = min(self.offset + count, len(self._data))
        return found.ljust(count, b"\0")

    def _directory(self) -> bytes:
        """Count, then for each file size, key and name; big-endian."""
        rows = [
            struct.pack(f">IHH{NAME_BYTES}s", len(self._item(key)), key, 0, name.encode())
            for key, name in self._files.items()
        ]
        return struct.pack(">I", len(rows)) + b"".join(rows)

    def _command(self, address: int) -> None:
        """Carry out the command at ``address``; outside RAM nothing can say that it failed."""
        try:
            control, length, target = _COMMAND.unpack(self._memory.read(address, _COMMAND.size))
        except IndexError:
            return
        if control & DMA_SELECT:
            self._select(control >> 16)
        status = 0
        rest = len(self._data) - self.offset
        if control & DMA_READ and length:
            try:
                self._memory.offset(target, length)
                if length > rest + BEYOND_MAXIMUM:
                    raise IndexError
                self._memory.dma_write(target, self._take(length))
            except IndexError:
                status = DMA_ERROR
        elif control & DMA_SKIP:
            self.offset = min(self.offset + length, len(self._data))
        elif control & DMA_WRITE:
            status = DMA_ERROR
        self._memory.dma_write(address, struct.pack(">I", status))
