"""Which of the downloaded files is the package that was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ringfence.errors import HostError
from ringfence.images.apt import Apt

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is missing")


@pytest.mark.parametrize(
    ("architecture", "names", "found"),
    [
        ("amd64", ["busybox=1:1.0"], "busybox_1%3a1.0_amd64.deb"),
        ("i386", ["busybox=1:1.0"], "busybox_1%3a1.0_i386.deb"),
        ("amd64", ["busybox:i386=1:1.0"], "busybox_1%3a1.0_i386.deb"),
        ("amd64", ["texts=2"], "texts_2_all.deb"),
        ("arm64", ["busybox=1:1.0"], None),
    ],
)
def test_architectures_lie_side_by_side(
    architecture: str,
    names: list[str],
    found: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("busybox_1%3a1.0_amd64.deb", "busybox_1%3a1.0_i386.deb", "texts_2_all.deb"):
        (folder / name).touch()
    apt = Apt(tmp_path / "apt", architecture=architecture)
    monkeypatch.setattr(apt, "_run", lambda *arguments, **more: ("", 0))
    if found is None:
        with pytest.raises(HostError, match="no file"):
            apt.download(names, folder)
    else:
        assert apt.download(names, folder)[0].path == folder / found
