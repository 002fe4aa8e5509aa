"""The guest's time-stamp counter: the host's plus an offset that the vCPU owns."""

from __future__ import annotations

import mmap
import time
from ctypes import CFUNCTYPE, addressof, c_char, c_uint64
from functools import cache
from typing import Any

_CODE = bytes.fromhex("0f3148c1e2204809d0c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_SAMPLE_NS = 30_000_000


@cache
def _reader() -> Any:
    # Written while writable, then only executable.
    import ctypes

    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page[: len(_CODE)] = _CODE
    address = addressof(c_char.from_buffer(page))
    ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_EXEC
    )
    function = CFUNCTYPE(c_uint64)(address)
    _reader_pages.append(page)
    return function


_reader_pages: list[mmap.mmap] = []


def read_host_tsc() -> int:
    """The host's counter now."""
    return int(_reader()())


def _pair() -> tuple[int, int]:
    """The counter and the monotonic clock at one moment, the tightest of a few tries."""
    best = None
    for _ in range(8):
        before = time.monotonic_ns()
        ticks = read_host_tsc()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, ticks, (before + after) // 2)
    assert best is not None
    return best[1], best[2]


@cache
def _first() -> tuple[int, int]:
    return _pair()


@cache
def host_hz() -> int:
    """The counter's frequency in Hz, measured against the monotonic clock."""
    ticks, at = _first()
    wait = _SAMPLE_NS - (time.monotonic_ns() - at)
    if wait > 0:
        time.sleep(wait / 1e9)
    now_ticks, now = _pair()
    return (now_ticks - ticks) * 1_000_000_000 // (now - at)


class GuestTsc:
    """The counter as the guest reads it; ``view`` is the vCPU's state once there is one."""

    def __init__(self) -> None:
        _first()
        self.view: Any = None

    @property
    def hz(self) -> int:
        """Ticks per second."""
        return host_hz()

    def read(self) -> int:
        """The guest's counter now."""
        offset = self.view.tsc_offset if self.view is not None else 0
        return (read_host_tsc() + offset) & ((1 << 64) - 1)


def host_tsc() -> GuestTsc:
    """A counter for one machine."""
    return GuestTsc()
