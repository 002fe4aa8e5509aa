"""Translations kept on disk: by content of the guest page, not by address.

One row of an SQLite database holds all known traces of one page content in one mode. The content's
hash is the key, so a kernel or a program is found again wherever it is mapped and whoever runs it;
position-dependent words are relocated when a row is placed. SQLite gives atomic writes, several
processes at once, and detection of torn files.

Rows are code that will be executed. So the file must belong to the user and be writable by nobody
else, every row carries a digest of its content, and everything depends on a version: a hash of the
translator's sources, of the CPU model and of iced-x86. What does not check out is dropped and made
again. Any trouble with the file costs time, never correctness: the run goes on without it.

Layout of a row's blob (little-endian): ``_HEAD`` (counts), the rows of ``StoredTrace``, relocation
pairs, marks, code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import struct
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ringfence.engine.translate.stored import STORED_BYTES
from ringfence.engine.translate.trace import Trace

FILE_NAME = "translations.rft"
MAXIMUM_BYTES = 1 << 30
"""A file that grew beyond this is emptied rather than added to."""
SPILL_BYTES = 8 << 20
"""Code that may wait in memory before it is written."""
_DIGEST = 16
_HEAD = struct.Struct("<4sIIII")
_MAGIC = b"RFT1"
_BUSY_SECONDS = 5.0


ROW_BYTES = STORED_BYTES
_ROW = struct.Struct("<Q16I")
assert _ROW.size == ROW_BYTES


@dataclass(slots=True)
class Stored:
    """All traces of one page content, as they come from the disk."""

    count: int
    rows: bytearray
    relocations: bytes
    marks: bytes
    code: bytes

    @property
    def lines(self) -> int:
        """Lines of the page that any of the traces depends on."""
        union = 0
        for (mask,) in struct.iter_unpack("<Q64x", self.rows):
            union |= mask
        return union

    def placed(self) -> None:
        """Free what only placing needs."""
        self.code = self.relocations = b""

    def traces(self) -> list[Trace]:
        """The traces as objects, for what happens rarely."""
        made = []
        for row in _ROW.iter_unpack(self.rows):
            (lines, offset, end, instructions, code, length, indirect, checked, local, reenter,
             reenter_local, relocation, relocations, mark, marks, swaps, _) = row  # fmt: skip
            pairs = array("i", self.relocations[relocation * 8 : (relocation + relocations) * 8])
            trace = Trace(
                offset,
                end,
                bytearray(self.code[code : code + length]),
                lines=lines,
                instructions=instructions,
                indirect=indirect,
                checked=checked,
                local=local,
                reenter=reenter,
                reenter_local=reenter_local,
                swaps=swaps,
                length=length,
                relocations=pairs,
                start=code,
            )
            trace.marks.frombytes(self.marks[mark * 4 : (mark + marks) * 4])
            made.append(trace)
        return made


def pack(traces: list[Trace]) -> bytes:
    """The blob of some traces."""
    rows, relocations, marks, code = bytearray(), bytearray(), bytearray(), bytearray()
    for trace in traces:
        rows += _ROW.pack(
            trace.lines,
            trace.offset,
            trace.end,
            trace.instructions,
            len(code),
            trace.length,
            trace.indirect,
            trace.checked,
            trace.local,
            trace.reenter,
            trace.reenter_local,
            len(relocations) // 8,
            len(trace.relocations) // 2,
            len(marks) // 4,
            len(trace.marks),
            trace.swaps,
            0,
        )
        relocations += trace.relocations.tobytes()
        marks += trace.marks.tobytes()
        code += trace.code
        code += bytes(-len(code) % 16)
    head = _HEAD.pack(_MAGIC, len(traces), len(relocations), len(marks), len(code))
    return bytes(head + rows + relocations + marks + code)


def unpack(blob: bytes) -> Stored:
    """The inverse of ``pack``; ValueError for a blob that is not one."""
    if len(blob) < _HEAD.size:
        raise ValueError("truncated")
    magic, count, relocations, marks, code = _HEAD.unpack_from(blob)
    at = _HEAD.size
    ends = [at + count * ROW_BYTES]
    for size in (relocations, marks, code):
        ends.append(ends[-1] + size)
    if magic != _MAGIC or ends[-1] != len(blob):
        raise ValueError("wrong layout")
    return Stored(
        count,
        bytearray(blob[at : ends[0]]),
        blob[ends[0] : ends[1]],
        blob[ends[1] : ends[2]],
        blob[ends[2] :],
    )


def _merge(known: Stored | None, fresh: list[Trace]) -> list[Trace]:
    """All traces of a page content, the newest of each address."""
    merged = {t.offset: t for t in (known.traces() if known else ())}
    merged.update((t.offset, t) for t in fresh)
    return list(merged.values())


class TranslationStore:
    """The translations of ``folder``, for one ``version`` of the translator."""

    def __init__(self, folder: Path, version: str) -> None:
        self.path = folder / FILE_NAME
        self.version = version
        self.fresh: defaultdict[bytes, list[Trace]] = defaultdict(list)
        self._waiting = 0
        self._database = self._open()

    def _open(self) -> sqlite3.Connection | None:
        """The database, made anew where it is missing, damaged, foreign or of another version."""
        for fresh in (False, True):
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if fresh or not self._is_ours():
                    self.path.unlink(missing_ok=True)
                    Path(f"{self.path}-journal").unlink(missing_ok=True)
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
                database = sqlite3.connect(
                    self.path,
                    timeout=_BUSY_SECONDS,
                    isolation_level=None,
                    check_same_thread=False,
                )
                self._prepare(database)
                return database
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    return None
            except (OSError, sqlite3.DatabaseError):
                continue
        return None

    def _is_ours(self) -> bool:
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return True
        regular = (status.st_mode & 0o170000) == 0o100000
        return regular and status.st_uid == os.getuid() and not status.st_mode & 0o022

    def _prepare(self, database: sqlite3.Connection) -> None:
        database.execute("PRAGMA synchronous = NORMAL")
        found = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        ).fetchall()
        if [name for (name,) in found] == ["pages", "version"]:
            row = database.execute("SELECT version FROM version").fetchone()
            if row == (self.version,):
                return
        database.execute("BEGIN IMMEDIATE")
        for (name,) in found:
            database.execute(f'DROP TABLE "{name}"')
        database.execute("CREATE TABLE version (version TEXT NOT NULL)")
        database.execute("INSERT INTO version VALUES (?)", (self.version,))
        database.execute("CREATE TABLE pages (key BLOB PRIMARY KEY, blob BLOB NOT NULL)")
        database.execute("COMMIT")

    @staticmethod
    def key(data: bytes, mode: int, wide: bool) -> bytes:
        """The key of a page's content in a mode."""
        salt = struct.pack("<II", mode, wide)
        return hashlib.blake2b(data, digest_size=_DIGEST, salt=salt).digest()

    def load(self, key: bytes) -> Stored | None:
        """What is known about a page content, by this run or an earlier one."""
        fresh = self.fresh.get(key)
        known = self._read(key)
        if fresh is None:
            return known
        return unpack(pack(_merge(known, fresh)))

    def _read(self, key: bytes) -> Stored | None:
        if self._database is None:
            return None
        try:
            row = self._database.execute("SELECT blob FROM pages WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            digest, blob = row[0][:_DIGEST], row[0][_DIGEST:]
            if hashlib.blake2b(blob, digest_size=_DIGEST, key=key).digest() != digest:
                return None
            return unpack(blob)
        except (sqlite3.Error, ValueError, TypeError):
            return None

    def remember(self, key: bytes, trace: Trace) -> None:
        """Keep a new trace; now and then, write what has come together and free its memory."""
        self.fresh[key].append(trace)
        self._waiting += trace.length
        if self._waiting > SPILL_BYTES:
            self.save()

    def save(self) -> None:
        """Write what is new; a full disk or a busy file only costs the next run time."""
        database = self._database
        self._waiting = 0
        if not self.fresh:
            return
        try:
            if database is None:
                raise OSError("no database")
            if self.path.stat().st_size > MAXIMUM_BYTES:
                database.execute("DELETE FROM pages")
                database.execute("VACUUM")
            database.execute("BEGIN IMMEDIATE")
            for key, traces in self.fresh.items():
                blob = pack(_merge(self._read(key), traces))
                digest = hashlib.blake2b(blob, digest_size=_DIGEST, key=key).digest()
                database.execute("INSERT OR REPLACE INTO pages VALUES (?, ?)", (key, digest + blob))
            database.execute("COMMIT")
        except (sqlite3.Error, OSError):
            with contextlib.suppress(sqlite3.Error):
                if database is not None and database.in_transaction:
                    database.execute("ROLLBACK")
        for traces in self.fresh.values():
            for trace in traces:
                trace.forget_code()
        self.fresh.clear()

    def close(self) -> None:
        """Save and close."""
        self.save()
        if self._database is not None:
            self._database.close()
            self._database = None
