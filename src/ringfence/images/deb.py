"""Read Debian packages without dpkg: an ar archive of a control and a data tarball (deb(5)).

Shape: two functions over a small ar reader. Tarballs are streamed through their decompressor, so
that a kernel package of half a gigabyte unpacked never lies in memory as a whole.
"""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import ImageError
from ringfence.images.packed import open_packed

AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


@dataclass(frozen=True)
class DebFile:
    """A file of a package: ``path`` from the root without a leading slash.

    ``mode`` has the permission bits only; ``target`` is a symbolic link's target, ``data`` a
    regular file's contents.
    """

    path: str
    kind: str
    mode: int
    data: bytes = b""
    target: str = ""


def read_control(deb: Path | bytes) -> dict[str, str]:
    """The fields of a package's control file (deb-control(5)); continuation lines joined."""
    for member in _tar_members(deb, "control.tar"):
        if member.path == "control":
            fields: dict[str, str] = {}
            name = ""
            for line in member.data.decode("utf-8", "replace").splitlines():
                if line[:1] in " \t":
                    fields[name] = fields.get(name, "") + "\n" + line.strip()
                elif ":" in line:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
            return fields
    raise ImageError(f"{_name(deb)} has no control file: expected a Debian package")


def read_files(deb: Path | bytes, wanted: Callable[[str], bool] | None = None) -> Iterator[DebFile]:
    """The files of a package, in its order; hard links come as files of their own.

    Parameters
    ----------
    deb : path or bytes
        The package.
    wanted : callable, optional
        Given a path, says whether to give that file out.

    Raises
    ------
    ImageError
        The package is damaged or of another kind.
    """
    return _tar_members(deb, "data.tar", wanted)


@contextmanager
def open_tar(deb: Path | bytes, prefix: str) -> Iterator[tarfile.TarFile]:
    """Open a package's ``data.tar`` or ``control.tar`` as a stream, to be read in order.

    Raises
    ------
    ImageError
        There is none. What is damaged inside raises as tarfile and the decompressor do.
    """
    contents = deb if isinstance(deb, bytes) else _read(deb)
    for name, member in _ar_members(contents, _name(deb)):
        if name.startswith(prefix):
            with (
                open_packed(name, member) as stream,
                tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar,
            ):
                yield tar
            return
    raise ImageError(f"{_name(deb)} has no {prefix}: expected a Debian package")


def _tar_members(
    deb: Path | bytes, prefix: str, wanted: Callable[[str], bool] | None = None
) -> Iterator[DebFile]:
    try:
        with open_tar(deb, prefix) as tar:
            yield from _tar_files(tar, wanted)
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise ImageError(
            f"{_name(deb)} is damaged, {prefix} can't be unpacked ({error}): fetch it again"
        ) from error


def _tar_files(tar: tarfile.TarFile, wanted: Callable[[str], bool] | None) -> Iterator[DebFile]:
    contents: dict[str, bytes] = {}
    for info in tar:
        path = info.name.removeprefix("./").strip("/")
        if not path or path == "." or ".." in path.split("/"):
            continue
        mode = info.mode & 0o7777
        if info.isreg():
            file = tar.extractfile(info)
            if wanted is not None and not wanted(path):
                continue
            data = file.read() if file is not None else b""
            contents[path] = data
            yield DebFile(path, "file", mode, data)
        elif wanted is not None and not wanted(path):
            continue
        elif info.isdir():
            yield DebFile(path, "dir", mode)
        elif info.issym():
            yield DebFile(path, "symlink", mode, target=info.linkname)
        elif info.islnk():
            linked = info.linkname.removeprefix("./").strip("/")
            if linked in contents:
                yield DebFile(path, "file", mode, contents[linked])


def _ar_members(contents: bytes, name: str) -> Iterator[tuple[str, memoryview]]:
    """Name and contents of each member of an ar archive (ar(5), common variant)."""
    if not contents.startswith(AR_MAGIC):
        raise ImageError(f"{name} is no Debian package: expected an ar archive")
    view = memoryview(contents)
    at = len(AR_MAGIC)
    while at + _AR_HEADER <= len(contents):
        header = contents[at : at + _AR_HEADER]
        try:
            size = int(header[48:58])
        except ValueError:
            size = -1
        if header[58:] != b"`\n" or size < 0:
            raise ImageError(f"{name} is damaged: no ar header at byte {at}; fetch it again")
        start = at + _AR_HEADER
        if start + size > len(contents):
            raise ImageError(f"{name} is cut off after {len(contents)} bytes: fetch it again")
        yield header[:16].decode("ascii", "replace").rstrip(" /"), view[start : start + size]
        at = start + size + size % 2


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"package {path} can't be read ({error.strerror}): fetch it again"
        ) from error


def _name(deb: Path | bytes) -> str:
    return f"package {deb.name}" if isinstance(deb, Path) else "the package"
