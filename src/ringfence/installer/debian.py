"""Install Debian on a disk of its own: ``ringfence pull debian --disk``.

Shape: `install_debian` is a straight line: packages, a tree of them, an empty ext4 file system, a
guest that unpacks the one on the other and configures it, and an image that starts the result with
Debian's kernel. Two disks are plugged into that guest: the new one, and the tree as a tar file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ringfence.errors import GuestTimeout, HostError, ImageError, RingfenceError
from ringfence.images import guest_agent
from ringfence.images.apt import Fetched, Progress, no_progress
from ringfence.images.debian import Parts, fetch_parts, open_apt
from ringfence.images.modules import pick_modules
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image, Package, Store, write_atomically
from ringfence.images.unpacked import Tree
from ringfence.installer import scripts
from ringfence.machine import Machine
from ringfence.storage.options import DiskOptions
from ringfence.storage.seed import Seed

NAME = "debian-disk"
PACKAGES = (
    "usr-is-merged",
    "apt",
    "systemd-sysv",
    "systemd-resolved",
    "libpam-systemd",
    "udev",
    "dbus",
    "mount",
    "passwd",
    "e2fsprogs",
    "kmod",
    "iproute2",
)
"""What the system has beside the distribution's essential packages."""
ROOT_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
"""What it takes to mount the root file system."""
CMDLINE = "console=ttyS0 root=/dev/vda"
MEMORY = "512M"
PATIENCE = 600.0
"""Seconds that the guest may be silent while it installs."""
SMALLEST = 1 << 30


def install_debian(
    store: Store,
    *,
    name: str = NAME,
    flavour: str = "cloud",
    size: int = 4 << 30,
    packages: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    suite: str | None = None,
    engine: str = "auto",
    progress: Progress = no_progress,
    refresh: bool = False,
) -> Image:
    """Build a disk with Debian on it, and an image that starts from it.

    Parameters
    ----------
    store : Store
        Where the image goes.
    name : str
        Its name.
    flavour : str
        Of the kernel, as `pull_debian` takes it.
    size : int
        Bytes of the disk; what is not used takes no room on the host's.
    packages : sequence of str
        Further packages to install.
    files : mapping, optional
        Files to put on the disk: path to contents.
    suite : str, optional
        Another suite of the host's distribution.
    engine : str
        What runs the guest that installs it.
    progress : callable
        Called with a stage ("update", "download", "unpack", "configure") and a fraction.
    refresh : bool
        Build it anew although it is there; what was on the old disk is lost.

    Raises
    ------
    HostError
        apt or mke2fs is missing, the network is down, the disk full.
    ImageError
        A package is damaged, or could not be configured; the guest's last words are quoted.
    """
    present = store.get(name)
    if present is not None and not refresh:
        return present  # whatever its recipe: there may be work of the user's on it
    mke2fs = find_mke2fs()
    apt = open_apt(store, suite)
    apt.update(progress)
    parts = fetch_parts(apt, store, flavour, progress)
    wanted = apt.closure([*apt.essential(), *PACKAGES, *packages])
    fetched = apt.download(wanted, store.root / "apt" / "packages", progress)
    with store.filling(name) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree = Path(scratch) / "tree.tar"
        _write_tree(tree, fetched, parts, files or {}, apt.sources(), progress)
        disk = folder / "disk.img"
        _make_file_system(mke2fs, disk, size)
        _run_installer(disk, tree, parts, engine, len(fetched), progress)
        tree.unlink()
        write_atomically(folder / "vmlinuz", parts.kernel)
        write_atomically(folder / "initrd", _initramfs(parts, scripts.BOOT))
        store.write_manifest(
            folder,
            name=name,
            kernel="vmlinuz",
            initrd="initrd",
            disk=disk.name,
            cmdline=CMDLINE,
            kernel_version=parts.release,
            packages=tuple(
                Package(each.name, each.version) for each in (*parts.packages, *fetched)
            ),
            extra={"flavour": flavour, "suite": suite or ""},
        )
    return store.find(name)


