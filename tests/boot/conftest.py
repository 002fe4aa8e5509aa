"""Synthetic kernels: an ELF64 file of given segments, and a bzImage around any payload."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import lz4.block
import pytest
import zstandard

MIB = 1 << 20
TEXT = bytes(range(256)) * 40


def make_elf(
    segments: tuple[tuple[int, bytes, int], ...] = ((16 * MIB, TEXT, 3 * MIB),),
    *,
    entry: int = 16 * MIB,
    virtual: int = 0,
    **changes: int,
) -> bytes:
    """An ELF64 executable; a segment is (paddr, contents, memsz); ``changes`` patch the header."""
    header = {
        "klass": 2,
        "data": 1,
        "type": 2,
        "machine": 62,
        "phoff": 64,
        "phentsize": 56,
        "phnum": len(segments),
        **changes,
    }
    identification = b"\x7fELF" + bytes([header["klass"], header["data"], 1]) + bytes(9)
    out = struct.pack(
        "<16sHHIQQQIHHHHHH",
        identification,
        header["type"],
        header["machine"],
        1,
        entry,
        header["phoff"],
        0,
        0,
        64,
        header["phentsize"],
        header["phnum"],
        64,
        0,
        0,
    )
    offset = 64 + 56 * len(segments)
    contents = b""
    for paddr, data, memsz in segments:
        at = offset + len(contents)
        out += struct.pack("<IIQQQQQQ", 1, 5, at, paddr + virtual, paddr, len(data), memsz, 0x1000)
        contents += data
    return out + contents


def lz4_legacy(data: bytes) -> bytes:
    """What ``lz4 -l`` writes."""
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 * MIB):
        block = lz4.block.compress(data[at : at + 8 * MIB], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "lz4": lz4_legacy,
}


def pack(name: str, data: bytes) -> bytes:
    """Packed as a kernel build does it: all but gzip get the size appended."""
    packed = PACKERS[name](data)
    return packed if name == "gzip" else packed + struct.pack("<I", len(data))


def make_bzimage(payload: bytes, *, setup_sects: int = 4, **changes: int) -> bytes:
    """A bzImage around a payload; ``changes`` patch header fields by name."""
    fields: dict[str, tuple[int, str, int]] = {
        "setup_sects": (0x1F1, "B", setup_sects),
        "boot_flag": (0x1FE, "H", 0xAA55),
        "jump": (0x200, "H", 0x6AEB),
        "header": (0x202, "I", int.from_bytes(b"HdrS", "little")),
        "version": (0x206, "H", 0x020F),
        "kernel_version": (0x20E, "H", 0x100),
        "loadflags": (0x211, "B", 0x03),
        "initrd_addr_max": (0x22C, "I", 0x7FFFFFFF),
        "kernel_alignment": (0x230, "I", 0x200000),
        "relocatable": (0x234, "B", 0),
        "xloadflags": (0x236, "H", 0x3F),
        "cmdline_size": (0x238, "I", 2047),
        "payload_offset": (0x248, "I", 0x100),
        "payload_length": (0x24C, "I", len(payload)),
        "pref_address": (0x258, "Q", 16 * MIB),
        "init_size": (0x260, "I", 8 * MIB),
    }
    out = bytearray(512 * ((setup_sects or 4) + 1) + 0x100)
    for name, (offset, code, value) in fields.items():
        struct.pack_into("<" + code, out, offset, changes.get(name, value))
    text = b"6.1.0-test (someone) #1\0"
    out[0x300 : 0x300 + len(text)] = text
    return bytes(out) + payload + bytes(64)


@pytest.fixture(name="elf")
def elf_fixture() -> Callable[..., bytes]:
    """:func:`make_elf`."""
    return make_elf


@pytest.fixture(name="bzimage")
def bzimage_fixture() -> Callable[..., bytes]:
    """:func:`make_bzimage`."""
    return make_bzimage


@pytest.fixture(name="pack")
def pack_fixture() -> Callable[[str, bytes], bytes]:
    """:func:`pack`."""
    return pack
