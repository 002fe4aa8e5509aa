"""From the dialect to an image of machine code: LLVM compiles, and the object is linked to itself.

A unit refers to nothing outside: no library, no global data that is written. So all relocations are
distances within the object, and what comes out can be copied to any address and run there.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_RELOC_TYPE_x64
from elftools.elf.relocation import RelocationSection
from llvmlite import binding as llvm

from ringfence.native import dialect

_DISTANCES = {ENUM_RELOC_TYPE_x64["R_X86_64_PC32"], ENUM_RELOC_TYPE_x64["R_X86_64_PLT32"]}
_ALLOCATED = 2
"""SHF_ALLOC."""
_ALIGNMENT = 64


def compile_image(roots: Sequence[Any], assembly: str = "", *, optimize: bool = True) -> bytes:
    """An image (see ``library``) of native functions and all that they call.

    ``assembly`` is added to the unit as it is; it may refer to the functions by name, and what it
    declares as global, they may call as an external function. Optimizing
    takes more than ten times as long, and the code it makes runs about twice as fast.
    """
    unit = dialect.Unit(roots, re.findall(r"(?m)^\.globl (\w+)$", assembly))
    with _uncollected():
        source = unit.ir()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    lines = [f'module asm "{line}"' for line in assembly.splitlines()]
    module = llvm.parse_assembly("\n".join([*lines, source]))
    module.verify()
    level = 2 if optimize else 0
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu="x86-64", features=dialect.NO_VECTOR, opt=level, reloc="pic", codemodel="small"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return link(bytes(machine.emit_object(module)))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without collections of garbage: of a million nodes of syntax trees, all are in use."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def link(data: bytes) -> bytes:
    """The image of an ELF object that refers to itself only.

    Raises
    ------
    ValueError
        It has a relocation that is no distance within the object.
    """
    elf = ELFFile(io.BytesIO(data))
    image = bytearray()
    starts: dict[int, int] = {}
    for number, section in enumerate(elf.iter_sections()):
        if section["sh_flags"] & _ALLOCATED and section["sh_type"] == "SHT_PROGBITS":
            image += bytes(-len(image) % _ALIGNMENT)
            starts[number] = len(image)
            image += section.data()
    symbols: Any = elf.get_section_by_name(".symtab")
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection) and section["sh_info"] in starts:
            for relocation in section.iter_relocations():
                symbol = symbols.get_symbol(relocation["r_info_sym"])
                home = symbol["st_shndx"]
                if relocation["r_info_type"] not in _DISTANCES or home not in starts:
                    raise ValueError(f"{symbol.name or home}: not a distance within the object")
                at = starts[section["sh_info"]] + relocation["r_offset"]
                target = starts[home] + symbol["st_value"] + relocation["r_addend"]
                struct.pack_into("<i", image, at, target - at)
    functions = {
        symbol.name: starts[symbol["st_shndx"]] + symbol["st_value"]
        for symbol in symbols.iter_symbols()
        if symbol.name and symbol["st_shndx"] in starts
    }
    names = json.dumps(functions).encode()
    return struct.pack("<I", len(names)) + names + bytes(image)
