"""What the CPU does, interpreted: functions run in Python give what compiled ones give."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.cpu import msr, reset, state
from ringfence.native.dialect import (
    ctz,
    mulhi,
    native,
    popcount,
    sar,
    sext,
    sle,
    slt,
)
from ringfence.native.interpret import Interpreter

M64 = (1 << 64) - 1


@native
def signed(left: int, right: int) -> int:
    """All arithmetic intrinsics."""
    total = slt(left, right) + 2 * sle(left, right) + sar(left, right & 63)
    return total ^ sext(left, 13) ^ mulhi(left, right) + popcount(left) * 64 + ctz(right)


def test_arithmetic(build_natives: Callable[..., Any]) -> None:
    compiled = build_natives(sys.modules[__name__]).function("signed", 2)
    run = Interpreter({}).function(signed)
    source = random.Random("arithmetic")
    for _ in range(300):
        left = source.getrandbits(source.choice([3, 13, 32, 64]))
        right = source.choice([0, 1, 63, source.getrandbits(64)])
        assert run(left, right) == compiled(left, right), (left, right)


INDEXES = [
    *range(0x200, 0x212), *range(0x250, 0x270), msr.PAT, msr.MTRR_DEF_TYPE, msr.MTRR_CAP,
    msr.HWCR, msr.DE_CFG, msr.VM_CR, msr.PATCH_LEVEL, msr.MISC_ENABLE, msr.MCG_STATUS,
    msr.TSC_ADJUST, msr.LSTAR, msr.KERNEL_GS_BASE, 0xC0010062, 0x12345, 0xFFFFFFFF,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_registers(build_natives: Callable[..., Any], seed: int) -> None:
    """Reads and writes of model-specific registers, by both, on equal states."""
    library = build_natives(msr)
    read, write = library.function("read_msr", 2), library.function("write_msr", 3)
    run = Interpreter({"rdtsc": lambda: 0})
    rooms = [ctypes.create_string_buffer(state.Cpu.size + 64) for _ in range(2)]
    addresses = [ctypes.addressof(room) + 63 & ~63 for room in rooms]
    views = [state.Cpu.at(address) for address in addresses]
    for view in views:
        reset.reset(view)
    source = random.Random(seed)
    for _ in range(200):
        index = source.choice(INDEXES)
        value = source.choice(
            [source.getrandbits(64), 6, 0x0606060606060606, source.getrandbits(12), 0xC06, 1 << 47]
        )
        interpreted = run.function(msr.write_msr)(views[1], index, value)
        assert write(addresses[0], index, value) == interpreted
        index = source.choice(INDEXES)
        assert read(addresses[0], index) == run.function(msr.read_msr)(views[1], index)
        assert views[0].value == views[1].value
    for view in views:
        view.tsc_offset = 0  # writes of TSC_ADJUST move it by a real counter in compiled code
    size = state.Cpu.offset_of("exc_vector")
    left, right = (ctypes.string_at(address, size) for address in addresses)
    assert left == right
