"""Refcounts of a qcow2 image: who uses a cluster, and where a free one is.

16 bits per cluster (refcount_order 4), in blocks of one cluster, found through the refcount table.
Blocks are read when needed, kept, and written through: an allocation is in the file (though not yet
on stable storage) before anything can point to the cluster. Clusters are allocated at the first gap
behind the last allocation, and finally at the file's end.

When the table has no more room, a larger one is written behind the file's end, and the header is
changed in one write to point to it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from ringfence.errors import ImageError
from ringfence.storage.disk import read_full, write_full
from ringfence.storage.qcow2_header import MAX_REFTABLE_BYTES, Header

REFTABLE_FIELDS = 48
"""Offset in the header of refcount_table_offset and refcount_table_clusters."""
OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00


class Refcounts:
    """Refcounts of an image that is open for writing; not thread-safe."""

    def __init__(self, fd: int, header: Header, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._cluster = 1 << header.cluster_bits
        self._per_block = self._cluster // 2
        self._table_offset = header.refcount_table_offset
        length = header.refcount_table_clusters * self._cluster
        data = bytearray(length)
        read_full(fd, self._table_offset, [memoryview(data)])
        self._table = list(struct.unpack(f">{length // 8}Q", data))
        self._blocks: dict[int, bytearray] = {}
        self._end = -(-os.fstat(fd).st_size // self._cluster)
        """First cluster behind the file."""
        self._next = 0
        self._protected: set[int] = set()
        self.protect(self._table_offset, length)
        for entry in self._table:
            if entry:
                self.protect(entry & OFFSET_MASK, self._cluster)

    def protect(self, offset: int, length: int) -> None:
        """Note that header or tables are there: data must never be."""
        self._protected.update(range(offset, offset + length, self._cluster))

    def unprotect(self, offset: int, length: int) -> None:
        """Note that there is no table any more."""
        self._protected.difference_update(range(offset, offset + length, self._cluster))

    def check(self, offset: int) -> None:
        """Raise ImageError if data at ``offset`` would overwrite header or tables."""
        if offset in self._protected:
            raise ImageError(
                f"{self._path} is damaged: data at {offset:#x}, where a table is; repair it with"
                " 'qemu-img check -r all'"
            )

    def get(self, cluster: int) -> int:
        """Return how many users a cluster has, by its number."""
        block = self._block(cluster // self._per_block)
        if block is None:
            return 0
        at = 2 * (cluster % self._per_block)
        return int.from_bytes(block[at : at + 2], "big")

    def allocate(self) -> int:
        """Take a free cluster; return its file offset."""
        cluster = self._find()
        self.check(cluster * self._cluster)
        self._set(cluster, 1)
        self._next = cluster + 1
        return cluster * self._cluster

    def release(self, offset: int, clusters: int) -> None:
        """Give up one use of each of some clusters."""
        first = offset // self._cluster
        for cluster in range(first, first + clusters):
            count = self.get(cluster)
            if not count:
                raise ImageError(f"{self._path}: a cluster in use has no refcount; check the image")
            self._set(cluster, count - 1)
            if count == 1:
                self._next = min(self._next, cluster)

    def _find(self) -> int:
        cluster = self._next
        while cluster < self._end:
            index, at = divmod(cluster, self._per_block)
            block = self._block(index)
            if block is None:
                return cluster
            found = block.find(b"\0\0", 2 * at)
            while found > 0 and found % 2:
                found = block.find(b"\0\0", found + 1)
            if found >= 0 and index * self._per_block + found // 2 < self._end:
                return index * self._per_block + found // 2
            cluster = (index + 1) * self._per_block
        self._end = max(self._end, self._next) + 1
        return self._end - 1

    def _block(self, index: int) -> bytearray | None:
        """Return a refcount block, or None where there is none."""
        block = self._blocks.get(index)
        if block is None and index < len(self._table):
            offset = self._table[index] & OFFSET_MASK
            if not offset:
                return None
            if offset % self._cluster or offset >= os.fstat(self._fd).st_size:
                raise ImageError(f"{self._path}: a refcount block at {offset:#x} can't be")
            block = bytearray(self._cluster)
            read_full(self._fd, offset, [memoryview(block)])
            self._blocks[index] = block
        return block

    def _set(self, cluster: int, count: int) -> None:
        index = cluster // self._per_block
        block = self._block(index)
        if block is None:
            block = self._new_block(index)
        at = 2 * (cluster % self._per_block)
        block[at : at + 2] = count.to_bytes(2, "big")
        place = (self._table[index] & OFFSET_MASK) + at
        write_full(self._fd, place, [memoryview(block)[at : at + 2]])

    def _new_block(self, index: int) -> bytearray:
        """Make a refcount block at the file's end; often it counts itself."""
        if index >= len(self._table):
            self._grow_table(index + 1)
            made = self._block(index)  # to count the table itself
            if made is not None:
                return made
        self._end = max(self._end, (index * self._per_block) + 1)
        place, self._end = self._end, self._end + 1
        block = bytearray(self._cluster)
        if place // self._per_block == index:
            at = 2 * (place % self._per_block)
            block[at : at + 2] = b"\0\1"
        write_full(self._fd, place * self._cluster, [memoryview(block)])
        self._blocks[index] = block
        self.protect(place * self._cluster, self._cluster)
        os.fdatasync(self._fd)
        self._table[index] = place * self._cluster
        entry = struct.pack(">Q", self._table[index])
        write_full(self._fd, self._table_offset + 8 * index, [memoryview(entry)])
        if place // self._per_block != index:
            self._set(place, 1)
        return block

    def _grow_table(self, entries: int) -> None:
        """Move the refcount table to the file's end, with room for more."""
        old_offset, old_clusters = self._table_offset, len(self._table) * 8 // self._cluster
        clusters = max(2 * old_clusters, -(-8 * entries // self._cluster) + 1)
        if clusters * self._cluster > MAX_REFTABLE_BYTES:
            raise ImageError(f"{self._path} can't grow any more: its refcount table is full")
        first, self._end = self._end, self._end + clusters
        table = self._table + [0] * (clusters * self._cluster // 8 - len(self._table))
        offset = first * self._cluster
        # What the table itself takes is counted in it before the header points to it; blocks that
        # are made for that go behind it.
        write_full(self._fd, offset, [memoryview(struct.pack(f">{len(table)}Q", *table))])
        self._table, self._table_offset = table, offset
        self.protect(offset, clusters * self._cluster)
        for cluster in range(first, first + clusters):
            self._set(cluster, 1)
        os.fdatasync(self._fd)
        fields = struct.pack(">QI", offset, clusters)
        write_full(self._fd, REFTABLE_FIELDS, [memoryview(fields)])
        os.fdatasync(self._fd)
        self.unprotect(old_offset, old_clusters * self._cluster)
        self.release(old_offset, old_clusters)
