"""The root file system that the guests start with."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.errors import ImageError
from ringfence.images.initramfs import Entry, read_archive
from ringfence.images.root import (
    INIT,
    MODULES_SCRIPT,
    NETWORK_SCRIPT,
    UDHCPC_SCRIPT,
    GuestRoot,
    build_initramfs,
)

BUSYBOX = b"\x7fELF pretend"


def entries(archive: bytes) -> dict[str, Entry]:
    return {entry.path: entry for entry in read_archive(archive)}


def test_layout() -> None:
    found = entries(build_initramfs(BUSYBOX))
    assert found["bin"].data == b"usr/bin"
    assert found["usr/bin/busybox"].mode == stat.S_IFREG | 0o755
    assert found["usr/bin/sh"].data == b"busybox"
    assert found["init"].data.decode() == INIT
    assert found["init"].mode & 0o111
    assert found["dev/console"].device == (5, 1)
    for folder in ("proc", "sys", "tmp", "root", "usr/sbin"):
        assert stat.S_ISDIR(found[folder].mode)


def test_extras(tmp_path: Path, deb: Callable[..., bytes]) -> None:
    (tmp_path / "run").write_bytes(b"data")
    (tmp_path / "run").chmod(0o700)
    package = tmp_path / "thing.deb"
    package.write_bytes(
        deb({"bin/thing": b"x", "lib": "usr/lib", "lib/l.so": "l.so.1", "usr/share/doc/d": b"y"})
    )
    archive = build_initramfs(
        BUSYBOX,
        {"/bin/script": b"#!/bin/sh\n", "/etc/x": b"text", "/run": tmp_path / "run"},
        init="#!/bin/sh\n",
        packages=[package],
    )
    found = entries(archive)
    assert found["usr/bin/script"].mode & 0o777 == 0o755
    assert found["etc/x"].mode & 0o777 == 0o644
    assert (found["run"].data, found["run"].mode & 0o777) == (b"data", 0o700)
    assert found["init"].data == b"#!/bin/sh\n"
    assert found["usr/bin/thing"].data == b"x"
    assert found["usr/lib/l.so"].data == b"l.so.1"
    assert found["lib"].data == b"usr/lib"
    assert "usr/share/doc/d" not in found
    assert archive == build_initramfs(
        BUSYBOX,
        {"/run": tmp_path / "run", "/etc/x": b"text", "/bin/script": b"#!/bin/sh\n"},
        init=b"#!/bin/sh\n",
        packages=[package],
    )


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="busybox"):
        build_initramfs(b"#!/bin/sh")
    with pytest.raises(ImageError, match="can't be read"):
        build_initramfs(tmp_path / "none")
    with pytest.raises(ImageError, match="can't be read"):
        build_initramfs(BUSYBOX, {"/x": tmp_path})


def test_place() -> None:
    root = GuestRoot()
    assert root.place("/bin/ls") == "usr/bin/ls"
    assert root.place("usr/bin/ls") == "usr/bin/ls"
    assert root.place("lib64/ld.so") == "usr/lib64/ld.so"
    assert root.place("library/x") == "library/x"


@pytest.mark.skipif(shutil.which("dash") is None, reason="the host has no POSIX shell to ask")
@pytest.mark.parametrize("script", [INIT, MODULES_SCRIPT, NETWORK_SCRIPT, UDHCPC_SCRIPT])
def test_scripts_are_valid_shell(script: str) -> None:
    subprocess.run(["dash", "-n"], input=script, text=True, check=True)