def access_by_ssh(keys: bytes) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Packages and files that let the owners of public keys log in as root."""
    return ("openssh-server",), {"root/.ssh/authorized_keys": keys}


def seed(user_data: bytes) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Packages and files that have cloud-init follow ``user_data`` at the first boot.

    The seed (`storage.seed`) lies in the folder where cloud-init looks before it looks for disks;
    what a seed disk says later comes before that.
    """
    files = Seed(user_data).files()
    return ("cloud-init",), {
        **{f"var/lib/cloud/seed/nocloud/{name}": data for name, data in files.items()},
        # The default locale would have to be generated, by a package that is not there.
        "etc/cloud/cloud.cfg.d/90_ringfence.cfg": (
            b"datasource_list: [NoCloud, None]\nlocale: false\n"
        ),
    }


def find_mke2fs() -> str:
    """Where mke2fs is; HostError where it is not."""
    found = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if found is None:
        raise HostError("mke2fs was not found, which makes file systems: install e2fsprogs")
    return found


def _write_tree(
    target: Path,
    fetched: Sequence[Fetched],
    parts: Parts,
    files: Mapping[str, bytes],
    sources: str,
    progress: Progress,
) -> None:
    with Tree(target) as tree:
        for index, package in enumerate(fetched):
            progress("unpack", index / len(fetched))
            tree.add_package(package.path)
        for path, data in parts.modules.items():
            tree.add_file(f"usr/lib/modules/{parts.release}/{path}", data)
        # Whatever else a script may want: users and groups are made by base-passwd's.
        order = sorted(tree.preinsts, key=lambda package: package != "base-passwd")
        tree.finish(
            {
                **{path: text.encode() for path, text in scripts.FILES.items()},
                "etc/apt/sources.list": sources.encode(),
                "var/lib/dpkg/tmp.preinst.order": "".join(f"{each}\n" for each in order).encode(),
                "ringfence-setup": scripts.SETUP.encode(),
                **guest_agent.disk_files(),
                **files,
            }
        )
    progress("unpack", 1.0)


def _make_file_system(mke2fs: str, disk: Path, size: int) -> None:
    with disk.open("wb") as file:
        file.truncate(size)
    command = [mke2fs, "-q", "-F", "-t", "ext4", "-L", "ringfence", "-E", "root_owner=0:0"]
    done = subprocess.run([*command, str(disk)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"mke2fs failed: {done.stderr.strip() or done.returncode}")


def _initramfs(parts: Parts, init: str) -> bytes:
    modules: dict[str, bytes | Path] = dict(
        pick_modules(parts.release, parts.modules, ROOT_MODULES)
    )
    with tempfile.TemporaryDirectory() as scratch:
        busybox = Path(scratch) / "busybox"
        busybox.write_bytes(parts.busybox)
        busybox.chmod(0o755)
        return build_initramfs(busybox, modules, init)


def _run_installer(
    disk: Path, tree: Path, parts: Parts, engine: str, packages: int, progress: Progress
) -> None:
    """Start the guest that installs, and follow it to its end."""
    with Machine(
        kernel=parts.kernel,
        initrd=_initramfs(parts, scripts.INSTALL),
        append="console=ttyS0 panic=-1 quiet",
        memory=MEMORY,
        engine=engine,
        disks=[DiskOptions(disk, "raw"), DiskOptions(tree, "raw", read_only=True)],
    ) as machine:
        machine.start()
        line = re.compile(rf"(?m)^(?:{scripts.MARK} (.*)|Setting up (\S+) .*)\r\n")
        configured = 0
        while True:
            try:
                said = line.search(machine.console.wait_for(line, PATIENCE))
            except RingfenceError as error:
                raise _failed("the guest stopped", machine) from error
            assert said is not None
            if said[2]:
                configured += 1
                progress("configure", min(configured / packages, 1.0))
            elif said[1] == "done":
                break
            elif said[1].startswith("failed"):
                raise _failed(said[1], machine)
        try:
            machine.wait(PATIENCE)
        except GuestTimeout as error:
            raise _failed("the guest did not power off", machine) from error


def _failed(why: str, machine: Machine) -> ImageError:
    words = " / ".join(machine.console.output.replace("\r", "").strip().splitlines()[-12:])
    return ImageError(f"the system can't be installed, {why}; last words: {words}")
