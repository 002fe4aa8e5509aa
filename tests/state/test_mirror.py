"""Disks that are copied along with their machine, and what is written to them meanwhile."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence import Machine
from ringfence.errors import HostError, UsageError
from ringfence.state import mirror
from ringfence.state.mirror import PLACE, Copies
from ringfence.state.send import Progress
from ringfence.state.wire import Kind, LinkError, Message, MoveFailed
from ringfence.storage.raw import RawDisk
from ringfence.storage.tracked import BLOCK, Tracked
from state.moving import Line, Target, allow, cut_at, guest, lives, nothing

SIZE = 1 << 20


def make_disks(folder: Path) -> list[str]:
    """A disk, and one whose changes are thrown away."""
    data = random.Random(3).randbytes(SIZE // 2)
    (folder / "one").write_bytes(data + bytes(SIZE // 2))
    (folder / "two").write_bytes(bytes(SIZE // 2) + data)
    return [str(folder / "one"), f"{folder}/two,snapshot"]


def writer(machine: Machine) -> Callable[[Progress], None]:
    """What the guest would do while it moves: a write per disk at each step."""
    made = random.Random(5)

    def write(progress: Progress) -> None:
        if progress.stage in ("disks", "memory"):
            for device in machine._parts.devices.disks:
                piece = made.randbytes(512 * made.randrange(1, 200))
                device._disk.write(512 * made.randrange(1800), [memoryview(piece)])  # type: ignore[arg-type]

    return write


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "unix://{}/sock"])
def test_disks_go_along(tmp_path: Path, address: str) -> None:
    files = [tmp_path / "new one", tmp_path / "new two"]
    target = Target(address.format(tmp_path), allow(*files))
    with guest(disks=make_disks(tmp_path)) as machine:
        storage = machine._host.storage.disks
        machine.migrate(target.address, mirror=True, progress=writer(machine))
        kept = [disk.read_bytes(0, SIZE) for disk in storage]
        changed = (tmp_path / "two").read_bytes()
    moved = target.take()
    assert lives(moved)
    assert [file.read_bytes() for file in files] == kept
    assert kept[1] != changed  # the throw-away layer went along
    assert [options.path for options in moved.config.disks] == files
    target.close()


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "new one", tmp_path / "new two"]
    target = Target("tcp://127.0.0.1:0", allow(*files))
    with guest(disks=make_disks(tmp_path)) as machine:
        for position in (3000, 300_000, 1_100_000):
            line = Line(tmp_path, target.address, cut_at(position), nothing)
            with pytest.raises(MoveFailed, match="goes on here"):
                machine.migrate(line.address, mirror=True)
            line.close()
            assert target.failed.wait(60)
            target.failed.clear()
            assert not any(file.exists() for file in files)
            assert lives(machine)
        with monkeypatch.context() as patch:

            def full(*given: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(mirror, "write_full", full)
            with pytest.raises(MoveFailed, match="No space left on device"):
                machine.migrate(target.address, mirror=True)
        assert not any(file.exists() for file in files)
        files[1].write_bytes(b"precious")
        with pytest.raises(MoveFailed, match="File exists"):
            machine.migrate(target.address, mirror=True)
        assert files[1].read_bytes() == b"precious"
        assert not files[0].exists()
        files[1].unlink()
        machine.migrate(target.address, mirror=True)
    assert lives(target.take())
    target.close()


def test_as_many_files_as_disks(tmp_path: Path) -> None:
    target = Target("tcp://127.0.0.1:0", allow(tmp_path / "new"))
    with guest(disks=make_disks(tmp_path)) as machine:
        with pytest.raises(MoveFailed, match="brings 2 disks"):
            machine.migrate(target.address, mirror=True)
        assert lives(machine)
    target.close()


@pytest.mark.parametrize("sizes", [None, [0], ["1"], [1 << 60], [SIZE, SIZE], {}])
def test_sizes_that_are_none(tmp_path: Path, sizes: object) -> None:
    with pytest.raises((UsageError, HostError)):
        Copies([tmp_path / "new"], sizes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PLACE.pack(1, 0, 512) + bytes(512),
        PLACE.pack(0, SIZE, 512) + bytes(512),
        PLACE.pack(0, 1 << 63, 512),
        PLACE.pack(0, 0, 512) + bytes(511),
        PLACE.pack(0, 0, SIZE),
    ],
)
def test_pieces_that_are_none(tmp_path: Path, data: bytes) -> None:
    copies = Copies([tmp_path / "new"], [SIZE])
    with pytest.raises(LinkError):
        copies.take(Message(Kind.DISK, 0, data))
    copies.discard()


def test_notes(tmp_path: Path) -> None:
    make_disks(tmp_path)
    disk = RawDisk(tmp_path / "one")
    tracked = Tracked(disk)
    tracked.write(BLOCK - 512, [memoryview(bytes(1024))])
    tracked.discard(5 * BLOCK, 512)
    tracked.write_zeroes(SIZE - 512, 512)
    tracked.write_now(7 * BLOCK, [memoryview(bytes(512))])
    assert tracked.left == 5 * BLOCK
    assert tracked.take() == [
        (0, 2 * BLOCK), (5 * BLOCK, BLOCK), (7 * BLOCK, BLOCK), (15 * BLOCK, BLOCK),
    ]  # fmt: skip
    assert tracked.take() == []
    disk.close()
