"""Plain data as JSON, and back, with nothing changed on the way.

JSON has no bytes, no tuples, no paths, and only text as keys. What it lacks becomes an object with
the one reserved key ``#``, which names the kind; all else is written as it is, so that a snapshot
can be read by people. Reading makes nothing but the kinds below: no code runs because of data.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from ringfence.errors import ImageError

KIND, VALUE = "#", "value"
MAX_DEPTH = 64
"""Nesting that is accepted; a machine's state needs about ten."""


def dumps(data: Any) -> bytes:
    """Plain data as JSON; TypeError for anything else (a bug of who saved it)."""
    return json.dumps(_encode(data), separators=(",", ":")).encode()


def loads(text: bytes | memoryview, what: str) -> Any:
    """Read what `dumps` wrote; ``what`` names it in errors.

    Raises
    ------
    ImageError
        It is no JSON, or not of our making.
    """
    try:
        return _decode(json.loads(bytes(text)), 0)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise ImageError(f"{what} is damaged ({error}): take it anew") from error


def _encode(data: Any) -> Any:
    if data is None or isinstance(data, bool | str):
        return data
    if isinstance(data, int):
        return int(data)  # members of enumerations, too
    if isinstance(data, bytes | bytearray):
        return {KIND: type(data).__name__, VALUE: base64.b64encode(data).decode()}
    if isinstance(data, Path):
        return {KIND: "path", VALUE: str(data)}
    if isinstance(data, list):
        return [_encode(each) for each in data]
    if isinstance(data, tuple):
        return {KIND: "tuple", VALUE: [_encode(each) for each in data]}
    if isinstance(data, dict):
        if all(isinstance(key, str) and key != KIND for key in data):
            return {key: _encode(value) for key, value in data.items()}
        return {KIND: "dict", VALUE: [[_encode(k), _encode(v)] for k, v in data.items()]}
    raise TypeError(f"{type(data).__name__} is no plain data")


def _decode(data: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deeply nested")
    if isinstance(data, list):
        return [_decode(each, depth + 1) for each in data]
    if not isinstance(data, dict):
        if isinstance(data, float):
            raise ValueError("a fraction")
        return data
    if KIND not in data:
        return {key: _decode(value, depth + 1) for key, value in data.items()}
    kind, value = data[KIND], data[VALUE]
    if kind in ("bytes", "bytearray"):
        raw = base64.b64decode(value, validate=True)
        return raw if kind == "bytes" else bytearray(raw)
    if kind == "path":
        return Path(value)
    if kind == "tuple":
        return tuple(_decode(each, depth + 1) for each in value)
    if kind == "dict":
        return {_decode(k, depth + 1): _decode(v, depth + 1) for k, v in value}
    raise ValueError(f"unknown kind {kind!r}")
