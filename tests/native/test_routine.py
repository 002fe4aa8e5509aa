"""Machine code as a Python function."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ringfence.native.routine import routine


def test_arguments_and_result() -> None:
    add = routine(bytes.fromhex("488d0437c3"), ctypes.c_uint64, ctypes.c_uint64)  # rdi + rsi
    assert add(5, 7) == 12
    assert add((1 << 64) - 1, 2) == 1


def test_its_page_can_t_be_written() -> None:
    made = routine(b"\xc3")
    address = ctypes.cast(made, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, protection = line.split()[:2]
        low, high = (int(each, 16) for each in span.split("-"))
        if low <= address < high:
            assert protection == "r-xp"
            return
    raise AssertionError("the routine is nowhere")
