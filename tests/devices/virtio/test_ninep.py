"""The device for shared folders, between a driver and a folder of the host's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.virtio.backends import Inline
from devices.virtio.conftest import Drive
from devices.virtio.driver import BUFFERS, Driver
from ringfence.devices.virtio import ninep
from ringfence.devices.virtio.ninep import Virtio9p
from ringfence.errors import ImageError
from ringfence.sharing.messages import HEADER, NO_FID, VERSION, Kind
from ringfence.sharing.options import ShareOptions
from ringfence.sharing.session import FolderServer
from ringfence.storage.pool import IoPool
from sharing.client import pack

ANSWER = BUFFERS + 0x4000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    """A server of a folder with a file in it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(range(256)) * 1000)
    made = FolderServer(ShareOptions(folder, "source"))
    yield made
    made.close()


def send(driver: Driver, at: int, kind: int, body: bytes, room: int = 4096) -> None:
    """Put a request into the queue; the answer has a place of its own."""
    request = HEADER.pack(HEADER.size + len(body), kind, at) + body
    driver.memory.write(BUFFERS + 0x100 * at, request)
    segments = [
        (BUFFERS + 0x100 * at, HEADER.size, False),
        (BUFFERS + 0x100 * at + HEADER.size, len(body), False),
        (ANSWER + 0x1000 * at, 11, True),
        (ANSWER + 0x1000 * at + 11, room, True),
    ]
    driver.rings[0].add(segments)


def begin(driver: Driver) -> None:
    """A session with handle 0 the folder's, and 1 the open file's."""
    send(driver, 0, Kind.VERSION, pack("4s", 65536, VERSION))
    send(driver, 1, Kind.ATTACH, pack("44ss4", 0, NO_FID, b"root", b"", 0))
    send(driver, 2, Kind.WALK, pack("44n", 0, 1, [b"file"]))
    send(driver, 3, Kind.LOPEN, pack("44", 1, 2))
    driver.notify()


@pytest.mark.parametrize("packed", [False, True])
def test_on_a_thread(drive: Drive, server: FolderServer, packed: bool) -> None:
    pool = IoPool(1)
    device = Virtio9p(server, pool)
    driver = drive(device, packed=packed)
    assert driver.settings(0, 2) == 6
    assert bytes(driver.settings(2 + n, 1) for n in range(6)) == b"source"
    driver.start(1, size=128, packed=packed)
    begin(driver)
    for number in range(4, 20):
        send(driver, number, Kind.READ, pack("484", 1, 100 * number, 3000))
    driver.notify()
    device.quiesce()
    assert sorted(length for _, length in driver.rings[0].used())[-16:] == [3011] * 16
    expected = bytes(range(256)) * 1000
    for number in range(4, 20):
        data = driver.memory.read(ANSWER + 0x1000 * number + 11, 3000)
        assert data == expected[100 * number :][:3000]
    pool.close()


def test_on_the_spot(drive: Drive, server: FolderServer) -> None:
    """What needs no waiting has its answer with the notification, unless others are before it."""
    if not server._tree.remembers:
        pytest.skip("the host offers no paths from its cache for temporary files")
    pool = Inline()
    driver = drive(Virtio9p(server, pool))
    driver.start(1)
    begin(driver)
    ring = driver.rings[0]
    assert len(ring.used()) == 4
    pool.held = []
    for number, kind, body in (
        (4, Kind.GETATTR, pack("48", 1, 0x7FF)),
        (5, Kind.READ, pack("484", 1, 0, 3000)),
        (6, Kind.WRITE, pack("484", 1, 0, 4) + b"new!"),
        (7, Kind.GETATTR, pack("48", 1, 0x7FF)),
        (8, Kind.READ, pack("484", 1, 0, 4)),
    ):
        send(driver, number, kind, body)
        driver.notify()
    assert [length for _, length in ring.used()] == [160, 3011]
    assert len(pool.held) == 3, "a read behind a write comes after it"
    held, pool.held = pool.held, None
    for job in held:
        job()
    assert [length for _, length in ring.used()] == [11, 160, 15]
    assert driver.memory.read(ANSWER + 0x8000 + 11, 4) == b"new!"
    send(driver, 9, Kind.GETATTR, pack("48", 1, 0x7FF))
    driver.notify()
    assert len(ring.used()) == 1


def test_one_turn_on_the_spot_is_bounded(
    drive: Drive, server: FolderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not server._tree.remembers:
        pytest.skip("the host offers no paths from its cache for temporary files")
    monkeypatch.setattr(ninep, "TURN", 7000)
    pool = Inline()
    driver = drive(Virtio9p(server, pool))
    driver.start(1)
    begin(driver)
    driver.rings[0].used()
    pool.held = []
    for number in range(4, 10):
        send(driver, number, Kind.READ, pack("484", 1, 0, 3000))
    driver.notify()
    assert len(driver.rings[0].used()) == 3
    assert len(pool.held) == 3
    held, pool.held = pool.held, None
    for job in held:
        job()
    assert len(driver.rings[0].used()) == 3


def test_reset_in_flight(drive: Drive, server: FolderServer) -> None:
    pool = Inline()
    driver = drive(Virtio9p(server, pool))
    driver.start(1)
    pool.held = []
    begin(driver)
    driver.put(0x14, 1, 0)
    assert driver.status
    for job in pool.held:
        job()
    pool.held = None
    assert driver.status == 0
    assert server.save()["fids"] == []
    driver.start(1)
    begin(driver)
    assert len(driver.rings[0].used()) == 4
    assert len(server.save()["fids"]) == 2


def test_state(drive: Drive, server: FolderServer) -> None:
    driver = drive(Virtio9p(server, Inline()))
    driver.start(1)
    begin(driver)
    driver.rings[0].used()
    state = driver.function.save()
    server.reset()
    driver.function.restore(state)
    send(driver, 5, Kind.READ, pack("484", 1, 5, 10))
    driver.notify()
    assert driver.rings[0].used()[-1][1] == 21
    state["device"]["session"] = None
    with pytest.raises(ImageError, match="no session"):
        driver.function.restore(state)


def test_a_bug_costs_one_answer(
    drive: Drive, server: FolderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = drive(Virtio9p(server, Inline()))
    driver.start(1)
    monkeypatch.setattr(server, "handle", lambda request, reply: 1 // 0)
    send(driver, 0, Kind.VERSION, pack("4s", 65536, VERSION))
    driver.notify()
    assert [length for _, length in driver.rings[0].used()] == [0]
    monkeypatch.undo()
    begin(driver)
    assert len(driver.rings[0].used()) == 4
