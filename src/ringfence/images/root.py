"""Build the small root file system that our guests start with: busybox, an init script, extras.

Shape: :class:`GuestRoot` is an :class:`Archive` that knows the layout of a merged-/usr system
(``/bin`` is a link to ``usr/bin`` and so on), so that files of packages from either layout land
in one place; :func:`build_initramfs` fills one. The init script uses the shell's own commands
where it can: every program that it starts costs boot time under translation.
"""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ringfence.errors import ImageError
from ringfence.images.deb import read_files
from ringfence.images.initramfs import Archive

MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Folders of the root that are links into /usr (Filesystem Hierarchy, merged /usr)."""
FOLDERS = ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var/log")
ESSENTIAL_APPLETS = ("sh", "mount", "setsid", "cttyhack", "poweroff", "reboot", "insmod")

INIT = """\
#!/bin/busybox sh
export PATH=/usr/local/bin:/usr/sbin:/usr/bin HOME=/root TERM="${TERM:-linux}"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
[ -d /dev/pts ] || mkdir /dev/pts
mount -t devpts devpts /dev/pts
[ -e /usr/bin/ls ] || busybox --install -s
echo ringfence > /proc/sys/kernel/hostname
echo 4 > /proc/sys/kernel/printk
trap 'busybox poweroff -f' USR1 USR2
trap 'busybox reboot -f' TERM
for script in /etc/ringfence/*.sh; do
    [ -r "$script" ] && . "$script"
done
read -r release < /proc/sys/kernel/osrelease
echo
echo "Linux $release runs under Ringfence."
echo "This is a busybox shell; 'exit' or 'poweroff' ends the machine."
echo
cd /root
setsid cttyhack sh -l &
wait $!
busybox poweroff -f
"""

MODULES_SCRIPT = """\
# Load the drivers of the PCI devices that are there, then of the virtio devices behind them.
for bus in pci virtio; do
    for alias in /sys/bus/$bus/devices/*/modalias; do
        [ -r "$alias" ] && read -r name < "$alias" && modprobe -q "$name"
    done
done
"""

NETWORK_SCRIPT = """\
# Ask for an address where there is a network card.
if [ -e /sys/class/net/eth0 ]; then
    ip link set lo up
    ip link set eth0 up
    udhcpc -q -n -t 3 -i eth0 -s /etc/udhcpc.script > /dev/null 2>&1
fi
"""

SHARES_SCRIPT = """\
# Mount the folders that the host shares, by their tags below /mnt.
for device in /sys/bus/virtio/devices/virtio*; do
    [ -r "$device/device" ] && read -r type < "$device/device" && [ "$type" = 0x0009 ] || continue
    if [ -r "$device/mount_tag" ] && modprobe -q 9p; then
        tag=$(tr -d '\\0' < "$device/mount_tag")
        mkdir -p "/mnt/$tag"
        mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 "$tag" "/mnt/$tag"
    else
        echo "There is a shared folder, but this kernel has no 9p: 'debian-generic' does."
    fi
