"""A tree of Debian packages as dpkg leaves it between unpacking and configuring, as one tar file.

What ``dpkg --unpack`` does can be done without root, and without running anything: the files of
all packages go into one archive, with the owners that they shall have, and dpkg's database is
written beside them (dpkg(1), "install ok unpacked"; the formats are those of /var/lib/dpkg).
Whoever unpacks the archive as root of some Linux, ours is a guest, can chroot there, run the
scripts that dpkg would have run before unpacking (`Tree.preinsts` names them), and then
``dpkg --configure -a``.

Folders are merged into /usr from the start. Configuration files are in place already, which dpkg
takes for their having been configured.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from ringfence.errors import ImageError
from ringfence.images.deb import open_tar, read_control
from ringfence.images.root import MERGED

PREINST = "var/lib/dpkg/tmp.preinst"
"""Folder of the scripts to run first, one per package, by name."""
_SCRIPTS = ("preinst", "postinst", "prerm", "postrm", "config")
_INFO = (*_SCRIPTS, "conffiles", "md5sums", "shlibs", "symbols", "templates", "triggers")


class Tree:
    """A tar file that is being written, until the end of a block.

    Parameters
    ----------
    target : Path
        The file; replaced if it is there.
    """

    def __init__(self, target: Path) -> None:
        self._tar = tarfile.TarFile(target, "w", format=tarfile.GNU_FORMAT)
        self._status: list[str] = []
        self._folders: set[str] = set()
        self.preinsts: list[str] = []
        """Packages that have a script to be run before all others, in the order they were added."""
        for name in MERGED:
            self.add_folder(f"usr/{name}")
            self.add_symlink(name, f"usr/{name}")
        for folder, mode in (("tmp", 0o1777), ("proc", 0o555), ("sys", 0o555), ("dev", 0o755)):
            self.add_folder(folder, mode)
        for folder in ("info", "updates", "triggers", "tmp.preinst"):
            self.add_folder(f"var/lib/dpkg/{folder}")
        self.add_file("var/lib/dpkg/info/format", b"1\n")
        self.add_file("var/lib/dpkg/available", b"")

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tar.__exit__(kind, error, trace)

    def add_folder(self, path: str, mode: int = 0o755) -> None:
        """Add a folder of root's; the first mention of a folder counts."""
        info = tarfile.TarInfo(path)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self._add(info)

    def add_symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        info = tarfile.TarInfo(path)
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
        self._tar.addfile(info)

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file of root's, behind what packages have there."""
        info = tarfile.TarInfo(path)
        info.size, info.mode = len(data), mode
        self._tar.addfile(info, io.BytesIO(data))

    def add_package(self, deb: Path) -> None:
        """Add a package's files, and its row in dpkg's database.

        Raises
        ------
        ImageError
            It is damaged.
        """
        fields = read_control(deb)
        try:
            paths = self._unpack(deb)
            scripts = {name: data for name, data in _control_files(deb) if name in _INFO}
        except (tarfile.TarError, lzma.LZMAError, OSError, EOFError, ValueError, KeyError) as error:
            raise ImageError(f"package {deb.name} is damaged ({error}): fetch it again") from error
        name = fields["Package"]
        same = fields.get("Multi-Arch") == "same"
        stem = f"{name}:{fields['Architecture']}" if same else name
        self._info(stem, "list", "".join(f"/{path}\n" for path in (".", *paths)).encode())
        for kind, data in scripts.items():
            self._info(stem, kind, data)
        if "preinst" in scripts:
            self.preinsts.append(name)
            self.add_file(f"{PREINST}/{name}", scripts["preinst"], 0o755)
        self._status.append(_status(fields, scripts.get("conffiles", b"").decode()))

    def finish(self, extra: Mapping[str, bytes]) -> None:
        """Write dpkg's database and further files, by path."""
        self.add_file("var/lib/dpkg/status", "\n".join(self._status).encode())
        for path, data in extra.items():
            self.add_file(path, data, 0o755 if data[:2] in (b"#!", b"\x7fE") else 0o644)

    def _unpack(self, deb: Path) -> list[str]:
        paths = []
        with open_tar(deb, "data.tar") as source:
            for info in source:
                path = info.name.removeprefix("./").strip("/")
                if not path or path == ".":
                    continue
                if ".." in path.split("/"):
                    raise ImageError(f"package {deb.name} has a path with '..': {path}")
                paths.append(path)
                info.name = _merged(path)
                info.uname = info.gname = ""
                if info.islnk():
                    info.linkname = _merged(info.linkname.removeprefix("./").strip("/"))
                self._add(info, source.extractfile(info) if info.isreg() else None)
        return paths

    def _add(self, info: tarfile.TarInfo, data: IO[bytes] | None = None) -> None:
        """Add a member, unless it is a folder that is there already."""
        if info.isdir():
            if info.name in self._folders or info.name in MERGED:
                return
            self._folders.add(info.name)
        self._tar.addfile(info, data)

    def _info(self, stem: str, kind: str, data: bytes) -> None:
        self.add_file(
            f"var/lib/dpkg/info/{stem}.{kind}", data, 0o755 if kind in _SCRIPTS else 0o644
        )


def _merged(path: str) -> str:
    top = path.partition("/")[0]
    return f"usr/{path}" if top in MERGED and path != top else path


def _control_files(deb: Path) -> Iterable[tuple[str, bytes]]:
    with open_tar(deb, "control.tar") as source:
        for info in source:
            file = source.extractfile(info) if info.isreg() else None
            if file is not None:
                yield info.name.removeprefix("./"), file.read()


def _status(fields: Mapping[str, str], conffiles: str) -> str:
    """A package's stanza (deb-control(5), and dpkg's own fields)."""
    lines = [f"Package: {fields['Package']}", "Status: install ok unpacked"]
    for name, value in fields.items():
        if name not in ("Package", "Status"):
            lines.append(f"{name}: " + value.replace("\n", "\n "))
    named = [line.split()[-1] for line in conffiles.splitlines() if line.startswith("/")]
    if named:
        lines.append("Conffiles:")
        lines += [f" {path} newconffile" for path in named]
    return "\n".join(lines) + "\n"
