"""A snapshot on disk: a folder that is whole, or isn't there.

| file | content |
|---|---|
| ``manifest.json`` | version, identity, what the machine is made of, checksums of the rest |
| ``state.json`` | what `Parts.save` gave |
| ``memory`` | RAM and ROM at their offsets, sparse; in an incremental snapshot only some pages |
| ``disk0`` … | the disks that the guest could write, as they were: raw and sparse |

All is written into a folder beside the target, synced, and renamed at the end: whoever is killed,
or runs out of disk space, leaves no snapshot rather than half of one. A lock on that folder tells a
later snapshot whether somebody still works on it or its remains can go.

The checksum of ``memory`` covers the pages that are not all zeroes, so that holes need not be read;
it is made from the file, after the guest has gone on. Restoring checks manifest and state, and the
sizes of everything; `Snapshot.verify` reads all.

**Chains.** An incremental snapshot names its parent by path and identity and holds the pages that
were written since, zeroes included. RAM is then mapped layer by layer.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import HostError, ImageError, UsageError
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.ram import GuestMemory, Layer
from ringfence.state import pages, plain
from ringfence.storage.disk import Disk, write_full

FORMAT, VERSION = "ringfence snapshot", 1
MANIFEST, STATE, MEMORY, DISK = "manifest.json", "state.json", "memory", "disk"
MAX_CHAIN = 64
MAX_RUNS = 30_000
"""Separate mappings that RAM may be made of (Linux allows a process 65,530)."""
MAX_JSON = 256 << 20
BLOCK = 1 << 18
"""Bytes of a disk that are copied, or left out as zeroes, at once."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was found whole.

    Attributes
    ----------
    path : Path
        Its folder.
    identity : str
        Random; a child names its parent by it.
    machine : dict
        What `state.description` wrote.
    state : dict
        What `Parts.save` gave.
    size, rom : int
        Bytes of RAM, and of ROM.
    runs : tuple of Run
        The pages that are in ``memory``.
    digest : str
        The checksum of ``memory``.
    disks : dict
        Copies of disks, by the disk's number.
    parent : Snapshot or None
        What the other pages are in.
    """

    path: Path
    identity: str
    machine: dict[str, Any]
    state: dict[str, Any]
    size: int
    rom: int
    runs: tuple[Run, ...]
    digest: str
    disks: dict[int, Path]
    parent: Snapshot | None

    @property
    def chain(self) -> list[Snapshot]:
        """This one and its ancestors, the oldest first."""
        older = [] if self.parent is None else self.parent.chain
        return [*older, self]

    def memory(self) -> GuestMemory:
        """RAM with the saved contents, to be read when the guest gets there."""
        chain = self.chain
        if sum(len(each.runs) for each in chain) > MAX_RUNS:
            raise ImageError(
                f"snapshot {self.path} is made of too many pieces: take a full one instead"
            )
        files: list[int] = []
        try:
            for each in chain:
                files.append(os.open(each.path / MEMORY, os.O_RDONLY | os.O_CLOEXEC))
            rom = b""
            for fd, each in zip(files, chain, strict=True):
                if self.rom and each.parent is None:
                    rom = os.pread(fd, self.rom, self.size)
            layers = [Layer(fd, each.runs) for fd, each in zip(files, chain, strict=True)]
            return GuestMemory(self.size, rom, layers=layers)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        finally:
            for fd in files:
                os.close(fd)

    def verify(self) -> None:
        """Read all of the memory files; ImageError where one is not what was written."""
        for each in self.chain:
            with (each.path / MEMORY).open("rb") as file:
                if _digest(file.fileno()) != each.digest:
                    raise ImageError(f"{each.path / MEMORY} was changed or damaged")


def load(path: Path) -> Snapshot:
    """Read a snapshot, all but its memory.

    Raises
    ------
    ImageError
        It is none, of another version, damaged, or its parent is missing.
    """
    return _load(path, MAX_CHAIN)


def _load(path: Path, depth: int) -> Snapshot:
    if not depth:
        raise ImageError(f"{path}: more than {MAX_CHAIN} snapshots build upon each other")
    manifest = _manifest(path)
    try:
        state_text = _read(path / manifest["state"]["file"], path)
        if hashlib.sha256(state_text).hexdigest() != manifest["state"]["sha256"]:
            raise ImageError(f"{path / STATE} was changed or damaged")
        memory = manifest["memory"]
        size, rom = int(memory["size"]), int(memory["rom"])
        runs = tuple(Run(int(first), int(count)) for first, count in memory["runs"])
        held = (path / MEMORY).stat().st_size
        end = (size + rom) // PAGE
        if held != size + rom or not _ordered(runs, end):
            raise ImageError(f"{path / MEMORY} has {held} bytes, expected {size + rom}")
        parent = memory["parent"]
        above = None
        if parent is not None:
            above = _load(path / parent["path"], depth - 1)
            if above.identity != parent["identity"] or (above.size, above.rom) != (size, rom):
                raise ImageError(f"{above.path} is not the snapshot that {path} was based on")
        return Snapshot(
            path=path,
            identity=str(manifest["identity"]),
            machine=dict(manifest["machine"]),
            state=dict(plain.loads(state_text, f"snapshot {path}")),
            size=size,
            rom=rom,
            runs=runs,
            digest=str(memory["sha256"]),
            disks={int(number): path / f"{DISK}{number}" for number in manifest["disks"]},
            parent=above,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(f"snapshot {path} is damaged ({error!r})") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _ordered(runs: Iterable[Run], end: int) -> bool:
    """Whether runs follow each other, without overlaps, below page ``end``."""
    at = 0
    for run in runs:
        if run.first < at or run.count <= 0:
            return False
        at = run.first + run.count
    return at <= end


def _manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        raise ImageError(f"{path} is no snapshot: it has no {MANIFEST}")
    outer = plain.loads(_read(path / MANIFEST, path), f"snapshot {path}")
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        raise ImageError(f"{path} is no snapshot of Ringfence's")
    if outer.get("version") != VERSION:
        raise ImageError(
            f"snapshot {path} has version {outer.get('version')!r}, expected {VERSION}:"
            " use the release that wrote it"
        )
    inner = outer.get("snapshot")
    if not isinstance(inner, dict) or _checksum(inner) != outer.get("sha256"):
        raise ImageError(f"{path / MANIFEST} was changed or damaged")
    return inner


def _checksum(inner: dict[str, Any]) -> str:
    return hashlib.sha256(plain.dumps(inner)).hexdigest()


def _read(file: Path, folder: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_JSON or file.parent != folder:
            raise ImageError(f"snapshot {folder} is damaged: {file.name}")
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: OSError) -> ImageError:
    return ImageError(f"snapshot {path} can't be read ({error.strerror}): is it complete?")


class Writer:
    """Writes one snapshot; leave the ``with`` block without `publish`, and nothing remains.

    Parameters
    ----------
    path : Path
        The folder that shall be the snapshot; it must not exist.

    Raises
    ------
    UsageError
        There is something at ``path``, or somebody else is writing a snapshot there.
    HostError
        The host refuses: no space, no permission.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._partial = self.path.with_name(f".{path.name}.partial")
        self._lock = -1
        self._memory: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._disks: tuple[int, ...] = ()

    def __enter__(self) -> Writer:
        with _host_errors(self.path):
            if os.path.lexists(self.path):
                raise UsageError(f"{self.path} exists: name a new folder for the snapshot")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            self._lock = os.open(self._partial, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._lock)
                self._lock = -1
                raise UsageError(f"another snapshot to {self.path} is under way") from error
            self._clear()
        return self

    def __exit__(self, *about: object) -> None:
        if self._lock >= 0:
            if self._partial.exists():
                shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def _clear(self) -> None:
        """Remove what someone left who was killed."""
        for each in self._partial.iterdir():
            each.unlink()

    def write(
        self,
        memory: GuestMemory,
        state: dict[str, Any],
        disks: Mapping[int, Disk],
        base: Snapshot | None,
        dirty: Sequence[Run],
    ) -> None:
        """Put RAM, state and ``disks``, by their numbers, on disk; the machine stands still.

        With a ``base``, only the pages ``dirty``, which were written since that.
        """
        with _host_errors(self.path):
            text = plain.dumps(state)
            (self._partial / STATE).write_bytes(text)
            runs = pages.all_pages(memory) if base is None else dirty
            view = memory.everything()
            with (self._partial / MEMORY).open("wb", buffering=0) as file:
                os.ftruncate(file.fileno(), memory.mapped)
                for run, filled in pages.split(view, runs):
                    if filled:
                        _write_all(file.fileno(), view, run)
            for number, disk in disks.items():
                _export(disk, self._partial / f"{DISK}{number}")
        self._disks = tuple(disks)
        self._state = {"file": STATE, "sha256": hashlib.sha256(text).hexdigest()}
        parent = None
        if base is not None:
            where = os.path.relpath(base.path.absolute(), self.path)
            parent = {"path": Path(where), "identity": base.identity}
        self._memory = {
            "size": memory.size,
            "rom": memory.mapped - memory.size,
            "runs": [[run.first, run.count] for run in runs],
            "parent": parent,
        }

    def publish(self, machine: dict[str, Any]) -> str:
        """Make the snapshot visible, whole and on stable storage; return its identity."""
        with _host_errors(self.path):
            with (self._partial / MEMORY).open("rb") as file:
                self._memory["sha256"] = _digest(file.fileno())
            identity = os.urandom(16).hex()
            inner = {
                "identity": identity,
                "created": int(time.time()),
                "machine": machine,
                "memory": self._memory,
                "state": self._state,
                "disks": self._disks,
            }
            outer = {
                "format": FORMAT,
                "version": VERSION,
                "sha256": _checksum(inner),
                "snapshot": inner,
            }
            text = json.dumps(json.loads(plain.dumps(outer)), indent=1)
            (self._partial / MANIFEST).write_text(text + "\n")
            for each in self._partial.iterdir():
                _sync(each)
            _sync(self._partial)
            self._partial.rename(self.path)
            _sync(self.path.parent)
        return identity


