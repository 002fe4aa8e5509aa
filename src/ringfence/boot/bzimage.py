"""Read a bzImage: check its setup header and unpack the kernel that is inside.

A bzImage is a boot sector, ``setup_sects`` sectors of real-mode code, and the protected-mode part:
a decompressor with the packed kernel, an ELF file, at ``payload_offset`` (boot.rst, protocol 2.08
and later). We unpack the payload ourselves and enter the kernel proper: under binary translation
the guest's own decompressor would cost far more time than ours, which runs natively.

Shape: :func:`open_kernel` accepts whatever a user may have (a bzImage, a bare or packed vmlinux)
and gives a :class:`Kernel`, which is all that the loader needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.boot.params import (
    BOOT_FLAG_MAGIC,
    HEADER_MAGIC,
    SETUP_HEADER_FLOOR,
    XLF_KERNEL_64,
    SetupHeader,
)
from ringfence.boot.source import ImageSource, read_image
from ringfence.boot.unpack import compression_of, unpack
from ringfence.errors import ImageError

SECTOR = 512
ELF_MAGIC = b"\x7fELF"
OLDEST_PROTOCOL = 0x020C
"""2.12 (Linux 3.8) is the first that says, in xloadflags, whether a kernel is a 64-bit one."""

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
    elf : bytes
        The unpacked vmlinux; more bytes (relocations) may follow the ELF file.
    header : SetupHeader or None
        The bzImage's setup header; None for a bare vmlinux.
    compression : str
        How it was packed: "gzip", "xz", …, or "none".
    version : str
        The kernel's version line as far as the image tells, else "".
    """

    elf: bytes
    header: SetupHeader | None
    compression: str
    version: str


def open_kernel(source: ImageSource) -> Kernel:
    """Recognize, check and unpack a kernel.

    Raises
    ------
    ImageError
        It can't be read, is no kernel, is too old, not a 64-bit one, or damaged.
    """
    data = read_image(source, "kernel")
    if data.startswith(ELF_MAGIC):
        return Kernel(data, None, "none", _banner(data))
    for magic, name in _MISTAKEN:
        if data.startswith(magic):
            raise ImageError(f"the kernel is {name}: expected a bzImage (vmlinuz) or a vmlinux")
    if compression_of(data) is not None:
        elf, compression = unpack(data, "kernel")
        if not elf.startswith(ELF_MAGIC):
            raise ImageError(
                f"the kernel is a {compression.name} file without a vmlinux inside: is it the"
                " initrd? Expected a bzImage (vmlinuz) or a vmlinux"
            )
        return Kernel(elf, None, compression.name, _banner(elf))
    header = parse_header(data)
    payload = _payload(data, header)
    elf, compression = unpack(payload, "kernel's payload")
    if not elf.startswith(ELF_MAGIC):
        raise ImageError(
            f"the kernel's payload unpacks to something that opens with {elf[:4].hex(' ')}:"
            " expected an ELF file; fetch the kernel again"
        )
    return Kernel(elf, header, compression.name, _version_string(data, header))


def parse_header(data: bytes) -> SetupHeader:
    """The setup header of a bzImage, checked against the 64-bit boot protocol.

    Raises
    ------
    ImageError
        The bytes are no bzImage, are cut off inside the header, or the kernel is too old or 32-bit.
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
            f"the kernel speaks boot protocol {major}.{minor:02}: expected 2.12 or later"
            " (Linux 3.8); give a newer kernel or its vmlinux"
        )
    if not header.xloadflags & XLF_KERNEL_64:
        raise ImageError("the kernel is a 32-bit one: expected a 64-bit x86 kernel")
    return header


def _payload(data: bytes, header: SetupHeader) -> memoryview:
    """The packed kernel inside a bzImage; the appended size word is still at its end."""
    start = SECTOR * (1 + (header.setup_sects or 4)) + header.payload_offset
    end = start + header.payload_length
    if not header.payload_offset or not header.payload_length:
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


def _banner(elf: bytes) -> str:
    """The release from the kernel's "Linux version …" banner."""
    at = elf.find(b"Linux version ")
    while at >= 0:
        text = elf[at + 14 : at + 270].split(b"\0", 1)[0].split(b"\n", 1)[0]
        if text[:1].isdigit():
            return text.decode("ascii", "replace").strip()
        at = elf.find(b"Linux version ", at + 1)
    return ""