done
"""

UDHCPC_SCRIPT = """\
#!/bin/busybox sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip address add "$ip/${mask:-24}" dev "$interface"
for gateway in $router; do ip route add default via "$gateway" dev "$interface"; done
for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
"""

PROFILE = """\
export PS1='\\w # '
alias ll='ls -l'
"""


class GuestRoot(Archive):
    """An initramfs with a merged /usr; a path below /bin, /sbin, /lib… lands in /usr."""

    def __init__(self) -> None:
        super().__init__()
        for name in MERGED:
            self.add_dir(f"usr/{name}")
            self.add_symlink(name, f"usr/{name}")

    def place(self, path: str) -> str:
        """Where a file that a package has at ``path`` belongs."""
        path = path.strip("/")
        top = path.split("/", 1)[0]
        return f"usr/{path}" if top in MERGED and path != top else path

    def add_deb(self, deb: Path | bytes, wanted: Callable[[str], bool] | None = None) -> None:
        """Everything in a Debian package, documentation excepted, or what ``wanted`` picks."""
        for file in read_files(deb, wanted or _is_useful):
            path = self.place(file.path)
            if path in MERGED:
                continue
            match file.kind:
                case "dir":
                    if path not in self:
                        self.add_dir(path, file.mode)
                case "symlink":
                    self.add_symlink(path, file.target)
                case _:
                    self.add_file(path, file.data, file.mode)


def build_initramfs(
    busybox: bytes | Path,
    extra_files: Mapping[str, bytes | Path] | None = None,
    init: str | bytes | None = None,
    *,
    packages: Iterable[Path] = (),
    compress: bool = False,
) -> bytes:
    """A root file system around busybox, as a cpio archive.

    Parameters
    ----------
    busybox : bytes or path
        A statically linked busybox for x86-64.
    extra_files : mapping, optional
        Guest path to contents, or to a file of the host whose permissions are kept. Contents that
        open with "#!" or an ELF header become executable. ``/etc/ringfence/*.sh`` are read by the
        init script before the shell starts.
    init : str or bytes, optional
        What to run as /init instead of ours, which ends the machine when its shell ends.
    packages : paths
        Debian packages to unpack into it.
    compress : bool
        Pack with gzip. The guest unpacks it, at its own speed.

    Raises
    ------
    ImageError
        busybox or an extra file can't be read, or a package is damaged.
    """
    root = GuestRoot()
    for folder in FOLDERS:
        root.add_dir(folder, 0o1777 if folder == "tmp" else 0o755)
    root.add_node("dev/console", "c", 5, 1)
    root.add_node("dev/null", "c", 1, 3, 0o666)
    program = busybox if isinstance(busybox, bytes) else _read(busybox)[0]
    if not program.startswith(b"\x7fELF"):
        raise ImageError("busybox is no ELF program: expected the one of package busybox-static")
    for package in packages:
        root.add_deb(package)
    root.add_file("usr/bin/busybox", program, 0o755)
    for applet in applets(busybox if isinstance(busybox, Path) else None):
        if f"usr/bin/{applet}" not in root and f"usr/sbin/{applet}" not in root:
            root.add_symlink(f"usr/bin/{applet}", "busybox")
    root.add_file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    root.add_file("etc/group", b"root:x:0:\n")
    root.add_file("etc/profile", PROFILE.encode())
    root.add_file("etc/hosts", b"127.0.0.1 localhost ringfence\n")
    root.add_file("etc/udhcpc.script", UDHCPC_SCRIPT.encode(), 0o755)
    script = INIT if init is None else init
    root.add_file("init", script.encode() if isinstance(script, str) else script, 0o755)
    for path, contents in (extra_files or {}).items():
        _add_extra(root, root.place(path), contents)
    return root.pack(compress=compress)


def applets(busybox: Path | None) -> tuple[str, ...]:
    """The commands in a busybox, by asking it; a few that we need where the host can't run it."""
    if busybox is None:
        return ESSENTIAL_APPLETS
    try:
        done = subprocess.run(
            [str(busybox.absolute()), "--list"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ESSENTIAL_APPLETS
    names = [name for name in done.stdout.split() if "/" not in name]
    return tuple(name for name in names if name not in ("busybox", "linuxrc", "init"))


def _add_extra(root: GuestRoot, path: str, contents: bytes | Path) -> None:
    if isinstance(contents, bytes):
        executable = contents[:2] == b"#!" or contents[:4] == b"\x7fELF"
        root.add_file(path, contents, 0o755 if executable else 0o644)
        return
    data, mode = _read(contents)
    root.add_file(path, data, mode)


def _read(path: Path) -> tuple[bytes, int]:
    """A host file's contents and permissions."""
    try:
        return path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ImageError(
            f"file {path} for the guest can't be read ({error.strerror}): check the path"
        ) from error


def _is_useful(path: str) -> bool:
    return not path.startswith(("usr/share/doc/", "usr/share/man/", "usr/share/lintian/"))
