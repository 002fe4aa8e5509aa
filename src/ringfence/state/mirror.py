"""Copying a machine's disks to where it goes, while it uses them.

The source reads each disk once from end to end, and then again what the guest wrote meanwhile
(`storage.tracked`), until that is little; the last of it goes while the guest stands still. The
target writes raw files that it has made for it, and that are gone again if the machine doesn't
come. What is a throw-away layer at the source is an ordinary disk at the target.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ringfence.assembly import MachineConfig, Parts
from ringfence.errors import HostError, UsageError
from ringfence.state.wire import Kind, Link, LinkError, Message
from ringfence.storage.disk import SECTOR, Disk, write_full
from ringfence.storage.options import DiskOptions
from ringfence.storage.tracked import Tracked

PIECE = 1 << 18
"""Bytes in one message."""
PLACE = struct.Struct("<IQI")
"""Number of the disk, offset and length, at the start of DISK; without data there are zeroes."""
LITTLE = 4 << 20
"""Bytes that may be left for the time in which the guest stands still."""
SYNC_AFTER = 64 << 20
"""Bytes that are written before they are put on stable storage: little is left for the end."""
ROUNDS = 10
MAX_DISK = 1 << 50


class Mirror:
    """The source's side.

    Parameters
    ----------
    parts : Parts
        The machine, which stands still; its devices use disks that are tracked from now on.
    disks : sequence of Disk
        Its disks.
    """

    def __init__(self, parts: Parts, disks: Sequence[Disk]) -> None:
        self._parts = parts
        self._disks = tuple(disks)
        self._tracked = [Tracked(disk) for disk in disks]
        parts.board.quiesce()
        parts.insert_disks(self._tracked)

    def stop(self) -> None:
        """Have the devices use the disks themselves again; the machine stands still."""
        self._parts.board.quiesce()
        self._parts.insert_disks(self._disks)

    def copy(self, link: Link, told: Callable[[int], None]) -> None:
        """Send all of it, and what was written meanwhile; ``told`` hears how much is left."""
        left = sum(disk.size for disk in self._tracked)
        for number, disk in enumerate(self._tracked):
            for at in range(0, disk.size, PIECE):
                length = min(PIECE, disk.size - at)
                self._send(link, number, at, length, known_zero=True)
                left -= length
                told(left)
        for _ in range(ROUNDS):
            if sum(disk.left for disk in self._tracked) <= LITTLE:
                return
            self.sync(link)

    def sync(self, link: Link) -> None:
        """Send what was written since it was last sent."""
        for number, disk in enumerate(self._tracked):
            for offset, length in disk.take():
                for at in range(offset, offset + length, PIECE):
                    part = min(PIECE, offset + length - at)
                    self._send(link, number, at, part, known_zero=False)

    def _send(self, link: Link, number: int, at: int, length: int, *, known_zero: bool) -> None:
        data = self._tracked[number].read_bytes(at, length)
        if data.count(0) == length:
            if known_zero:
                return
            data = b""
        link.look()
        link.send_raw(Kind.DISK, PLACE.pack(number, at, length) + data)


class Copies:
    """The target's side: the files that the disks become.

    Parameters
    ----------
    paths : sequence of Path
        The files to make, in the order of the disks.
    sizes : object
        Their sizes, as the sender says.

    Raises
    ------
    UsageError, HostError
        They can't be made; none is left behind.
    """

    def __init__(self, paths: Sequence[Path], sizes: object) -> None:
        if (
            not isinstance(sizes, list)
            or not all(type(size) is int and SECTOR <= size <= MAX_DISK for size in sizes)
            or len(sizes) != len(paths)
        ):
            number = len(sizes) if isinstance(sizes, list) else "no"
            raise UsageError(
                f"the machine brings {number} disks: name as many new files at the target (--disk),"
                " in their order"
            )
        self.paths = tuple(paths)
        self._sizes = sizes
        self._files: list[int] = []
        self._unsynced = 0
        self._made: list[Path] = []
        try:
            for path, size in zip(paths, sizes, strict=True):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._files.append(os.open(path, flags, 0o600))
                self._made.append(path)
                os.ftruncate(self._files[-1], size)
        except OSError as error:
            self.discard()
            raise HostError(f"the disk {path} can't be made there ({error.strerror})") from error

    def placed(self, config: MachineConfig) -> MachineConfig:
        """The machine with these disks; UsageError if it has others."""
        if len(config.disks) != len(self.paths):
            raise UsageError(f"the machine has {len(config.disks)} disks and brings others")
        return replace(
            config,
            disks=tuple(
                _placed(options, path)
                for options, path in zip(config.disks, self.paths, strict=True)
            ),
        )

    def take(self, message: Message) -> None:
        """Write what has come; LinkError for nonsense, HostError where the host refuses."""
        if len(message.data) < PLACE.size:
            raise LinkError("the other side sent noise (a place cut off)")
        number, offset, length = PLACE.unpack_from(message.data)
        data = memoryview(message.data)[PLACE.size :]
        if (
            number >= len(self._files)
            or length > PIECE
            or offset + length > self._sizes[number]
            or len(data) not in (0, length)
        ):
            raise LinkError(f"the other side sent {length} bytes for disk {number} at {offset}")
        with self._writing():
            write_full(self._files[number], offset, [data or memoryview(bytes(length))])
            self._unsynced += length
            if self._unsynced > SYNC_AFTER:
                self._sync()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            names = ", ".join(map(str, self.paths))
            raise HostError(
                f"{names} can't be written ({error.strerror}): is there room?"
            ) from error

    def finish(self) -> None:
        """All has come: put it on stable storage."""
        with self._writing():
            self._sync()
        self._close()

    def _sync(self) -> None:
        for fd in self._files:
            os.fdatasync(fd)
        self._unsynced = 0

    def _close(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files = []

    def discard(self) -> None:
        """The machine does not come: remove the files."""
        self._close()
        for path in self._made:
            path.unlink(missing_ok=True)
        self._made = []


def _placed(options: DiskOptions, path: Path) -> DiskOptions:
    return replace(options, path=path, format="raw", snapshot=False, backing=False)
