"""What the host has in memory: files that are found and read without waiting for anything.

A request that is answered by the thread that brings it saves two changes of threads, which is most
of what it takes. But that thread is a vCPU's, and has the board's lock. So it does only what can't
wait: paths whose every step the kernel knows (openat2(2), RESOLVE_CACHED), and data in the page
cache (RWF_NOWAIT, preadv2(2)). `NotNow` says that it takes more, and is left to who may wait.

Attributes of a file that was found are in memory where the file system is the host's own. Of one
behind a network or another process nobody knows, so nothing is done at once there, and no step
leads into another file system than the shared folder's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from ringfence.memory.buffers import total

LARGEST = 256 << 10
"""Bytes that are read at once."""
_OPENAT2 = 437
"""System call of x86-64 Linux."""
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _CACHED = 0x01, 0x02, 0x04, 0x08, 0x20
"""Flags RESOLVE_* of openat2(2)."""
_HOW = struct.pack(
    "<QQQ",
    os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC,
    0,
    _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH | _CACHED,
)
"""struct open_how: flags, mode, resolve."""
_LOCAL = {
    0xEF53: "ext2, ext3, ext4",
    0x58465342: "XFS",
    0x9123683E: "Btrfs",
    0xF2F52010: "F2FS",
    0x2FC12FC1: "ZFS",
    0xCA451A4E: "bcachefs",
    0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
}
"""File systems whose attributes are the host's own, by the numbers of statfs(2)."""

_libc = ctypes.PyDLL(None, use_errno=True)
"""Keeps Python's lock: what is called here is over at once, or fails."""
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = [
    *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


class NotNow(Exception):
    """This can't be done without waiting for the host; nothing has been done."""


def offered(folder: int) -> bool:
    """Whether the host can do without waiting what is asked of a folder (a descriptor)."""
    status = ctypes.create_string_buffer(256)
    if _libc.fstatfs(folder, status):
        return False
    if int.from_bytes(status.raw[:8], "little") not in _LOCAL:
        return False
    try:
        os.close(look(folder, b"."))
    except (OSError, NotNow):
        return False
    return True


def look(folder: int, path: bytes) -> int:
    """A descriptor (O_PATH) of what is at a path beneath a folder, a link at its end not followed.

    OSError (ENOENT) if nothing is, as the kernel remembers.
    """
    found = int(_libc.syscall(_OPENAT2, folder, path, _HOW, len(_HOW)))
    if found >= 0:
        return found
    if ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    raise NotNow


def read(file: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill buffers from a file's cached pages; how many bytes, fewer only at the file's end."""
    wanted = total(buffers)
    if wanted > LARGEST:
        raise NotNow
    try:
        done = os.preadv(file, buffers, offset, os.RWF_NOWAIT)
        whole = done == wanted or os.fstat(file).st_size <= offset + done
    except OSError as error:
        raise NotNow from error
    if not whole:
        raise NotNow
    return done
