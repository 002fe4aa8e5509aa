"""A symbol file for GDB, made of a stripped Linux kernel: names, and how to unwind its stack.

The file is an ELF object with the kernel's sections at their addresses but without their bytes,
which GDB reads from the guest; with a symbol table (`kallsyms`) and call frame information (`orc`).

Source: System V ABI, chapter 4 (ELF); AMD64 psABI.
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from ringfence.errors import ImageError
from ringfence.gdb.kallsyms import Symbol, read_kallsyms
from ringfence.gdb.orc import debug_frame, read_orc

SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOBITS = 1, 2, 3, 8
SHN_ABS = 0xFFF1
STT_OBJECT, STT_FUNC = 1, 2
STB_LOCAL, STB_GLOBAL = 0, 1
_EHDR, _SHDR, _SYM = 64, 64, 24


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    flags: int
    address: int
    size: int
    data: bytes = b""
    link: int = 0
    info: int = 0
    entry: int = 0


def symbol_file(vmlinux: bytes) -> tuple[bytes, int]:
    """The file, and how many symbols it has.

    Raises
    ------
    ImageError
        The kernel carries no symbols that can be read.
    """
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(vmlinux))
        sections = [section for section in elf.iter_sections() if section["sh_flags"] & SHF_ALLOC]
        contents = {section.name: section for section in sections}
        constant = contents.get(".rodata")
        data = constant.data() if constant is not None else vmlinux
        symbols = read_kallsyms(data)
        frames = _frames(contents, symbols)
    except (ELFError, ValueError, KeyError, struct.error) as error:
        raise ImageError(f"the kernel's sections can't be read ({error})") from error
    kept = [
        _Section(
            section.name, SHT_NOBITS, section["sh_flags"], section["sh_addr"], section["sh_size"]
        )
        for section in sections
        if section["sh_addr"]
    ]
    return _write(kept, symbols, frames), len(symbols)


def _frames(contents: dict[str, Any], symbols: list[Symbol]) -> bytes:
    """Call frame information; empty for a kernel without ORC."""
    places, entries = contents.get(".orc_unwind_ip"), contents.get(".orc_unwind")
    if places is None or entries is None:
        return b""
    rows = read_orc(places.data(), entries.data(), places["sh_addr"], new=".orc_header" in contents)
    code = [
        (section["sh_addr"], section["sh_addr"] + section["sh_size"])
        for section in contents.values()
        if section["sh_flags"] & SHF_EXECINSTR
    ]
    functions = sorted({each.address for each in symbols if each.kind in "tTwW"})
    made = b""
    for start, end in code:
        inside = [address for address in functions if start <= address < end]
        part = debug_frame(rows, inside, end)
        made += _moved(part, len(made))
    return made


def _moved(frames: bytes, by: int) -> bytes:
    """Call frame information whose common entry is at another offset of its section."""
    if not by:
        return frames
    out = bytearray(frames)
    (length,) = struct.unpack_from("<I", out)
    at = 4 + length
    while at < len(out):
        (length,) = struct.unpack_from("<I", out, at)
        struct.pack_into("<I", out, at + 4, by)
        at += 4 + length
    return bytes(out)


def _write(kept: list[_Section], symbols: list[Symbol], frames: bytes) -> bytes:
    """The ELF file: header, contents, section headers."""
    table, names = _symbol_table(kept, symbols)
    strings = len(kept) + 2
    locals_ = 1 + sum(symbol.kind.islower() for symbol in symbols)
    sections = [
        _Section("", 0, 0, 0, 0),
        *kept,
        _Section(".symtab", SHT_SYMTAB, 0, 0, len(table), table, strings, locals_, _SYM),
        _Section(".strtab", SHT_STRTAB, 0, 0, len(names), names),
        _Section(".debug_frame", SHT_PROGBITS, 0, 0, len(frames), frames),
    ]
    titles = b"\0".join([*(section.name.encode() for section in sections), b".shstrtab", b""])
    sections.append(_Section(".shstrtab", SHT_STRTAB, 0, 0, len(titles), titles))
    body, headers = bytearray(), bytearray()
    title = 0
    for section in sections:
        offset = _EHDR + len(body) if section.data else 0
        headers += struct.pack(
            "<IIQQQQIIQQ", title, section.kind, section.flags, section.address, offset,
            section.size, section.link, section.info, 8 if section.kind else 0, section.entry,
        )  # fmt: skip
        body += section.data + bytes(-len(section.data) % 8)
        title += len(section.name) + 1
    magic = b"\x7fELF\2\1\1" + bytes(9)
    head = magic + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, _EHDR + len(body), 0, _EHDR, 0, 0, _SHDR,
        len(sections), len(sections) - 1,
    )  # fmt: skip
    return head + bytes(body) + bytes(headers)


def _symbol_table(kept: list[_Section], symbols: list[Symbol]) -> tuple[bytes, bytes]:
    """``.symtab``, local symbols first, and ``.strtab``."""
    order = sorted(range(len(kept)), key=lambda n: kept[n].address)
    starts = [kept[n].address for n in order]
    addresses = [symbol.address for symbol in symbols]
    table, names = bytearray(_SYM), bytearray(1)
    for symbol in sorted(symbols, key=lambda each: each.kind.isupper()):
        at = bisect_right(starts, symbol.address) - 1
        index = SHN_ABS
        if at >= 0 and symbol.kind not in "aA":
            section = kept[order[at]]
            if symbol.address <= section.address + section.size:
                index = order[at] + 1
        following = bisect_right(addresses, symbol.address)
        function = symbol.kind in "tTwW"
        size = 0
        if function and following < len(addresses):
            size = addresses[following] - symbol.address
        binding = STB_LOCAL if symbol.kind.islower() else STB_GLOBAL
        kind = STT_FUNC if function else STT_OBJECT
        table += struct.pack(
            "<IBBHQQ", len(names), binding << 4 | kind, 0, index, symbol.address, size
        )
        names += symbol.name.encode() + b"\0"
    return bytes(table), bytes(names)
