"""A guest that is saved, and goes on in another machine or another process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import Shell, environment
from ringfence import Machine
from ringfence.images.store import Image
from ringfence.life import State
from ringfence.storage.options import DiskOptions

pytestmark = pytest.mark.boot

COUNTER = "i=0; while sleep 0.1; do i=$((i+1)); echo count-$i.; done &\n"


@pytest.fixture(scope="module")
def saved(cloud: Image, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """A snapshot of a guest that counts, and one of what changed until it had counted further."""
    folder = tmp_path_factory.mktemp("snapshots")
    disk = folder / "disk.img"
    disk.write_bytes(b"before".ljust(1 << 20, b"\0"))
    with Machine(
        kernel=cloud.kernel,
        initrd=cloud.initrd,
        append="console=ttyS0 panic=-1",
        engine="translate",
        cache_dir=cache,
        memory="256M",
        disks=[DiskOptions(disk, "raw")],
        rng=True,
    ) as machine:
        machine.start()
        Shell(machine).take_over()
        machine.console.send(COUNTER)
        machine.console.wait_for("count-3.", 60)
        machine.snapshot(folder / "one", incremental=True)
        assert machine.state is State.RUNNING
        machine.console.wait_for("count-9.", 60)
        machine.snapshot(folder / "two", base=folder / "one")
        machine.console.wait_for("count-11.", 60)
    yield folder


@pytest.mark.parametrize(("name", "count"), [("one", 3), ("two", 9), ("one", 3)])
def test_the_guest_goes_on_where_it_was(saved: Path, cache: Path, name: str, count: int) -> None:
    with Machine.restore(saved / name, engine="translate", cache_dir=cache, verify=True) as machine:
        assert machine.state is State.READY
        machine.start()
        found = machine.console.wait_for(re.compile(r"count-\d+\."), 60)
        number = re.findall(r"count-(\d+)\.", found)
        assert int(number[0]) in (count, count + 1, count + 2)
        shell = Shell(machine)
        assert "before" in shell.run("kill %1; wait; head -c 6 /dev/vda")
        # Nobody else sees what this one does.
        shell.run("echo AFTER | dd of=/dev/vda conv=notrunc; sync; dd if=/dev/zero of=/f count=9")
        troubles = "rcu.*stall|lockup|unstable|backwards"
        assert shell.run(f"dmesg | grep -ciE '{troubles}' || true") == "0\n"
        machine.console.send("poweroff -f\n")
        assert machine.wait(30).value == "power-off"


def test_a_snapshot_of_a_restored_machine(saved: Path, cache: Path, tmp_path: Path) -> None:
    with Machine.restore(saved / "two", engine="translate", cache_dir=cache) as machine:
        machine.start()
        Shell(machine).run("kill %1; wait; echo second > /generation; echo AFTER > /dev/vda")
        machine.pause()
        machine.snapshot(tmp_path / "three")
        assert machine.state is State.PAUSED
    again = (
        "import sys; from ringfence import Machine\n"
        "machine = Machine.restore(sys.argv[1], engine='translate', cache_dir=sys.argv[2])\n"
        "machine.start()\n"
        "machine.console.send('cat /generation; head -c 5 /dev/vda; poweroff -f\\n')\n"
        "machine.wait(60); print(machine.console.output)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", again, tmp_path / "three", cache],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    assert "second" in done.stdout
    assert "AFTER" in done.stdout
