"""What a machine starts: kernel, initrd, command line, firmware, by what its owner named.

`choose` decides between an image, a kernel of the owner's and firmware, and reads what has to be
read to know what they are. Images and their store are loaded only where one is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import ImageError, UsageError
from ringfence.storage.options import DiskOptions

if TYPE_CHECKING:
    from ringfence.boot.firmware import Firmware
    from ringfence.boot.source import ImageSource

DEFAULT_APPEND = "console=ttyS0 panic=-1"
"""Kernel command line where neither the owner nor the image says another."""
DEFAULT_IMAGE = "debian"


@dataclass(frozen=True, slots=True)
class Software:
    """What a machine starts.

    Attributes
    ----------
    kernel, initrd : bytes, Path or None
        None where firmware starts what is on a disk.
    cmdline : str
        The kernel's command line.
    disks : tuple of DiskOptions
        The image's own disk, if it has one.
    firmware : Firmware or None
        What starts in the kernel's place, or before it.
    """

    kernel: ImageSource | None
    initrd: ImageSource | None
    cmdline: str
    disks: tuple[DiskOptions, ...] = ()
    firmware: Firmware | None = None


def choose(
    image: str | None,
    kernel: ImageSource | None,
    initrd: ImageSource | None,
    append: str | None,
    bios: str | Path | Firmware | None,
    nvram: str | Path | None,
    ephemeral: bool,
) -> Software:
    """Find what a machine is to start; the parameters are those of `Machine`.

    Raises
    ------
    UsageError
        What is asked for doesn't go together.
    ImageError
        The image or the firmware isn't there, or can't be read.
    """
    firmware = _firmware(bios, nvram)
    initrd = _source(initrd)
    if kernel is not None:
        if image is not None:
            raise UsageError("both an image and a kernel were given: expected one of them")
        cmdline = DEFAULT_APPEND if append is None else append
        return Software(_source(kernel), initrd, cmdline, firmware=firmware)
    if firmware is not None and image is None:
        return Software(None, initrd, append or "", firmware=firmware)
    return _from_image(image or DEFAULT_IMAGE, initrd, append, ephemeral, firmware)


def _source(source: ImageSource | None) -> ImageSource | None:
    return Path(source) if isinstance(source, str) else source


def _firmware(bios: str | Path | Firmware | None, nvram: str | Path | None) -> Firmware | None:
    """Firmware by its name, from a file, or as it was given."""
    if bios is None:
        if nvram is not None:
            raise UsageError("variables were given without firmware: expected bios, too")
        return None
    from ringfence.boot.firmware import Firmware, read_firmware
    from ringfence.images import firmware
    from ringfence.images.store import Store

    if isinstance(bios, Firmware):
        return bios
    if bios not in firmware.PACKAGES:
        # A file of its own may come with variables of its own, without a template.
        given = Path(nvram) if nvram else None
        return read_firmware(bios, given if given and given.exists() else None)
    found = firmware.find_firmware(str(bios), Store())
    if found is None:
        raise ImageError(f"firmware {bios} is not there: fetch it by 'ringfence pull {bios}'")
    return read_firmware(found.code, found.variables)


def _from_image(
    name: str,
    initrd: ImageSource | None,
    append: str | None,
    ephemeral: bool,
    firmware: Firmware | None,
) -> Software:
    """What a stored or built-in image has, and what was given in its place."""
    from ringfence.images import builtin
    from ringfence.images.store import Store

    kernel: ImageSource
    disks: tuple[DiskOptions, ...] = ()
    if name == builtin.NAME:
        kernel, cmdline = builtin.builtin_kernel(), DEFAULT_APPEND
    else:
        image = Store().find(name)
        kernel, initrd = image.kernel, initrd or image.initrd
        cmdline = " ".join(dict.fromkeys(f"{DEFAULT_APPEND} {image.cmdline}".split()))
        if image.disk is not None:
            disks = (DiskOptions(image.disk, "raw", snapshot=ephemeral),)
    cmdline = f"{cmdline} {append}" if append else cmdline
    return Software(kernel, initrd, cmdline, disks, firmware)
