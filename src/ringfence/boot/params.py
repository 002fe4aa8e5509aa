"""The zero page: Linux's ``struct boot_params`` and the setup header inside it.

The facts are those of Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit Boot
Protocol") and Documentation/arch/x86/zero-page.rst.

Shape: a structure is a class whose fields are descriptors over one 4096-byte buffer. The setup
header lies at the same offset (0x1F1) in a bzImage file and in ``struct boot_params``, so one
declaration serves both: :class:`SetupHeader` reads the file, :class:`BootParams` extends it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

SETUP_HEADER_BASE = 0x1F1
"""Offset of the first field of the setup header."""
SETUP_HEADER_FLOOR = 0x202
"""The header ends this many bytes from the start, plus the byte at 0x201 (the jump's offset)."""
SETUP_HEADER_LIMIT = 0x290
"""Offset in ``struct boot_params`` that the header must not reach beyond."""
HEADER_MAGIC = int.from_bytes(b"HdrS", "little")
BOOT_FLAG_MAGIC = 0xAA55
PAGE = 4096
E820_MAX_ENTRIES = 128
"""Entries of ``e820_table`` (E820_MAX_ENTRIES_ZEROPAGE)."""

# loadflags
LOADED_HIGH = 1 << 0
KASLR_FLAG = 1 << 1
# xloadflags
XLF_KERNEL_64 = 1 << 0

LOADER_UNREGISTERED = 0xFF
"""type_of_loader of a boot loader without an assigned number."""
SETUP_RNG_SEED = 9
"""setup_data type: bytes for the kernel's random number generator (Linux 6.0 and later)."""


class Field:
    """A little-endian unsigned integer at a fixed offset of a :class:`Structure`."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Structure, owner: type) -> int:
        end = self.offset + self.size
        return int.from_bytes(instance.raw[self.offset : end], "little")

    def __set__(self, instance: Structure, value: int) -> None:
        if not 0 <= value < 1 << 8 * self.size:
            raise ValueError(f"{self.name} = {value:#x} does not fit in {self.size} bytes")
        end = self.offset + self.size
        instance.raw[self.offset : end] = value.to_bytes(self.size, "little")


class Structure:
    """A page-sized buffer, ``raw``, that :class:`Field` descriptors give names to."""

    def __init__(self) -> None:
        self.raw = bytearray(PAGE)


class SetupHeader(Structure):
    """The setup header (boot.rst, "The Real-Mode Kernel Header"); fields by their names there."""

    setup_sects = Field(0x1F1, 1)
    syssize = Field(0x1F4, 4)
    vid_mode = Field(0x1FA, 2)
    boot_flag = Field(0x1FE, 2)
    header = Field(0x202, 4)
    version = Field(0x206, 2)
    kernel_version = Field(0x20E, 2)
    type_of_loader = Field(0x210, 1)
    loadflags = Field(0x211, 1)
    code32_start = Field(0x214, 4)
    ramdisk_image = Field(0x218, 4)
    ramdisk_size = Field(0x21C, 4)
    cmd_line_ptr = Field(0x228, 4)
    initrd_addr_max = Field(0x22C, 4)
    kernel_alignment = Field(0x230, 4)
    relocatable_kernel = Field(0x234, 1)
    xloadflags = Field(0x236, 2)
    cmdline_size = Field(0x238, 4)
    payload_offset = Field(0x248, 4)
    payload_length = Field(0x24C, 4)
    setup_data = Field(0x250, 8)
    pref_address = Field(0x258, 8)
    init_size = Field(0x260, 4)
    handover_offset = Field(0x264, 4)

    def copy_header(self, image: bytes | bytearray) -> None:
        """Take the setup header, and only that, from a bzImage or another zero page.

        Fields that the image's protocol version doesn't have yet stay zero, as boot.rst asks.
        """
        end = min(SETUP_HEADER_FLOOR + image[0x201], SETUP_HEADER_LIMIT, len(image))
        self.raw[SETUP_HEADER_BASE:end] = image[SETUP_HEADER_BASE:end]


class E820(IntEnum):
    """Types of e820 ranges (ACPI 6.5, table 15.1 "Address Range Types")."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4


@dataclass(frozen=True)
class E820Entry:
    """``size`` bytes from guest-physical ``base`` on are of ``type``."""

    base: int
    size: int
    type: E820

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.base + self.size


class BootParams(SetupHeader):
    """``struct boot_params`` (zero-page.rst), as far as we fill it in."""

    acpi_rsdp_addr = Field(0x070, 8)
    ext_ramdisk_image = Field(0x0C0, 4)
    ext_ramdisk_size = Field(0x0C4, 4)
    ext_cmd_line_ptr = Field(0x0C8, 4)
    e820_entries = Field(0x1E8, 1)
    sentinel = Field(0x1EF, 1)

    E820_TABLE = 0x2D0
    """Offset of ``e820_table``."""

    def set_e820(self, entries: list[E820Entry]) -> None:
        """Fill in the memory map: packed entries of 64-bit base, 64-bit size, 32-bit type."""
        if len(entries) > E820_MAX_ENTRIES:
            raise ValueError(f"{len(entries)} e820 entries: expected at most {E820_MAX_ENTRIES}")
        self.e820_entries = len(entries)
        for index, entry in enumerate(entries):
            struct.pack_into(
                "<QQI", self.raw, self.E820_TABLE + 20 * index, entry.base, entry.size, entry.type
            )

    def get_e820(self) -> list[E820Entry]:
        """The memory map as filled in."""
        rows = (
            struct.unpack_from("<QQI", self.raw, self.E820_TABLE + 20 * index)
            for index in range(self.e820_entries)
        )
        return [E820Entry(base, size, E820(type_)) for base, size, type_ in rows]
