"""Names of running machines: one folder each, held by a lock that dies with its process.

    <run-time folder>/<name>/lock      flock()ed as long as the machine's process lives; its pid
                             control   the control socket
                             vsock     the way to the guest's sockets, if it has one
    <run-time folder>/<name>.log       what a detached machine had to say

The lock, and neither pid nor socket, says whether a machine lives: the kernel drops it with the
process, however that ends. Whoever finds a folder whose lock is free removes it. So a name is free
again as soon as its process is gone.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ringfence.errors import HostError, UsageError

FOLDER_MODE = 0o700
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCK = "lock"
_CHANGES = ".changes"
"""Held while folders come and go."""


def runtime_folder() -> Path:
    """Where running machines are found; it need not exist.

    ``$RINGFENCE_HOME/run``, else ``$XDG_RUNTIME_DIR/ringfence``, else ``/tmp/ringfence-<uid>`` (XDG
    Base Directory Specification; its folder is missing where nobody logged in, as in containers).
    """
    home = os.environ.get("RINGFENCE_HOME")
    if home:
        return Path(home).absolute() / "run"
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base.startswith("/"):
        return Path(base) / "ringfence"
    return Path(f"/tmp/ringfence-{os.getuid()}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of a machine of that name are, whether it runs or not."""

    name: str
    folder: Path

    @property
    def control(self) -> Path:
        """The control socket."""
        return self.folder / "control"

    @property
    def vsock(self) -> Path:
        """The socket that leads to the guest's sockets."""
        return self.folder / "vsock"

    @property
    def log(self) -> Path:
        """The log of a detached machine; it outlives the folder."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def pid(self) -> int | None:
        """The process that holds the name; None if that is not known (any more)."""
        try:
            return int((self.folder / _LOCK).read_text())
        except (OSError, ValueError):
            return None


class Claim:
    """A name that this process holds, until `release`, its block's end or the process's.

    Parameters
    ----------
    place : Place
        Whose folder it is.
    lock : int
        The descriptor that holds the lock.
    """

    def __init__(self, place: Place, lock: int) -> None:
        self.place = place
        self._lock = lock

    def __enter__(self) -> Place:
        return self.place

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def adopt(self) -> None:
        """Say that this process has the name, which it inherited by fork()."""
        os.pwrite(self._lock, f"{os.getpid()}\n".encode().ljust(16), 0)

    def release(self) -> None:
        """Remove the folder and give the name up. Safe to repeat."""
        if self._lock >= 0:
            with _changing(self.place.folder.parent):
                shutil.rmtree(self.place.folder, ignore_errors=True)
                os.close(self._lock)
                self._lock = -1


def place_of(name: str) -> Place:
    """The place of a machine; UsageError where ``name`` can't be one."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} can't be a machine's name: expected up to 64 of A-Z, a-z, 0-9, '.', '_', '-'"
        )
    return Place(name, runtime_folder() / name)


def claim(name: str) -> Claim:
    """Take a name for this process.

    Raises
    ------
    UsageError
        A machine of that name runs, or it can't be a name.
    HostError
        The run-time folder can't be used.
    """
    place = place_of(name)
    made = _try_claim(place)
    if made is None:
        raise UsageError(
            f"a machine named {name!r} runs already (pid {place.pid}): choose another --name"
        )
    return made


def claim_free(stem: str) -> Claim:
    """Take ``stem``, or the first of ``stem-2``, ``stem-3``… that no machine has.

    A stem that can't be a name leads to ``machine``.
    """
    if not _NAME.fullmatch(f"{stem}-1000"):
        stem = "machine"
    number = 1
    while True:
        made = _try_claim(place_of(stem if number == 1 else f"{stem}-{number}"))
        if made is not None:
            return made
        number += 1


def running() -> list[Place]:
    """The machines that live, by name; what dead ones left is removed."""
    folder = runtime_folder()
    if not folder.is_dir():
        return []
    found = []
    with _changing(folder):
        for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
            if _NAME.fullmatch(name):
                place = place_of(name)
                remains = _take_lock(place)
                if remains is None:
                    found.append(place)
                else:
                    shutil.rmtree(place.folder, ignore_errors=True)
                    os.close(remains)
    return found


def _try_claim(place: Place) -> Claim | None:
    folder = place.folder.parent
    _make_private(folder)
    with _changing(folder):
        place.folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        lock = _take_lock(place)
        if lock is None:
            return None
        for left in place.folder.iterdir():
            if left.name != _LOCK:
                left.unlink()
    made = Claim(place, lock)
    made.adopt()
    return made


def _take_lock(place: Place) -> int | None:
    """Lock a machine's folder, which exists; None if a process holds it."""
    lock = os.open(place.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


@contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Let nobody else look at or change the run-time folder meanwhile; HostError for its troubles.

    All that is done inside takes a moment, whatever machines do.
    """
    try:
        lock = os.open(folder / _CHANGES, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise HostError(
            f"folder {folder} can't be used ({error.strerror}): set RINGFENCE_HOME to a folder of"
            " yours"
        ) from error


def _make_private(folder: Path) -> None:
    """Make the run-time folder, which must be nobody else's: sockets in it give full control."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise HostError(
                f"{folder} is not a folder of yours: set RINGFENCE_HOME or XDG_RUNTIME_DIR"
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            folder.chmod(FOLDER_MODE)
    except OSError as error:
        raise HostError(
            f"folder {folder} can't be made ({error.strerror}): set RINGFENCE_HOME to a folder of"
            " yours"
        ) from error
