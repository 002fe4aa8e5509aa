"""Machines on one socket: hub and peers, QEMU's framing, peers that misbehave or vanish."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import stat
import subprocess
import threading

import pytest

from network.support import Card, frame, until
from ringfence.errors import HostError, UsageError
from ringfence.network import stream
from ringfence.network.backend import MAXIMUM_FRAME
from ringfence.network.peer import BACKLOG, Peer
from ringfence.network.stream import SocketNetwork


@pytest.fixture
def path(tmp_path):
    return tmp_path / "wire"


@pytest.fixture
def join(path):
    """Join the wire with a card."""
    ends = []

    def made():
        end, card = SocketNetwork(path), Card()
        end.attach(card)
        ends.append(end)
        return end, card

    yield made
    for end in ends:
        end.close()


def raw(path) -> socket.socket:
    """A peer that speaks for itself."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(20)
    peer.connect(str(path))
    return peer


def packed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def test_three_on_a_wire(join) -> None:
    (first, one), (second, two), (third, three) = join(), join(), join()
    assert [end.hub for end in (first, second, third)] == [True, False, False]
    second.transmit(frame(2))
    second.carry()
    until(lambda: one.frames and three.frames)
    first.transmit(frame(1))
    first.carry()
    until(lambda: two.frames and len(three.frames) == 2)
    third.transmit(frame(3))
    third.carry()
    until(lambda: len(one.frames) == 2 and len(two.frames) == 2)
    assert one.frames == [frame(2), frame(3)]
    assert two.frames == [frame(1), frame(3)]
    assert three.frames == [frame(2), frame(1)]


def test_much_traffic_comes_whole(join) -> None:
    (first, one), (second, two) = join(), join()
    until(lambda: first._peers)  # what is sent to nobody is lost, as on any wire
    source = random.Random(5)
    frames = [frame(number, source.randrange(60, 9000)) for number in range(500)]
    for each in frames:
        first.transmit(each)
        first.carry()
        second.transmit(each)
        second.carry()
    until(lambda: len(one.frames) == 500 and len(two.frames) == 500)
    assert one.frames == two.frames == frames
    assert first.stats()["dropped_sending"] == 0


def test_the_format(join, path) -> None:
    """As QEMU's stream backend has it: big-endian length, frame."""
    end, card = join()
    peer = raw(path)
    data = packed(frame(1)) + packed(frame(2, 1514))
    for at in range(0, len(data), 7):
        peer.sendall(data[at : at + 7])
    until(lambda: len(card.frames) == 2)
    assert card.frames == [frame(1), frame(2, 1514)]
    end.transmit(frame(3))
    end.carry()
    assert peer.recv(100) == packed(frame(3))
    peer.close()


