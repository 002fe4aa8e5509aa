"""Functions of the dialect, run in Python (tests/cpu compares them with compiled ones)."""

from __future__ import annotations

from ringfence.native.dialect import native, native_inline
from ringfence.native.interpret import Interpreter

M64 = (1 << 64) - 1
CONSTANT = 0x10


@native_inline
def helper(value: int) -> int:
    """Wraps below zero."""
    return value - CONSTANT


@native
def sample(value: int, count: int) -> int:
    """A bit of everything."""
    total = 0
    for step in range(count):
        if step == 3:
            continue
        total += value * (step + 1) << 3
        total ^= ~helper(step)
    while total > 1 << 63 and not value & 2:
        total -= 1 << 63
    return -total if value & 1 else total


def test_arithmetic_wraps() -> None:
    run = Interpreter({}).function(sample)
    assert Interpreter({}).function(helper)(3) == 3 - CONSTANT & M64
    for value, count in ((0, 0), (M64, 5), (1 << 63, 7), (12345, 9)):
        total = 0
        for step in range(count):
            if step != 3:
                total = total + (value * (step + 1) << 3) & M64
                total ^= ~(step - CONSTANT) & M64
        while total > 1 << 63 and not value & 2:
            total -= 1 << 63
        assert run(value, count) == (-total & M64 if value & 1 else total)


def test_what_is_bound_is_called() -> None:
    seen: list[int] = []

    def bound(value: int) -> int:
        seen.append(value)
        return value - CONSTANT & M64

    run = Interpreter({"helper": bound}).function(sample)
    assert run(1, 2) == Interpreter({}).function(sample)(1, 2)
    assert seen == [0, 1]
