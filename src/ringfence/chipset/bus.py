"""The board's two buses: I/O ports and memory-mapped I/O.

`PortBus` keeps, for every access size, a dict from port to a ready-to-call handler (a
``functools.partial`` of the device's method), because every port access of the guest comes
through here: a byte access is one dict lookup and one call. What moves at the guest's will (PCI's
base address registers) is a `Window` in an `AddressMap`: windows may overlap each other and the
board's own devices, so the map is flattened, at each change, to the disjoint runs that are seen,
and an access is one bisection. `MmioBus` has all its devices in such a map, `PortBus` asks one for
ports that no device of the board has.

What a device sees is always naturally aligned and wholly inside it; everything else (unaligned,
straddling, too wide) reaches it as single bytes, in ascending order. Where no device answers,
reads give all ones and writes vanish, as on a PC's bus.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

from ringfence.errors import UsageError
from ringfence.memory.registers import RegisterBank


class Device(Protocol):
    """What a bus can reach: ``offset`` counts from the base it was registered at."""

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes at ``offset``, little-endian."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the low ``size`` bytes of ``value`` at ``offset``."""


_SIZES = (1, 2, 4)
BOARD = 0
"""Rank of what is soldered to the board; windows that the guest moves have higher numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """``length`` addresses from ``base`` that ``device`` answers; the lowest ``rank`` is seen.

    Some of the device's registers may be in a ``bank``, which an engine may access by itself.
    """

    base: int
    length: int
    device: Device
    rank: int = BOARD
    bank: RegisterBank | None = None

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.base + self.length


class AddressMap:
    """Windows, and who is seen at an address.

    Of overlapping windows the one with the lowest rank is seen, of equal ranks the one that came
    first. A change costs the square of the number of windows (192 on a full PCI bus), a look-up
    its logarithm.
    """

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._starts: list[int] = []
        self._runs: list[tuple[int, int, Device] | None] = []
        self._seen: list[tuple[int, int, Window]] = []
        self.on_change: Callable[[], None] = lambda: None
        """Called when other windows are seen than before."""

    def __iter__(self) -> Iterator[Window]:
        return iter(tuple(self._windows))

    def banks(self) -> list[tuple[int, int, int, RegisterBank]]:
        """Where banks of registers are seen: start and end, base of the window, bank."""
        return [
            (start, end, window.base, window.bank)
            for start, end, window in self._seen
            if window.bank is not None
        ]

    def add(self, window: Window) -> None:
        """Map a window."""
        self._windows.append(window)
        self._flatten()

    def remove(self, window: Window) -> None:
        """Take back a window that `add` has mapped."""
        self._windows.remove(window)
        self._flatten()

    def find(self, address: int) -> tuple[int, int, Device] | None:
        """Return (end of the run, base of the window, device) seen at ``address``, or None."""
        index = bisect_right(self._starts, address) - 1
        return self._runs[index] if index >= 0 else None

    def _flatten(self) -> None:
        ranked = sorted(self._windows, key=lambda window: window.rank)
        edges = sorted({edge for window in ranked for edge in (window.base, window.end)})
        self._starts, self._runs, self._seen = [], [], []
        last: Window | None = None
        for start, end in pairwise(edges):
            seen = next((each for each in ranked if each.base <= start < each.end), None)
            if seen is not None and seen is last:
                self._runs[-1] = (end, seen.base, seen.device)
                self._seen[-1] = (self._starts[-1], end, seen)
                continue
            self._starts.append(start)
            self._runs.append(None if seen is None else (end, seen.base, seen.device))
            if seen is not None:
                self._seen.append((start, end, seen))
            last = seen
        if edges:
            self._starts.append(edges[-1])
            self._runs.append(None)
        self.on_change()


class PortBus:
    """The 64 Ki I/O ports."""

    def __init__(self) -> None:
        self._readers: dict[int, dict[int, Callable[[], int]]] = {size: {} for size in _SIZES}
        self._writers: dict[int, dict[int, Callable[[int], None]]] = {size: {} for size in _SIZES}
        self._byte_readers = self._readers[1]
        self.windows = AddressMap()
        """What answers ports that no registered device has."""

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
        found = self._window(port, size)
        if found is not None:
            return found[2].read(port - found[1], size)
        if size == 1:
            return 0xFF
        return sum(self.read(port + index & 0xFFFF, 1) << 8 * index for index in range(size))

    def write(self, port: int, size: int, value: int) -> None:
        """Do an OUT of ``size`` bytes (1, 2, 4) at ``port``."""
        handler = self._writers[size].get(port)
        if handler is not None:
            handler(value)
            return
        found = self._window(port, size)
        if found is not None:
            found[2].write(port - found[1], size, value)
        elif size > 1:
            for index in range(size):
                self.write(port + index & 0xFFFF, 1, value >> 8 * index & 0xFF)

    def _window(self, port: int, size: int) -> tuple[int, int, Device] | None:
        """Return the window that takes the access in one piece, if no fixed port is touched."""
        found = self.windows.find(port)
        if found is None or not _whole(port, size, found[0]):
            return None
        if any(port + index in self._byte_readers for index in range(size)):
            return None
        return found


class MmioBus:
    """Guest-physical regions that are devices: those of the board, and windows that move."""

    def __init__(self) -> None:
        self.map = AddressMap()

    def register(self, base: int, length: int, device: Device) -> None:
        """Let ``device`` answer ``length`` bytes from guest-physical ``base``, before any window.

        Raises UsageError where another device of the board is.
        """
        if base < 0 or length < 1:
            raise UsageError(f"MMIO {base:#x}+{length:#x} is no region: expected at least a byte")
        for other in self.map:
            if other.rank == BOARD and base < other.end and other.base < base + length:
                raise UsageError(
                    f"MMIO {base:#x}+{length:#x} overlaps the device at {other.base:#x}: move it"
                )
        self.map.add(Window(base, length, device))

    def unregister(self, base: int) -> None:
        """Remove the board's device that starts at ``base``, if there is one."""
        for window in self.map:
            if window.rank == BOARD and window.base == base:
                self.map.remove(window)

    def read(self, pa: int, size: int) -> int:
        """Return ``size`` bytes at guest-physical ``pa``, little-endian."""
        found = self.map.find(pa)
        if found is not None and _whole(pa, size, found[0]):
            return found[2].read(pa - found[1], size)
        if size == 1:
            return 0xFF
        return sum(self.read(pa + index, 1) << 8 * index for index in range(size))

    def write(self, pa: int, size: int, value: int) -> None:
        """Store ``size`` bytes at guest-physical ``pa``."""
        found = self.map.find(pa)
        if found is not None and _whole(pa, size, found[0]):
            found[2].write(pa - found[1], size, value)
        elif size > 1:
            for index in range(size):
                self.write(pa + index, 1, value >> 8 * index & 0xFF)


def _whole(address: int, size: int, end: int) -> bool:
    """Tell whether a device that is seen up to ``end`` takes the access in one piece."""
    return size == 1 or (size in (2, 4, 8) and address % size == 0 and address + size <= end)
