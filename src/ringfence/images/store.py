"""The image folder: one sub-folder per guest, each with a manifest that says what it holds.

``$RINGFENCE_HOME``, else ``$XDG_DATA_HOME/ringfence``, else ``~/.local/share/ringfence``::

    images/<name>/manifest.json, vmlinuz, initrd, …
    apt/                            apt's state and cache, our own (see apt.py)

Shape: an image is filled in a temporary folder beside its place and renamed into it, so that a
reader sees the old image or the new one and never half of one. Folders without a readable
manifest are not images; :meth:`Store.list_images` passes over them.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringfence.errors import HostError, ImageError, UsageError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Package:
    """A distribution's package that an image was made of."""

    name: str
    version: str


@dataclass(frozen=True)
class Image:
    """A guest that can be started.

    Attributes
    ----------
    name : str
        What the user calls it.
    folder : Path
        Where its files are.
    kernel : Path
        A bzImage or a vmlinux.
    initrd : Path or None
        The first file system, if the guest needs one.
    cmdline : str
        The command line that suits it.
    kernel_version : str
        The release, as ``uname -r`` gives it in the guest.
    packages : tuple[Package, ...]
        What it was made of.
    extra : Mapping[str, str]
        Whatever else its maker noted (distribution, flavour).
    disk : Path or None
        The guest's first disk, raw, if it has one.
    """

    name: str
    folder: Path
    kernel: Path
    initrd: Path | None
    cmdline: str
    kernel_version: str
    packages: tuple[Package, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    disk: Path | None = None

    @property
    def kernel_size(self) -> int:
        """Bytes of the kernel's file."""
        return self.kernel.stat().st_size

    @property
    def initrd_size(self) -> int:
        """Bytes of the initrd's file; 0 without one."""
        return self.initrd.stat().st_size if self.initrd else 0


def default_root() -> Path:
    """The data folder by the environment (XDG Base Directory Specification)."""
    home = os.environ.get("RINGFENCE_HOME")
    if home:
        return Path(home)
    data = os.environ.get("XDG_DATA_HOME")
    base = Path(data) if data and Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "ringfence"


class Store:
    """The image folder below ``root``, which is created when something is first stored."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()

    @property
    def images(self) -> Path:
        """The folder that holds one sub-folder per image."""
        return self.root / "images"

    def list_images(self) -> list[Image]:
        """All images, by name."""
        if not self.images.is_dir():
            return []
        found = []
        for folder in sorted(self.images.iterdir()):
            with suppress(ImageError):  # one made by a newer Ringfence
                found.append(self._load(folder))
        return [image for image in found if image is not None]

    def get(self, name: str) -> Image | None:
        """The image of that name, or None."""
        check_name(name)
        return self._load(self.images / name)

    def find(self, name: str) -> Image:
        """The image of that name.

        Raises
        ------
        UsageError
            There is none, or its name can't be one; names the ones there are.
        """
        image = self.get(name)
        if image is not None:
            return image
        known = [other.name for other in self.list_images()]
        if not known:
            raise UsageError(f"no image {name!r}: there are none yet in {self.images}; pull one")
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else "pull it first"
        raise UsageError(f"no image {name!r} among {', '.join(known)}: {hint}")

    def remove(self, name: str) -> None:
        """Delete an image; UsageError where there is none of that name."""
        folder = self.find(name).folder
        shutil.rmtree(folder)

    @contextmanager
    def filling(self, name: str) -> Iterator[Path]:
        """A fresh folder to fill; it becomes the image's folder when the block ends well.

        The folder is deleted when the block raises; an older image of that name then stays. Call
        :meth:`write_manifest` inside the block.
        """
        check_name(name)
        final = self.images / name
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self.images))
            folder.chmod(0o755)
        except OSError as error:
            raise HostError(
                f"{self.images} can't be written ({error.strerror}): set RINGFENCE_HOME to a"
                " folder of yours"
            ) from error
        try:
            yield folder
            if not (folder / MANIFEST).is_file():
                raise AssertionError(f"image {name} was filled without a manifest")
            _replace_folder(folder, final)
        except OSError as error:
            raise HostError(
                f"image {name} can't be stored in {self.images} ({error.strerror}): is the disk"
                " full?"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_manifest(
        self,
        folder: Path,
        *,
        name: str,
        kernel: str,
        initrd: str | None,
        cmdline: str,
        kernel_version: str,
        packages: tuple[Package, ...] = (),
        extra: Mapping[str, str] | None = None,
        disk: str | None = None,
    ) -> None:
        """Write the manifest of an image that is being filled; file names relative to it."""
        sizes = {
            part: (folder / file).stat().st_size
            for part, file in (("kernel", kernel), ("initrd", initrd))
            if file is not None
        }
        manifest = {
            "version": MANIFEST_VERSION,
            "name": name,
            "kernel": kernel,
            "initrd": initrd,
            "disk": disk,
            "cmdline": cmdline,
            "kernel_version": kernel_version,
            "sizes": sizes,
            "packages": [{"name": p.name, "version": p.version} for p in packages],
            "extra": dict(extra or {}),
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")

    def _load(self, folder: Path) -> Image | None:
        """The image in a folder; None where there is none or it isn't whole."""
        if folder.name.startswith("."):
            return None
        try:
            manifest: Any = json.loads((folder / MANIFEST).read_bytes())
            if manifest["version"] > MANIFEST_VERSION:
                raise ImageError(
                    f"image {folder.name} was made by a newer Ringfence (manifest version"
                    f" {manifest['version']}, expected {MANIFEST_VERSION}): pull it again"
                )
            image = Image(
                name=folder.name,
                folder=folder,
                kernel=folder / manifest["kernel"],
                initrd=folder / manifest["initrd"] if manifest["initrd"] else None,
                cmdline=manifest["cmdline"],
                kernel_version=manifest["kernel_version"],
                packages=tuple(Package(p["name"], p["version"]) for p in manifest["packages"]),
                extra=manifest.get("extra", {}),
                disk=folder / manifest["disk"] if manifest.get("disk") else None,
            )
            for part, size in manifest["sizes"].items():
                if (folder / manifest[part]).stat().st_size != size:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return image


def check_name(name: str) -> None:
    """UsageError where ``name`` can't be an image's name, which is also a folder's name."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} can't be an image's name: expected up to 64 of a-z, 0-9, '.', '_', '-'"
        )


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old contents or the new ones."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace_folder(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``; what was there is moved aside first and then deleted."""
    if not final.exists():
        new.rename(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent)) / "image"
    final.rename(old)
    try:
        new.rename(final)
    except OSError:
        old.rename(final)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
