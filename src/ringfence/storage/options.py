"""From what a user writes behind ``--disk`` to an open disk.

The format is never guessed from the contents: the guest writes those, and a guest that could turn a
raw disk into another format's header would choose which files of the host are opened next time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UsageError
from ringfence.pacing import OPTIONS, Pacing
from ringfence.storage.disk import Disk

FORMATS = ("raw", "qcow2")
SERIAL_LENGTH = 20
NO_PACING = Pacing()


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """One disk of a machine.

    Attributes
    ----------
    path : Path
        The image.
    format : str
        ``raw`` or ``qcow2``; by default as the file's suffix says, and raw for others.
    read_only : bool
        The guest can't write.
    snapshot : bool
        What the guest writes is thrown away with the machine.
    direct : bool
        Pass by the host's page cache.
    serial : str
        The serial number that the guest sees, 20 ASCII characters at most.
    backing : bool
        Let a qcow2 image name backing files anywhere, not only in or below its own folder.
    pacing : Pacing
        How often its device and the guest tell each other of work.
    slot : int or None
        The PCI slot of one that was added while the guest ran; None: the next free one.
    """

    path: Path
    format: str
    read_only: bool = False
    snapshot: bool = False
    direct: bool = False
    serial: str = ""
    backing: bool = False
    pacing: Pacing = NO_PACING
    slot: int | None = None


FLAGS = {
    "readonly": "read_only",
    "snapshot": "snapshot",
    "direct": "direct",
    "backing": "backing",
}


def parse_disk(text: str | Path | DiskOptions) -> DiskOptions:
    """Read ``FILE[,format=raw|qcow2][,readonly][,snapshot][,direct][,backing][,serial=TEXT]``.

    A comma in the file's name is written twice. A flag may be given a value: ``readonly=off``.
    The device's switches (`pacing.OPTIONS`) may follow, too.

    Raises
    ------
    UsageError
        There is an unknown option or value.
    """
    if isinstance(text, DiskOptions):
        return text
    if isinstance(text, Path):
        return DiskOptions(text, _format_of(text))
    first, *rest = text.replace(",,", "\0").split(",")
    path = Path(first.replace("\0", ","))
    if not first:
        raise UsageError(f"disk {text!r} names no file: expected FILE[,OPTION...]")
    format_, serial = _format_of(path), ""
    flags: dict[str, bool] = {}
    pacing = NO_PACING
    for option in rest:
        name, _, value = option.partition("=")
        if name == "format" and value in FORMATS:
            format_ = value
        elif name == "serial" and 0 < len(value) <= SERIAL_LENGTH and value.isascii():
            serial = value
        elif name in FLAGS and value in ("", "on", "off"):
            flags[FLAGS[name]] = value != "off"
        elif (paced := pacing.with_option(option)) is not None:
            pacing = paced
        else:
            raise UsageError(
                f"disk option {option!r}: expected format=raw|qcow2, readonly, snapshot, direct,"
                f" backing, serial=TEXT of up to {SERIAL_LENGTH} ASCII characters, {OPTIONS}"
            )
    return DiskOptions(path, format_, serial=serial, pacing=pacing, **flags)


def open_disk(options: DiskOptions) -> Disk:
    """Open a disk as the options say.

    Raises
    ------
    ImageError, HostError
        The file can't be opened, is damaged, or another machine uses it.
    """
    read_only = options.read_only or options.snapshot
    disk = _OPENERS[options.format](options, read_only)
    if options.snapshot and not options.read_only:
        from ringfence.storage.overlay import Overlay

        return Overlay(disk)
    return disk


def _open_raw(options: DiskOptions, read_only: bool) -> Disk:
    from ringfence.storage.raw import RawDisk

    return RawDisk(options.path, read_only=read_only, direct=options.direct)


def _open_qcow2(options: DiskOptions, read_only: bool) -> Disk:
    from ringfence.storage.qcow2 import Qcow2Disk

    return Qcow2Disk(
        options.path, read_only=read_only, direct=options.direct, any_backing=options.backing
    )


_OPENERS: dict[str, Callable[[DiskOptions, bool], Disk]] = {
    "raw": _open_raw,
    "qcow2": _open_qcow2,
}


def _format_of(path: Path) -> str:
    return "qcow2" if path.suffix.lower() == ".qcow2" else "raw"
