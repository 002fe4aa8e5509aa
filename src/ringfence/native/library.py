"""Machine code of the dialect in memory, and images of it on the disk.

An *image* is a table of functions (JSON, behind its length in four bytes) and position-independent
code; ``compiler`` makes it, and only that needs LLVM. It depends on the Python sources, the
compiler and LLVM's version, so it is kept in the cache folder under their hash: a second start
neither parses the sources nor loads LLVM.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import inspect
import json
import os
import stat
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ringfence.native import dialect, layout
from ringfence.native.routine import executable


def source_key(modules: Sequence[ModuleType]) -> str:
    """Hash of the sources a unit is made of, of the compiler, and of LLVM's version."""
    digest = hashlib.blake2b(digest_size=16)
    own = [dialect, layout, sys.modules[__name__]]
    paths = [Path(inspect.getfile(module)) for module in (*own, *modules)]
    for path in (*paths, Path(__file__).with_name("compiler.py")):
        digest.update(path.read_bytes())
    digest.update(repr((_llvm_identity(), sys.version_info[:2])).encode())
    return digest.hexdigest()


def _llvm_identity() -> tuple[int, int]:
    """Size and time of the compiler's package file, found without importing it."""
    found = importlib.util.find_spec("llvmlite")
    if found is None or found.origin is None:
        return 0, 0
    status = Path(found.origin).with_name("_version.py").stat()
    return status.st_size, status.st_mtime_ns


def image_path(folder: Path, key: str, kind: str = "native") -> Path:
    """Where the optimized image of a unit, known by its `source_key`, is kept in a cache folder."""
    return folder / f"{kind}-{key}.o"


class Library:
    """Native functions in memory, callable by address or through ctypes.

    Parameters
    ----------
    image : bytes
        What `compiler.compile_image` made.

    Raises
    ------
    OSError
        The host allows no executable memory.
    """

    def __init__(self, image: bytes) -> None:
        (length,) = struct.unpack_from("<I", image)
        self._functions: dict[str, int] = json.loads(image[4 : 4 + length])
        self._base = executable(image[4 + length :])

    def address(self, name: str) -> int:
        """Host address of a native function; KeyError where there is none."""
        return self._base + self._functions[name]

    def function(self, name: str, arguments: int, *, long: bool = False) -> Any:
        """The function as a ctypes callable of 64-bit integers.

        Python's global lock is given away meanwhile if it may take ``long``; for what is over in
        microseconds that would cost more than it gives to others.
        """
        prototype = ctypes.CFUNCTYPE if long else ctypes.PYFUNCTYPE
        kind = prototype(ctypes.c_uint64, *[ctypes.c_uint64] * arguments)
        return kind(self.address(name))


def read_image(path: Path) -> bytes | None:
    """An image that we wrote ourselves and nothing has changed since, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            regular = stat.S_ISREG(status.st_mode)
            if not regular or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
            data = file.read()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if hashlib.blake2b(code, digest_size=32).digest() == digest else None


def write_image(path: Path, code: bytes) -> None:
    """Write an image and its digest at once; a full disk only costs the next start time."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.blake2b(code, digest_size=32).digest() + code)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove all files of a kind but the ``keep`` written last: other versions left them behind."""
    with contextlib.suppress(OSError):
        found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
        for path in found[: max(0, len(found) - keep)]:
            path.unlink(missing_ok=True)
