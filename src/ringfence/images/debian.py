"""Make an image of a distribution's kernel and busybox, fetched with the host's apt.

Shape: :func:`pull_debian` is a straight line (update, resolve, download, unpack, build, store);
the parts are in ``apt.py``, ``deb.py``, ``modules.py``, ``root.py`` and ``store.py``. Packages are
kept in the store's ``apt/packages`` folder, so that two images share what they have in common.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import HostError, ImageError, UsageError
from ringfence.images import guest_agent
from ringfence.images.apt import Apt, Fetched, Progress, no_progress
from ringfence.images.deb import read_files
from ringfence.images.modules import pick_modules
from ringfence.images.root import (
    MODULES_SCRIPT,
    NETWORK_SCRIPT,
    SHARES_SCRIPT,
    build_initramfs,
)
from ringfence.images.store import Image, Package, Store, write_atomically

METAPACKAGES = {
    "cloud": ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm"),
    "generic": ("linux-image-amd64", "linux-image-generic"),
    "i386": ("linux-image-686-pae",),
}
"""Per flavour, the packages that depend on the newest kernel: Debian's name, then Ubuntu's."""
ARCHITECTURES = {"i386": "i386"}
"""Flavours that aren't of the host's architecture."""
CMDLINE = "console=ttyS0"
RECIPE = "3"
"""What our part of an image is; one of another recipe is made again when it is pulled."""
_VERSIONED = re.compile(r"linux-image(?:-unsigned)?-\d.*")
_KERNEL = re.compile(r"boot/vmlinuz-(.+)")
_MODULE = re.compile(
    r"(?:usr/)?lib/modules/[^/]+/"
    r"(kernel/(?:drivers/(?:virtio|block|char|net(?=/[^/]+$)|net/ethernet/intel/e1000"
    r"|acpi|input|cdrom)|net/(?:core|vmw_vsock|9p)"
    r"|fs/(?:ext4|jbd2|9p|netfs|fscache|isofs|fat|nls)|fs(?=/mbcache)|lib|crypto)/"
    r".+\.ko(?:\.\w+)?)"
)
"""Where the modules of a virtual machine, and those that they need, are in a kernel package."""


def pull_debian(
    store: Store,
    *,
    flavour: str = "cloud",
    progress: Progress = no_progress,
    suite: str | None = None,
    refresh: bool = False,
    name: str | None = None,
) -> Image:
    """Fetch a kernel and busybox and make an image of them.

    Parameters
    ----------
    store : Store
        Where the image goes.
    flavour : str
        "cloud" (small, for virtual machines), "generic" (drivers for all sorts of hardware), or
        "i386" (a 32-bit system).
    progress : callable
        Called with a stage ("update", "download", "unpack", "build") and a fraction, 0.0 to 1.0.
    suite : str, optional
        Another suite of the host's distribution; by default what the host's apt sources have.
    refresh : bool
        Fetch and build again although the image is there.
    name : str, optional
        The image's name; by default "debian-<flavour>", with the suite appended if one is given.

    Raises
    ------
    UsageError
        The flavour is unknown.
    HostError
        apt is missing, the network is down, or the folder can't be written.
    ImageError
        A package is damaged.
    """
    if flavour not in METAPACKAGES:
        raise UsageError(f"no flavour {flavour!r}: expected {' or '.join(METAPACKAGES)}")
    name = name or "-".join(filter(None, ("debian", flavour, suite)))
    present = store.get(name)
    if present is not None and present.extra.get("recipe") == RECIPE and not refresh:
        return present
    apt = open_apt(store, suite, ARCHITECTURES.get(flavour))
    apt.update(progress)
    parts = fetch_parts(apt, store, flavour, progress)
    release, modules = parts.release, parts.modules
    with store.filling(name) as folder, tempfile.TemporaryDirectory() as scratch:
        busybox = Path(scratch) / "busybox"
        busybox.write_bytes(parts.busybox)
        busybox.chmod(0o755)
        progress("build", 0.0)
        extra: dict[str, bytes | Path] = dict(pick_modules(release, modules))
        if extra:
            extra["/etc/ringfence/10-modules.sh"] = MODULES_SCRIPT.encode()
        extra["/etc/ringfence/20-network.sh"] = NETWORK_SCRIPT.encode()
        extra["/etc/ringfence/25-shares.sh"] = SHARES_SCRIPT.encode()
        if flavour not in ARCHITECTURES:
            extra |= guest_agent.initramfs_files()
        write_atomically(folder / "vmlinuz", parts.kernel)
        write_atomically(folder / "initrd", build_initramfs(busybox, extra))
        write_atomically(folder / "busybox", busybox.read_bytes(), 0o755)
        store.write_manifest(
            folder,
            name=name,
            kernel="vmlinuz",
            initrd="initrd",
            cmdline=CMDLINE,
            kernel_version=release,
            packages=tuple(Package(item.name, item.version) for item in parts.packages),
            extra={"flavour": flavour, "suite": suite or "", "recipe": RECIPE},
        )
    progress("build", 1.0)
    return store.find(name)


@dataclass(frozen=True)
class Parts:
    """What every guest of Debian's is made of.

    Attributes
    ----------
    release : str
        The kernel's, as ``uname -r`` gives it.
    kernel : bytes
        A bzImage.
    modules : mapping
        Drivers and what they need, by path below /lib/modules/<release>; see `pick_modules`.
    busybox : bytes
        A static program.
    packages : tuple of Fetched
        Where all this is from: the kernel's packages, then busybox.
    """

    release: str
    kernel: bytes
    modules: Mapping[str, bytes]
    busybox: bytes
    packages: tuple[Fetched, ...]


def fetch_parts(apt: Apt, store: Store, flavour: str, progress: Progress) -> Parts:
    """Download and unpack kernel and busybox; apt's lists must be fresh."""
    names = [*_resolve_kernel(apt, flavour), "busybox-static"]
    fetched = apt.download(names, store.root / "apt" / "packages", progress)
    release, kernel, modules = _unpack_kernel(fetched[:-1], progress)
    return Parts(release, kernel, modules, _busybox(fetched[-1]), tuple(fetched))


