"""The socket device: packets one by one, and streams to real Unix sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.virtio.backends import Note
from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, Driver
from ringfence.devices.virtio import vsock
from ringfence.devices.virtio.vsock import (
    BUFFER,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Key,
    VirtioVsock,
)
from ringfence.devices.virtio.vsock_unix import UnixHost
from ringfence.errors import HostError, UsageError

CID = 3
PATIENCE = 20.0


class Guest:
    """A driver that speaks packets."""

    def __init__(self, drive: Drive, host: Note | UnixHost, cid: int = CID) -> None:
        self.device = VirtioVsock(cid, host)
        self.driver: Driver = drive(self.device)
        self.driver.start(messages=True)
        self.slot = 0
        self.places: dict[int, int] = {}
        self.waiting: list[tuple[int, tuple[int, int], bytes]] = []

    def listen(self, count: int = 16, length: int = 4096) -> None:
        """Add receive buffers."""
        for _ in range(count):
            at = BUFFERS + 0x40000 + self.slot * 0x1000
            self.slot = (self.slot + 1) % 64
            self.places[self.driver.rings[0].add([(at, length, True)])] = at
        self.driver.notify(0)

    def say(
        self, key: Key, op: int, data: bytes = b"", flags: int = 0, room: int = 65536,
        taken: int = 0, length: int = -1, kind: int = 1, cids: tuple[int, int] = (CID, 2),
    ) -> None:  # fmt: skip
        """Send a packet."""
        size = len(data) if length < 0 else length
        header = HEADER.pack(*cids, *key, size, kind, op, flags, room, taken)
        self.driver.memory.write(BUFFERS, header + data)
        segments = [(BUFFERS, len(header), False)]
        if data:
            segments.append((BUFFERS + len(header), len(data), False))
        self.driver.request(1, segments)

    def heard(self) -> list[tuple[int, Key, bytes]]:
        """Packets from the device: operation, connection, data."""
        found = []
        for name, length in self.driver.rings[0].used():
            raw = self.driver.memory.read(self.places.pop(name), length)
            source, target, host_port, guest_port, size, _, op, _, _, _ = HEADER.unpack_from(raw)
            assert (source, target, size) == (2, CID, length - HEADER.size)
            found.append((op, (guest_port, host_port), raw[HEADER.size :]))
        return found

    def await_packet(self, op: int) -> tuple[Key, bytes]:
        """Wait for a packet of a kind; others are kept."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.waiting += self.heard()
            for at, packet in enumerate(self.waiting):
                if packet[0] == op:
                    del self.waiting[at]
                    self.listen(1)
                    return packet[1], packet[2]
            assert time.monotonic() < deadline, f"no packet {op}: {self.waiting}"
            time.sleep(0.005)


A: Key = (1000, 2000)


@pytest.fixture
def host() -> Note:
    return Note()


@pytest.fixture
def guest(drive: Drive, host: Note) -> Guest:
    made = Guest(drive, host)
    made.listen()
    return made


def test_configuration(guest: Guest) -> None:
    assert (guest.driver.settings(0, 4), guest.driver.settings(4, 4)) == (CID, 0)


def test_a_connection_of_the_guest(guest: Guest, host: Note) -> None:
    guest.say(A, REQUEST)
    assert host.log == [("connect", A)]
    assert guest.heard() == []
    guest.device.accept(A)
    assert guest.heard() == [(RESPONSE, A, b"")]
    guest.say(A, RW, b"hello")
    guest.device.send(A, b"hi")
    assert host.log[1:] == [("data", A, b"hello")]
    assert guest.heard() == [(RW, A, b"hi")]
    guest.say(A, SHUTDOWN, flags=3)
    assert host.log[2:] == [("shut", A, 3)]
    guest.device.end(A)
    assert guest.heard() == [(RST, A, b"")]
    assert host.log[3:] == []


def test_a_connection_of_the_host(guest: Guest, host: Note) -> None:
    assert guest.device.request(A)
    assert not guest.device.request(A)
    assert guest.device.room(A) == 0
    assert guest.heard() == [(REQUEST, A, b"")]
    guest.say(A, RESPONSE, room=10)
    assert host.log == [("established", A)]
    assert guest.device.room(A) == 10
    guest.device.send(A, b"0123456789")
    assert guest.device.room(A) == 0
    guest.say(A, CREDIT_UPDATE, room=10, taken=4)
    assert host.log[1:] == [("credit", A)]
    assert guest.device.room(A) == 4
    guest.say(A, RST)
    assert host.log[2:] == [("ended", A)]


