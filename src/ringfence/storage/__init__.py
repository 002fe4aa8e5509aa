"""What is on the host's side of a disk: files in several formats, and who waits for them.

`disk` says what a disk can do, `raw` and `qcow2` are formats, `overlay` throws changes away,
`awaited` stands in for an image that is still in use elsewhere, `pool` has the threads that wait
for the host, `options` opens what a user has asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.errors import HostError
from ringfence.storage.awaited import Awaited
from ringfence.storage.disk import Disk
from ringfence.storage.options import DiskOptions, open_disk
from ringfence.storage.pool import IoPool


class Storage:
    """All disks of a machine, open, and the threads that work on them.

    They outlive a reset of the machine, which its devices do not. Of a machine that is on its way
    (``awaited``) they are opened by `reclaim`.

    Raises
    ------
    ImageError, HostError
        A disk can't be opened; those before it are closed again.
    """

    def __init__(self, options: Sequence[DiskOptions], *, awaited: bool = False) -> None:
        self.pool = IoPool()
        self._options = tuple(options)
        self.disks: list[Disk] = [Awaited(read_only=each.read_only) for each in options]
        if not awaited:
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def lend(self) -> None:
        """Let another process open the images that were ours alone; see `Disk.lend`."""
        for disk in self.disks:
            disk.lend()

    def reclaim(self) -> None:
        """Have them for ourselves, again or at last; HostError if somebody else has one now."""
        for disk in self.disks:
            disk.reclaim()
        self._open()

    def _open(self) -> None:
        for at, disk in enumerate(self.disks):
            if isinstance(disk, Awaited):
                self.disks[at] = open_disk(self._options[at])

    def add(self, options: DiskOptions, disk: Disk) -> None:
        """Take in one more disk, which is open."""
        self._options = (*self._options, options)
        self.disks.append(disk)

    def remove(self, at: int) -> Disk:
        """Give away the disk of a number; it is still open."""
        self._options = (*self._options[:at], *self._options[at + 1 :])
        return self.disks.pop(at)

    def close(self) -> None:
        """Finish what was submitted, flush, close the files.

        Raises
        ------
        HostError
            What was written to a disk can't be put on stable storage; all are closed.
        """
        self.pool.close()
        disks, self.disks = self.disks, []
        asked, self._options = self._options, ()
        failed = []
        for disk, options in zip(disks, asked, strict=True):
            try:
                disk.close()
            except OSError as error:
                failed.append(f"{options.path} ({error.strerror})")
        if failed:
            raise HostError(
                f"what the guest wrote last may not be on disk: {', '.join(failed)} could not be"
                " flushed"
            )
