"""Read a bzImage: check its setup header and unpack the kernel that is inside.

A bzImage is a boot sector, ``setup_sects`` sectors of real-mode code, and the protected-mode part:
a decompressor with the packed kernel, an ELF file, at ``payload_offset`` (boot.rst, protocol 2.08
and later). We unpack the payload ourselves and enter the kernel proper: under binary translation
the guest's own decompressor would cost far more time than ours, which runs natively. Where there is
no such payload (memtest86+, old kernels), or one asks for it, the protected-mode part is loaded as
it is, for the 32-bit boot protocol or the 64-bit one.

Shape: :func:`open_kernel` accepts whatever a user may have (a bzImage, a bare or packed vmlinux)
and gives a :class:`Kernel`, which is all that the loader needs to know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ringfence.boot.elf import ELF_MAGIC, PF_X, Program, Segment
from ringfence.boot.params import (
    BOOT_FLAG_MAGIC,
    HEADER_MAGIC,
    LOADED_HIGH,
    SETUP_HEADER_FLOOR,
    XLF_KERNEL_64,
    SetupHeader,
)
from ringfence.boot.source import ImageSource, read_image
from ringfence.boot.unpack import Unpacked, compression_of, unpack
from ringfence.errors import ImageError
from ringfence.memory.ram import HIGH_RAM_BASE

SECTOR = 512
OLDEST_PROTOCOL = 0x0202
"""2.02 (Linux 2.4) is the first that takes the command line where we put it."""
PAYLOAD_PROTOCOL, RELOCATABLE_PROTOCOL, XLOADFLAGS_PROTOCOL = 0x0208, 0x020A, 0x020C
"""The first with payload_offset; with pref_address and init_size; with xloadflags."""
LOAD_ADDRESS = 0x100000
"""Where the protected-mode part is loaded unless the header says otherwise."""
ENTRY_64 = 0x200
"""The 64-bit entry point, from the start of the protected-mode part on."""

_BANNER = re.compile(rb"Linux version ([0-9][^\0\n]{0,255})")
_MISTAKEN = (
    (b"070701", "a cpio archive, probably an initrd"),
    (b"070702", "a cpio archive, probably an initrd"),
    (b"!<arch>\n", "a Debian package or an ar archive"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"PK\x03\x04", "a zip archive"),
    (b"#!", "a script"),
)
"""What people give by mistake: opening bytes, and its name for the message."""


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to be loaded.

    Attributes
    ----------
    elf : bytes or memoryview
        The unpacked vmlinux; more bytes (relocations) may follow the ELF file. Empty where there is
        none: then ``code`` is to be run.
    code : bytes or memoryview
        The protected-mode part of a bzImage as it is.
    code_64 : bool
        Whether that is to be entered in 64-bit mode.
    header : SetupHeader or None
        The bzImage's setup header; None for a bare vmlinux.
    compression : str
        How it was packed: "gzip", "xz", …, or "none".
    version : str
        The kernel's version line as far as the image tells, else "".
    """

    elf: Unpacked
    header: SetupHeader | None
    compression: str
    version: str
    code: bytes | memoryview = b""
    code_64: bool = False


def open_kernel(source: ImageSource, *, as_is: bool = False) -> Kernel:
    """Recognize, check and unpack a kernel.

    Parameters
    ----------
    source : bytes or path
        A bzImage, a vmlinux, or a vmlinux packed by a program that we know.
    as_is : bool
        Don't unpack a bzImage; its code is to be entered in protected mode.

    Raises
    ------
    ImageError
        It can't be read, is no kernel, is too old, or damaged.
    """
    data = read_image(source, "kernel")
    if data.startswith(ELF_MAGIC):
        return Kernel(data, None, "none", _banner(data))
    for magic, name in _MISTAKEN:
        if data.startswith(magic):
            raise ImageError(f"the kernel is {name}: expected a bzImage (vmlinuz) or a vmlinux")
    if compression_of(data) is not None:
        elf, compression = unpack(data, "kernel")
        if bytes(elf[:4]) != ELF_MAGIC:
            raise ImageError(
                f"the kernel is a {compression.name} file without a vmlinux inside: is it the"
                " initrd? Expected a bzImage (vmlinuz) or a vmlinux"
            )
        return Kernel(elf, None, compression.name, _banner(elf))
    header = parse_header(data)
    version = _version_string(data, header)
    code = memoryview(data)[SECTOR * (1 + (header.setup_sects or 4)) :]
    if not code:
        raise ImageError("the kernel is cut off behind its real-mode part: fetch it again")
    if as_is or header.version < PAYLOAD_PROTOCOL or not header.payload_offset:
        can_64 = header.version >= XLOADFLAGS_PROTOCOL and header.xloadflags & XLF_KERNEL_64
        return Kernel(b"", header, "none", version, code, bool(can_64) and not as_is)
    payload = _payload(data, header)
    elf, compression = unpack(payload, "kernel's payload")
    if bytes(elf[:4]) != ELF_MAGIC:
        raise ImageError(
            f"the kernel's payload unpacks to something that opens with {bytes(elf[:4]).hex(' ')}:"
            " expected an ELF file; fetch the kernel again"
        )
    return Kernel(elf, header, compression.name, version, code)