def test_credit_for_the_guest(guest: Guest, host: Note) -> None:
    guest.say(A, REQUEST)
    guest.device.accept(A)
    guest.heard()
    for _ in range(BUFFER // 4096):
        guest.say(A, RW, b"x" * 4096)
    assert guest.heard() == []
    guest.device.taken(A, BUFFER // 2)
    assert guest.heard() == [(CREDIT_UPDATE, A, b"")]
    guest.say(A, CREDIT_REQUEST)
    assert guest.heard() == [(CREDIT_UPDATE, A, b"")]
    for _ in range(BUFFER // 8192):
        guest.say(A, RW, b"x" * 4096)
    assert guest.heard() == []
    guest.say(A, RW, b"x")
    assert guest.heard() == [(RST, A, b"")]
    assert host.log[-1] == ("ended", A)


@pytest.mark.parametrize(
    "packet",
    [
        {"op": RW, "data": b"x"},
        {"op": RESPONSE},
        {"op": SHUTDOWN},
        {"op": CREDIT_REQUEST},
        {"op": 99},
        {"op": REQUEST, "kind": 2},
    ],
)
def test_packets_out_of_place_are_reset(guest: Guest, packet: dict[str, int]) -> None:
    guest.say(A, **packet)  # type: ignore[arg-type]
    assert guest.heard() == [(RST, A, b"")]


def test_packets_that_are_ignored(guest: Guest, host: Note) -> None:
    guest.say(A, RST)
    guest.say(A, REQUEST, cids=(4, 2))
    guest.say(A, REQUEST, cids=(CID, 1))
    guest.driver.request(1, [(BUFFERS, 20, False)])
    guest.driver.request(1, [(BUFFERS, 20, True)])
    assert guest.heard() == []
    assert host.log == []


@pytest.mark.parametrize("packet", [{"op": RW, "data": b"x", "length": 9}, {"op": 99}])
def test_broken_packets_end_a_connection(guest: Guest, host: Note, packet: dict[str, int]) -> None:
    guest.say(A, REQUEST)
    guest.device.accept(A)
    guest.heard()
    guest.say(A, **packet)  # type: ignore[arg-type]
    assert guest.heard() == [(RST, A, b"")]
    assert host.log[-1] == ("ended", A)


def test_long_data_in_short_buffers(guest: Guest) -> None:
    guest.say(A, REQUEST)
    guest.device.accept(A)
    guest.heard()
    used_up = len(guest.places)
    for _ in range(used_up):
        guest.device.send(A, b"-")
    guest.heard()
    guest.device.send(A, bytes(range(200)))
    guest.listen(3, HEADER.size)
    guest.listen(5, HEADER.size + 50)
    raw = [
        guest.driver.memory.read(guest.places[name], n) for name, n in guest.driver.rings[0].used()
    ]
    assert b"".join(each[HEADER.size :] for each in raw) == bytes(range(200))


def test_a_flood_waits_for_its_answers(drive: Drive, host: Note) -> None:
    guest = Guest(drive, host)
    taken = 0
    for number in range(vsock.MAX_PENDING + 50):
        guest.driver.memory.write(BUFFERS, HEADER.pack(CID, 2, number, 1, 0, 1, RW, 0, 0, 0))
        guest.driver.rings[1].add([(BUFFERS, HEADER.size, False)])
        guest.driver.notify(1)
        taken += len(guest.driver.rings[1].used())
        if number - taken > 40:
            break
    assert taken == vsock.MAX_PENDING
    for _ in range(12):
        guest.listen(32)
        guest.heard()
        if not guest.device._pending:
            break
    assert len(guest.driver.rings[1].used()) > 40
    assert not guest.device._pending


def test_a_host_that_is_behind(guest: Guest, host: Note) -> None:
    host.behind = True
    guest.say(A, REQUEST)
    assert host.log == []
    host.behind = False
    guest.device.resume()
    assert host.log == [("connect", A)]


def test_number_of_connections(guest: Guest, host: Note) -> None:
    for port in range(vsock.MAX_CONNECTIONS):
        guest.say((port, 1), REQUEST)
    guest.say((9999, 1), REQUEST)
    assert guest.heard() == [(RST, (9999, 1), b"")]
    guest.say((5, 1), REQUEST)
    assert host.log[-1] == ("ended", (5, 1))
    guest.driver.put(0x14, 1, 0)
    assert sum(entry[0] == "ended" for entry in host.log) == vsock.MAX_CONNECTIONS


def test_restored_device_has_no_connections(drive: Drive, guest: Guest) -> None:
    guest.say(A, REQUEST)
    other = Guest(drive, Note())
    other.device.restore(guest.device.save())
    other.driver.memory.write(BUFFERS, b"\xff" * 8)
    other.driver.rings[2].add([(BUFFERS, 8, True)])
    other.driver.notify(2)
    assert other.driver.rings[2].used() == [(other.driver.rings[2].size - 1, 4)]
    assert other.driver.memory.read(BUFFERS, 4) == bytes(4)


def test_restored_device_asks_for_no_connection_before_its_driver_knows(
    drive: Drive, guest: Guest
) -> None:
    other = Guest(drive, Note(), cid=77)
    other.device.restore(guest.device.save())
    other.listen()
    assert not other.device.request(A)
    other.driver.rings[2].add([(BUFFERS, 8, True)])
    other.driver.notify(2)
    assert not other.device.request(A)
    assert other.driver.settings(0, 4) == 77
    assert other.device.request(A)


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFF_FFFF, 1 << 64])
def test_addresses_that_no_guest_has(cid: int) -> None:
    with pytest.raises(UsageError, match="expected 3 to"):
        VirtioVsock(cid, Note())


# ---- Unix sockets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v.sock"


@pytest.fixture
def unix(path: Path) -> Iterator[UnixHost]:
    made = UnixHost(path)
    yield made
    made.close()
    assert not path.exists()


def dial(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(PATIENCE)
    made.connect(str(path))
    return made


def test_from_the_host(drive: Drive, unix: UnixHost, path: Path) -> None:
    guest = Guest(drive, unix)
    guest.listen()
    with dial(path) as stream:
        stream.sendall(b"CONNECT 77\nearly")
        key, _ = guest.await_packet(REQUEST)
        assert key[0] == 77
        guest.say(key, RESPONSE)
        assert stream.recv(100) == b"OK %d\n" % key[1]
        assert guest.await_packet(RW) == (key, b"early")
        guest.say(key, RW, b"answer")
        assert stream.recv(100) == b"answer"
        stream.shutdown(socket.SHUT_WR)
        guest.await_packet(SHUTDOWN)
        guest.say(key, RW, b"last", taken=5)
        assert stream.recv(100) == b"last"
        guest.say(key, SHUTDOWN, flags=3)
        assert stream.recv(100) == b""
        guest.await_packet(RST)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"HELLO\n",
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT 4294967296\n",
        b"C" * 100,
        b"A 1\n",
    ],
)
def test_bad_greetings(drive: Drive, unix: UnixHost, path: Path, line: bytes) -> None:
    guest = Guest(drive, unix)
    guest.listen()
    with dial(path) as stream:
        stream.sendall(line)
        with contextlib.suppress(ConnectionResetError):
            assert stream.recv(10) == b""
    assert guest.heard() == []


