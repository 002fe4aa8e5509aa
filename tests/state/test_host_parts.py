"""What a machine has from its host goes along: disks that were added, shared folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence import Machine
from ringfence.chipset.pci.hotplug import BASE, EJECT
from ringfence.errors import RingfenceError
from ringfence.state.receive import Allowed
from ringfence.state.send import Progress
from ringfence.state.wire import MoveFailed
from state.moving import Target, guest, lives


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


def test_a_disk_that_was_added_and_a_folder(tmp_path: Path, disk: Path) -> None:
    """By migration, to a folder of another name, then by a snapshot."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    allowed = Allowed(
        engine="translate", disks=[disk], shares=[f"{there},tag=work"], cache_dir=None
    )
    target = Target("tcp://127.0.0.1:0", allowed)
    with guest(shares=[f"{here},tag=work"]) as machine:
        assert machine.add_disk(disk) == 24
        machine.migrate(target.address)
    arrived = target.take()
    assert [options.slot for options in arrived.config.disks] == [24]
    assert arrived.config.shares[0].path == there
    assert lives(arrived)
    arrived.snapshot(tmp_path / "saved")
    target.close()
    again = Machine.restore(tmp_path / "saved", engine="translate")
    with again:
        again.start()
        assert [options.slot for options in again.config.disks] == [24]
        assert lives(again)
    there.rmdir()
    with pytest.raises(RingfenceError, match="there"):
        Machine.restore(tmp_path / "saved", engine="translate")


def test_a_disk_that_goes_meanwhile(disk: Path) -> None:
    """The guest may let go of it at any moment: then the next attempt has none."""
    target = Target("tcp://127.0.0.1:0", Allowed(engine="translate", disks=[disk], cache_dir=None))
    with guest() as machine:
        machine.add_disk(disk)

        def let_go(progress: Progress) -> None:
            if progress.stage == "memory" and machine.config.disks:
                machine._parts.board.port_write(BASE + EJECT, 4, 1 << 24)

        with pytest.raises(MoveFailed, match=r"let go of a disk meanwhile.*goes on here"):
            machine.migrate(target.address, progress=let_go)
        assert lives(machine)
        machine.migrate(target.address)
    assert target.take().config.disks == ()
    target.close()
