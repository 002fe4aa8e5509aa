"""The host's side of devices, in memory: backends that note what they are told, or fail."""

from __future__ import annotations

import os
import random
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from ringfence.devices.virtio.vsock import Key, Shut, VirtioVsock
from ringfence.memory.buffers import Buffers, scatter
from ringfence.network.backend import NetworkCard

SIZE = 1 << 20
"""Bytes of a `Ramdisk`."""


class Ramdisk:
    """A disk that notes what is done to it."""

    file = -1

    def __init__(self, read_only: bool = False) -> None:
        self.size = SIZE
        self.read_only = read_only
        self.data = bytearray(random.Random(1).randbytes(SIZE))
        self.log: list[tuple[object, ...]] = []
        self.fails = False
        self.quick = False

    def read(self, offset: int, buffers: Buffers) -> None:
        if self.fails:
            raise OSError("no")
        scatter(memoryview(self.data)[offset:], buffers)

    def write(self, offset: int, buffers: Buffers) -> None:
        data = b"".join(buffers)
        self.log.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def transfer(self, offset: int, vector: bytes, *, write: bool) -> int:
        return 0

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        if self.quick:
            self.read(offset, buffers)
        return self.quick

    def write_now(self, offset: int, buffers: Buffers) -> bool:
        if self.quick:
            self.write(offset, buffers)
        return self.quick

    def flush(self) -> None:
        self.log.append(("flush",))

    def discard(self, offset: int, length: int) -> None:
        self.log.append(("discard", offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.log.append(("zero", offset, length, unmap))


class Filedisk(Ramdisk):
    """A `Ramdisk` whose bytes are in a file, too, to which it may be passed by."""

    def __init__(self, read_only: bool = False) -> None:
        super().__init__(read_only)
        self.own, path = tempfile.mkstemp()
        Path(path).unlink()
        weakref.finalize(self, os.close, self.own)
        self.file = self.own
        os.pwrite(self.own, self.data, 0)

    def write(self, offset: int, buffers: Buffers) -> None:
        super().write(offset, buffers)
        os.pwrite(self.own, b"".join(buffers), offset)


class Inline:
    """A pool that does jobs at once, or when told."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        if self.held is None:
            job()
        else:
            self.held.append(job)


class Wire:
    """A backend that notes what it is given."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.resumed = 0
        self.card: NetworkCard | None = None
        self.takes_large = False
        self.large: bool | None = None
        self.limit = 1 << 30
        """Frames that it keeps."""

    def attach(self, card: NetworkCard) -> None:
        self.card = card

    def detach(self) -> None:
        self.card = None

    def receive(self, frame: bytes) -> bool:
        """Bring a single frame to the card."""
        return self.card is not None and self.card.receive([frame]) == 1

    def resume(self) -> None:
        self.resumed += 1

    def bring_large(self, wanted: bool) -> None:
        self.large = wanted

    def room(self) -> int:
        return max(self.limit - len(self.frames), 0)

    def transmit(self, frame: bytes) -> None:
        self.frames.append(frame)

    def carry(self) -> None: ...


class Note:
    """A host's end that notes what it is told."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.behind = False

    def attach(self, device: VirtioVsock) -> None:
        self.device = device

    def connect(self, key: Key) -> None:
        self.log.append(("connect", key))

    def established(self, key: Key) -> None:
        self.log.append(("established", key))

    def data(self, key: Key, data: bytes) -> None:
        self.log.append(("data", key, data))

    def credit(self, key: Key) -> None:
        self.log.append(("credit", key))

    def shut(self, key: Key, flags: Shut) -> None:
        self.log.append(("shut", key, int(flags)))

    def ended(self, key: Key) -> None:
        self.log.append(("ended", key))

    def close(self) -> None:
        pass
