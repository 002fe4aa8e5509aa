"""Disks that come and go in a running guest, by the command line's way to a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.api import names
from ringfence.api.server import published
from ringfence.cli import devices
from ringfence.errors import HostError, UsageError
from ringfence.images.store import Image
from ringfence.storage.options import open_disk, parse_disk

pytestmark = pytest.mark.boot

SIZE = 8 << 20
FIND = "until [ -e /dev/%s ]; do sleep 0.1; done; cat /sys/block/%s/serial"


def test_disks_come_and_go(
    cloud: Image, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for disk in (first, second):
        disk.write_bytes(bytes(SIZE))
    with (
        Machine(
            kernel=cloud.kernel, initrd=cloud.initrd, append=APPEND, cache_dir=cache, rng=True
        ) as machine,
        names.claim("plugged") as place,
        published(machine, place),
    ):
        with pytest.raises(UsageError, match="expected it to be running"):
            machine.add_disk(first)
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        devices.add("plugged", f"{first},serial=FIRST", as_json=True)
        assert json.loads(capsys.readouterr().out) == {"slot": 24}
        shell.run("modprobe virtio_blk; sleep 0.1")
        assert shell.run(FIND % ("vda", "vda")) == "FIRST"
        shell.run("echo written > /dev/vda; sync")
        with pytest.raises(HostError):
            devices.add("plugged", str(first), as_json=False)  # it is in use
        devices.add("plugged", f"{second},serial=SECOND", as_json=False)
        assert capsys.readouterr().out == "25\n"
        assert shell.run(FIND % ("vdb", "vdb")) == "SECOND"

        devices.remove("plugged", 24, timeout=60)
        assert shell.run("ls /dev/vd*") == "/dev/vdb\n"
        assert first.read_bytes()[:8] == b"written\n"
        open_disk(parse_disk(first)).close()  # nobody has it any more
        devices.show("plugged", as_json=True)
        assert [row["slot"] for row in json.loads(capsys.readouterr().out)] == [25]
        with pytest.raises(UsageError, match="no device in slot 24"):
            devices.remove("plugged", 24, timeout=60)
        machine.snapshot(tmp_path / "saved")

        shell.run("echo 0 > /sys/bus/pci/slots/25/power")  # the guest lets go by itself
        assert machine.config.disks == ()
        assert machine.add_disk(second) == 24
        assert shell.run(FIND % ("vda", "vda")) == ""

    with Machine.restore(tmp_path / "saved", cache_dir=cache) as again:
        again.start()
        shell.machine = again
        assert shell.run(FIND % ("vdb", "vdb")) == "SECOND"
        again.remove_disk(25, timeout=60)
        assert shell.run("ls /dev/vd*; true").endswith("No such file or directory\n")
