"""Modules: files beside the kernel, each with a command line, as multiboot and PVH hand them over.

They are given as peers take them, text such as ``"initrd.gz quiet"``: the file's name ends at the
first space, and the whole text is the module's command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringfence.boot.elf import Program
from ringfence.boot.layout import (
    BOOT_CS,
    BOOT_DS,
    CMDLINE_BASE,
    CMDLINE_LIMIT,
    CR0_PROTECTED,
    GDT_BASE,
    STACK_TOP,
    BootState,
    Placement,
    check_fits,
    encode_text,
    store_gdt,
)
from ringfence.boot.source import ImageSource, read_image
from ringfence.errors import UsageError
from ringfence.memory.ram import PAGE, GuestMemory

MODULES_MAXIMUM = 256


@dataclass(frozen=True)
class Module:
    """A module in guest memory: ``size`` bytes at ``base``, its command line at ``text``."""

    base: int
    size: int
    text: int


@dataclass(frozen=True)
class Loaded:
    """What `load_modules` has stored, and where the kernel's own command line is."""

    modules: tuple[Module, ...]
    cmdline: int
    placements: tuple[Placement, ...]


def parse_module(text: str) -> tuple[str, str]:
    """The file of a module, and its command line."""
    file = text.partition(" ")[0]
    if not file:
        raise UsageError(f"module {text!r} names no file: expected FILE, or 'FILE ARGUMENT...'")
    return file, text


def load_modules(
    memory: GuestMemory,
    program: Program,
    modules: Sequence[str | tuple[ImageSource, str]],
    cmdline: str,
) -> Loaded:
    """Put modules page by page behind the kernel, and all command lines into low memory.

    A module is text as `parse_module` takes it, or an image and its command line.

    Raises
    ------
    ImageError
        A file can't be read, or they don't fit into memory.
    UsageError
        There are too many, or too much text.
    """
    if len(modules) > MODULES_MAXIMUM:
        raise UsageError(f"{len(modules)} modules: expected at most {MODULES_MAXIMUM}")
    named = [parse_module(each) if isinstance(each, str) else each for each in modules]
    images = [read_image(source, "module") for source, _ in named]
    lines = [encode_text(cmdline), *(encode_text(text, "a module") for _, text in named)]
    if sum(map(len, lines)) > CMDLINE_LIMIT - CMDLINE_BASE:
        raise UsageError(
            f"the command lines have {sum(map(len, lines))} bytes: expected at most"
            f" {CMDLINE_LIMIT - CMDLINE_BASE} together; shorten them"
        )
    spans = [-(-len(image) // PAGE) * PAGE for image in images]
    base = check_fits(memory, program, sum(spans), "the modules")
    texts = [CMDLINE_BASE + sum(map(len, lines[:at])) for at in range(len(lines))]
    placed = []
    for image, span, text in zip(images, spans, texts[1:], strict=True):
        memory.write(base, image)
        placed.append(Module(base, len(image), text))
        base += span
    memory.write(CMDLINE_BASE, b"".join(lines))
    return Loaded(
        tuple(placed),
        CMDLINE_BASE,
        (
            Placement("command line", CMDLINE_BASE, sum(map(len, lines))),
            *(Placement("module", module.base, module.size) for module in placed),
        ),
    )


def protected_entry(
    memory: GuestMemory,
    program: Program,
    loaded: Loaded,
    information: Placement,
    rip: int,
    rax: int = 0,
) -> BootState:
    """How a kernel that knows modules is entered: 32-bit code, EBX says where it is informed."""
    gdt, gdt_limit = store_gdt(memory, 32)
    placements = [
        gdt,
        information,
        *loaded.placements,
        *(Placement("kernel", segment.paddr, segment.memsz) for segment in program.segments),
    ]
    return BootState(
        rip=rip,
        rax=rax,
        rbx=information.base,
        rsp=STACK_TOP,
        cr0=CR0_PROTECTED,
        gdt_base=GDT_BASE,
        gdt_limit=gdt_limit,
        cs=BOOT_CS,
        ds=BOOT_DS,
        placements=tuple(sorted(placements, key=lambda placement: placement.base)),
    )
