"""The native dialect: what its operators mean, and what it refuses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Annotated, cast

import pytest

from ringfence.native.compiler import compile_image
from ringfence.native.dialect import (
    DialectError,
    Unit,
    mulhi,
    native,
    native_inline,
    sar,
    sext,
    slt,
)
from ringfence.native.layout import Array, Struct, u8, u16, u32, u64
from ringfence.native.library import Library, read_image, write_image

MASK = (1 << 64) - 1
VALUES = (0, 1, 2, 63, 64, 0x7F, 0x80, 0xFFFFFFFF, 1 << 63, MASK, 0x123456789ABCDEF0)


class Box(Struct):
    """One field of each kind."""

    small: Annotated[int, u8]
    wide: Annotated[int, u64]
    half: Annotated[int, u16]
    words: Annotated[Array, u32, 4]


@native
def arithmetic(a: int, b: int) -> int:
    """All operators, folded into one number."""
    total = (a + b) ^ (a - b) ^ (a * b) ^ (a & b) ^ (a | b) ^ ~a ^ -b
    total += (a << (b & 127)) ^ (a >> (b & 127))
    if b:
        total ^= (a // b) + (a % b)
    return total


@native
def signed(a: int, b: int) -> int:
    """The spelled-out signed operations."""
    return slt(a, b) | (sar(a, 4) << 8) ^ sext(b, 8) ^ mulhi(a, b)


@native_inline
def twice(a: int) -> int:
    """Inlined."""
    return a * 2


@native
def control(count: int) -> int:
    """Loops, conditions, short circuits."""
    total = 0
    for i in range(2, count):
        if (i % 3 == 0 and i > 5) or i == 4:
            continue
        if i > 40:
            break
        total += twice(i) if not i & 1 else i
    while total > 1000:
        total -= 7
    return total


@native
def fields(box: Box, value: int) -> int:
    """Stores narrow, loads zero-extend."""
    box.small = value
    box.half = value >> 4
    box.wide += value
    for i in range(4):
        box.words[i] = value + i
    return box.small + box.half + box.words[3]


@native
def pointed(address: int) -> int:
    """A local that points at a structure, another one in each round."""
    total = 0
    for i in range(3):
        box: Box = cast(Box, address + i * Box.size)
        total += box.half
        box.small = Box.offset_of("words")
    return total


@native
def counted(limit: int) -> int:
    """Calls that are made while compiling."""
    if limit in (5, 6) and limit not in (7, 5):
        return 0
    return limit + int("7") + max(2, 3)


@pytest.fixture(scope="module", params=[False, True], ids=["quick", "optimized"])
def library(request: pytest.FixtureRequest) -> Library:
    """The functions above, compiled."""
    roots = [arithmetic, signed, control, fields, pointed, counted]
    return Library(compile_image(roots, optimize=request.param))


def expected_arithmetic(a: int, b: int) -> int:
    shift = b & 127
    total = (a + b) ^ (a - b) ^ (a * b) ^ (a & b) ^ (a | b) ^ ~a ^ -b
    total = (total & MASK) + (((a << shift) & MASK) ^ (a >> shift))
    if b:
        total ^= (a // b) + (a % b)
    return total & MASK


@pytest.mark.parametrize("a", VALUES)
@pytest.mark.parametrize("b", VALUES)
def test_operators_wrap_and_are_unsigned(library: Library, a: int, b: int) -> None:
    assert library.function("arithmetic", 2)(a, b) == expected_arithmetic(a, b)


@pytest.mark.parametrize("a", VALUES)
@pytest.mark.parametrize("b", VALUES)
def test_signed_operations(library: Library, a: int, b: int) -> None:
    def sign(value: int, bits: int = 64) -> int:
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    less = int(sign(a) < sign(b))
    want = less | ((sign(a) >> 4 << 8) & MASK) ^ (sign(b, 8) & MASK) ^ (a * b >> 64)
    assert library.function("signed", 2)(a, b) == want


@pytest.mark.parametrize("count", [0, 3, 10, 41, 200])
def test_control_flow(library: Library, count: int) -> None:
    total = 0
    for i in range(2, count):
        if (i % 3 == 0 and i > 5) or i == 4:
            continue
        if i > 40:
            break
        total += i * 2 if not i & 1 else i
    while total > 1000:
        total -= 7
    assert library.function("control", 1)(count) == total


def test_structures(library: Library) -> None:
    memory = ctypes.create_string_buffer(Box.size)
    address = ctypes.addressof(memory)
    box = Box.at(address)
    box.wide = MASK
    value = 0x1_2345_6789
    got = library.function("fields", 2)(address, value)
    assert (box.small, box.half, box.wide) == (0x89, 0x5678, value - 1)
    assert list(box.words) == [(value + i) & 0xFFFFFFFF for i in range(4)]
    assert got == 0x89 + 0x5678 + ((value + 3) & 0xFFFFFFFF)


@native
def with_float(a: int) -> int:
    """Refused: no such type."""
    return a + undefined  # type: ignore[name-defined]  # noqa: F821


@native
def with_field(box: Box) -> int:
    """Refused: no such field."""
    return box.missing  # type: ignore[attr-defined]


@native
def with_object(a: int) -> int:
    """Refused: no such statement."""
    with a:  # type: ignore[attr-defined]
        return a


@pytest.mark.parametrize("function", [with_float, with_field, with_object])
def test_refusals_name_file_and_function(function: object) -> None:
    with pytest.raises(DialectError, match=rf"test_dialect\.py:\d+: {function.name}"):  # type: ignore[attr-defined]
        Unit([function]).ir()


def test_locals_that_point_at_structures(library: Library) -> None:
    block = ctypes.create_string_buffer(Box.size * 3)
    boxes = [Box.at(ctypes.addressof(block) + n * Box.size) for n in range(3)]
    for n, box in enumerate(boxes):
        box.half = 1000 * n
    assert library.function("pointed", 1)(ctypes.addressof(block)) == 3000
    assert [box.small for box in boxes] == [Box.offset_of("words")] * 3


def test_calls_of_ordinary_functions_are_constants(library: Library) -> None:
    assert [library.function("counted", 1)(n) for n in (4, 5, 6, 100)] == [14, 15, 0, 110]


def test_a_damaged_object_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "below" / "object"
    write_image(path, b"code")
    assert read_image(path) == b"code"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_image(path) is None
    path.write_bytes(whole)
    path.chmod(0o666)
    assert read_image(path) is None, "anybody could have written it"
    assert read_image(tmp_path / "none") is None


def test_an_object_that_can_t_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write_image(tmp_path / "file" / "object", b"code")
