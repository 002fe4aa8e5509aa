"""Whose connection a frame belongs to when a guest has moved."""

from __future__ import annotations

import socket
import struct

import pytest

from network.support import frame
from ringfence.network import succession
from ringfence.network.peer import NoFrames, Peer
from ringfence.network.succession import MAX_EARLY, Predecessor

GUEST, HOST = b"\x0a\x00\x02\x0f", b"\x0a\x00\x02\x02"
SYN, ACK, FIN = 2, 16, 1


def segment(flags: int, *, incoming: bool = False, port: int = 1000, options: int = 0) -> bytes:
    """A TCP segment of the guest's from ``port``, or the other way round."""
    ends = [(GUEST, port), (HOST, 80)]
    (source, near), (target, far) = reversed(ends) if incoming else ends
    head = bytes([0x45 + options // 4]) + bytes(8) + b"\x06\0\0" + source + target + bytes(options)
    tcp = struct.pack(">HHIIBBHHH", near, far, 0, 0, 0x50, flags, 0, 0, 0)
    return bytes(12) + b"\x08\x00" + head + tcp


@pytest.mark.parametrize("options", [0, 8])
def test_what_began_before_the_move_is_the_old_network_s(options: int) -> None:
    past = Predecessor()
    assert past.claims(segment(ACK, options=options))
    assert past.claims(segment(SYN | ACK, options=options))
    assert not past.claims(segment(SYN, options=options))
    assert not past.claims(segment(ACK, options=options))
    assert past.claims(segment(ACK, port=1001, options=options))


def test_what_comes_in_by_the_new_network_is_its_own() -> None:
    past = Predecessor()
    past.note(segment(ACK, incoming=True))
    assert past.claims(segment(ACK))
    past.note(segment(SYN, incoming=True))
    assert not past.claims(segment(SYN | ACK))


@pytest.mark.parametrize("cut", range(60))
def test_all_else_is_the_new_network_s(cut: int) -> None:
    past = Predecessor()
    whole = segment(ACK)
    assert past.claims(whole[:cut]) == (cut >= len(whole))
    assert not past.claims(frame(1)[:cut])
    assert not past.claims(whole[:23] + b"\x11" + whole[24:])  # UDP


def test_what_waits_and_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "MAX_FLOWS", 10)
    past = Predecessor()
    for port in range(10):
        assert not past.exhausted
        past.claims(segment(SYN, port=port))
    assert past.exhausted
    for number in range(2 * MAX_EARLY):
        past.send(frame(number))
    near, far = socket.socketpair()
    far.setblocking(False)
    with far:
        past.plug(Peer(near))
        assert past.peer is not None
        past.peer.flush()
        assert len(Peer(far).receive()) == MAX_EARLY
        near.close()


def test_a_line_that_ends_or_carries_noise() -> None:
    near, far = socket.socketpair()
    peer = Peer(near)
    near.setblocking(False)
    assert peer.receive() == []
    far.sendall(b"\0\0\0\x04fine" + b"\0")
    assert peer.receive() == [b"fine"]
    far.sendall(b"\xff" * 8)
    with pytest.raises(NoFrames):
        peer.receive()
    far.close()
    peer = Peer(near)
    with pytest.raises(ConnectionResetError):
        peer.receive()
    near.close()
