"""Plain data through JSON."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import ImageError
from ringfence.state import plain


class Colour(IntEnum):
    RED = 3


@pytest.mark.parametrize(
    "data",
    [
        None,
        True,
        -1,
        1 << 64,
        "text with \u20ac",
        b"\0\xff",
        bytearray(b"x"),
        [1, [2, (3, "4")]],
        {"a": {"b": b"c"}},
        {1: 2, "#": b"odd"},
        Path("/tmp/x"),
        (),
    ],
)
def test_it_comes_back_as_it_was(data: Any) -> None:
    back = plain.loads(plain.dumps(data), "test")
    assert back == data
    assert type(back) is type(data)


def test_enumerations_become_integers() -> None:
    assert type(plain.loads(plain.dumps(Colour.RED), "test")) is int


@pytest.mark.parametrize("data", [object(), 1.5, {1, 2}, print])
def test_what_is_not_plain_is_a_bug(data: Any) -> None:
    with pytest.raises(TypeError):
        plain.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"1.5",
        b'{"#": "bytes"}',
        b'{"#": "bytes", "value": "?"}',
        b'{"#": "bytes", "value": 3}',
        b'{"#": "object", "value": "os.system"}',
        b'{"#": "tuple", "value": 3}',
        b'{"#": "dict", "value": [[1]]}',
        b'{"#": "dict", "value": [[[], 1]]}',
        b'{"#": [], "value": 0}',
        b"[" * 200 + b"]" * 200,
        b"[" * 100_000,
        b"NaN",
    ],
)
def test_noise_is_refused(text: bytes) -> None:
    with pytest.raises(ImageError, match="the thing is damaged"):
        plain.loads(text, "the thing")
