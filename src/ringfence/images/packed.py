"""Open packed streams by the suffix of their name, as packages and kernel modules have it.

Shape: one function that gives a readable stream; nothing is unpacked before it is read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from typing import IO, Any, cast

from ringfence.errors import HostError, ImageError


def open_packed(name: str, data: bytes | memoryview) -> IO[bytes]:
    """A stream of what ``data`` unpacks to; ``name`` tells by its suffix how it is packed.

    A name that ends in ".tar" or ".ko" is not packed. Reading may raise OSError, EOFError or
    lzma.LZMAError where the data is damaged.

    Raises
    ------
    ImageError
        The suffix is unknown.
    HostError
        The Python package that it takes is absent.
    """
    raw = io.BytesIO(data)
    match name.rpartition(".")[2]:
        case "tar" | "ko":
            return raw
        case "gz":
            return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
        case "xz" | "lzma":
            return cast("IO[bytes]", lzma.LZMAFile(raw))
        case "bz2":
            return cast("IO[bytes]", bz2.BZ2File(raw))
        case "zst":
            return io.BufferedReader(_ZstdStream(name, raw))
        case other:
            raise ImageError(f"{name} is packed with {other!r}: expected xz, zst, gz or bz2")


class _ZstdStream(io.RawIOBase):
    """A zstd stream whose damage is an OSError, as it is with the standard library's streams."""

    def __init__(self, name: str, packed: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise HostError(
                f"{name} is packed with zstd, which needs the Python package zstandard: add it"
            ) from error
        self._error = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._reader.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from error
