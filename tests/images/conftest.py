"""Synthetic Debian packages, and the marker of tests that use the host's apt."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Mapping

import pytest
import zstandard


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "apt: needs the host's apt and its network")


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def make_tar(files: Mapping[str, bytes | str]) -> bytes:
    """A tarball; str values are symbolic links, "hard:" ones hard links, "dir:" ones folders."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, value in files.items():
            info = tarfile.TarInfo("./" + path)
            if isinstance(value, bytes):
                info.size, info.mode = len(value), 0o755 if "bin/" in path else 0o644
                tar.addfile(info, io.BytesIO(value))
                continue
            kind, _, target = value.rpartition(":")
            info.mode = 0o755
            info.type = {"": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "dir": tarfile.DIRTYPE}[kind]
            info.linkname = f"./{target}" if kind == "hard" else target
            tar.addfile(info)
    return out.getvalue()


def make_deb(
    files: Mapping[str, bytes | str],
    suffix: str = ".xz",
    fields: bytes = b"",
    scripts: Mapping[str, bytes] | None = None,
) -> bytes:
    """A Debian package with these files, further control fields, and control files."""
    control = b"Package: thing\nVersion: 1:2-3\n" + fields
    control += b"Description: a thing\n that does\n"
    members = {
        "debian-binary": b"2.0\n",
        f"control.tar{suffix}": PACKERS[suffix](make_tar({"control": control, **(scripts or {})})),
        f"data.tar{suffix}": PACKERS[suffix](make_tar(files)),
    }
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


@pytest.fixture(name="deb")
def deb_fixture() -> Callable[..., bytes]:
    """:func:`make_deb`."""
    return make_deb