def parse_header(data: bytes) -> SetupHeader:
    """The setup header of a bzImage.

    Raises
    ------
    ImageError
        The bytes are no bzImage, are cut off inside the header, or the kernel is too old.
    """
    if len(data) < SETUP_HEADER_FLOOR:
        raise ImageError(
            f"the kernel has only {len(data)} bytes: expected a bzImage (vmlinuz) or a vmlinux"
        )
    probe = SetupHeader()
    head = data[: len(probe.raw)]
    probe.raw[: len(head)] = head
    if probe.boot_flag != BOOT_FLAG_MAGIC:
        raise ImageError(
            "the kernel is neither a bzImage (no 0xAA55 at 0x1FE) nor an ELF file:"
            " give a vmlinuz or a vmlinux"
        )
    if len(data) < SETUP_HEADER_FLOOR + data[0x201]:
        raise ImageError(
            f"the kernel is cut off inside its setup header, after {len(data)} bytes:"
            " fetch it again"
        )
    if probe.header != HEADER_MAGIC:
        raise ImageError(
            "the kernel has a boot sector but no setup header ('HdrS' at 0x202):"
            " is it a disk image? Give a vmlinuz or a vmlinux"
        )
    header = SetupHeader()
    header.copy_header(data)
    major, minor = header.version >> 8, header.version & 0xFF
    if header.version < OLDEST_PROTOCOL:
        raise ImageError(
            f"the kernel speaks boot protocol {major}.{minor:02}: expected 2.02 or later"
            " (Linux 2.4); give a newer kernel or its vmlinux"
        )
    if not header.loadflags & LOADED_HIGH:
        raise ImageError("the kernel is a zImage, loaded below 1 MiB: expected a bzImage")
    return header


def flat_program(kernel: Kernel) -> Program:
    """The protected-mode part of a bzImage as a program, for the entry point that it has."""
    header = kernel.header
    assert header is not None
    base, room = LOAD_ADDRESS, len(kernel.code)
    if header.version >= RELOCATABLE_PROTOCOL:
        room = max(room, header.init_size)
        if header.relocatable_kernel and header.pref_address:
            base = header.pref_address
    if base < LOAD_ADDRESS or base + room > HIGH_RAM_BASE:
        raise ImageError(
            f"the kernel is damaged: it wants to be at {base:#x} - {base + room:#x},"
            " expected above 1 MiB and below 4 GiB"
        )
    segment = Segment(base, base, room, PF_X, memoryview(kernel.code))
    if kernel.code_64:
        return Program(base + ENTRY_64, (segment,), 64)
    return Program(base, (segment,), 32)


def _payload(data: bytes, header: SetupHeader) -> memoryview:
    """The packed kernel inside a bzImage; the appended size word is still at its end."""
    start = SECTOR * (1 + (header.setup_sects or 4)) + header.payload_offset
    end = start + header.payload_length
    if not header.payload_length:
        raise ImageError("the kernel has no payload (payload_length is 0): give its vmlinux")
    if end > len(data):
        raise ImageError(
            f"the kernel is cut off: its payload ends at byte {end}, the file at {len(data)};"
            " fetch it again"
        )
    return memoryview(data)[start:end]


def _version_string(data: bytes, header: SetupHeader) -> str:
    """The text that ``kernel_version`` points to, 0x200 bytes less than its offset."""
    at = header.kernel_version + 0x200
    if not header.kernel_version or at >= len(data):
        return ""
    text = data[at : at + 256].split(b"\0", 1)[0]
    return text.decode("ascii", "replace").strip()


def _banner(elf: Unpacked) -> str:
    """The release from the kernel's "Linux version …" banner."""
    found = _BANNER.search(elf)
    return found[1].decode("ascii", "replace").strip() if found else ""
