"""Debian's firmware for virtual machines, fetched with apt as images are, and kept beside them.

``seabios`` is a BIOS, ``ovmf`` is UEFI with a template of its variables. Each is a folder below
``firmware/`` in the store.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import HostError, ImageError
from ringfence.images.apt import Progress, no_progress
from ringfence.images.deb import read_files
from ringfence.images.debian import fetch_packages
from ringfence.images.store import Store, write_atomically

CODE, VARIABLES = "code.rom", "variables.rom"
PACKAGES: dict[str, dict[str, str]] = {
    "seabios": {CODE: "usr/share/seabios/bios-256k.bin"},
    "ovmf": {
        CODE: "usr/share/OVMF/OVMF_CODE_4M.fd",
        VARIABLES: "usr/share/OVMF/OVMF_VARS_4M.fd",
    },
}
"""Packages that we know, and which of their files are what."""


@dataclass(frozen=True)
class FirmwareFiles:
    """Where firmware is: its code, and the template of its variables if it has any."""

    code: Path
    variables: Path | None


def find_firmware(name: str, store: Store) -> FirmwareFiles | None:
    """Firmware that has been fetched before."""
    folder = store.root / "firmware" / name
    if not all((folder / file).is_file() for file in PACKAGES[name]):
        return None
    return FirmwareFiles(folder / CODE, folder / VARIABLES if VARIABLES in PACKAGES[name] else None)


def fetch_firmware(
    name: str, store: Store | None = None, progress: Progress = no_progress
) -> FirmwareFiles:
    """Firmware by its package's name, one of PACKAGES; downloaded where it is not there yet.

    Raises
    ------
    HostError
        apt is missing, the network is down, or the folder can't be written.
    ImageError
        The package has no such files.
    """
    store = store or Store()
    found = find_firmware(name, store)
    if found is not None:
        return found
    (package,) = fetch_packages(
        [name], store.root / "apt" / "packages", store=store, progress=progress
    )
    wanted = {path: file for file, path in PACKAGES[name].items()}
    parent = store.root / "firmware"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            for file in read_files(package.path, lambda path: path in wanted):
                write_atomically(folder / wanted[file.path], file.data)
            missing = {*PACKAGES[name]} - {each.name for each in folder.iterdir()}
            if missing:
                raise ImageError(f"package {name} {package.version} has no {', '.join(missing)}")
            shutil.rmtree(parent / name, ignore_errors=True)
            folder.replace(parent / name)
    except OSError as error:
        raise HostError(f"{parent} can't be written ({error.strerror})") from error
    found = find_firmware(name, store)
    assert found is not None
    return found
