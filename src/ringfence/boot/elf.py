"""Load the segments of an ELF kernel, 32-bit or 64-bit, at their physical addresses.

Shape: :func:`read_segments` checks everything about the file and returns plain data, a
:class:`Program`, which other formats make, too; :func:`load_segments` stores it in guest memory,
and :func:`find_note` looks into notes. Of the file only the ELF header and the program headers are
read, two structures that don't deserve a library: importing one took longer than unpacking the
kernel. Sections and symbols are never looked at, and what follows the ELF file (the relocations
that a KASLR kernel's decompressor would use) is ignored.

Source: System V ABI, "ELF Header", "Program Header", "Program Loading" and "Note Section"; AMD64
psABI section 4.1.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import NamedTuple

from ringfence.boot.unpack import Unpacked
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory

KERNEL_FLOOR = 0x100000
"""Lowest guest-physical address that a kernel may occupy; below are our own structures."""
ELF_MAGIC = b"\x7fELF"
PF_X = 1
PT_LOAD, PT_NOTE = 1, 4
ELFCLASS = {1: 32, 2: 64}
ELFDATA2LSB = 1
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PN_XNUM = 0xFFFF
_IDENT = "4xBB10x"
"""e_ident: the magic bytes, the class, the byte order."""
_EHDR = {32: struct.Struct(f"<{_IDENT}HHIIIIIHHHHHH"), 64: struct.Struct(f"<{_IDENT}HHIQQQIHHHHHH")}
_PHDR = {32: struct.Struct("<8I"), 64: struct.Struct("<2I6Q")}
_MACHINES = {32: (EM_386, EM_X86_64), 64: (EM_X86_64,)}
NOTES_MAXIMUM = 1 << 16
"""Bytes of notes that are looked at."""


class ProgramHeader(NamedTuple):
    """What a program header says; the names are the ABI's."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD segment: ``data`` goes to ``paddr``, zeros fill it up to ``memsz`` bytes."""

    paddr: int
    vaddr: int
    memsz: int
    flags: int
    data: memoryview

    @property
    def end(self) -> int:
        """First guest-physical address behind the segment."""
        return self.paddr + self.memsz


@dataclass(frozen=True)
class Program:
    """What is to be loaded: physical ``entry``, ``segments``, ascending, and whose code it is.

    ``bits`` is 32 or 64.
    """

    entry: int
    segments: tuple[Segment, ...]
    bits: int = 64

    @property
    def base(self) -> int:
        """Lowest guest-physical address of any segment."""
        return self.segments[0].paddr

    @property
    def end(self) -> int:
        """First guest-physical address behind all segments."""
        return max(segment.end for segment in self.segments)


def read_segments(elf: Unpacked) -> Program:
    """Check an ELF file and find what is to be loaded.

    Raises
    ------
    ImageError
        Not an x86 or x86-64 executable, cut off, overlapping or misplaced segments,
        or an entry point outside of them.
    """
    entry, bits, headers = _read_headers(elf)
    segments = sorted(
        (_segment(elf, header) for header in headers if header.p_type == PT_LOAD),
        key=lambda segment: segment.paddr,
    )
    segments = [segment for segment in segments if segment.memsz]
    if not segments:
        raise ImageError("the vmlinux has no segment to load (PT_LOAD): is it an object file?")
    for below, above in itertools.pairwise(segments):
        if above.paddr < below.end:
            raise ImageError(
                f"the vmlinux is damaged: segments at {below.paddr:#x} and {above.paddr:#x} overlap"
            )
    return Program(_physical_entry(entry, segments), tuple(segments), bits)


