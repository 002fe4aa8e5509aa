"""What each message of 9P2000.L does: a shared folder and the one guest that has it.

`FolderServer.handle` takes a request and fills its answer, straight between the guest's buffers
and the host's files where data are moved. Requests are carried out one after another, by one thread
(the device's), so whoever waits for a FLUSH has the flushed request's answer already. While none is
under way, `FolderServer.handle_now` may be asked for an answer that needs no waiting (`cached`).

A guest says what it likes. Each byte of a request is read once and bounded before it is used; work
is bounded by the message's size, memory by the numbers of handles and open files. Whatever the host
refuses, and whatever makes no sense, is an error number to the guest.

Not done: extended attributes (refused, EOPNOTSUPP); devices (EPERM); locks that anybody but the
guest's own programs would see: its kernel keeps them among these, which is all that a LOCK is
granted for.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ringfence.errors import ImageError
from ringfence.memory.buffers import Buffers, scatter, split, total
from ringfence.sharing import cached
from ringfence.sharing.attributes import Attributes, Valid, file_system
from ringfence.sharing.files import OPEN_FLAGS, FidTable, entries
from ringfence.sharing.messages import (
    HEADER,
    MAX_BODY,
    MAX_MSIZE,
    MIN_MSIZE,
    NO_FID,
    READ_HEADER,
    UNKNOWN_VERSION,
    VERSION,
    WRITE_HEADER,
    Kind,
    malformed,
    string,
    unpack,
)
from ringfence.sharing.options import ShareOptions
from ringfence.sharing.tree import Place, Tree, check_name

STATE_VERSION = 1
MAX_OPEN = 1 << 14
"""Files that one guest may have open; less where the process may have less."""
AT_REMOVEDIR = 0x200
LOCK_SUCCESS, UNLOCKED = b"\0", 2
AT_ONCE = (Kind.WALK, Kind.GETATTR, Kind.CLUNK, Kind.READ, Kind.FLUSH, Kind.XATTRWALK)
"""What may be answered without waiting: it changes nothing on the host."""
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_Handler = Callable[..., bytes]


class FolderServer:
    """The host's side of one shared folder.

    Parameters
    ----------
    options : ShareOptions
        Which folder, and how.

    Raises
    ------
    UsageError, HostError
        It is no folder, or can't be opened.
    """

    def __init__(self, options: ShareOptions) -> None:
        self.tag = options.tag
        self._read_only = options.read_only
        self._tree = Tree(options.path)
        self._attributes = Attributes(options, self._tree.device)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._fids = FidTable(min(MAX_OPEN, most // 2) if most > 0 else MAX_OPEN)
        self._msize = 0
        """Bytes of a message; 0: no session has begun."""
        self._lock = threading.Lock()
        self._handlers = self._table()

    def close(self) -> None:
        """Let go of all files and the folder."""
        self.reset()
        self._tree.close()

    def reset(self) -> None:
        """End the session."""
        with self._lock:
            self._fids.clear()
            self._msize = 0

    def save(self) -> dict[str, Any]:
        """The session as plain data; no request is under way."""
        with self._lock:
            return {"version": STATE_VERSION, "msize": self._msize, "fids": self._fids.saved()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; ImageError if it can't be that."""
        try:
            if state["version"] != STATE_VERSION or not 0 <= state["msize"] <= MAX_MSIZE:
                raise ValueError("of another version")
            with self._lock:
                self._msize = int(state["msize"])
                self._fids.restored(state["fids"], self._tree)
        except (LookupError, TypeError, ValueError, OSError) as error:
            raise ImageError(f"saved session of a shared folder is damaged: {error}") from error

    # ---- messages

    def handle(self, request: Buffers, reply: Buffers) -> int:
        """Carry out a request; return how much of ``reply`` was filled."""
        with self._lock:
            return self._carry_out(request, reply)

    def handle_now(self, request: Buffers, reply: Buffers) -> int | None:
        """As `handle`, if that needs no waiting for the host; else None, and nothing is done."""
        if not self._tree.remembers or not self._lock.acquire(blocking=False):
            return None
        try:
            with self._tree.from_memory():
                return self._carry_out(request, reply)
        except cached.NotNow:
            return None
        finally:
            self._lock.release()

    def _carry_out(self, request: Buffers, reply: Buffers) -> int:
        head, data = split(request, WRITE_HEADER)
        message = b"".join(head)
        if len(message) < HEADER.size:
            return 0
        size, kind, tag = HEADER.unpack_from(message)
        if self._tree.hasty and kind not in AT_ONCE:
            raise cached.NotNow
        try:
            if kind == Kind.READ:
                return self._read(message, tag, reply)
            if kind == Kind.WRITE:
                body = self._write(message, data)
            else:
                rest = min(size, MAX_BODY) - len(message)
                message += b"".join(split(data, max(rest, 0))[0])
                body = self._perform(kind, message[HEADER.size : max(size, HEADER.size)])
            if HEADER.size + len(body) > total(reply):
                raise OSError(errno.ENOBUFS, "no room for the answer")
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            kind, body = Kind.LERROR, _U32.pack(number)
        return scatter(HEADER.pack(HEADER.size + len(body), kind + 1, tag) + body, reply)

    def _perform(self, kind: int, body: bytes) -> bytes:
        found = self._handlers.get(kind)
        if found is None:
            raise OSError(errno.EOPNOTSUPP, "unknown message")
        if not self._msize and kind != Kind.VERSION:
            raise malformed()
        fields, handler = found
        return handler(*unpack(fields, body))

    def _table(self) -> dict[int, tuple[str, _Handler]]:
        """Kind to fields and handler; a reader's table refuses what changes anything."""
        reading: dict[int, tuple[str, _Handler]] = {
            Kind.VERSION: ("4s", self._version),
            Kind.AUTH: ("", self._refused),
            Kind.ATTACH: ("44ss", self._attach),
            Kind.FLUSH: ("", _nothing),
            Kind.WALK: ("44n", self._walk),
            Kind.CLUNK: ("4", self._clunk),
            Kind.LOPEN: ("44", self._open),
            Kind.READDIR: ("484", self._read_folder),
            Kind.READLINK: ("4", self._read_link),
            Kind.GETATTR: ("48", self._get_attributes),
            Kind.STATFS: ("4", self._statfs),
            Kind.FSYNC: ("44", self._sync),
            Kind.LOCK: ("4", self._grant),
            Kind.GETLOCK: ("41884s", self._tell_lock),
            Kind.XATTRWALK: ("", self._refused),
            Kind.REMOVE: ("4", self._remove),
        }
        writing: dict[int, tuple[str, _Handler]] = {
            Kind.LCREATE: ("4s444", self._create),
            Kind.SETATTR: ("444448" + "8888", self._set_attributes),
            Kind.MKDIR: ("4s44", self._make_folder),
            Kind.SYMLINK: ("4ss4", self._make_symlink),
            Kind.MKNOD: ("4s4444", self._make_node),
            Kind.LINK: ("44s", self._link),
            Kind.RENAME: ("44s", self._rename),
            Kind.RENAMEAT: ("4s4s", self._rename_at),
            Kind.UNLINKAT: ("4s4", self._unlink),
            Kind.XATTRCREATE: ("", self._refused),
        }
        if self._read_only:
            writing = dict.fromkeys(writing, ("", _read_only))
        return reading | writing

    # ---- the session

    def _version(self, msize: int, version: bytes) -> bytes:
        """version(5): begins a session anew, with all handles gone."""
        self._fids.clear()
        self._msize = 0
        if msize < MIN_MSIZE:
            raise malformed()
        msize = min(msize, MAX_MSIZE)
        if version != VERSION:
            return _U32.pack(msize) + string(UNKNOWN_VERSION)
        self._msize = msize
        return _U32.pack(msize) + string(VERSION)

    def _attach(self, number: int, authentication: int, user: bytes, folder: bytes) -> bytes:
        """attach(5): a handle of the shared folder, or of one in it."""
        del user
        if authentication != NO_FID:
            raise OSError(errno.EOPNOTSUPP, "no authentication")
        place = self._tree.root
        for name in filter(None, folder.split(b"/")):
            place = place.child(name)
        qid = self._attributes.qid(self._tree.status(place))
        self._fids.add(number, place)
        return qid

    def _walk(self, number: int, new: int, names: Sequence[bytes]) -> bytes:
        """walk(5): as far as it goes; the new handle is made only if that is all the way."""
        fid = self._fids[number]
        if number == new and fid.file >= 0:
            raise OSError(errno.EBADF, "an open handle can't move")
        place = fid.place
        qids: list[bytes] = []
        for name in names:
            try:
                place = self._step(place, name)
                qids.append(self._attributes.qid(self._tree.status(place)))
            except OSError:
                if not qids:
                    raise
                break
        if len(qids) == len(names):
            if number == new:
                fid.place = place
            else:
                self._fids.add(new, place)
        return struct.pack("<H", len(qids)) + b"".join(qids)

    def _step(self, place: Place, name: bytes) -> Place:
        """One name further; the shared folder is its own parent."""
        if name == b"..":
            return place.parent or place
        return place if name == b"." else place.child(name)

    def _clunk(self, number: int) -> bytes:
        if self._tree.hasty and self._fids[number].file >= 0:
            raise cached.NotNow  # the last one to close a file that was removed frees its blocks
        self._fids.drop(number)
        return b""

    def _refused(self) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "not offered")

    # ---- files

    def _open(self, number: int, flags: int) -> bytes:
        """LOPEN: flags are those of open(2); answers with qid and iounit (0: as msize allows)."""
        fid = self._fids[number]
        flags &= OPEN_FLAGS | os.O_TRUNC
        if self._read_only and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        file = self._fids.open(fid, lambda: self._tree.open(fid.place, flags), flags)
        return self._attributes.qid(os.fstat(file)) + _U32.pack(0)

    def _create(self, number: int, name: bytes, flags: int, mode: int, group: int) -> bytes:
        """LCREATE: the folder's handle becomes one of the new file, open."""
        del group
        fid = self._fids[number]
        folder = fid.place
        flags &= OPEN_FLAGS | os.O_TRUNC | os.O_EXCL
        file = self._fids.open(
            fid, lambda: self._tree.create(folder, name, flags, mode & 0o777), flags
        )
        fid.place = folder.child(name)
        return self._attributes.qid(os.fstat(file)) + _U32.pack(0)

    def _read(self, message: bytes, tag: int, reply: Buffers) -> int:
        """read(5), into the answer's own buffers."""
        number, offset, count = unpack("484", message[HEADER.size :])
        head, room = split(reply, READ_HEADER.size)
        if total(head) < READ_HEADER.size:
            raise OSError(errno.ENOBUFS, "no room for the answer")
        file = self._fids[number].descriptor()
        read = cached.read if self._tree.hasty else os.preadv
        done = read(file, split(room, self._bounded(count))[0], offset)
        scatter(READ_HEADER.pack(READ_HEADER.size + done, Kind.READ + 1, tag, done), head)
        return READ_HEADER.size + done

    def _write(self, message: bytes, data: Buffers) -> bytes:
        """write(5), from the request's own buffers."""
        number, offset, count = unpack("484", message[HEADER.size :])
        file = self._fids[number].descriptor()
        buffers, _ = split(data, self._bounded(count))
        return _U32.pack(os.pwritev(file, buffers, offset))

    def _bounded(self, count: int) -> int:
        return min(count, self._msize)

    def _sync(self, number: int, data_only: int) -> bytes:
        file = self._fids[number].descriptor()
        (os.fdatasync if data_only else os.fsync)(file)
        return b""

    def _read_folder(self, number: int, offset: int, count: int) -> bytes:
        """READDIR: as many entries as fit."""
        file = self._fids[number].descriptor()
        room = min(self._bounded(count), MAX_BODY)
        found = bytearray()
        for entry in entries(file, offset):
            if len(found) + len(entry) > room:
                if not found:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                break
            found += entry
        return _U32.pack(len(found)) + found

    def _read_link(self, number: int) -> bytes:
        with self._tree.reached(self._fids[number].place) as at:
            return string(os.readlink(b"", dir_fd=at))

    def _grant(self, number: int) -> bytes:
        self._fids[number].descriptor()
        return LOCK_SUCCESS

    def _tell_lock(
        self, number: int, kind: int, start: int, length: int, process: int, client: bytes
    ) -> bytes:
        del kind
        self._fids[number].descriptor()
        return struct.pack("<BQQI", UNLOCKED, start, length, process) + string(client)

    # ---- attributes

    def _get_attributes(self, number: int, mask: int) -> bytes:
        del mask
        fid = self._fids[number]
        if fid.file >= 0 or fid.lost:
            return self._attributes.told(os.fstat(fid.descriptor()))
        return self._attributes.told(self._tree.status(fid.place))

    def _set_attributes(
        self, number: int, valid: int, mode: int, uid: int, gid: int, size: int, *times: int
    ) -> bytes:
        """SETATTR: what is open by that, else what is at the place."""
        fid = self._fids[number]
        if valid & Valid.SIZE:
            self._truncate(number, size)
        if fid.file >= 0 or fid.lost:
            self._attributes.change(fid.descriptor(), valid, mode, uid, gid, _times(times))
        else:
            with self._tree.reached(fid.place) as at:
                self._tree.checked(os.fstat(at))
                self._attributes.change(at, valid, mode, uid, gid, _times(times))
        return b""

    def _truncate(self, number: int, size: int) -> None:
        fid = self._fids[number]
        if fid.lost or (fid.file >= 0 and fid.flags & os.O_ACCMODE):
            os.ftruncate(fid.descriptor(), size)
            return
        file = self._tree.open(fid.place, os.O_WRONLY)
        try:
            os.ftruncate(file, size)
        finally:
            os.close(file)

    def _statfs(self, number: int) -> bytes:
        with self._tree.reached(self._fids[number].place) as at:
            return file_system(at)

    # ---- names

    def _make_folder(self, number: int, name: bytes, mode: int, group: int) -> bytes:
        del group
        return self._made(number, name, lambda at: os.mkdir(name, 0o700, dir_fd=at), mode)

    def _make_symlink(self, number: int, name: bytes, target: bytes, group: int) -> bytes:
        del group
        if b"\0" in target:
            raise malformed()
        return self._made(number, name, lambda at: os.symlink(target, name, dir_fd=at))

    def _make_node(
        self, number: int, name: bytes, mode: int, major: int, minor: int, group: int
    ) -> bytes:
        """MKNOD: regular files, FIFOs and sockets, which mean something to the guest alone."""
        del major, minor, group
        kind = stat.S_IFMT(mode)
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return self._made(number, name, lambda at: os.mknod(name, kind | 0o600, dir_fd=at), mode)

    def _made(
        self, number: int, name: bytes, make: Callable[[int], None], mode: int | None = None
    ) -> bytes:
        """Make something in a folder, with just these permissions; its qid."""
        check_name(name)
        folder = self._fids[number].place
        with self._tree.reached(folder) as at:
            self._tree.checked(os.fstat(at))
            make(at)
        with self._tree.reached(folder.child(name)) as made:
            if mode is not None:
                self._attributes.change(made, Valid.MODE, mode, 0, 0, (0, 0, 0, 0))
            return self._attributes.qid(os.fstat(made))

    def _link(self, number: int, target: int, name: bytes) -> bytes:
        """LINK: another name for ``target``."""
        check_name(name)
        place = self._fids[target].place
        if place.parent is None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        with (
            self._tree.reached(place.parent) as source,
            self._tree.reached(self._fids[number].place) as folder,
        ):
            place.names()  # it may be gone itself
            os.link(place.name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        return b""

    def _rename(self, number: int, folder: int, name: bytes) -> bytes:
        """RENAME: what a handle stands for."""
        place = self._fids[number].place
        place.names()
        if place.parent is None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return self._move(place.parent, place.name, self._fids[folder].place, name)

    def _rename_at(self, number: int, name: bytes, folder: int, new: bytes) -> bytes:
        return self._move(self._fids[number].place, name, self._fids[folder].place, new)

    def _move(self, source: Place, name: bytes, target: Place, new: bytes) -> bytes:
        check_name(name)
        check_name(new)
        with self._tree.reached(source) as old, self._tree.reached(target) as folder:
            same = _same(name, old, new, folder)
            os.rename(name, new, src_dir_fd=old, dst_dir_fd=folder)
        if not same:
            source.moved(name, target, new)
        return b""

    def _unlink(self, number: int, name: bytes, flags: int) -> bytes:
        self._delete(self._fids[number].place, name, folder=bool(flags & AT_REMOVEDIR))
        return b""

    def _remove(self, number: int) -> bytes:
        """remove(5): the handle is gone even if its file can't be."""
        place = self._fids[number].place
        self._fids.drop(number)
        if self._read_only:
            return _read_only()
        if place.parent is None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        folder = stat.S_ISDIR(self._tree.status(place).st_mode)
        self._delete(place.parent, place.name, folder=folder)
        return b""

    def _delete(self, parent: Place, name: bytes, *, folder: bool) -> None:
        check_name(name)
        with self._tree.reached(parent) as at:
            if folder:
                os.rmdir(name, dir_fd=at)
            else:
                os.unlink(name, dir_fd=at)
        parent.removed(name)


def _same(name: bytes, old: int, new: bytes, folder: int) -> bool:
    """Whether two names are of one file, when rename(2) does nothing."""
    try:
        first = os.stat(name, dir_fd=old, follow_symlinks=False)
        second = os.stat(new, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(first, second)


def _times(times: Sequence[int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = times
    return first, second, third, fourth


def _nothing() -> bytes:
    return b""


def _read_only() -> bytes:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
