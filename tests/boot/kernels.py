"""Small kernels in assembly, as multiboot and PVH files."""

from __future__ import annotations

import struct

from ringfence.images.builtin import assemble

MIB = 1 << 20
BASE = 2 * MIB


def code32(source: str, base: int = BASE) -> bytes:
    """Machine code of 32-bit assembly, to lie at ``base``; ``BASE`` is that address in it."""
    return assemble(f".intel_syntax noprefix\n.set BASE, {base}\n.text\n.code32\n{source}")


def elf32(
    segments: tuple[tuple[int, bytes, int], ...],
    entry: int,
    *,
    note: bytes = b"",
    machine: int = 3,
) -> bytes:
    """An ELF32 executable; a segment is (paddr, contents, memsz), ``note`` is a PT_NOTE."""
    rows = [(1, paddr, data, memsz) for paddr, data, memsz in segments]
    if note:
        rows.append((4, 0, note, len(note)))
    identification = b"\x7fELF\1\1\1".ljust(16, b"\0")
    header = struct.pack(
        "<16sHHIIIIIHHHHHH",
        identification, 2, machine, 1, entry, 52, 0, 0, 52, 32, len(rows), 40, 0, 0,
    )  # fmt: skip
    offset = 52 + 32 * len(rows)
    table = contents = b""
    for kind, paddr, data, memsz in rows:
        at = offset + len(contents)
        table += struct.pack("<8I", kind, at, paddr, paddr, len(data), memsz, 5, 4)
        contents += data.ljust(-(-len(data) // 4) * 4, b"\0")
    return header + table + contents


def multiboot_header(flags: int = 3, *addresses: int) -> bytes:
    """A multiboot header, with its five addresses if there are any."""
    magic = 0x1BADB002
    return struct.pack(
        f"<3I{len(addresses)}I", magic, flags, -(magic + flags) & 0xFFFF_FFFF, *addresses
    )


def multiboot_elf(source: str, flags: int = 3) -> bytes:
    """A multiboot kernel as an ELF32 file: the header, then the code."""
    header = multiboot_header(flags)
    text = header + code32(source, BASE + len(header))
    return elf32(((BASE, text, len(text) + 0x1000),), BASE + len(header))


def multiboot_flat(source: str, *, prefix: int = 64) -> bytes:
    """A multiboot kernel that is no ELF file: addresses are in its header."""
    start, size = BASE + prefix, 12 + 20
    code = code32(source, start + size)
    end = start + size + len(code)
    header = multiboot_header(1 << 16 | 3, start, BASE, end, end + 0x100, start + size)
    return bytes(prefix) + header + code + b"not loaded"


def pvh_note(entry: int, size: int = 4) -> bytes:
    """Another owner's note, then Xen's note of a PVH entry point."""
    other = struct.pack("<III", 4, 5, 1) + b"GNU\0" + b"other\0\0\0"
    return other + struct.pack("<III", 4, size, 18) + b"Xen\0" + entry.to_bytes(size, "little")


def pvh_elf(source: str) -> bytes:
    """A PVH kernel as an ELF32 file; its ordinary entry point leads nowhere."""
    text = code32(source)
    return elf32(((BASE, b"\xf4" + text, 0x2000),), BASE, note=pvh_note(BASE + 1))
