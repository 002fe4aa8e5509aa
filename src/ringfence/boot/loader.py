"""Recognize a kernel's format and load it.

=============  ==================================================================================
``linux``      bzImage or vmlinux; what is packed is unpacked by us (`linux`)
``linux32``    a bzImage as it is, entered by the boot protocol's 32-bit entry point
``multiboot``  multiboot 1: ELF files, or by addresses in the header (`multiboot`)
``pvh``        ELF files with Xen's note of a PVH entry point (`pvh`)
``auto``       multiboot where there is such a header, PVH for ELF files with its note that are not
               Linux, ``linux`` for anything else
=============  ==================================================================================

Files of all formats may be packed, as distributions have Xen and Mach (``xen.gz``); boot loaders
unpack them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ringfence.boot import multiboot, pvh
from ringfence.boot.bzimage import open_kernel
from ringfence.boot.elf import ELF_MAGIC
from ringfence.boot.layout import BootState
from ringfence.boot.linux import load_linux
from ringfence.boot.params import HEADER_MAGIC
from ringfence.boot.source import ImageSource, read_image
from ringfence.boot.unpack import compression_of, unpack
from ringfence.errors import ImageError, UsageError
from ringfence.memory.ram import GuestMemory

FORMATS = ("auto", "linux", "linux32", "multiboot", "pvh")
_LINUX_BANNER = b"Linux version "


def recognize(data: bytes) -> str:
    """The format of a kernel's file, by its contents: one of `FORMATS`, but not ``auto``."""
    if data[0x202:0x206] == HEADER_MAGIC.to_bytes(4, "little"):
        return "linux"
    if multiboot.find_header(data) is not None:
        return "multiboot"
    if data.startswith(ELF_MAGIC) and _LINUX_BANNER not in data and pvh.entry_point(data):
        return "pvh"
    return "linux"


def load_guest(
    memory: GuestMemory,
    *,
    kernel: ImageSource,
    boot: str = "auto",
    initrd: ImageSource | None = None,
    modules: Sequence[str | tuple[ImageSource, str]] = (),
    cmdline: str = "",
    rsdp: int | None = None,
) -> BootState:
    """Put a kernel and all that comes with it into guest memory.

    Parameters
    ----------
    memory : GuestMemory
        The guest's RAM.
    kernel : bytes or path
        In a format of `FORMATS`.
    boot : str
        The format.
    initrd : bytes or path, optional
        Linux's first file system; for other formats the first module.
    modules : sequence of str, or of (image, str)
        ``FILE`` or ``FILE ARGUMENT...``, for multiboot and PVH kernels.
    cmdline : str
        The kernel's command line. A multiboot kernel finds its file's name before it.
    rsdp : int, optional
        Guest-physical address of the ACPI RSDP.

    Raises
    ------
    ImageError, UsageError
        As the loaders do; modules are given to a kernel that takes none.
    """
    if boot not in FORMATS:
        raise UsageError(f"boot format {boot!r} is unknown: expected one of {', '.join(FORMATS)}")
    data = read_image(kernel, "kernel")
    plain = bytes(unpack(data, "kernel")[0]) if compression_of(data) is not None else data
    if boot == "auto":
        boot = recognize(plain)
    if boot in ("linux", "linux32"):
        if modules:
            raise UsageError("a Linux kernel takes no modules: give its initrd as initrd")
        opened = open_kernel(data, as_is=boot == "linux32")
        if boot == "linux32" and opened.header is None:
            raise ImageError("the kernel is no bzImage, which boot format linux32 needs")
        return load_linux(memory, kernel=opened, initrd=initrd, cmdline=cmdline, rsdp=rsdp)
    given: list[str | tuple[ImageSource, str]] = [*modules]
    if initrd is not None:
        given.insert(0, (initrd, _name(initrd, "initrd")))
    if boot == "pvh":
        return pvh.load_pvh(memory, kernel=plain, modules=given, cmdline=cmdline, rsdp=rsdp)
    line = f"{_name(kernel, 'kernel')} {cmdline}".rstrip()
    return multiboot.load_multiboot(memory, kernel=plain, modules=given, cmdline=line)


def _name(source: ImageSource, default: str) -> str:
    """What a file is called in a command line."""
    return str(source) if isinstance(source, (str, Path)) else default
