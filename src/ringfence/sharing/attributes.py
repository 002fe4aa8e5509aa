"""What a guest is told of files, and what it may change of them.

**Owners.** What the guest makes belongs to whoever runs the machine; in the guest his files belong
to the user that `ShareOptions` names, root unless told. All other numbers are the same on both
sides. A guest may only give files to whom the host lets us give them.

**Permissions** have no set-user-ID and set-group-ID bits, in either direction: a program that a
guest leaves in the folder must not be more than one of ours when it is run on the host.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from enum import IntFlag

from ringfence.sharing.messages import QID, QidType
from ringfence.sharing.options import ShareOptions
from ringfence.sharing.tree import by_descriptor

PERMISSIONS = 0o1777
V9FS_MAGIC = 0x01021997
"""The kind of file system that STATFS tells (linux/magic.h)."""
BASIC = 0x7FF
"""All of GETATTR's fields up to blocks (P9_GETATTR_BASIC)."""
_ATTRIBUTES = struct.Struct("<Q13sIIIQQQQQQQQQQQ32x")
"""valid, qid, mode, uid, gid, nlink, rdev, size, blksize, blocks, three times in seconds and
nanoseconds; then btime, gen and data_version, which are not told."""
_STATFS = struct.Struct("<IIQQQQQQI")
"""type, bsize, blocks, bfree, bavail, files, ffree, fsid, namelen."""
_NANO = 10**9
_INODE_BITS = 48


class Valid(IntFlag):
    """What a SETATTR sets (P9_ATTR_…)."""

    MODE = 0x01
    UID = 0x02
    GID = 0x04
    SIZE = 0x08
    ATIME = 0x10
    MTIME = 0x20
    ATIME_SET = 0x80
    MTIME_SET = 0x100


class Attributes:
    """The two sides' views of one shared folder.

    Parameters
    ----------
    options : ShareOptions
        Whose the host's files are in the guest.
    device : int
        The folder's own st_dev.
    """

    def __init__(self, options: ShareOptions, device: int) -> None:
        self._uids = (os.geteuid(), options.uid)
        self._gids = (os.getegid(), options.gid)
        self._devices = {device: 0}

    def inode(self, status: os.stat_result) -> int:
        """The guest's inode number: the host's, told apart where other file systems are mounted."""
        number = self._devices.setdefault(status.st_dev, len(self._devices))
        return (status.st_ino ^ number << _INODE_BITS) & (1 << 64) - 1

    def qid(self, status: os.stat_result) -> bytes:
        """What names a file for good (intro(5)); its version changes with its contents."""
        kind = QidType.FILE
        if stat.S_ISDIR(status.st_mode):
            kind = QidType.DIRECTORY
        elif stat.S_ISLNK(status.st_mode):
            kind = QidType.SYMLINK
        version = (status.st_mtime_ns ^ status.st_size << 8) & 0xFFFFFFFF
        return QID.pack(kind, version, self.inode(status))

    def told(self, status: os.stat_result) -> bytes:
        """The answer to GETATTR."""
        mode = status.st_mode
        return _ATTRIBUTES.pack(
            BASIC,
            self.qid(status),
            stat.S_IFMT(mode) | mode & PERMISSIONS,
            _theirs(status.st_uid, self._uids),
            _theirs(status.st_gid, self._gids),
            status.st_nlink,
            status.st_rdev,
            status.st_size,
            status.st_blksize,
            status.st_blocks,
            *divmod(status.st_atime_ns, _NANO),
            *divmod(status.st_mtime_ns, _NANO),
            *divmod(status.st_ctime_ns, _NANO),
        )

    def change(
        self,
        descriptor: int,
        valid: int,
        mode: int,
        uid: int,
        gid: int,
        times: tuple[int, int, int, int],
    ) -> None:
        """Do all of a SETATTR but its size to what is open, be it only with O_PATH.

        ``times`` are atime and mtime, in seconds and nanoseconds each.
        """
        path = by_descriptor(descriptor)
        if valid & (Valid.UID | Valid.GID):
            os.chown(
                path,
                _ours(uid, self._uids) if valid & Valid.UID else -1,
                _ours(gid, self._gids) if valid & Valid.GID else -1,
            )
        if valid & Valid.MODE:
            path.chmod(mode & PERMISSIONS)
        if valid & (Valid.ATIME | Valid.MTIME):
            status = path.stat()
            now = time.time_ns()
            atime, mtime = status.st_atime_ns, status.st_mtime_ns
            if valid & Valid.ATIME:
                atime = times[0] * _NANO + times[1] if valid & Valid.ATIME_SET else now
            if valid & Valid.MTIME:
                mtime = times[2] * _NANO + times[3] if valid & Valid.MTIME_SET else now
            os.utime(path, ns=(atime, mtime))


def _theirs(number: int, pair: tuple[int, int]) -> int:
    return pair[1] if number == pair[0] else number


def _ours(number: int, pair: tuple[int, int]) -> int:
    return pair[0] if number == pair[1] else number


def file_system(descriptor: int) -> bytes:
    """The answer to STATFS."""
    status = os.fstatvfs(descriptor)
    return _STATFS.pack(
        V9FS_MAGIC,
        status.f_frsize,
        status.f_blocks,
        status.f_bfree,
        status.f_bavail,
        status.f_files,
        status.f_ffree,
        status.f_fsid & (1 << 64) - 1,
        status.f_namemax,
    )
