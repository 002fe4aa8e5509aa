"""The one atomic operation of Python's on memory that native code shares: compare and exchange.

Native code runs in other threads without Python's lock, so what both change needs the processor's.
The few bytes of machine code keep Python's lock, and are a full barrier: what was stored before is
seen by others before anything is read behind it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from ringfence.native.routine import routine

_CODE = bytes.fromhex(
    "4889f0"  # mov rax, rsi
    "f0480fb117"  # lock cmpxchg [rdi], rdx
    "c3"  # ret
)


@cache
def compare_exchange() -> Callable[[int, int, int], int]:
    """A function of a host address, an old and a new value of 64 bits.

    It stores the new value if the old one is there, and returns what was there.
    """
    return routine(_CODE, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