def fetch_packages(
    names: Sequence[str],
    dest: Path,
    *,
    store: Store | None = None,
    dependencies: bool = False,
    progress: Progress = no_progress,
    suite: str | None = None,
) -> list[Fetched]:
    """Download packages into a folder, for :func:`build_initramfs` to unpack.

    Parameters
    ----------
    names : sequence of str
        Packages by name, each with "=version" if it has to be that one.
    dest : Path
        Where the .deb files go; those that are there already are kept.
    store : Store, optional
        Whose folder keeps apt's lists; by default the user's.
    dependencies : bool
        Take all packages that those need, too.

    Raises
    ------
    HostError
        apt is missing, the network is down, or a package is unknown.
    """
    apt = open_apt(store or Store(), suite)
    apt.update(progress)
    wanted = apt.closure(names) if dependencies else list(names)
    return apt.download(wanted, dest.absolute(), progress)


def open_apt(store: Store, suite: str | None = None, architecture: str | None = None) -> Apt:
    """The host's apt with a state folder of ours; HostError where there can be none."""
    folder = "-".join(filter(None, ("state", architecture)))
    try:
        return Apt(store.root / "apt" / folder, suite=suite, architecture=architecture)
    except OSError as error:
        raise HostError(
            f"{store.root} can't be written ({error.strerror}): set RINGFENCE_HOME to a folder of"
            " yours"
        ) from error


def _resolve_kernel(apt: Apt, flavour: str) -> list[str]:
    """The versioned kernel package, and Ubuntu's package of its modules where there is one."""
    for metapackage in METAPACKAGES[flavour]:
        for name in apt.depends(metapackage):
            if _VERSIONED.fullmatch(name):
                modules = re.sub(r"image(-unsigned)?", "modules", name, count=1)
                return [name, modules] if apt.candidate(modules) else [name]
    raise HostError(
        f"apt knows none of {', '.join(METAPACKAGES[flavour])}:"
        f" {apt.reason()}; or give a kernel file"
    )


def _unpack_kernel(
    packages: Sequence[Fetched], progress: Progress
) -> tuple[str, bytes, dict[str, bytes]]:
    """Release, bzImage, and modules by their path below /lib/modules/<release>."""
    release, kernel = "", b""
    modules: dict[str, bytes] = {}
    for index, package in enumerate(packages):
        progress("unpack", index / len(packages))
        for file in read_files(package.path, _is_kernel_part):
            if match := _KERNEL.fullmatch(file.path):
                release, kernel = match[1], file.data
            elif (match := _MODULE.fullmatch(file.path)) and file.kind == "file":
                modules[match[1]] = file.data
    progress("unpack", 1.0)
    if not kernel:
        raise ImageError(f"package {packages[0].name} has no /boot/vmlinuz-*: pull another flavour")
    return release, kernel, modules


def _is_kernel_part(path: str) -> bool:
    return bool(_KERNEL.fullmatch(path) or _MODULE.fullmatch(path))


def _busybox(package: Fetched) -> bytes:
    for file in read_files(package.path, lambda path: path.endswith("bin/busybox")):
        if file.kind == "file":
            return file.data
    raise ImageError(f"package {package.name} has no /bin/busybox: fetch it again")
