"""Debian's own drivers on our PCI devices: what the guest sees, and what the host finds then."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest import support
from guest.support import APPEND, BOOT, Session, Shell
from ringfence import Machine
from ringfence.images.debian import fetch_packages
from ringfence.images.root import GuestRoot
from ringfence.images.store import Image, Store

pytestmark = pytest.mark.boot

SIZE = 64 << 20


def tool(name: str) -> str:
    """A program of the host's."""
    return support.require(shutil.which(name), name)


@pytest.fixture(scope="module")
def initrd(cloud: Image, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's initramfs, with its modules, and pciutils behind it."""
    assert cloud.initrd is not None
    folder = tmp_path_factory.mktemp("pciutils")
    root = GuestRoot()
    for package in fetch_packages(["pciutils"], folder, store=store, dependencies=True):
        root.add_deb(package.path)
    target = folder / "initrd"
    target.write_bytes(cloud.initrd.read_bytes() + root.pack())
    return target


@contextmanager
def booted(cloud: Image, initrd: Path, cache: Path, *disks: str, **options: Any) -> Iterator[Shell]:
    """A shell on a machine with disks, which is stopped at the end."""
    with Machine(
        kernel=cloud.kernel,
        initrd=initrd,
        append=APPEND,
        cache_dir=cache,
        disks=disks,
        **options,
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        yield shell


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder to make file systems of."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "hello").write_text("from the host\n")
    (folder / "big").write_bytes(bytes(range(256)) * 20_000)
    return folder


def make_disk(tree: Path, kind: str) -> Path:
    """An ext4 file system of a folder, in an image of some format."""
    raw = tree.parent / "disk.raw"
    raw.touch()
    with raw.open("r+b") as file:
        file.truncate(SIZE)
    subprocess.run([tool("mke2fs"), "-q", "-t", "ext4", "-d", tree, raw], check=True)
    if kind == "raw":
        return raw
    target = raw.with_suffix(".qcow2")
    command = [tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", raw, target]
    subprocess.run(command, check=True)
    return target


def as_raw(disk: Path) -> Path:
    """The contents of an image whose qcow2 structure is found to be in order."""
    if disk.suffix == ".raw":
        return disk
    subprocess.run([tool("qemu-img"), "check", "-q", disk], check=True)
    target = disk.with_name("after.raw")
    command = [tool("qemu-img"), "convert", "-f", "qcow2", "-O", "raw", disk, target]
    subprocess.run(command, check=True)
    return target


def read_file(disk: Path, name: str) -> bytes:
    """A file of an ext4 file system."""
    command = [tool("debugfs"), "-R", f"cat {name}", str(disk)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize(("kind", "packed"), [("raw", True), ("qcow2", False)])
def test_ext4(cloud: Image, initrd: Path, cache: Path, tree: Path, kind: str, packed: bool) -> None:
    disk = make_disk(tree, kind)
    with booted(cloud, initrd, cache, f"{disk},serial=RF-1", packed=packed) as shell:
        features = shell.run("cat /sys/bus/virtio/devices/virtio0/features")
        assert features[34] == str(int(packed))
        assert shell.run("cat /sys/block/vda/serial") == "RF-1"
        assert int(shell.run("cat /sys/block/vda/size")) * 512 == SIZE
        shell.run("mount /dev/vda /mnt")
        assert shell.run("cat /mnt/hello") == "from the host\n"
        digest = hashlib.md5((tree / "big").read_bytes()).hexdigest()
        assert shell.run("md5sum < /mnt/big").split()[0] == digest
        shell.run("dd if=/dev/urandom of=/mnt/noise bs=64k count=80 2> /dev/null")
        noise = shell.run("md5sum < /mnt/noise").split()[0]
        shell.run("rm /mnt/big; echo from the guest > /mnt/said; fstrim /mnt || true")
        shell.run("umount /mnt")
        assert "error" not in shell.run("dmesg | grep -i vda")
    after = as_raw(disk)
    subprocess.run([tool("e2fsck"), "-fn", after], check=True, capture_output=True)
    assert read_file(after, "said") == b"from the guest\n"
    assert hashlib.md5(read_file(after, "noise")).hexdigest() == noise


def test_lspci(cloud: Image, initrd: Path, cache: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with booted(cloud, initrd, cache, f"{disk},readonly", rng=True) as shell:
        said = shell.run("lspci -vv 2> /dev/null")
        slots = {part.split(" ", 1)[0]: part for part in re.split(r"\n\n", said) if part.strip()}
        assert list(slots) == ["00:00.0", "00:01.0", "00:02.0"]
        assert "Host bridge: Intel" in slots["00:00.0"]
        assert "Virtio 1.0 block device (rev 01)" in slots["00:01.0"]
        assert "Virtio 1.0 RNG (rev 01)" in slots["00:02.0"]
        for part in (slots["00:01.0"], slots["00:02.0"]):
            assert "Mem+ BusMaster+" in part
            assert "DisINTx+" in part
            assert "pin A routed to IRQ" in part
            assert re.search(
                r"Region 1: Memory at \w+ \(32-bit, non-prefetchable\) \[size=4K\]", part
            )
            assert re.search(r"Region 4: Memory at \w+ .*\[size=16K\]", part)
            assert "MSI-X: Enable+ Count=2 Masked-" in part
            for structure in ("CommonCfg", "ISR", "DeviceCfg", "Notify"):
                assert f"VirtIO: {structure}" in part
            assert "Kernel driver in use: virtio-pci" in part
        assert shell.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
        assert len(shell.run("head -c 64 /dev/hwrng | hexdump -ve '/1 \"%02x\"'")) == 128
        assert shell.run("cat /sys/block/vda/ro") == "1\n"
        assert shell.run("dmesg -r | grep '^<[0-4]>.*\\(pci\\|virtio\\|ACPI\\)' || true") == ""


def test_thrown_away_changes(cloud: Image, initrd: Path, cache: Path, tree: Path) -> None:
    disk = make_disk(tree, "raw")
    before = disk.read_bytes()
    with booted(cloud, initrd, cache, f"{disk},snapshot", on_reset="reboot") as shell:
        shell.run("mount /dev/vda /mnt; echo changed > /mnt/hello; umount /mnt")
        shell.machine.console.send("reboot -f\n")
        again = Shell(shell.machine)
        again.take_over()
        assert again.run("mount /dev/vda /mnt; cat /mnt/hello") == "changed\n"
    assert disk.read_bytes() == before


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_was_synced_survives_a_kill(
    cloud: Image, initrd: Path, cache: Path, tmp_path: Path, kind: str
) -> None:
    """The guest writes, syncs and says so; the machine is killed in the midst of more."""
    disk = tmp_path / f"disk.{kind}"
    command = [tool("qemu-img"), "create", "-q", "-f", kind, disk, str(SIZE)]
    subprocess.run(command, check=True)
    arguments = support.boot_arguments(cloud.kernel, initrd, cache)
    session = Session(*arguments, "--disk", disk)
    try:
        session.wait_for(b"~ # ", BOOT)
        session.type(
            b"i=0; while :; do i=$((i + 1));"
            b' printf "%08d" $i | dd of=/dev/vda bs=4096 seek=$i conv=fsync 2> /dev/null;'
            b' echo "<""$i>"; done\n'
        )
        session.wait_for(b"<25>", BOOT)
        session.process.kill()
        session.process.wait()
    finally:
        session.close()
    if kind == "qcow2":
        subprocess.run([tool("qemu-img"), "check", "-q", "-r", "leaks", disk], check=True)
    contents = as_raw(disk).read_bytes()
    for number in range(1, 26):
        assert contents[4096 * number :][:8] == b"%08d" % number


def test_named_ports(cloud: Image, initrd: Path, cache: Path) -> None:
    heard = bytearray()
    with booted(cloud, initrd, cache, ports={"agent": heard.extend}) as shell:
        assert shell.run("cat /sys/class/virtio-ports/vport*p1/name") == "agent\n"
        port = shell.run("echo /dev/vport*p1").strip()
        shell.run(f"echo from the guest > {port}")
        assert heard == b"from the guest\n"
        shell.run(f"(head -n 1 < {port} > /tmp/got) & sleep 0.2")
        assert shell.machine.send_port("agent", b"from the host\n") == 14
        assert shell.run("wait; sleep 0.2; cat /tmp/got") == "from the host\n"
        shell.machine.console.send("echo by another way > /dev/hvc0\n")
        shell.machine.console.wait_for("by another way\r\n", 10)


def test_sockets_between_guest_and_host(
    cloud: Image, initrd: Path, cache: Path, tmp_path: Path
) -> None:
    program = support.compile_c(support.PROGRAMS / "vsock.c", tmp_path / "vsock")
    root = GuestRoot()
    root.add_file("usr/bin/vsock", program.read_bytes(), 0o755)
    archive = tmp_path / "initrd"
    archive.write_bytes(initrd.read_bytes() + root.pack())
    path = tmp_path / "v.sock"
    data = bytes(range(256)) * 4000
    with (
        socket.socket(socket.AF_UNIX) as listener,
        booted(cloud, archive, cache, vsock=path) as shell,
    ):
        listener.bind(f"{path}_2000")
        listener.listen()
        shell.run("vsock listen 1000 & sleep 0.3")
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(30)
            stream.connect(str(path))
            stream.sendall(b"CONNECT 1000\n")
            answer = stream.makefile("rb")
            assert answer.readline().startswith(b"OK ")
            sender = threading.Thread(target=lambda: stream.sendall(data))
            sender.start()
            assert answer.read(len(data)) == data
            sender.join()
            stream.shutdown(socket.SHUT_WR)
            assert answer.read() == b""
        shell.run("echo from the guest | vsock connect 2000 > /tmp/answer & sleep 0.3")
        listener.settimeout(30)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b"from the guest\n"
            connection.sendall(b"from the host\n")
        shell.run("until grep -q host /tmp/answer; do sleep 0.1; done")
        assert "onnect" in shell.run("echo | vsock connect 2001", status=1)
    assert not path.exists()


def test_balloon(cloud: Image, initrd: Path, cache: Path) -> None:
    free = "awk '/MemFree/{print $2}' /proc/meminfo"
    with booted(cloud, initrd, cache, balloon=True) as shell:
        before = int(shell.run(free))
        shell.machine.set_balloon("128M")
        shell.run(f"until [ $({free}) -le {before - (120 << 10)} ]; do sleep 0.1; done")
        balloon = shell.machine._parts.devices.balloon
        assert balloon is not None
        assert 120 << 8 <= balloon.actual <= 128 << 8
        shell.machine.set_balloon(0)
        shell.run(f"until [ $({free}) -ge {before - (16 << 10)} ]; do sleep 0.1; done")
        shell.run("dd if=/dev/zero of=/tmp/fill bs=1M count=100 2> /dev/null")
        shell.run("cmp -n 1000000 /tmp/fill /dev/zero")