def test_refused_by_the_guest(drive: Drive, unix: UnixHost, path: Path) -> None:
    guest = Guest(drive, unix)
    guest.listen()
    with dial(path) as stream:
        stream.sendall(b"CONNECT 77\n")
        key, _ = guest.await_packet(REQUEST)
        guest.say(key, RST)
        assert stream.recv(10) == b""


def test_from_the_guest(drive: Drive, unix: UnixHost, path: Path) -> None:
    guest = Guest(drive, unix)
    guest.listen()
    guest.say((50, 600), REQUEST)
    assert guest.await_packet(RST) == ((50, 600), b"")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_600")
        listener.listen()
        guest.say((50, 600), REQUEST)
        guest.await_packet(RESPONSE)
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(PATIENCE)
            guest.say((50, 600), RW, b"hello")
            assert stream.recv(100) == b"hello"
            stream.sendall(b"goodbye")
            assert guest.await_packet(RW) == ((50, 600), b"goodbye")
        guest.await_packet(SHUTDOWN)


def test_much_data_with_little_credit(drive: Drive, unix: UnixHost, path: Path) -> None:
    guest = Guest(drive, unix)
    guest.listen()
    data = bytes(range(256)) * 400
    with dial(path) as stream:
        stream.sendall(b"CONNECT 1\n")
        key, _ = guest.await_packet(REQUEST)
        guest.say(key, RESPONSE, room=1000)
        assert stream.recv(100).startswith(b"OK")
        sender = threading.Thread(target=lambda: stream.sendall(data))
        sender.start()
        got = b""
        while len(got) < len(data):
            part = guest.await_packet(RW)[1]
            assert 0 < len(part) <= 1000
            got += part
            guest.say(key, CREDIT_UPDATE, room=1000, taken=len(got))
        assert got == data
        sender.join()


def test_paths(tmp_path: Path, path: Path) -> None:
    first = UnixHost(path)
    with pytest.raises(HostError):
        UnixHost(path)
    first.close()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    UnixHost(path).close()
    path.write_text("mine")
    with pytest.raises(HostError):
        UnixHost(path)
    assert path.read_text() == "mine"
    with pytest.raises(HostError):
        UnixHost(tmp_path / ("x" * 200))
    assert struct.calcsize("<QQIIIHHIII") == 44
