"""Framing of GDB's protocol: what is complete comes out, whatever else comes in."""

from __future__ import annotations

import random

import pytest

from ringfence.gdb.packets import (
    PACKET_MAX,
    PacketReader,
    ProtocolError,
    Signal,
    escape,
    frame,
    unescape,
)


def test_pieces() -> None:
    reader = PacketReader()
    stream = b"+" + frame(b"qSupported") + b"++\x03" + frame(b"?") + b"junk" + frame(b"m1,2")
    found = [each for at in range(len(stream)) for each in reader.feed(stream[at : at + 1])]
    assert found == [b"qSupported", Signal.INTERRUPT, b"?", b"m1,2"]


def test_checksums() -> None:
    reader = PacketReader()
    assert list(reader.feed(b"$g#00$g#67")) == [Signal.DAMAGED, b"g"]
    reader.checked = False
    assert list(reader.feed(b"$g#zz")) == [b"g"]


def test_too_long() -> None:
    assert list(PacketReader().feed(frame(b"x" * PACKET_MAX))) == [b"x" * PACKET_MAX]
    with pytest.raises(ProtocolError):
        list(PacketReader().feed(b"$" + b"x" * (PACKET_MAX + 2)))


def test_escapes() -> None:
    data = bytes(range(256))
    assert unescape(escape(data)) == data
    assert not set(b"#$*") & set(escape(data))
    assert unescape(b"}") == b" "


def test_noise() -> None:
    noise = random.Random(7)
    reader = PacketReader()
    for _ in range(300):
        try:
            list(reader.feed(noise.randbytes(noise.randrange(200))))
        except ProtocolError:
            reader = PacketReader()
