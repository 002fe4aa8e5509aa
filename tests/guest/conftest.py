"""Guests that tests share: images, a cache folder that two processes filled, a machine.

Images are pulled once per session, into ``$RINGFENCE_TEST_HOME`` if that is set (and found there
the next time).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, BOOT, PROGRAMS, Ended, Shell
from kept import kept_code
from ringfence import Machine
from ringfence.images.debian import pull_debian
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image, Store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The image folder of this session."""
    home = os.environ.get("RINGFENCE_TEST_HOME")
    return Store(Path(home) if home else tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def cloud(store: Store) -> Image:
    """Debian's cloud kernel with busybox."""
    support.require(shutil.which("apt-get"), "apt")
    return pull_debian(store, flavour="cloud")


@pytest.fixture(scope="session")
def generic(store: Store) -> Image:
    """Debian's generic kernel with busybox."""
    support.require(shutil.which("apt-get"), "apt")
    return pull_debian(store, flavour="generic")


@pytest.fixture(scope="session")
def i386(store: Store) -> Image:
    """Debian's 32-bit kernel with busybox."""
    support.require(shutil.which("apt-get"), "apt")
    return pull_debian(store, flavour="i386")


@pytest.fixture(scope="session")
def with_init(cloud: Image, tmp_path_factory: pytest.TempPathFactory) -> support.MakeInitrd:
    """A function that makes an initramfs of busybox and a script for /init."""
    folder = tmp_path_factory.mktemp("initrd")

    def make(script: str) -> Path:
        target = folder / f"initrd{len(list(folder.iterdir()))}"
        target.write_bytes(build_initramfs(cloud.folder / "busybox", init=script))
        return target

    return make


@dataclass(frozen=True)
class Filled:
    """A cache folder, and the two runs that filled it at the same time."""

    folder: Path
    runs: tuple[Ended, Ended]


@pytest.fixture(scope="session")
def filled(cloud: Image, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A cache folder that two boots have filled at once, starting with an empty one."""
    folder = tmp_path_factory.mktemp("cache")
    assert cloud.initrd is not None
    pair = [
        support.Session(*support.boot_arguments(cloud.kernel, cloud.initrd, folder))
        for _ in range(2)
    ]
    try:
        for session in pair:
            session.wait_for(b"~ # ", BOOT)
            session.type(b"echo $((6*7))\n")
        for session in pair:
            session.wait_for(b"\n42\r\n", BOOT)
            session.type(b"poweroff -f\n")
        first, second = (session.end(BOOT) for session in pair)
    finally:
        for session in pair:
            session.close()
    kept_code(folder)
    return Filled(folder, (first, second))


@pytest.fixture(scope="session")
def cache(filled: Filled) -> Path:
    """A cache folder with the engine's optimized code."""
    return filled.folder


@pytest.fixture(scope="session")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled test program."""
    return support.compile_c(PROGRAMS / "life.c", tmp_path_factory.mktemp("programs") / "life")


@pytest.fixture(scope="session")
def initrd(cloud: Image, life: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock initramfs with the test programs in it."""
    target = tmp_path_factory.mktemp("stock") / "initrd"
    extra: dict[str, bytes | Path] = {
        "/test/life": life,
        "/test/life.sh": PROGRAMS / "life.sh",
    }
    target.write_bytes(build_initramfs(cloud.folder / "busybox", extra))
    return target


@pytest.fixture(scope="module")
def machine(cloud: Image, initrd: Path, cache: Path) -> Iterator[Machine]:
    """A running machine, at its shell's prompt when `shell` is asked for."""
    with Machine(
        kernel=cloud.kernel, initrd=initrd, append=APPEND, engine="translate", cache_dir=cache
    ) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def shell(machine: Machine) -> Shell:
    """A shell on that machine."""
    made = Shell(machine)
    made.take_over()
    return made


@pytest.fixture(scope="session")
def host_root(cloud: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the image's busybox and its commands, for the host to run."""
    folder = tmp_path_factory.mktemp("host") / "bin"
    folder.mkdir()
    program = folder / "busybox"
    shutil.copy(cloud.folder / "busybox", program)
    subprocess.run([program, "--install", "-s", folder], check=True)
    return folder
