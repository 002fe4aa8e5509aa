"""What is on the host's side of a disk: files in several formats, and who waits for them.

`disk` says what a disk can do, `raw` and `qcow2` are formats, `overlay` throws changes away, `pool`
has the threads that wait for the host, `options` opens what a user has asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.storage.disk import Disk
from ringfence.storage.options import DiskOptions, open_disk
from ringfence.storage.pool import IoPool


class Storage:
    """All disks of a machine, open, and the threads that work on them.

    They outlive a reset of the machine, which its devices do not.

    Raises
    ------
    ImageError, HostError
        A disk can't be opened; those before it are closed again.
    """

    def __init__(self, options: Sequence[DiskOptions]) -> None:
        self.pool = IoPool()
        self.disks: list[Disk] = []
        try:
            for each in options:
                self.disks.append(open_disk(each))
        except BaseException:
            self.close()
            raise

    def lend(self) -> None:
        """Let another process open the images that were ours alone; see `Disk.lend`."""
        for disk in self.disks:
            disk.lend()

    def reclaim(self) -> None:
        """Have them for ourselves again; HostError if somebody else has one now."""
        for disk in self.disks:
            disk.reclaim()

    def close(self) -> None:
        """Finish what was submitted, flush, close the files."""
        self.pool.close()
        disks, self.disks = self.disks, []
        for disk in disks:
            disk.close()
