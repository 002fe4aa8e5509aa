"""The board's two buses: I/O ports and memory-mapped I/O.

`PortBus` keeps, for every access size, a dict from port to a ready-to-call handler (a
``functools.partial`` of the device's method), because every port access of the guest comes
through here: a byte access is one dict lookup and one call. `MmioBus` keeps its regions sorted
and finds one by bisection.

What a device sees is always naturally aligned and wholly inside it; everything else (unaligned,
straddling, too wide) reaches it as single bytes, in ascending order. Where no device answers,
reads give all ones and writes vanish, as on a PC's bus.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from ringfence.errors import UsageError


class Device(Protocol):
    """What a bus can reach: ``offset`` counts from the base it was registered at."""

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes at ``offset``, little-endian."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the low ``size`` bytes of ``value`` at ``offset``."""


_SIZES = (1, 2, 4)


class PortBus:
    """The 64 Ki I/O ports."""

    def __init__(self) -> None:
        self._readers: dict[int, dict[int, Callable[[], int]]] = {size: {} for size in _SIZES}
        self._writers: dict[int, dict[int, Callable[[int], None]]] = {size: {} for size in _SIZES}
        self._byte_readers = self._readers[1]
        self._byte_writers = self._writers[1]

    def register(
        self, base: int, length: int, device: Device, widths: Iterable[int] = _SIZES
    ) -> None:
        """Let ``device`` answer ``length`` ports from ``base``.

        Parameters
        ----------
        base, length : int
            The ports; they must be free.
        device : Device
            Called with ``offset = port - base``.
        widths : Iterable[int]
            Access sizes that the device takes as a whole; wider ones reach it as bytes.
        """
        if base < 0 or length < 1 or base + length > 0x10000:
            raise UsageError(f"ports {base:#x}+{length:#x} are out of range: expected 0..0xffff")
        for port in range(base, base + length):
            if port in self._byte_readers:
                raise UsageError(f"port {port:#x} already has a device: choose another")
        for size in sorted({1, *widths}):
            for port in range(base, base + length - size + 1):
                if port % size == 0:
                    self._readers[size][port] = partial(device.read, port - base, size)
                    self._writers[size][port] = partial(device.write, port - base, size)

    def unregister(self, base: int, length: int) -> None:
        """Free ``length`` ports from ``base``."""
        for port in range(base, base + length):
            for size in _SIZES:
                self._readers[size].pop(port, None)
                self._writers[size].pop(port, None)

    def read(self, port: int, size: int) -> int:
        """Return what an IN of ``size`` bytes (1, 2, 4) at ``port`` gives."""
        handler = self._readers[size].get(port)
        if handler is not None:
            return handler()
        if size == 1:
            return 0xFF
        value = 0
        for index in range(size):
            byte = self._byte_readers.get(port + index & 0xFFFF)
            value |= (0xFF if byte is None else byte()) << 8 * index
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """Do an OUT of ``size`` bytes (1, 2, 4) at ``port``."""
        handler = self._writers[size].get(port)
        if handler is not None:
            handler(value)
        elif size > 1:
            for index in range(size):
                byte = self._byte_writers.get(port + index & 0xFFFF)
                if byte is not None:
                    byte(value >> 8 * index & 0xFF)


class MmioBus:
    """Guest-physical regions that are devices."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, int, Device]] = []

    def register(self, base: int, length: int, device: Device) -> None:
        """Let ``device`` answer ``length`` bytes from guest-physical ``base``."""
        if base < 0 or length < 1:
            raise UsageError(f"MMIO {base:#x}+{length:#x} is no region: expected at least a byte")
        for start, end, _ in self._regions:
            if base < end and start < base + length:
                raise UsageError(
                    f"MMIO {base:#x}+{length:#x} overlaps the device at {start:#x}: move it"
                )
        insort(self._regions, (base, base + length, device), key=_base)

    def unregister(self, base: int) -> None:
        """Remove the region that starts at ``base``, if there is one."""
        self._regions = [region for region in self._regions if region[0] != base]

    def find(self, pa: int) -> tuple[int, int, Device] | None:
        """Return (base, end, device) of the region that holds ``pa``, or None."""
        index = bisect_right(self._regions, pa, key=_base) - 1
        if index >= 0 and pa < self._regions[index][1]:
            return self._regions[index]
        return None

    def read(self, pa: int, size: int) -> int:
        """Return ``size`` bytes at guest-physical ``pa``, little-endian."""
        region = self.find(pa)
        if region is not None and _whole(pa, size, region[1]):
            return region[2].read(pa - region[0], size)
        if size == 1:
            return 0xFF
        return sum(self.read(pa + index, 1) << 8 * index for index in range(size))

    def write(self, pa: int, size: int, value: int) -> None:
        """Store ``size`` bytes at guest-physical ``pa``."""
        region = self.find(pa)
        if region is not None and _whole(pa, size, region[1]):
            region[2].write(pa - region[0], size, value)
        elif size > 1:
            for index in range(size):
                self.write(pa + index, 1, value >> 8 * index & 0xFF)


def _base(region: tuple[int, int, Device]) -> int:
    return region[0]


def _whole(pa: int, size: int, end: int) -> bool:
    """Tell whether a device that ends at ``end`` takes the access in one piece."""
    return size == 1 or (size in (2, 4, 8) and pa % size == 0 and pa + size <= end)
