"""qcow2 disks, versions 2 and 3: two levels of tables from guest clusters to clusters of the file.

The specification is QEMU's docs/interop/qcow2.txt; names are its names. The parts: `qcow2_header`
reads and checks the header, `qcow2_refcounts` counts who uses a cluster, this file maps and moves
data.

**What the file is like at any moment.** Data go to a newly allocated cluster at once, and so does
its refcount; the L2 entry that points to it stays in memory until the next flush, which first puts
data and refcounts on stable storage, then writes the entries, then syncs again. Clusters that are
no longer used are given up only after that. So whenever the process or the host dies, tables point
to complete data, and the worst that is left behind are leaked clusters. What was flushed is there.
The entries waiting are flushed also when they are many, and when the disk is closed.

**Locks.** One lock guards tables and refcounts. Reads and writes of clusters that are allocated and
not shared move their data without it.

**Hostile images.** Every offset in a table is checked for alignment and against the file's end,
every table for its size, before it is followed; data are never written over header or tables.
Backing files are opened read-only, in a format that the image has to name, and only in or below the
image's own folder unless the owner allows more.
"""

from __future__ import annotations

import os
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import ImageError, UsageError
from ringfence.memory.buffers import Buffers, scatter, split, total
from ringfence.storage.disk import Disk, Immediate, open_file, read_full, write_full
from ringfence.storage.qcow2_header import AUTOCLEAR_FEATURES, COMPRESSION_ZSTD, Header, Snapshot
from ringfence.storage.qcow2_refcounts import Refcounts

