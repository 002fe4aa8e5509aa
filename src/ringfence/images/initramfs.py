"""Write and read cpio archives of the "newc" kind, which Linux unpacks as its first file system.

The format is that of Documentation/driver-api/early-userspace/buffer-format.rst: per entry a
header of "070701" and thirteen 8-digit hexadecimal fields, the NUL-ended name, padding to 4 bytes,
the contents, padding to 4 bytes; an entry named "TRAILER!!!" ends the archive.

Shape: :class:`Archive` collects entries in a dictionary by path and renders them sorted, with
inode numbers counted up and all times 0, so that equal contents give equal bytes. Parent folders
appear by themselves. :func:`read_archive` is the inverse, for tests and for looking inside.
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ringfence.errors import ImageError, UsageError

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
_HEADER_SIZE = 110
_ALIGN = 4
_SIZE_LIMIT = 1 << 32


@dataclass(frozen=True)
class Entry:
    """One file: ``mode`` has the type bits of ``stat``; ``device`` is (major, minor) of a node."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Archive:
    """An initramfs in the making. Paths are relative to the root; all files belong to root."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        """All entries, parents before their children, in an order that depends on paths alone."""
        return iter(self._entries[path] for path in sorted(self._entries, key=_order))

    def __contains__(self, path: str) -> bool:
        return _normal(path) in self._entries

    def add_dir(self, path: str, mode: int = 0o755) -> None:
        """A folder; one that is there already gets the new mode."""
        self._add(Entry(_normal(path), stat.S_IFDIR | mode))

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file; replaces a file of that path."""
        if len(data) >= _SIZE_LIMIT:
            raise UsageError(f"{path} has {len(data)} bytes: a cpio archive takes less than 4 GiB")
        self._add(Entry(_normal(path), stat.S_IFREG | mode, bytes(data)))

    def add_symlink(self, path: str, target: str) -> None:
        """A symbolic link to ``target``, which is stored as it is."""
        self._add(Entry(_normal(path), stat.S_IFLNK | 0o777, target.encode()))

    def add_node(self, path: str, kind: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node: ``kind`` is "c" (character) or "b" (block)."""
        types = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}
        if kind not in types:
            raise UsageError(f"device node {path} of kind {kind!r}: expected 'c' or 'b'")
        self._add(Entry(_normal(path), types[kind] | mode, b"", (major, minor)))

    def pack(self, *, compress: bool = False) -> bytes:
        """The archive's bytes; gzip-packed (without a time stamp) on request."""
        out = bytearray()
        for inode, entry in enumerate(self, start=1):
            _emit(out, entry, inode)
        _emit(out, Entry(TRAILER, 0), 0)
        out += bytes(-len(out) % 512)
        return gzip.compress(bytes(out), 6, mtime=0) if compress else bytes(out)

    def add(self, entry: Entry) -> None:
        """An entry as it is, its path made relative to the root."""
        self._add(Entry(_normal(entry.path), entry.mode, entry.data, entry.device))

    def _add(self, entry: Entry) -> None:
        if not entry.path:
            raise UsageError("an initramfs entry needs a path: the root itself is always there")
        for parent in reversed(PurePosixPath(entry.path).parents):
            name = str(parent)
            if name == ".":
                continue
            known = self._entries.setdefault(name, Entry(name, stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(known.mode):
                raise UsageError(f"{entry.path} can't be in the initramfs: {name} is not a folder")
        self._entries[entry.path] = entry


def read_archive(data: bytes) -> list[Entry]:
    """The entries of an unpacked newc archive, up to its trailer.

    Raises
    ------
    ImageError
        The bytes are no newc archive or are cut off.
    """
    entries: list[Entry] = []
    at = 0
    while True:
        header = data[at : at + _HEADER_SIZE]
        if len(header) < _HEADER_SIZE or header[:6] not in (MAGIC, b"070702"):
            raise ImageError(
                f"the initramfs is damaged at byte {at}: expected a cpio header 070701"
            )
        try:
            fields = [int(header[i : i + 8], 16) for i in range(6, _HEADER_SIZE, 8)]
        except ValueError as error:
            raise ImageError(f"the initramfs is damaged at byte {at}: {error}") from error
        mode, size, major, minor, name_size = (fields[i] for i in (1, 6, 9, 10, 11))
        name_at = at + _HEADER_SIZE
        data_at = _up(name_at + name_size)
        if not name_size or data_at + size > len(data):
            raise ImageError(f"the initramfs is cut off inside the entry at byte {at}")
        name = data[name_at : name_at + name_size - 1].decode("utf-8", "surrogateescape")
        if name == TRAILER:
            return entries
        entries.append(Entry(name, mode, data[data_at : data_at + size], (major, minor)))
        at = _up(data_at + size)


def _emit(out: bytearray, entry: Entry, inode: int) -> None:
    name = entry.path.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    out += MAGIC + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % _ALIGN)
    out += entry.data
    out += bytes(-len(out) % _ALIGN)


def _order(path: str) -> tuple[str, ...]:
    return PurePosixPath(path).parts


def _normal(path: str) -> str:
    """A path as the archive names it: no leading slash, no "." or ".."."""
    parts = [part for part in PurePosixPath("/" + path).parts[1:] if part != "."]
    if ".." in parts or "\0" in path:
        raise UsageError(f"{path!r} can't be in an initramfs: expected a path without '..'")
    return "/".join(parts)


def _up(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
