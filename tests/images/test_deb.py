"""Debian packages of each packing are read; damaged ones are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.errors import ImageError
from ringfence.images.deb import DebFile, read_control, read_files

Maker = Callable[..., bytes]
FILES: dict[str, bytes | str] = {
    "bin": "dir:",
    "bin/tool": b"\x7fELF" * 1000,
    "bin/same": "hard:bin/tool",
    "lib/libx.so": "libx.so.1",
    "etc/conf": b"x = 1\n",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_read(suffix: str, deb: Maker, tmp_path: Path) -> None:
    path = tmp_path / "thing.deb"
    path.write_bytes(deb(FILES, suffix))
    assert read_control(path)["Version"] == "1:2-3"
    assert read_control(path)["Description"] == "a thing\nthat does"
    assert list(read_files(path)) == [
        DebFile("bin", "dir", 0o755),
        DebFile("bin/tool", "file", 0o755, b"\x7fELF" * 1000),
        DebFile("bin/same", "file", 0o755, b"\x7fELF" * 1000),
        DebFile("lib/libx.so", "symlink", 0o755, target="libx.so.1"),
        DebFile("etc/conf", "file", 0o644, b"x = 1\n"),
    ]
    assert [f.path for f in read_files(path, lambda p: p.startswith("etc"))] == ["etc/conf"]


def test_paths_can_not_escape(deb: Maker) -> None:
    assert list(read_files(deb({"../../etc/passwd": b"x", "a/../b": b"y"}))) == []


def test_damaged(deb: Maker, tmp_path: Path) -> None:
    whole = deb(FILES)
    for length in [0, 7, 8, 60, 100, 200, 400, len(whole) // 2, len(whole) - 10]:
        with pytest.raises(ImageError):
            list(read_files(whole[:length]))
    with pytest.raises(ImageError, match="no Debian package"):
        list(read_files(b"PK\x03\x04" + bytes(100)))
    with pytest.raises(ImageError, match="can't be read"):
        list(read_files(tmp_path / "none.deb"))


def test_unknown_packing(deb: Maker) -> None:
    with pytest.raises(ImageError, match="'lzo'"):
        list(read_files(deb(FILES).replace(b"data.tar.xz ", b"data.tar.lzo")))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_mangled_bytes_never_surprise(suffix: str, deb: Maker) -> None:
    source = random.Random(5)
    whole = deb(FILES, suffix)
    refused = 0
    for _ in range(200):
        mangled = bytearray(whole)
        for _ in range(source.randrange(1, 8)):
            mangled[source.randrange(len(mangled))] = source.randrange(256)
        try:
            list(read_files(bytes(mangled)))
        except ImageError as error:
            refused += 1
            assert str(error)
    assert refused
