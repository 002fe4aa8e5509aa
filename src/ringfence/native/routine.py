"""A few bytes of machine code as a Python function, for what the dialect can't say.

Each routine has pages of its own, which are never writable and executable at once and live as long
as the process. The calling convention is the C one (System V).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

_pages: list[mmap.mmap] = []


def routine(code: bytes, *arguments: Any) -> Callable[..., int]:
    """A function that runs ``code`` with arguments of these ctypes types; RAX is its result.

    Raises
    ------
    OSError
        The host allows no executable memory.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        error = ctypes.get_errno()
        raise OSError(error, f"mprotect refused an executable page: {os.strerror(error)}")
    _pages.append(page)
    made: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_uint64, *arguments)(address)
    return made
