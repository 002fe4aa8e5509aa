"""Undo the compressions that Linux kernels, initrds and Debian packages come in.

Shape: one table, magic bytes to decompressor. Each decompressor takes the packed bytes, which may
be followed by others (a kernel build appends the unpacked size as a 32-bit word, the linker adds
padding), and a ceiling for the result, so that no hostile file can fill the host's memory.
``zstandard`` and ``lz4`` are imported at their first use; the rest is in the standard library.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import mmap
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from ringfence.errors import HostError, ImageError

MAXIMUM_UNPACKED = 1 << 30
"""Bytes; the default ceiling of an unpacked image."""

LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_LEGACY_BLOCK = 8 << 20
"""Unpacked bytes per block, the last excepted (LZ4 frame format, section "Legacy frame")."""
_ZSTD_STEP = 4096
"""Packed bytes per step; even the best-packed zeros stay within some 100 MiB in one."""


Unpacked = bytes | memoryview


class _Broken(Exception):
    """The packed bytes are damaged; the text says how."""


def _gzip(data: memoryview, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    unpacked = stream.decompress(data, limit + 1)
    if not stream.eof and len(unpacked) <= limit:
        raise _Broken("it ends before its trailer")
    return unpacked


def _xz(data: memoryview, limit: int) -> bytes:
    return _through(lzma.LZMADecompressor(lzma.FORMAT_XZ), data, limit)


def _lzma(data: memoryview, limit: int) -> bytes:
    return _through(lzma.LZMADecompressor(lzma.FORMAT_ALONE), data, limit)


def _bzip2(data: memoryview, limit: int) -> bytes:
    return _through(bz2.BZ2Decompressor(), data, limit)


def _through(
    stream: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: memoryview, limit: int
) -> bytes:
    unpacked = stream.decompress(data, limit + 1)
    if not stream.eof and len(unpacked) <= limit:
        raise _Broken("it ends before its end marker")
    return unpacked


def _zstd(data: memoryview, limit: int) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise HostError(
            "a zstd-packed image needs the Python package zstandard: install it"
        ) from error
    stream = zstandard.ZstdDecompressor().decompressobj()
    blocks: list[bytes] = []
    total = 0
    try:
        for at in range(0, len(data), _ZSTD_STEP):
            blocks.append(stream.decompress(data[at : at + _ZSTD_STEP]))
            total += len(blocks[-1])
            if stream.eof or total > limit:
                return b"".join(blocks)
    except zstandard.ZstdError as error:
        raise _Broken(str(error)) from error
    raise _Broken("it ends before its last block")


def _lz4(data: memoryview, limit: int) -> memoryview:
    """The legacy frame: magic, then blocks of a 32-bit packed size and that many bytes.

    There is no end mark. What can't be a block (too few bytes, or a size beyond the rest) is the
    size word that the kernel build appends; it ends the frame. Blocks are gathered outside of
    malloc's heap, as they are large and soon gone, and on huge pages where the host has them.
    """
    try:
        import lz4.block
    except ImportError as error:
        raise HostError("an lz4-packed image needs the Python package lz4: install it") from error
    blocks = _lz4_blocks(data)
    if not blocks:
        raise _Broken("it has no whole block")
    room = min(len(blocks) * _LZ4_LEGACY_BLOCK, limit + _LZ4_LEGACY_BLOCK)
    unpacked = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        unpacked.madvise(mmap.MADV_HUGEPAGE)
    for block in blocks:
        if unpacked.tell() > limit:
            break
        try:
            unpacked.write(lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK))
        except lz4.block.LZ4BlockError as error:
            raise _Broken(str(error)) from error
    return memoryview(unpacked)[: unpacked.tell()]


def _lz4_blocks(data: memoryview) -> list[memoryview]:
    """The packed blocks of a legacy frame."""
    blocks = []
    at = 4
    while len(data) - at >= 4:
        word = bytes(data[at : at + 4])
        at += 4
        if word == LZ4_LEGACY_MAGIC:
            continue
        size, rest = int.from_bytes(word, "little"), len(data) - at
        if size == 0 or size > rest:
            if rest >= 64:
                raise _Broken(f"a block of {size} bytes is cut off after {rest}")
            break
        blocks.append(data[at : at + size])
        at += size
    return blocks


def _lzo(data: memoryview, limit: int) -> bytes:
    raise ImageError(
        "the image is packed with LZO, which is not supported: expected gzip, xz, zstd, lz4, bzip2"
        " or lzma; unpack it first (lzop -d) or give the vmlinux file"
    )


@dataclass(frozen=True)
class Compression:
    """A way of packing: ``name``, the ``magic`` it opens with, and how to undo it."""

    name: str
    magic: bytes
    undo: Callable[[memoryview, int], Unpacked]


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b\x08", _gzip),
    Compression("xz", b"\xfd7zXZ\x00", _xz),
    Compression("zstd", b"\x28\xb5\x2f\xfd", _zstd),
    Compression("lz4", LZ4_LEGACY_MAGIC, _lz4),
    Compression("bzip2", b"BZh", _bzip2),
    Compression("lzma", b"\x5d\x00\x00", _lzma),
    Compression("lzo", b"\x89LZO\x00\x0d\x0a\x1a\x0a", _lzo),
)
"""The packings of ``scripts/Makefile.lib`` in Linux, by the magic each opens with."""


def compression_of(data: bytes | memoryview) -> Compression | None:
    """The compression whose magic opens ``data``, or None."""
    head = bytes(data[:16])
    for compression in COMPRESSIONS:
        if head.startswith(compression.magic):
            return compression
    return None


def unpack(
    data: bytes | memoryview, what: str, limit: int = MAXIMUM_UNPACKED
) -> tuple[Unpacked, Compression]:
    """Unpack ``data``, whatever of :data:`COMPRESSIONS` it is packed with.

    Parameters
    ----------
    data : bytes
        The packed bytes; anything after their end is ignored.
    what : str
        What it is meant to be; used in messages.
    limit : int
        Ceiling of the unpacked size in bytes.

    Raises
    ------
    ImageError
        Unknown or unsupported compression, damaged data, or a result beyond ``limit``.
    """
    compression = compression_of(data)
    if compression is None:
        known = ", ".join(c.name for c in COMPRESSIONS if c.undo is not _lzo)
        raise ImageError(
            f"the {what} opens with {bytes(data[:6]).hex(' ') or 'nothing'}, no known compression:"
            f" expected one of {known}"
        )
    try:
        unpacked = compression.undo(memoryview(data), limit)
    except (_Broken, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise ImageError(
            f"the {what} is damaged, its {compression.name} data can't be unpacked ({error}):"
            " fetch it again"
        ) from error
    if len(unpacked) > limit:
        raise ImageError(
            f"the {what} unpacks to more than {limit >> 20} MiB: expected a smaller one"
        )
    return unpacked, compression
