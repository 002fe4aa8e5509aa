"""Guests that go on from one snapshot, and are to be different ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import APPEND, Commands, Shell
from ringfence import Machine
from ringfence.images.store import Image

pytestmark = pytest.mark.boot

RANDOM = "head -c 16 /dev/urandom | xxd -p"
RESEEDED = "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true"


@pytest.fixture(scope="module")
def saved(generic: Image, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A snapshot of a kernel that knows of generation IDs."""
    folder = tmp_path_factory.mktemp("identity") / "saved"
    with Machine(
        kernel=generic.kernel,
        initrd=generic.initrd,
        append=APPEND,
        engine="translate",
        cache_dir=cache,
        memory="256M",
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        machine.snapshot(folder)
        assert shell.run(RESEEDED) == "0\n"
    yield folder


def test_random_numbers_differ(saved: Path, cache: Path) -> None:
    numbers = set()
    for _ in range(2):
        with Machine.restore(saved, engine="translate", cache_dir=cache) as machine:
            machine.start()
            shell = Shell(machine)
            # The interrupt comes before the first command; the kernel handles it in a work item.
            shell.run(f"until {RESEEDED.split(' ||')[0]} > /dev/null; do sleep 0.02; done")
            numbers.add(shell.run(RANDOM))
            assert shell.run(RESEEDED) == "1\n"
    assert len(numbers) == 2


@pytest.fixture
def ringfence(cloud: Image, cache: Path, tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path / "home", cache)
    shutil.copytree(cloud.folder, tmp_path / "home" / "images" / "guest")
    yield commands
    commands.stop()


SETTING = "echo aaaa > /etc/machine-id; mkdir -p /etc/ringfence/clone.d"
HOOK = """cd /etc/ringfence/clone.d; echo '#!/bin/sh
echo "$RINGFENCE_NAME $RINGFENCE_MAC" > /hooked' > hook; chmod +x hook"""
WHO = f"cat /etc/machine-id; {RANDOM}; hostname; cat /sys/class/net/eth0/address /hooked"


def test_clones_differ_in_all_that_names_them(ringfence: Commands, tmp_path: Path) -> None:
    """Also where the kernel knows nothing of generation IDs, as Debian's for clouds does not."""
    network = ("--net", f"socket:{tmp_path / 'wire'}")
    ringfence("run", "guest", "--memory", "192M", "--engine", "translate", "-d", "--name", "one",
              *network)  # fmt: skip
    ringfence("exec", "one", "--", "sh", "-c", f"{SETTING}; {HOOK}")
    ringfence("snapshot", "one", tmp_path / "saved")
    said = ringfence("clone", tmp_path / "saved", "-n", "2", "--name", "a_b", "--json").stdout
    clones = json.loads(said)
    seen = [ringfence("exec", each["name"], "--", "sh", "-c", WHO).stdout for each in clones]
    words = [each.split() for each in seen]
    for clone, (machine_id, _, host_name, mac, *hooked) in zip(clones, words, strict=True):
        assert clone["told"]
        assert host_name == clone["name"].replace("_", "-")
        assert mac == clone["mac"]
        assert hooked == [clone["name"], mac]
        assert len(machine_id) == 32
    for field in ("name", "pid", "mac", "cid", "generation", "vsock"):
        assert len({each[field] for each in clones}) == 2
    assert words[0][0] != words[1][0]
    assert words[0][1] != words[1][1]


def test_a_guest_that_can_t_take_its_name(ringfence: Commands, tmp_path: Path) -> None:
    """It runs nevertheless, and who asked hears why."""
    ringfence("run", "guest", "--memory", "192M", "--engine", "translate", "-d", "--name", "one")
    fails = "cd /etc/ringfence; mkdir clone.d; cp /bin/busybox clone.d/no-such-applet"
    ringfence("exec", "one", "--", "sh", "-c", fails)
    ringfence("snapshot", "one", tmp_path / "saved")
    done = ringfence("clone", tmp_path / "saved", "--name", "two")
    assert done.stdout == "two\n"
    assert "two: the guest did not take its new name: no-such-applet" in done.stderr
    assert ringfence("clone", tmp_path / "saved", "--name", "three", "--no-rename").stderr == ""
    assert "ringfence\n" in ringfence("exec", "three", "hostname").stdout
