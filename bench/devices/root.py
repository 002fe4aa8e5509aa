"""The guest's root file system: a pulled image's own, with programs of Debian's laid over it.

Linux unpacks one cpio archive behind the other, so ours is simply appended. Packages like fio
depend on hundreds of megabytes; only the programs and the shared libraries that they are linked to
are taken, found by what ELF files say they need.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.elffile import ELFFile

from bench.image import SOURCES, Say
from ringfence.images.deb import DebFile, read_files
from ringfence.images.debian import fetch_packages, pull_debian
from ringfence.images.root import GuestRoot
from ringfence.images.store import Image, Store

FLAVOUR = "generic"
"""Debian's kernel with drivers for real cards."""
PACKAGES = ("fio", "iperf3", "iputils-ping")
PROGRAMS = ("usr/bin/fio", "usr/bin/iperf3", "usr/bin/ping")
SESSION = b"""\
mount -t tmpfs -o mode=1777 tmpfs /tmp
stty -echo
. /bench/session.sh
poweroff -f
"""


def build(work: Path, say: Say) -> tuple[Image, Path]:
    """Return the image and the initramfs, which is kept in ``work``."""
    store = Store()
    image = store.get(f"debian-{FLAVOUR}")
    if image is None:
        say(f"fetching Debian's {FLAVOUR} kernel")
        image = pull_debian(store, flavour=FLAVOUR)
    assert image.initrd is not None
    base = image.initrd.read_bytes()
    session = (SOURCES / "session.sh").read_bytes()
    digest = hashlib.blake2b(digest_size=8)
    for part in (base, session, SESSION, Path(__file__).read_bytes()):
        digest.update(part)
    initrd = work / f"devices-{digest.hexdigest()}.cpio"
    if not initrd.exists():
        say(f"fetching Debian packages: {', '.join(PACKAGES)}")
        debs = fetch_packages(PACKAGES, work / "packages", store=store, dependencies=True)
        say("building the root file system")
        root = GuestRoot()
        for path, file in needed(each.path for each in debs).items():
            if file.kind == "symlink":
                root.add_symlink(path, file.target)
            else:
                root.add_file(path, file.data, file.mode)
        root.add_file("bench/session.sh", session)
        root.add_file("etc/ringfence/90-session.sh", SESSION)
        initrd.write_bytes(base + root.pack())
    return image, initrd


def needed(debs: Iterable[Path]) -> dict[str, DebFile]:
    """Return `PROGRAMS` and all that they are linked to, by path in a merged /usr."""
    place = GuestRoot().place
    files = {place(file.path): file for deb in debs for file in read_files(deb)}
    by_name: dict[str, list[str]] = {}
    for path in files:
        by_name.setdefault(path.rsplit("/", 1)[-1], []).append(path)
    found: dict[str, DebFile] = {}
    todo = list(PROGRAMS)
    while todo:
        path = todo.pop()
        if path in found or files[path].kind == "dir":
            continue
        file = found[path] = files[path]
        for name in _references(file):
            todo += by_name.get(name.rsplit("/", 1)[-1], [])
    return found


def _references(file: DebFile) -> list[str]:
    """Names of the files that one needs: a link's target, a program's libraries and loader."""
    if file.kind == "symlink":
        return [file.target]
    if file.data[:4] != b"\x7fELF":
        return []
    elf = ELFFile(io.BytesIO(file.data))
    names = [
        part.get_interp_name() for part in elf.iter_segments() if part["p_type"] == "PT_INTERP"
    ]
    for part in elf.iter_segments():
        if part["p_type"] == "PT_DYNAMIC":
            names += [tag.needed for tag in part.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
    return names