@pytest.mark.parametrize("prefix", [0, MAXIMUM_FRAME + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_that_no_frame_has_ends_the_connection(join, path, prefix) -> None:
    end, card = join()
    peer = raw(path)
    peer.sendall(packed(frame(1)) + prefix.to_bytes(4, "big") + bytes(100))
    assert peer.recv(1) == b""
    assert end.stats()["dropped_peers"] == 1
    other = raw(path)
    other.sendall(packed(frame(2)))
    until(lambda: frame(2) in card.frames)
    peer.close()
    other.close()


def test_noise(join, path) -> None:
    end, card = join()
    source = random.Random(11)
    for _ in range(30):
        peer = raw(path)
        with contextlib.suppress(OSError):
            peer.sendall(source.randbytes(source.randrange(1, 5000)))
        peer.close()
    peer = raw(path)
    peer.sendall(packed(frame(1)))
    until(lambda: frame(1) in card.frames)
    peer.close()
    until(lambda: not end._peers)


def test_short_frames_reach_no_card(join, path) -> None:
    end, card = join()
    peer = raw(path)
    for length in range(1, 14):
        peer.sendall(packed(bytes(length)))
    peer.sendall(packed(frame(1)))
    until(lambda: card.frames)
    assert card.frames == [frame(1)]
    assert end.stats()["dropped_receiving"] == 13
    peer.close()


def test_a_peer_that_does_not_read_costs_itself_only(join, path) -> None:
    end, _ = join()
    other, card = join()
    lazy = raw(path)
    until(lambda: len(end._peers) == 2)
    for number in range(3000):
        end.transmit(frame(number, 1514))
        end.carry()
        until(lambda sent=number: sent - len(card.frames) < 300)
    until(lambda: other.stats()["received"] == 3000)
    assert end.stats()["dropped_sending"] > 0
    assert all(len(peer.outgoing) <= BACKLOG for peer in end._peers.values())
    lazy.close()


def test_when_the_hub_goes_another_becomes_it(join, monkeypatch) -> None:
    monkeypatch.setattr(stream, "RETRY", 0.02)
    (first, _), (second, two), (third, three) = join(), join(), join()
    first.close()
    until(lambda: second.hub or third.hub)
    until(lambda: second._peers and third._peers)
    assert second.hub != third.hub
    second.transmit(frame(1))
    second.carry()
    third.transmit(frame(2))
    third.carry()
    until(lambda: two.frames and three.frames)
    assert (two.frames, three.frames) == ([frame(2)], [frame(1)])


def test_a_socket_left_behind_is_replaced(join, path) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(path))
    stale.close()
    end, _ = join()
    assert end.hub


def test_the_socket_is_the_user_s_own(join, path) -> None:
    join()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_many_at_once(path) -> None:
    """However they race, there is one hub, and all are on one wire."""
    ends: list[SocketNetwork] = []
    cards = [Card() for _ in range(8)]

    def enter(card: Card) -> None:
        end = SocketNetwork(path)
        end.attach(card)
        ends.append(end)

    threads = [threading.Thread(target=enter, args=(card,)) for card in cards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert sum(end.hub for end in ends) == 1
        hub = next(end for end in ends if end.hub)
        until(lambda: len(hub._peers) == 7)
        ends[0].transmit(frame(1))
        ends[0].carry()
        until(lambda: sum(len(card.frames) for card in cards) == 7)
    finally:
        for end in ends:
            end.close()


def test_another_file_is_left_alone(path) -> None:
    path.write_text("precious")
    with pytest.raises(HostError, match="can't be used"):
        SocketNetwork(path)
    assert path.read_text() == "precious"


def test_bad_paths(tmp_path) -> None:
    with pytest.raises(HostError, match="folder"):
        SocketNetwork(tmp_path / "absent" / "wire")
    with pytest.raises(UsageError, match="too long"):
        SocketNetwork(tmp_path / ("x" * 120))


def test_frames_are_cut_off_whole() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(ours)
    data = b"".join(packed(frame(number)) for number in range(5))
    found = []
    for byte in data:
        peer.incoming.append(byte)
        found += peer.frames()
    assert found == [frame(number) for number in range(5)]
    assert not peer.incoming
    ours.close()
    theirs.close()


def test_qemu_s_stream(join, path) -> None:
    """QEMU joins the wire, and its own user network answers from there."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is missing")
    end, card = join()
    arguments = [qemu, "-M", "none", "-display", "none", "-nodefaults"]
    for network in (
        f"stream,id=wire,server=off,addr.type=unix,addr.path={path}",
        "user,id=user",
        "hubport,hubid=1,id=one,netdev=wire",
        "hubport,hubid=1,id=two,netdev=user",
    ):
        arguments += ["-netdev", network]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: end._peers or process.poll() is not None)
            if process.poll() is not None:
                pytest.skip("this QEMU has no stream backend")
            request = bytes.fromhex(
                "ffffffffffff020000000001080600010800060400010200000000010a00020f"
            )
            end.transmit((request + bytes(6) + bytes([10, 0, 2, 2])).ljust(60, b"\0"))
            end.carry()
            until(lambda: card.frames)
        finally:
            process.kill()
    assert card.frames[0][12:14] + card.frames[0][28:32] == b"\x08\x06" + bytes([10, 0, 2, 2])
