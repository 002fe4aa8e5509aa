"""Interpreted functions of the dialect give what compiled ones give."""

from __future__ import annotations

import ctypes
import random

import pytest

from ringfence.cpu import msr, reset, state
from ringfence.engine.translate import natives
from ringfence.engine.translate.block import Vcpu
from ringfence.native.dialect import (
    ctz,
    mulhi,
    native,
    native_inline,
    popcount,
    sar,
    sext,
    sle,
    slt,
)
from ringfence.native.interpret import Interpreter
from ringfence.native.library import Library

M64 = (1 << 64) - 1
CONSTANT = 0x10


@native_inline
def helper(value: int) -> int:
    """Wraps below zero."""
    return value - CONSTANT


@native
def signed(left: int, right: int) -> int:
    """All arithmetic intrinsics."""
    total = slt(left, right) + 2 * sle(left, right) + sar(left, right & 63)
    return total ^ sext(left, 13) ^ mulhi(left, right) + popcount(left) * 64 + ctz(right)


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


def test_arithmetic_like_compiled() -> None:
    library = Library([signed, sample], [])
    source = random.Random("arithmetic")
    for made in (signed, sample):
        run = Interpreter({}).function(made)
        compiled = library.function(made.name, 2)  # type: ignore[attr-defined]
        for _ in range(300):
            left = source.getrandbits(source.choice([3, 13, 32, 64]))
            right = 9 if made is sample else source.choice([0, 1, 63, source.getrandbits(64)])
            assert run(left, right) == compiled(left, right), (left, right)


@pytest.fixture(scope="module")
def compiled() -> object:
    return natives.load(None)


def test_registers_like_compiled(compiled: object) -> None:
    """Reads and writes of model-specific registers, by both, on equal states."""
    source = random.Random("registers")
    run = Interpreter({"rdtsc": lambda: 0})
    blocks = [ctypes.create_string_buffer(Vcpu.size + 4096) for _ in range(2)]
    addresses = [ctypes.addressof(block) + 4095 & ~4095 for block in blocks]
    views = [Vcpu.at(address) for address in addresses]
    for view in views:
        reset.reset(view)
    read = compiled.function("read_msr", 2)  # type: ignore[attr-defined]
    write = compiled.function("write_msr", 3)  # type: ignore[attr-defined]
    indexes = [
        *range(0x200, 0x212), *range(0x250, 0x270), msr.PAT, msr.MTRR_DEF_TYPE, msr.MTRR_CAP,
        msr.HWCR, msr.DE_CFG, msr.VM_CR, msr.PATCH_LEVEL, msr.MISC_ENABLE, msr.MCG_STATUS,
        msr.TSC_ADJUST, msr.LSTAR, msr.KERNEL_GS_BASE, 0xC0010062, 0x12345, M64 >> 32,
    ]  # fmt: skip
    for _ in range(600):
        index = source.choice(indexes)
        value = source.choice(
            [source.getrandbits(64), 6, 0x0606060606060606, source.getrandbits(12), 0xC06, 1 << 47]
        )
        assert write(addresses[0], index, value) == run.function(msr.write_msr)(
            views[1], index, value
        )
        index = source.choice(indexes)
        assert read(addresses[0], index) == run.function(msr.read_msr)(views[1], index)
        assert views[0].value == views[1].value
    size = state.Cpu.offset_of("exc_vector")
    skipped = state.Cpu.offset_of("tsc_offset")
    left, right = (ctypes.string_at(address, size) for address in addresses)
    assert left[:skipped] == right[:skipped]
