"""The tree of unpacked packages: merged folders, dpkg's database, scripts to be run first."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.errors import ImageError
from ringfence.images.unpacked import Tree

Maker = Callable[..., bytes]


def test_a_tree(deb: Maker, tmp_path: Path) -> None:
    package = tmp_path / "thing.deb"
    package.write_bytes(
        deb(
            {
                "bin": "dir:",
                "bin/tool": b"#!/bin/sh\n",
                "bin/same": "hard:bin/tool",
                "lib/link.so": "link.so.1",
                "etc/thing.conf": b"yes\n",
                "usr/share/thing": "dir:",
            },
            fields=b"Architecture: amd64\nMulti-Arch: same\nStatus: bogus\n",
            scripts={
                "preinst": b"#!/bin/sh\n",
                "postinst": b"#!/bin/sh\n",
                "conffiles": b"/etc/thing.conf\n",
                "nonsense": b"?",
            },
        )
    )
    with Tree(tmp_path / "tree.tar") as tree:
        tree.add_package(package)
        tree.finish({"etc/hostname": b"guest\n", "setup": b"#!/bin/sh\n"})
    assert tree.preinsts == ["thing"]
    with tarfile.open(tmp_path / "tree.tar") as tar:
        members = {member.name: member for member in tar}
        texts = {
            name: file.read().decode()
            for name, member in members.items()
            if member.isreg() and (file := tar.extractfile(member)) is not None
        }
    assert members["bin"].linkname == "usr/bin"
    assert members["usr/bin/tool"].mode == 0o755
    assert members["usr/bin/same"].linkname == "usr/bin/tool"
    assert members["usr/lib/link.so"].linkname == "link.so.1"
    assert members["tmp"].mode == 0o1777
    assert members["setup"].mode == 0o755
    assert {member.uid for member in members.values()} == {0}
    info = "var/lib/dpkg/info/thing:amd64"
    assert texts[f"{info}.list"].splitlines()[:3] == ["/.", "/bin", "/bin/tool"]
    assert members[f"{info}.postinst"].mode == 0o755
    assert f"{info}.nonsense" not in members
    assert texts["var/lib/dpkg/tmp.preinst/thing"] == "#!/bin/sh\n"
    status = texts["var/lib/dpkg/status"]
    assert status.startswith("Package: thing\nStatus: install ok unpacked\nVersion: 1:2-3\n")
    assert "\nDescription: a thing\n that does\n" in status
    assert status.endswith("Conffiles:\n /etc/thing.conf newconffile\n")
    assert "bogus" not in status


def test_packages_that_are_damaged(deb: Maker, tmp_path: Path) -> None:
    package = tmp_path / "thing.deb"
    package.write_bytes(deb({"a/../../etc/passwd": b""}))
    with Tree(tmp_path / "tree.tar") as tree:
        with pytest.raises(ImageError, match=r"'\.\.'"):
            tree.add_package(package)
        whole = deb({"usr/bin/tool": b"x" * 10000})
        package.write_bytes(whole[: len(whole) - 80])
        with pytest.raises(ImageError, match=r"thing\.deb"):
            tree.add_package(package)
        with pytest.raises(ImageError, match="can't be read"):
            tree.add_package(tmp_path / "missing.deb")
