"""Random numbers and names for a guest, whose agent may not know what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.agent import renewal, wire
from ringfence.agent.wire import Kind
from ringfence.errors import HostError

DONE = wire.frame(Kind.EXIT, wire.NUMBER.pack(0))
FAILED = wire.frame(Kind.EXIT, wire.NUMBER.pack(1 << 8))
MACS = (b"\2\0\0\0\0\1", b"\2\0\0\0\0\2")


def test_stirred(answering: Callable[[bytes], Path]) -> None:
    renewal.stir(answering(DONE))


@pytest.mark.parametrize(
    ("answer", "message"), [(b"", "too old"), (b"x" * 100, "too old"), (FAILED, "kernel takes no")]
)
def test_not_stirred(answer: bytes, message: str, answering: Callable[[bytes], Path]) -> None:
    with pytest.raises(renewal.NotStirred, match=message):
        renewal.stir(answering(answer))


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no agent answers") as caught:
        renewal.stir(tmp_path / "vsock", patience=0)
    assert not isinstance(caught.value, renewal.NotStirred)


def test_named(answering: Callable[[bytes], Path]) -> None:
    renewal.rename(answering(DONE), "web", MACS, {})


def test_not_named(answering: Callable[[bytes], Path]) -> None:
    words = wire.frame(Kind.STDERR, b"x" * 9000 + b"\xff") + FAILED
    with pytest.raises(HostError, match=r"did not take its new name: x{4096}$"):
        renewal.rename(answering(words), "web", MACS, {})
    with pytest.raises(HostError, match="its new name: status 1"):
        renewal.rename(answering(FAILED), "web", MACS, {})