def _write_all(fd: int, view: memoryview, run: Run) -> None:
    at, end = run.offset, run.offset + run.length
    while at < end:
        at += os.pwrite(fd, view[at:end], at)


def _export(disk: Disk, path: Path) -> None:
    """Write what a disk holds to a raw, sparse file."""
    disk.flush()
    room = memoryview(bytearray(BLOCK))
    zeroes = bytes(BLOCK)
    with path.open("wb", buffering=0) as file:
        os.ftruncate(file.fileno(), disk.size)
        for at in range(0, disk.size, BLOCK):
            part = room[: min(BLOCK, disk.size - at)]
            disk.read(at, [part])
            if bytes(part) != zeroes[: len(part)]:
                write_full(file.fileno(), at, [part])


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(fd: int) -> str:
    """The checksum of a memory file: where runs of pages with contents begin, and their bytes."""
    size = os.fstat(fd).st_size
    total = hashlib.sha256(struct.pack("<Q", size))
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        expected = -1
        for run, filled in pages.split(view, pages.with_data(fd, size)):
            if not filled:
                continue
            if run.first != expected:
                total.update(struct.pack("<Q", run.first))
            total.update(view[run.offset : run.offset + run.length])
            expected = run.first + run.count
    return total.hexdigest()


@contextmanager
def _host_errors(path: Path) -> Iterator[None]:
    """Turn what the host refuses into an error that says what was to be written."""
    try:
        yield
    except OSError as error:
        advice = "make room" if error.errno == errno.ENOSPC else "check the folder"
        raise HostError(
            f"no snapshot was written to {path} ({error.strerror}): {advice} and try again"
        ) from error
