"""Files beneath a folder, and none elsewhere.

A `Place` is a name in another place, up to the shared folder itself: what a guest's handle stands
for. It holds no descriptor, so a guest may have many; when a folder is renamed, all places in it
have moved along. One that was removed stays so, even if its name comes to be used again.

**How a place is reached.** Name by name, from the descriptor of the shared folder: each is opened
in the one before with O_PATH and O_NOFOLLOW. A name has no slash and is neither ``.`` nor ``..``,
so a step leads down or fails; a symbolic link is opened as itself and nothing lies in it. Whatever
is swapped under way by others, no step leads out. (openat2 with RESOLVE_BENEATH would do the same
in one call; but old kernels and many containers don't have it, and one way is enough.) What may be
opened, regular files and folders, is opened again by that descriptor, so that it is the very file
that was looked at: nothing is called on devices, FIFOs and sockets.

Where nobody may wait (`Tree.from_memory`), the whole way is one openat2 of what the kernel has
cached, or none (`cached.NotNow`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from ringfence.errors import HostError, UsageError
from ringfence.sharing import cached

MAX_PATH = 4096
"""Bytes of a path beneath the folder."""
NAME_LENGTH = 255
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPENED = Path("/proc/self/fd")


class Place:
    """A name in a folder, or the shared folder."""

    __slots__ = ("__weakref__", "_children", "gone", "name", "parent")

    def __init__(self, parent: Place | None, name: bytes) -> None:
        self.parent = parent
        self.name = name
        self.gone = False
        """Whether it was removed, or replaced by something else."""
        self._children: WeakValueDictionary[bytes, Place] | None = None

    def child(self, name: bytes) -> Place:
        """The place of a name in this one; the same for all who ask."""
        check_name(name)
        if self._children is None:
            self._children = WeakValueDictionary()
        found = self._children.get(name)
        if found is None:
            found = self._children[name] = Place(self, name)
        return found

    def names(self) -> list[bytes]:
        """The way from the shared folder; OSError if it is gone or too long."""
        names: list[bytes] = []
        length = 0
        at = self
        while at.parent is not None:
            if at.gone:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            names.append(at.name)
            length += len(at.name) + 1
            if length > MAX_PATH:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            at = at.parent
        names.reverse()
        return names

    def forget(self, name: bytes) -> Place | None:
        """Note that what had this name here has it no more; return who stands for it."""
        return None if self._children is None else self._children.pop(name, None)

    def removed(self, name: bytes) -> None:
        """Note that what had this name here is gone."""
        found = self.forget(name)
        if found is not None:
            found.gone = True

    def moved(self, name: bytes, target: Place, new: bytes) -> None:
        """Note that what was called ``name`` here is ``new`` in ``target`` now."""
        if target is self and new == name:
            return
        target.removed(new)
        found = self.forget(name)
        if found is None:
            return
        if found in target.lineage():  # only if others move folders about at the same time
            found.gone = True
            return
        found.parent, found.name = target, new
        if target._children is None:
            target._children = WeakValueDictionary()
        target._children[new] = found

    def lineage(self) -> Iterator[Place]:
        """This place and all that it lies in."""
        at: Place | None = self
        while at is not None:
            yield at
            at = at.parent


def check_name(name: bytes) -> None:
    """Raise OSError unless it is the name of something in a folder."""
    if len(name) > NAME_LENGTH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def by_descriptor(descriptor: int) -> Path:
    """A path that leads to just what is open there, a symbolic link not followed."""
    return _OPENED / str(descriptor)


class Tree:
    """A shared folder.

    Parameters
    ----------
    path : Path
        The folder.

    Raises
    ------
    UsageError, HostError
        It is no folder, or can't be opened.

    Attributes
    ----------
    root : Place
        The folder itself.
    remembers : bool
        Whether `from_memory` can be had on this host.
    hasty : bool
        Whether `from_memory` holds.
    """

    def __init__(self, path: Path) -> None:
        self.root = Place(None, b"")
        self.hasty = False
        try:
            self._descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"shared folder {path}: {error.strerror}") from error
        except OSError as error:
            raise HostError(f"shared folder {path} can't be opened: {error.strerror}") from error
        try:
            self.device = os.fstat(self._descriptor).st_dev
            self._proc = _OPENED.stat().st_dev
        except OSError as error:
            os.close(self._descriptor)
            raise HostError(f"sharing a folder needs /proc: {error.strerror}") from error
        self.remembers = cached.offered(self._descriptor)

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._descriptor)

    @contextmanager
    def from_memory(self) -> Iterator[None]:
        """Have nothing waited for meanwhile: what that takes is `cached.NotNow`."""
        self.hasty = True
        try:
            yield
        finally:
            self.hasty = False

    @contextmanager
    def reached(self, place: Place) -> Iterator[int]:
        """A descriptor (O_PATH) of what is at a place, for a while."""
        names = place.names()
        at = self._descriptor
        try:
            if self.hasty and names:
                at = cached.look(at, b"/".join(names))
            else:
                for name in names:
                    before, at = at, os.open(name, _LOOK, dir_fd=at)
                    if before != self._descriptor:
                        os.close(before)
            yield at
        finally:
            if at != self._descriptor:
                os.close(at)

    def status(self, place: Place) -> os.stat_result:
        """What the host says of a place; OSError if the guest has no business there."""
        with self.reached(place) as at:
            return self.checked(os.fstat(at))

    def checked(self, status: os.stat_result) -> os.stat_result:
        """Refuse the host's /proc, by which our own memory could be reached."""
        if status.st_dev == self._proc:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return status

    def open(self, place: Place, flags: int) -> int:
        """Open a regular file or a folder; OSError for what is neither."""
        with self.reached(place) as at:
            mode = self.checked(os.fstat(at)).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            return os.open(by_descriptor(at), flags | os.O_CLOEXEC | os.O_NOCTTY)

    def create(self, place: Place, name: bytes, flags: int, mode: int) -> int:
        """Make a regular file and open it; without O_EXCL open the one that there is."""
        check_name(name)
        exclusive = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
        with self.reached(place) as at:
            try:
                descriptor = os.open(name, flags | exclusive, mode, dir_fd=at)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                return self.open(place.child(name), flags)
        with suppress(OSError):  # the guest has a umask of its own
            os.fchmod(descriptor, mode)
        return descriptor
