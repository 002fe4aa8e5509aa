"""The memory balloon (5.5): the guest gives pages back to the host, asked or by itself.

Inflating: the owner sets a target, the driver takes that many pages away from its guest and names
them; they are given back to the host and read as zeroes from then on. Deflating needs nothing: a
page that is touched again is there again. With free-page reporting the driver tells, unasked, which
pages are free at the moment, as buffers of a queue of its own.

The specification numbers the queues 0 to 4, of which 2 and 3 belong to features not offered here;
Linux numbers only those that are used. So all three are queues for reporting.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain
from ringfence.memory.buffers import split
from ringfence.memory.ram import PAGE

INFLATE, DEFLATE, REPORTING = 0, 1, 2
QUEUE_SIZE = 128
MAX_PAGES = 4096
"""Page numbers taken from one request."""

# Feature bits (5.5.3)
DEFLATE_ON_OOM, PAGE_REPORTING = 1 << 2, 1 << 5

CONFIG = struct.Struct("<IIII")
"""num_pages, actual, free_page_hint_cmd_id, poison_val (5.5.4)."""
ACTUAL_OFFSET = 4


class VirtioBalloon(VirtioDevice):
    """A balloon, empty at first.

    Attributes
    ----------
    target : int
        4 KiB pages that the guest shall give; set it with `set_target`.
    actual : int
        Pages that it says it has given.
    """

    TYPE = 5
    CLASS_CODE = 0x00FF00
    FIELDS = ("target", "actual")

    def __init__(self) -> None:
        super().__init__(DEFLATE_ON_OOM | PAGE_REPORTING, (QUEUE_SIZE,) * 5)
        self.target = 0
        self.actual = 0

    def set_target(self, size: int) -> None:
        """Ask the guest to do without ``size`` bytes (any thread)."""
        with self.transport.lock:
            self.target = size // PAGE
            self.transport.config_changed()

    def config(self) -> bytes:
        """See `VirtioDevice.config`."""
        return CONFIG.pack(self.target, self.actual, 0, 0)

    def config_write(self, offset: int, data: bytes) -> None:
        """See `VirtioDevice.config_write`: only actual may be written, and as a whole."""
        if offset == ACTUAL_OFFSET and len(data) == 4:
            self.actual = int.from_bytes(data, "little")

    def reset(self) -> None:
        """See `VirtioDevice.reset`: a new driver starts with an empty balloon."""
        self.actual = 0

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`."""
        if number == INFLATE:
            self.drain(number, self._inflate)
        elif number == DEFLATE:
            self.drain(number, lambda chain: 0)
        else:
            self.drain(number, self._reported)

    def _inflate(self, chain: Chain) -> int:
        data = b"".join(split(chain.readable, 4 * MAX_PAGES)[0])
        numbers = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
        for first, count in _runs(sorted(set(numbers))):
            self._give_back(first * PAGE, count * PAGE)
        return 0

    def _reported(self, chain: Chain) -> int:
        for offset, length in chain.places:
            address = self.transport.memory.address(offset)
            start = -(-address // PAGE) * PAGE
            end = (address + length) // PAGE * PAGE
            if start < end:
                self._give_back(start, end - start)
        return 0

    def _give_back(self, address: int, length: int) -> None:
        """Discard pages, those of them that are RAM."""
        for region in self.transport.memory.regions:
            start = max(address, region.base)
            end = min(address + length, region.base + region.size)
            if start < end:
                self.transport.memory.discard(start, end - start)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Join ascending numbers to runs of (first, count)."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at
