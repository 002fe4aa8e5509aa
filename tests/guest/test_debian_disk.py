"""A whole Debian on a disk: installed by a guest, started, given packages, switched off.

The disk is built once per image folder (``$RINGFENCE_TEST_HOME``), and not written to by tests.
"""

from __future__ import annotations

import functools
import http.server
import itertools
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import support
from ringfence import Machine
from ringfence.agent import wire
from ringfence.agent.client import Command
from ringfence.images.store import Image, Store
from ringfence.installer.debian import install_debian
from ringfence.storage.options import DiskOptions
from ringfence.storage.seed import parse_seed

LOGIN = 600.0
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGxvb2sgYXQgbWUsIEkgYW0ganVzdCBhIHRlc3Q tester"
USER_DATA = b"""\
#cloud-config
disable_root: false
locale: false
write_files:
- path: /etc/seeded
  content: "from the seed\\n"
runcmd:
- [cp, /etc/seeded, /root/ran]
"""
DISK = 64 << 20
FIO = (
    "fio --name=check --ioengine=psync --verify=crc32c --do_verify=1 --verify_fatal=1 --direct=1"
    " --rw=randrw --bsrange=4k-64k --size=12m --fsync=64 --randseed=7 --minimal --filename="
)


@pytest.fixture(scope="module")
def installed(store: Store) -> Image:
    """Debian with fio and cloud-init, on a disk."""
    support.require(shutil.which("apt-get"), "apt")
    support.require(shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin"), "mke2fs")
    packages = ["fio", "cloud-init"]
    return install_debian(store, name="test-cloud", size=2 << 30, packages=packages)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[int]:
    """An apt archive of one package on the host's loopback; its port."""
    support.require(shutil.which("dpkg-deb"), "dpkg-deb")
    folder = tmp_path / "archive"
    package = tmp_path / "package"
    program = package / "usr/bin/ringfence-greeting"
    program.parent.mkdir(parents=True)
    folder.mkdir()
    program.write_text("#!/bin/sh\necho greetings from a package\n")
    program.chmod(0o755)
    (package / "DEBIAN").mkdir()
    control = "Package: greeting\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <n@b.org>\n"
    control += "Description: greets\n"
    (package / "DEBIAN/control").write_text(control)
    deb = folder / "greeting.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(package), str(deb)]
    subprocess.run(command, check=True, capture_output=True)
    digest = subprocess.run(["sha256sum", str(deb)], check=True, capture_output=True, text=True)
    (folder / "Packages").write_text(
        f"{control}Filename: ./greeting.deb\nSize: {deb.stat().st_size}\n"
        f"SHA256: {digest.stdout.split()[0]}\n"
    )

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class Login:
    """Root's shell on the serial console."""

    def __init__(self, machine: Machine) -> None:
        self.console = machine.console
        self._numbers = itertools.count(1)
        self.console.wait_for("login: ", LOGIN)
        self.console.send("root\n")
        self.console.wait_for("~# ", LOGIN)

    def run(self, line: str, timeout: float = LOGIN) -> str:
        """What a command printed; it has to succeed."""
        mark = f"end-{next(self._numbers)}"
        self.console.send(f"{line}; echo {mark[:3]}''{mark[3:]}=$?\n")
        text = self.console.wait_for(re.compile(rf"{mark}=\d+\r\n"), timeout)
        assert f"{mark}=0" in text, text
        return text.replace("\r", "")


@pytest.mark.boot
def test_debian_from_disk(
    installed: Image, store: Store, repository: int, cache: Path, tmp_path: Path
) -> None:
    """Boot to login, cloud-init, apt over the user network, fio on disks, the agent, the button."""
    qemu_img = support.require(shutil.which("qemu-img"), "qemu-img")
    raw, qcow2 = tmp_path / "raw.img", tmp_path / "disk.qcow2"
    with raw.open("wb") as file:
        file.truncate(DISK)
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", qcow2, str(DISK)], check=True)
    assert installed.disk is not None
    before = installed.disk.stat().st_mtime_ns
    with Machine(
        kernel=installed.kernel,
        initrd=installed.initrd,
        append=f"console=ttyS0 panic=-1 {installed.cmdline}",
        engine="translate",
        cache_dir=cache,
        disks=[
            DiskOptions(installed.disk, "raw", snapshot=True),
            DiskOptions(raw, "raw"),
            DiskOptions(qcow2, "qcow2"),
        ],
        network="user:loopback",
        vsock=tmp_path / "vsock",
        seed=parse_seed(USER_DATA, [KEY], "seeded"),
    ) as machine:
        machine.start()
        root = Login(machine)
        root.run("cloud-init status --wait")
        assert "from the seed" in root.run("cat /root/ran")
        assert KEY in root.run("cat /root/.ssh/authorized_keys")
        assert 'LABEL="CIDATA"' in root.run("blkid /dev/vdd")
        root.run('test -z "$(systemctl --failed --no-legend --plain)" || systemctl --failed')
        assert "debian" in root.run("cat /etc/os-release")
        root.run('dpkg --audit && test -z "$(dpkg --audit)"')

        root.run("systemctl start systemd-networkd-wait-online")
        source = f"deb [trusted=yes] http://10.0.2.2:{repository} ./"
        root.run(f"echo '{source}' > /etc/apt/sources.list && apt-get update")
        root.run("apt-get install -y greeting")
        assert "greetings from a package" in root.run("ringfence-greeting")

        for disk in ("/dev/vdb", "/dev/vdc"):
            root.run(FIO + disk)

        said: list[bytes] = []
        command = Command(tmp_path / "vsock", wire.request(["/bin/hostname"], {}))
        assert command.run(None, said.append, said.append) == 0
        command.close()
        assert said == [b"seeded\n"]

        machine.press_power_button()
        assert machine.wait(LOGIN).value == "power-off"
    checked = subprocess.run([qemu_img, "check", qcow2], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert installed.disk.stat().st_mtime_ns == before, "the image's disk was not to be written"