OFLAG_COPIED, OFLAG_COMPRESSED, OFLAG_ZERO = 1 << 63, 1 << 62, 1 << 0
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""Of L1 and L2 entries."""
L2_CACHE_BYTES = 8 << 20
DIRTY_ENTRIES = 4096
"""L2 entries that may wait for a flush."""
MAX_DEPTH = 16
"""Images in a backing chain."""


@dataclass(slots=True)
class _Table:
    """An L2 table in memory: where it is in the file, its entries, those not yet written."""

    offset: int
    entries: array[int]
    dirty: set[int]


class Qcow2Disk(Disk):
    """A qcow2 image.

    Parameters
    ----------
    path : Path
        The image.
    read_only : bool
        Refuse to write.
    direct : bool
        Not possible with qcow2: UsageError.
    any_backing : bool
        Follow names of backing files to anywhere.
    snapshot : str, optional
        ID or name of an internal snapshot to read instead of the present state; read-only.

    Raises
    ------
    ImageError, HostError
        The image can't be opened, is damaged, or needs something that is not supported.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        direct: bool = False,
        any_backing: bool = False,
        snapshot: str | None = None,
        depth: int = 0,
    ) -> None:
        if direct:
            raise UsageError("direct I/O is for raw disks: leave out 'direct' for a qcow2 image")
        self.read_only = read_only or snapshot is not None
        self._path = path
        self._backing: Disk | None = None
        self._lock = threading.RLock()
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self._dirty = 0
        self._given_up: list[tuple[int, int]] = []
        self._fd = open_file(path, read_only=self.read_only)
        self._now = Immediate(self._fd)
        try:
            self.header = Header.read(self._fd, path, writable=not self.read_only)
            self._cluster = 1 << self.header.cluster_bits
            self._l2_entries = self._cluster // 8
            self._table_limit = max(16, L2_CACHE_BYTES // self._cluster)
            self.size = self.header.size // 512 * 512
            l1_offset, l1_size = self.header.l1_table_offset, self.header.l1_size
            if snapshot is not None:
                found = self._find_snapshot(snapshot)
                l1_offset, l1_size = found.l1_table_offset, found.l1_size
                self.size = (found.size or self.header.size) // 512 * 512
            self._l1_offset = l1_offset
            self._l1 = self._read_table(l1_offset, l1_size)
            if l1_size * self._l2_entries * self._cluster < self.size:
                raise ImageError(f"{path}: its L1 table is too short for its size")
            self._refcounts: Refcounts | None = None
            if not self.read_only:
                self._refcounts = Refcounts(self._fd, self.header, path)
                self._protect()
                self._clear_features()
            if self.header.backing_file:
                self._backing = self._open_backing(any_backing, depth)
        except BaseException:
            os.close(self._fd)
            raise

    # ---- what a disk does

    def read(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.read`."""
        views = list(buffers)
        for start, length in self._pieces(offset, total(views)):
            part, views = split(views, length)
            with self._lock:
                entry = self._entry(start)
                if entry & OFLAG_COMPRESSED:
                    data = self._decompress(entry)
                    at = start % self._cluster
                    scatter(memoryview(data)[at : at + length], part)
                    continue
            self._read_cluster(entry, start, part)

    def write(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.write`."""
        views = list(buffers)
        for start, length in self._pieces(offset, total(views)):
            part, views = split(views, length)
            host = self._in_place(start)
            if host is None:
                with self._lock:
                    host = self._in_place(start)
                    if host is None:
                        self._write_new(start, part)
                        continue
            write_full(self._fd, host, part)

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.read_now`: inside a cluster whose table is known."""
        entry = self._entry_now(offset, total(buffers))
        if entry is None or entry & OFLAG_COMPRESSED:
            return False
        if (entry & OFLAG_ZERO and self.header.version >= 3) or (
            not entry and self._backing is None
        ):
            _zero(buffers)
            return True
        host = self._host(entry)
        return bool(host) and self._now.read(host + offset % self._cluster, buffers)

    def write_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.write_now`: inside a cluster that is ours and whose table is known."""
        entry = self._entry_now(offset, total(buffers))
        place = None if entry is None else self._place(entry, offset)
        return place is not None and self._now.write(place, buffers)

    def flush(self) -> None:
        """See `Disk.flush`."""
        if self.read_only:
            return
        with self._lock:
            self._commit()

    def discard(self, offset: int, length: int) -> None:
        """See `Disk.discard`: whole clusters are freed and read as zeroes."""
        self._clear(offset, length, partial=False)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """See `Disk.write_zeroes`."""
        del unmap
        self._clear(offset, length, partial=True)

    @property
    def locked(self) -> int | None:
        """See `Disk.locked`."""
        return self._fd

    def close(self) -> None:
        """See `Disk.close`."""
        if self._fd < 0:
            return
        try:
            self.flush()
        finally:
            os.close(self._fd)
            self._fd = -1
            if self._backing is not None:
                self._backing.close()

    @property
    def snapshots(self) -> list[Snapshot]:
        """The internal snapshots, in the file's order."""
        return self.header.snapshots(self._fd)

    # ---- opening

    def _find_snapshot(self, wanted: str) -> Snapshot:
        for each in self.snapshots:
            if wanted in (each.identifier, each.name):
                return each
        names = ", ".join(each.name for each in self.snapshots) or "none"
        raise UsageError(f"{self._path} has no snapshot {wanted!r}: expected one of {names}")

    def _protect(self) -> None:
        """Note where data must never be written."""
        assert self._refcounts is not None
        self._refcounts.protect(0, self._cluster)
        self._refcounts.protect(self._l1_offset, 8 * len(self._l1))
        for entry in self._l1:
            if entry:
                self._refcounts.protect(entry & OFFSET_MASK, self._cluster)
        if self.header.nb_snapshots:
            self._refcounts.protect(self.header.snapshots_offset, 1)

    def _clear_features(self) -> None:
        """Clear the autoclear bits, none of which we keep valid ("Header")."""
        if self.header.version >= 3:
            write_full(self._fd, AUTOCLEAR_FEATURES, [memoryview(bytes(8))])

    def _open_backing(self, any_backing: bool, depth: int) -> Disk:
        from ringfence.storage.raw import RawDisk

        name, kind = self.header.backing_file, self.header.backing_format
        if depth >= MAX_DEPTH:
            raise ImageError(f"{self._path}: more than {MAX_DEPTH} backing files, or a circle")
        folder = self._path.resolve().parent
        target = (folder / name).resolve()
        if not any_backing and not target.is_relative_to(folder):
            raise ImageError(
                f"{self._path} has its backing file in another folder ({target}): if you trust the"
                " image, add ',backing'"
            )
        if kind == "raw":
            return RawDisk(target, read_only=True)
        if kind == "qcow2":
            return Qcow2Disk(target, read_only=True, any_backing=any_backing, depth=depth + 1)
        raise ImageError(
            f"{self._path} doesn't say which format its backing file has"
            f" ({kind or 'nothing'}): tell it with 'qemu-img rebase -u -b … -F raw|qcow2'"
        )

    def _read_table(self, offset: int, count: int) -> array[int]:
        """Read ``count`` entries of a table."""
        end = -(-os.fstat(self._fd).st_size // 512) * 512
        if offset % self._cluster or not offset or offset + 8 * count > end:
            raise ImageError(f"{self._path}: a table at {offset:#x}+{8 * count:#x} can't be")
        entries = array("Q", bytes(8 * count))
        read_full(self._fd, offset, [memoryview(entries).cast("B")])
        entries.byteswap()
        return entries

    def _write_entries(self, place: int, entries: array[int]) -> None:
        """Write entries of a table to a place in the file."""
        entries.byteswap()
        write_full(self._fd, place, [memoryview(entries).cast("B")])
        entries.byteswap()

    # ---- tables

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a range at cluster boundaries."""
        end = offset + length
        while offset < end:
            part = min(self._cluster - offset % self._cluster, end - offset)
            yield offset, part
            offset += part

    def _table(self, offset: int) -> _Table | None:
        """Return the L2 table for a guest offset, or None where there is none. With the lock."""
        index = offset // self._cluster // self._l2_entries
        table = self._tables.get(index)
        if table is not None:
            self._tables.move_to_end(index)
            return table
        host = self._l1[index] & OFFSET_MASK
        if not host:
            return None
        return self._remember(index, _Table(host, self._read_table(host, self._l2_entries), set()))

    def _remember(self, index: int, table: _Table) -> _Table:
        self._tables[index] = table
        if len(self._tables) > self._table_limit:
            old, oldest = next(iter(self._tables.items()))
            if oldest.dirty:
                self._commit()
            del self._tables[old]
        return table

    def _entry(self, offset: int) -> int:
        """Return the L2 entry for a guest offset; 0 where there is none. With the lock."""
        table = self._table(offset)
        return 0 if table is None else table.entries[offset // self._cluster % self._l2_entries]

    def _entry_now(self, offset: int, length: int) -> int | None:
        """Return the L2 entry for a range inside one cluster, if that needs no waiting."""
        number, at = divmod(offset, self._cluster)
        if at + length > self._cluster or not self._lock.acquire(blocking=False):
            return None
        try:
            table = self._tables.get(number // self._l2_entries)
            return None if table is None else table.entries[number % self._l2_entries]
        finally:
            self._lock.release()

    def _set_entry(self, offset: int, value: int) -> None:
        """Change an L2 entry; the file's is changed by `_commit`. With the lock."""
        table = self._writable_table(offset)
        index = offset // self._cluster % self._l2_entries
        table.entries[index] = value
        if index not in table.dirty:
            table.dirty.add(index)
            self._dirty += 1

    def _writable_table(self, offset: int) -> _Table:
        """Return the L2 table for a guest offset, made or copied if it is not ours alone."""
        index = offset // self._cluster // self._l2_entries
        table = self._table(offset)
        entry = self._l1[index]
        if table is not None and entry & OFLAG_COPIED:
            return table
        new = self._allocate()
        assert self._refcounts is not None
        entries = array("Q", bytes(self._cluster)) if table is None else table.entries[:]
        if table is not None:
            self._given_up.append((table.offset, 1))
            self._refcounts.unprotect(table.offset, self._cluster)
        # A new table is written whole and empty of what is not on disk, then the L1 entry: both may
        # come before the data that later entries point to.
        self._write_entries(new, entries)
        self._refcounts.protect(new, self._cluster)
        self._tables.pop(index, None)
        made = self._remember(index, _Table(new, entries, set()))
        os.fdatasync(self._fd)
        self._l1[index] = new | OFLAG_COPIED
        self._write_entries(self._l1_offset + 8 * index, self._l1[index : index + 1])
        return made

    def _commit(self) -> None:
        """Put everything on stable storage, in the order that never points to nothing."""
        os.fdatasync(self._fd)
        if not self._dirty and not self._given_up:
            return
        for table in self._tables.values():
            for first, last in _runs(table.dirty):
                self._write_entries(table.offset + 8 * first, table.entries[first:last])
            table.dirty.clear()
        self._dirty = 0
        os.fdatasync(self._fd)
        if self._refcounts is not None:
            given_up, self._given_up = self._given_up, []
            for offset, clusters in given_up:
                self._refcounts.release(offset, clusters)

    # ---- clusters

    def _allocate(self) -> int:
        if self._refcounts is None:
            raise ImageError(f"{self._path} is open read-only")
        return self._refcounts.allocate()

    def _host(self, entry: int) -> int:
        """Return the file offset of a standard cluster, checked; 0 where there is none."""
        host = entry & OFFSET_MASK
        if host % self._cluster:
            raise ImageError(f"{self._path}: a cluster at {host:#x} can't be")
        return host

    def _read_cluster(self, entry: int, start: int, part: Buffers) -> None:
        """Fill ``part`` from inside one cluster that is not compressed."""
        if entry & OFLAG_ZERO and self.header.version >= 3:
            _zero(part)
            return
        host = self._host(entry)
        if host:
            read_full(self._fd, host + start % self._cluster, part)
        elif self._backing is None or start >= self._backing.size:
            _zero(part)
        else:
            inside, beyond = split(part, self._backing.size - start)
            self._backing.read(start, inside)
            _zero(beyond)

    def _in_place(self, start: int) -> int | None:
        """Return where in the file a guest offset can be written as it is, or None."""
        with self._lock:
            table = self._table(start)
            if table is None:
                return None
            entry = table.entries[start // self._cluster % self._l2_entries]
        return self._place(entry, start)

    def _place(self, entry: int, start: int) -> int | None:
        """Return where in the file an L2 entry lets a guest offset be written, or None."""
        if not entry & OFLAG_COPIED or entry & (OFLAG_COMPRESSED | OFLAG_ZERO):
            return None
        host = self._host(entry)
        if not host or self._refcounts is None:
            return None
        self._refcounts.check(host)
        return host + start % self._cluster

    def _write_new(self, start: int, part: Buffers) -> None:
        """Write into a cluster that has none of its own yet. With the lock."""
        if self.read_only:
            raise ImageError(f"{self._path} is open read-only")
        base = start - start % self._cluster
        old = self._entry(base)
        at = start - base
        views = list(part)
        if total(views) < self._cluster:
            whole = memoryview(bytearray(self._cluster))
            if old & OFLAG_COMPRESSED:
                whole[:] = self._decompress(old)
            else:
                self._read_cluster(old, base, [whole])
            for view in views:
                whole[at : at + len(view)] = view
                at += len(view)
            views = [whole]
        host = self._allocate()
        write_full(self._fd, host, views)
        self._replace(base, old, host | OFLAG_COPIED)

    def _replace(self, base: int, old: int, new: int) -> None:
        """Exchange an L2 entry and give up what the old one had. With the lock."""
        self._set_entry(base, new)
        if old & OFLAG_COMPRESSED:
            offset, length = self._compressed_place(old)
            first = offset // self._cluster
            last = (offset + length - 1) // self._cluster
            self._given_up.append((first * self._cluster, last - first + 1))
        elif self._host(old) and self._host(old) != self._host(new):
            self._given_up.append((self._host(old), 1))
        if self._dirty > DIRTY_ENTRIES or len(self._given_up) > DIRTY_ENTRIES:
            self._commit()

    def _clear(self, offset: int, length: int, *, partial: bool) -> None:
        """Make whole clusters read as zeroes, and with ``partial`` the parts at the ends, too."""
        zero_flag = OFLAG_ZERO if self.header.version >= 3 else 0
        for start, part in self._pieces(offset, length):
            whole = not start % self._cluster and part == min(self._cluster, self.size - start)
            possible = zero_flag or self._backing is None
            if whole and possible:
                with self._lock:
                    old = self._entry(start)
                    if old != zero_flag and (old or self._backing is not None):
                        self._replace(start, old, zero_flag)
            elif partial:
                self.write(start, [memoryview(bytes(part))])

    # ---- compressed clusters

    def _compressed_place(self, entry: int) -> tuple[int, int]:
        """Return file offset and length of a compressed cluster's data ("L2 table entry")."""
        shift = 62 - (self.header.cluster_bits - 8)
        offset = entry & (1 << shift) - 1
        sectors = (entry & OFLAG_COMPRESSED - 1) >> shift
        return offset, (sectors + 1) * 512 - offset % 512

    def _decompress(self, entry: int) -> bytes:
        offset, length = self._compressed_place(entry)
        packed = bytearray(length)
        read_full(self._fd, offset, [memoryview(packed)])
        try:
            if self.header.compression_type == COMPRESSION_ZSTD:
                import zstandard

                with zstandard.ZstdDecompressor().stream_reader(bytes(packed)) as reader:
                    data = reader.read(self._cluster)
            else:
                data = zlib.decompressobj(-12).decompress(packed, self._cluster)
        except Exception as error:
            raise ImageError(f"{self._path}: a compressed cluster is damaged ({error})") from error
        if len(data) != self._cluster:
            raise ImageError(f"{self._path}: a compressed cluster is too short")
        return data


def _zero(views: Buffers) -> None:
    for view in views:
        view[:] = bytes(len(view))


def _runs(indexes: set[int]) -> Iterator[tuple[int, int]]:
    """Join indexes to half-open runs."""
    first = last = -1
    for index in sorted(indexes):
        if index != last:
            if first >= 0:
                yield first, last
            first = index
        last = index + 1
    if first >= 0:
        yield first, last
