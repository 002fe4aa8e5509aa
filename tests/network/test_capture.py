"""Captures: a file that other tools read, whatever goes wrong with it."""

from __future__ import annotations

import resource
import shutil
import signal
import struct
import subprocess

import pytest

from network.support import Card, frame
from ringfence.errors import HostError
from ringfence.network.capture import Capture


class Echo:
    """A backend that keeps all, and brings what the test says."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.calls: list[str] = []
        self.takes_large = True
        self.large: bool | None = None

    def attach(self, card) -> None:
        self.card = card

    def detach(self) -> None:
        self.calls.append("detach")

    def resume(self) -> None:
        self.calls.append("resume")

    def bring_large(self, wanted: bool) -> None:
        self.large = wanted

    def room(self) -> int:
        return 7

    def transmit(self, data: bytes) -> None:
        self.sent.append(data)

    def carry(self) -> None: ...

    def stats(self) -> dict[str, int]:
        return {"sent": len(self.sent)}

    def close(self) -> None:
        self.calls.append("close")


def records(data: bytes) -> list[bytes]:
    """The frames of a file."""
    magic, major, minor, _, _, _, kind = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, kind) == (0xA1B23C4D, 2, 4, 1)
    at, found = 24, []
    while at < len(data):
        _, nanoseconds, length, whole = struct.unpack_from("<IIII", data, at)
        assert nanoseconds < 1_000_000_000
        assert length == whole
        found.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return found


def test_what_goes_through_is_recorded(tmp_path) -> None:
    inner, card = Echo(), Card(room=1)
    wire = Capture(inner, tmp_path / "f.pcap")
    wire.attach(card)
    wire.transmit(frame(1))
    wire.carry()
    assert inner.card.receive([frame(2), frame(3)]) == 1, "refused: not on the wire yet"
    wire.transmit(frame(4, 1514))
    wire.carry()
    wire.resume()
    assert wire.room() == 7
    inner.card.more()
    assert card.told == 1
    wire.bring_large(True)
    assert wire.takes_large
    assert inner.large
    wire.detach()
    assert wire.stats() == {"sent": 2, "not_captured": 0}
    wire.close()
    wire.close()
    assert inner.calls == ["resume", "detach", "close", "close"]
    assert records((tmp_path / "f.pcap").read_bytes()) == [frame(1), frame(2), frame(4, 1514)]
    if shutil.which("tcpdump"):
        done = subprocess.run(
            ["tcpdump", "-r", tmp_path / "f.pcap"], capture_output=True, check=True, text=True
        )
        assert len(done.stdout.splitlines()) >= 3


def test_a_full_disk_costs_frames_only(tmp_path) -> None:
    """And the file stays readable: half a record is taken back."""
    inner, card = Echo(), Card()
    target = tmp_path / "f.pcap"
    wire = Capture(inner, target)
    wire.attach(card)
    wire.transmit(frame(1))
    wire.carry()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (target.stat().st_size + 30, limit[1]))
        wire.transmit(frame(2))
        wire.carry()
        assert inner.card.receive([frame(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    wire.transmit(frame(4))
    wire.carry()
    assert (inner.sent, card.frames) == ([frame(1), frame(2), frame(4)], [frame(3)])
    assert wire.stats()["not_captured"] == 2
    assert records(target.read_bytes()) == [frame(1), frame(4)]
    wire.close()
    wire.transmit(frame(5))
    wire.carry()
    assert wire.stats()["not_captured"] == 3


def test_a_folder_that_is_not_there(tmp_path) -> None:
    with pytest.raises(HostError, match="can't be written"):
        Capture(Echo(), tmp_path / "absent" / "f.pcap")


def test_no_room_for_the_header() -> None:
    """Frames behind it would be noise to whoever reads the file later."""
    with pytest.raises(HostError, match="no room"):
        Capture(Echo(), "/dev/full")
