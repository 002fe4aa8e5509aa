"""A guest's handles of files (fids), and what is open.

A `Fid` stands for a place, and once it was opened, for a file: that stays what it is, whatever
becomes of its name. `saved` tells both in plain data; a file is opened again by its name, and where
that leads to another file by then, the handle is stale (ESTALE) until the guest lets go of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from ringfence.sharing.messages import QID, QidType, string
from ringfence.sharing.tree import Place, Tree, check_name

MAX_FIDS = 1 << 16
OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_DSYNC | os.O_SYNC
"""Of a guest's flags, which have the host's numbers (both are x86-64), those that stay in force."""
LARGEST_LISTING = 64 << 10
"""Bytes of a folder that are read from the kernel at once."""
_DIRENT = struct.Struct("<QqHB")
"""struct linux_dirent64 (getdents64(2)) up to its name: inode, offset, length, type."""
_ENTRY = struct.Struct("<QB")
"""Offset and type, in an entry of READDIR behind the qid."""
_DT_DIRECTORY, _DT_LINK = 4, 10
_GETDENTS64 = 217
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


def stale() -> OSError:
    """What a handle of something that is gone is answered with."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


class Fid:
    """One handle.

    Attributes
    ----------
    place : Place
        What it stands for.
    file : int
        The descriptor of what was opened; -1 while nothing is.
    flags : int
        What it was opened with.
    """

    __slots__ = ("file", "flags", "lost", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.file = -1
        self.flags = 0
        self.lost = False
        """Whether it was open in a life before, and could not be opened again."""

    def opened(self, file: int, flags: int) -> None:
        """Take over a descriptor."""
        self.file, self.flags = file, flags & OPEN_FLAGS

    def descriptor(self) -> int:
        """What is open; OSError if nothing is."""
        if self.lost:
            raise stale()
        if self.file < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.file

    def close(self) -> None:
        """Close what is open."""
        if self.file >= 0:
            file, self.file = self.file, -1
            os.close(file)


class FidTable:
    """All of a session's handles, by the guest's numbers.

    Parameters
    ----------
    most : int
        Files that may be open at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._fids: dict[int, Fid] = {}
        self._open = 0

    def __getitem__(self, number: int) -> Fid:
        """A handle; OSError if there is none of that number."""
        found = self._fids.get(number)
        if found is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return found

    def add(self, number: int, place: Place) -> Fid:
        """Make a handle; OSError if the number is in use, or there are too many."""
        if number in self._fids:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if len(self._fids) >= MAX_FIDS:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        found = self._fids[number] = Fid(place)
        return found

    def open(self, fid: Fid, opener: Callable[[], int], flags: int) -> int:
        """Open a handle by ``opener``; OSError if it is open, or too many are."""
        if fid.lost or fid.file >= 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._open >= self._most:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        file = opener()
        fid.opened(file, flags)
        self._open += 1
        return file

    def drop(self, number: int) -> None:
        """Forget a handle, and close what it has open."""
        found = self[number]
        del self._fids[number]
        self._open -= found.file >= 0
        found.close()

    def clear(self) -> None:
        """Forget all."""
        for number in list(self._fids):
            self.drop(number)

    # ---- state

    def saved(self) -> list[dict[str, Any]]:
        """All handles as plain data."""
        return [_saved(number, fid) for number, fid in self._fids.items()]

    def restored(self, rows: list[dict[str, Any]], tree: Tree) -> None:
        """Take over what `saved` returned; ValueError, LookupError or TypeError if it is not."""
        self.clear()
        for row in rows:
            place = tree.root
            for name in row["names"]:
                place = _child(place, name)
            if row["gone"]:
                place = Place(tree.root, b"")
                place.gone = True
            fid = self.add(int(row["fid"]), place)
            if row["inode"] is None:
                continue
            try:
                self._reopen(fid, tree, int(row["flags"]) & OPEN_FLAGS, row["inode"])
            except OSError:
                fid.lost = True

    def _reopen(self, fid: Fid, tree: Tree, flags: int, inode: int) -> None:
        def again() -> int:
            file = tree.open(fid.place, flags)
            if os.fstat(file).st_ino != inode:
                os.close(file)
                raise stale()
            return file

        self.open(fid, again, flags)


def _saved(number: int, fid: Fid) -> dict[str, Any]:
    try:
        names, gone = fid.place.names(), False
    except OSError:
        names, gone = [], True
    opened = fid.file >= 0
    inode = os.fstat(fid.file).st_ino if opened else -1 if fid.lost else None
    return {"fid": number, "names": names, "gone": gone, "flags": fid.flags, "inode": inode}


def _child(place: Place, name: Any) -> Place:
    if not isinstance(name, bytes):
        raise TypeError(f"{name!r} is no name")
    try:
        check_name(name)
    except OSError as error:
        raise ValueError(f"{name!r} is no name") from error
    return place.child(name)


def entries(directory: int, offset: int) -> Iterator[bytes]:
    """What is in an open folder from an offset on, each entry as READDIR has it.

    An offset is the kernel's own (getdents64(2)): 0, or what came with the entry before. So nothing
    has to be kept between two requests, however large the folder is. There may be more behind the
    last one given.
    """
    os.lseek(directory, offset, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(LARGEST_LISTING)
    length = _syscall(_GETDENTS64, directory, buffer, LARGEST_LISTING)
    if length < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    raw = buffer.raw[:length]
    at = 0
    while at < length:
        inode, following, size, kind = _DIRENT.unpack_from(raw, at)
        name = raw[at + _DIRENT.size : at + size].split(b"\0", 1)[0]
        at += size
        qid_type = QidType.FILE
        if kind == _DT_DIRECTORY:
            qid_type = QidType.DIRECTORY
        elif kind == _DT_LINK:
            qid_type = QidType.SYMLINK
        head = QID.pack(qid_type, 0, inode) + _ENTRY.pack(following & (1 << 64) - 1, kind)
        yield head + string(name)