def find_note(elf: Unpacked, owner: bytes, kind: int) -> bytes | None:
    """The descriptor of the first note of this owner and type; None if there is none.

    Raises
    ------
    ImageError
        See `read_segments`; a note that is cut off only ends the search.
    """
    for header in _read_headers(elf)[2]:
        if header.p_type != PT_NOTE:
            continue
        at = header.p_offset
        notes = memoryview(elf)[at : at + min(header.p_filesz, NOTES_MAXIMUM)]
        while len(notes) >= 12:
            name_size, size, found = struct.unpack_from("<III", notes)
            body = 12 + -(-name_size // 4) * 4
            if body + size > len(notes):
                break
            if found == kind and bytes(notes[12 : 12 + name_size]).rstrip(b"\0") == owner:
                return bytes(notes[body : body + size])
            notes = notes[body + -(-size // 4) * 4 :]
    return None


def load_segments(memory: GuestMemory, image: Program) -> None:
    """Store the segments in guest memory and zero what the file doesn't fill.

    Raises
    ------
    ImageError
        A segment lies outside of RAM.
    """
    for segment in image.segments:
        try:
            memory.offset(segment.paddr, segment.memsz)
        except IndexError as error:
            raise ImageError(
                f"the kernel reaches up to {segment.end:#x}, beyond the guest's memory:"
                f" give the guest at least {(segment.end >> 20) + 1} MiB"
            ) from error
    for segment in image.segments:
        memory.write(segment.paddr, segment.data)
        blank = segment.memsz - len(segment.data)
        memory.write(segment.paddr + len(segment.data), bytes(blank))


def _read_headers(elf: Unpacked) -> tuple[int, int, list[ProgramHeader]]:
    """Entry point, 32 or 64, and the program headers of a checked file."""
    if bytes(elf[:4]) != ELF_MAGIC:
        raise ImageError("the kernel is no ELF file: expected a vmlinux")
    bits = ELFCLASS.get(elf[4], 0) if len(elf) > 4 else 0
    if not bits or len(elf) < _EHDR[bits].size:
        raise ImageError("the vmlinux is damaged or cut off in its first header: fetch it again")
    _, order, kind, machine, _, entry, start, _, _, _, width, count, *_ = _EHDR[bits].unpack_from(
        elf
    )
    if order != ELFDATA2LSB or machine not in _MACHINES[bits]:
        raise ImageError(
            f"the vmlinux is a {bits}-bit one for another machine (e_machine {machine}):"
            " expected x86 or x86-64"
        )
    if kind not in (ET_EXEC, ET_DYN):
        raise ImageError(f"the vmlinux is no executable (type {kind}): expected a linked kernel")
    if count and width != _PHDR[bits].size:
        raise ImageError(
            f"the vmlinux is damaged: program headers of {width} bytes, expected {_PHDR[bits].size}"
        )
    if count == PN_XNUM:
        raise ImageError("the vmlinux has 65535 or more program headers: expected a kernel")
    if start + count * width > len(elf):
        raise ImageError("the vmlinux is cut off inside its program headers: fetch it again")
    return entry, bits, [_program_header(elf, start + n * width, bits) for n in range(count)]


def _program_header(elf: Unpacked, at: int, bits: int) -> ProgramHeader:
    fields = _PHDR[bits].unpack_from(elf, at)
    if bits == 64:
        return ProgramHeader(*fields[:7])
    kind, offset, vaddr, paddr, filesz, memsz, flags, _ = fields
    return ProgramHeader(kind, flags, offset, vaddr, paddr, filesz, memsz)


def _segment(elf: Unpacked, header: ProgramHeader) -> Segment:
    offset, filesz, memsz = header.p_offset, header.p_filesz, header.p_memsz
    paddr = header.p_paddr
    if filesz > memsz:
        raise ImageError(f"the vmlinux is damaged: segment at {paddr:#x} is larger in the file")
    if offset + filesz > len(elf):
        raise ImageError(
            f"the vmlinux is cut off: a segment ends at byte {offset + filesz}, the file at"
            f" {len(elf)}; fetch it again"
        )
    if memsz and paddr < KERNEL_FLOOR:
        raise ImageError(
            f"the vmlinux wants to be at physical {paddr:#x}: expected {KERNEL_FLOOR:#x} or above"
        )
    if paddr + memsz > 1 << 52:
        raise ImageError(f"the vmlinux is damaged: a segment at physical {paddr:#x}")
    data = memoryview(elf)[offset : offset + filesz]
    return Segment(paddr, header.p_vaddr, memsz, header.p_flags, data)


def _physical_entry(entry: int, segments: list[Segment]) -> int:
    """``e_entry`` as a physical address, which it is in Linux; other kernels give a virtual one."""
    for segment in segments:
        if segment.paddr <= entry < segment.end:
            return entry
    for segment in segments:
        if segment.vaddr <= entry < segment.vaddr + segment.memsz:
            return entry - segment.vaddr + segment.paddr
    raise ImageError(
        f"the vmlinux starts at {entry:#x}, outside of its own segments: fetch it again"
    )
