"""The header of a qcow2 image, its extensions and its list of snapshots: read once, and checked.

Sections are those of QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import ImageError

MAGIC = b"QFI\xfb"
VERSION_2 = struct.Struct(">4sIQIIQIIQQIIQ")
"""Header, the first 72 bytes of every version."""
AUTOCLEAR_FEATURES = 88
"""Offset of the bits that a writer who doesn't know them has to clear."""
VERSION_3 = struct.Struct(">QQQII")
"""incompatible, compatible and autoclear features, refcount_order, header_length."""
EXTENSION = struct.Struct(">II")
BACKING_FORMAT = 0xE279_2ACA
"""Header extension: backing file format name."""
SNAPSHOT = struct.Struct(">QIHHIIQII")
"""Snapshot table entry: L1 offset and size, lengths of ID and name, times, state, extra data."""

# Incompatible features
DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
COMPRESSION_ZLIB, COMPRESSION_ZSTD = 0, 1

MAX_SIZE = 1 << 56
MAX_L1_ENTRIES = (32 << 20) // 8
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE = 64 << 20
MAX_BACKING_NAME = 1023


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An internal snapshot: its names, its L1 table, its size in bytes (0: the image's)."""

    identifier: str
    name: str
    l1_table_offset: int
    l1_size: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; fields by the specification's names."""

    path: Path
    version: int
    backing_file: str
    backing_format: str
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    refcount_order: int
    compression_type: int

    @classmethod
    def read(cls, fd: int, path: Path, *, writable: bool) -> Header:
        """Read the header of an open image.

        Raises
        ------
        ImageError
            It is no qcow2 image, it is damaged, or it needs what is not supported.
        """

        def need(condition: bool, what: str) -> None:
            if not condition:
                raise ImageError(f"{path} is no usable qcow2 image: {what}")

        file_size = os.fstat(fd).st_size
        raw = os.pread(fd, 4096, 0)
        need(len(raw) >= VERSION_2.size and raw[:4] == MAGIC, "it lacks the header")
        (
            _, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_size,
            l1_offset, reftable_offset, reftable_clusters, nb_snapshots, snapshots_offset,
        ) = VERSION_2.unpack_from(raw)  # fmt: skip
        need(version in (2, 3), f"version {version}, expected 2 or 3")
        incompatible, refcount_order, header_length = 0, 4, VERSION_2.size
        compression = COMPRESSION_ZLIB
        if version == 3:
            need(len(raw) >= 104, "its header is cut off")
            incompatible, _, _, refcount_order, header_length = VERSION_3.unpack_from(raw, 72)
            need(104 <= header_length <= len(raw), f"a header of {header_length} bytes")
            if incompatible & COMPRESSION:
                need(header_length > 104, "its header is too short")
                compression = raw[104]
        need(9 <= cluster_bits <= 21, f"clusters of 2^{cluster_bits} bytes")
        cluster = 1 << cluster_bits
        need(not crypt, "it is encrypted")
        need(not incompatible & EXTERNAL_DATA, "its data are in another file")
        need(not incompatible & ~(DIRTY | CORRUPT | COMPRESSION), "it has unknown features")
        need(compression in (COMPRESSION_ZLIB, COMPRESSION_ZSTD), "unknown compression")
        if writable:
            need(
                not incompatible & (DIRTY | CORRUPT),
                "it was not closed properly; repair it with 'qemu-img check -r all'",
            )
            need(refcount_order == 4, "refcounts of another width than 16 bits; open it read-only")
        need(refcount_order <= 6, f"refcounts of 2^{refcount_order} bits")
        need(512 <= size <= MAX_SIZE, f"a size of {size} bytes")
        need(0 < l1_size <= MAX_L1_ENTRIES, f"an L1 table of {l1_size} entries")
        for offset, length, what in (
            (l1_offset, 8 * l1_size, "L1 table"),
            (reftable_offset, reftable_clusters * cluster, "refcount table"),
        ):
            inside = offset > 0 and offset % cluster == 0 and offset + length <= file_size + cluster
            need(inside, f"its {what} is at {offset:#x}")
        need(
            0 < reftable_clusters * cluster <= MAX_REFTABLE_BYTES,
            f"a refcount table of {reftable_clusters} clusters",
        )
        need(nb_snapshots <= MAX_SNAPSHOTS, f"{nb_snapshots} snapshots")
        need(
            not nb_snapshots
            or (snapshots_offset % cluster == 0 and cluster <= snapshots_offset < file_size),
            f"its snapshot table is at {snapshots_offset:#x}",
        )
        backing, kind = "", ""
        if backing_offset:
            need(
                0 < backing_length <= MAX_BACKING_NAME
                and header_length <= backing_offset
                and backing_offset + backing_length <= min(cluster, file_size),
                "its backing file's name is out of place",
            )
            name = os.pread(fd, backing_length, backing_offset)
            need(b"\0" not in name, "its backing file's name has a NUL")
            backing = os.fsdecode(name)
            kind = _backing_format(os.pread(fd, cluster, 0), header_length)
        return cls(
            path, version, backing, kind, cluster_bits, size, l1_size, l1_offset, reftable_offset,
            reftable_clusters, nb_snapshots, snapshots_offset, refcount_order, compression,
        )  # fmt: skip

    def snapshots(self, fd: int) -> list[Snapshot]:
        """Read the snapshot table."""
        found = []
        at = self.snapshots_offset
        end = min(os.fstat(fd).st_size, at + MAX_SNAPSHOT_TABLE)
        for _ in range(self.nb_snapshots):
            raw = os.pread(fd, SNAPSHOT.size, at)
            if len(raw) < SNAPSHOT.size or at >= end:
                raise ImageError(f"{self.path}: its snapshot table is cut off")
            l1_offset, l1_size, id_length, name_length, _, _, _, _, extra = SNAPSHOT.unpack(raw)
            if extra > 1024 or not 0 < l1_size <= MAX_L1_ENTRIES:
                raise ImageError(f"{self.path}: a snapshot that can't be")
            rest = os.pread(fd, extra + id_length + name_length, at + SNAPSHOT.size)
            size = int.from_bytes(rest[8:16], "big") if extra >= 16 else 0
            if size > MAX_SIZE:
                raise ImageError(f"{self.path}: a snapshot of {size} bytes")
            text = rest[extra:]
            identifier = text[:id_length].decode("utf-8", "replace")
            name = text[id_length:].decode("utf-8", "replace")
            found.append(Snapshot(identifier, name, l1_offset, l1_size, size))
            length = SNAPSHOT.size + extra + id_length + name_length
            at += -(-length // 8) * 8
        return found


def _backing_format(cluster: bytes, at: int) -> str:
    """Find the extension that names the backing file's format."""
    while at + EXTENSION.size <= len(cluster):
        kind, length = EXTENSION.unpack_from(cluster, at)
        at += EXTENSION.size
        if not kind or at + length > len(cluster):
            break
        if kind == BACKING_FORMAT:
            return cluster[at : at + length].decode("ascii", "replace")
        at += -(-length // 8) * 8
    return ""
