"""Machine code in executable memory, and a few bytes of it as a Python function.

Each piece has pages of its own, which are never writable and executable at once and live as long as
the process. The calling convention is the C one (System V).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

_pages: list[mmap.mmap] = []


def executable(code: bytes) -> int:
    """Address of ``code`` in executable memory that lives as long as the process.

    Raises
    ------
    OSError
        The host allows no executable memory.
    """
    size = -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_EXEC):
        error = ctypes.get_errno()
        raise OSError(error, f"mprotect refused executable memory: {os.strerror(error)}")
    _pages.append(pages)
    return address


def routine(code: bytes, *arguments: Any) -> Callable[..., int]:
    """A function that runs ``code`` with arguments of these ctypes types; RAX is its result.

    It keeps Python's global lock, which would take longer to give away than the few bytes to run.

    Raises
    ------
    OSError
        The host allows no executable memory.
    """
    made: Callable[..., int] = ctypes.PYFUNCTYPE(ctypes.c_uint64, *arguments)(executable(code))
    return made
