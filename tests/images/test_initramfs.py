"""cpio archives: deterministic, read back by us and by the system's cpio where there is one."""

from __future__ import annotations

import gzip
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.errors import ImageError, UsageError
from ringfence.images.initramfs import Archive, Entry, read_archive


def sample(order: int = 1) -> Archive:
    archive = Archive()
    steps: list[Callable[[], None]] = [
        lambda: archive.add_file("/usr/bin/tool", b"#!/bin/sh\n", 0o755),
        lambda: archive.add_file("etc/odd name", b"abc"),
        lambda: archive.add_symlink("bin", "usr/bin"),
        lambda: archive.add_node("dev/console", "c", 5, 1, 0o620),
        lambda: archive.add_node("dev/vda", "b", 254, 16),
        lambda: archive.add_dir("tmp", 0o1777),
        lambda: archive.add_file("empty", b""),
    ]
    for step in steps[::order]:
        step()
    return archive


def test_round_trip() -> None:
    assert read_archive(sample().pack()) == [
        Entry("bin", stat.S_IFLNK | 0o777, b"usr/bin"),
        Entry("dev", stat.S_IFDIR | 0o755),
        Entry("dev/console", stat.S_IFCHR | 0o620, b"", (5, 1)),
        Entry("dev/vda", stat.S_IFBLK | 0o600, b"", (254, 16)),
        Entry("empty", stat.S_IFREG | 0o644),
        Entry("etc", stat.S_IFDIR | 0o755),
        Entry("etc/odd name", stat.S_IFREG | 0o644, b"abc"),
        Entry("tmp", stat.S_IFDIR | 0o1777),
        Entry("usr", stat.S_IFDIR | 0o755),
        Entry("usr/bin", stat.S_IFDIR | 0o755),
        Entry("usr/bin/tool", stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
    ]


def test_equal_contents_give_equal_bytes() -> None:
    assert sample().pack() == sample(-1).pack()
    assert sample().pack(compress=True) == sample(-1).pack(compress=True)
    assert gzip.decompress(sample().pack(compress=True)) == sample().pack()
    assert len(sample().pack()) % 512 == 0


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the host has no cpio")
def test_the_systems_cpio_reads_it(tmp_path: Path) -> None:
    subprocess.run(
        ["cpio", "-id", "--quiet", "--no-absolute-filenames", "etc/*", "usr/*", "bin"],
        input=sample().pack(),
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "etc/odd name").read_bytes() == b"abc"
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("path", ["../x", "a/../../x", "", "/", "a\0b", "."])
def test_bad_paths(path: str) -> None:
    with pytest.raises(UsageError):
        Archive().add_file(path, b"")


def test_a_file_is_no_folder() -> None:
    archive = Archive()
    archive.add_file("a", b"")
    with pytest.raises(UsageError, match="a is not a folder"):
        archive.add_file("a/b", b"")
    with pytest.raises(UsageError, match="expected 'c' or 'b'"):
        archive.add_node("n", "x", 1, 2)


def test_replaced_and_contained() -> None:
    archive = sample()
    archive.add_file("empty", b"full")
    assert "/empty" in archive
    assert "usr" in archive
    assert "nothing" not in archive
    assert [e.data for e in archive if e.path == "empty"] == [b"full"]


def test_damaged_archives() -> None:
    whole = sample().pack()
    with pytest.raises(ImageError, match="byte 0"):
        read_archive(b"x" * 1000)
    with pytest.raises(ImageError, match="damaged"):
        read_archive(whole[:6] + b"zz" + whole[8:])
    for length in range(0, len(whole) - 512, 37):
        with pytest.raises(ImageError):
            read_archive(whole[:length])
