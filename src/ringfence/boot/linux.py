"""Load Linux for the 64-bit boot protocol and say with what registers to enter it.

The kernel proper (vmlinux) is entered at ``startup_64`` in 64-bit mode with RSI at the zero page,
paging on with an identity map, interrupts off, and flat segments __BOOT_CS and __BOOT_DS
(boot.rst, "64-bit Boot Protocol"). No decompressor runs, so there is no KASLR.

What we place in guest-physical memory; nothing overlaps, and everything below 1 MiB is free again
once the kernel has copied its parameters:

======================  ====================================================================
0x00000 - 0x01000       nothing (the real-mode vectors and the BIOS data area on a PC)
0x01000 - 0x02000       GDT
0x02000 - 0x07000       boot stack, grows down from 0x07000
0x07000 - 0x08000       zero page (``struct boot_params``)
0x08000 - 0x09000       setup_data: the seed of the random number generator, if one is given
0x09000 - 0x0F000       page tables: PML4, PDPT, four page directories (first 4 GiB)
0x10000 - 0x20000       command line
0x9FC00 - 0xA0000       EBDA, reserved
0xE0000 - 0x100000      ACPI tables and BIOS, reserved; written by the chipset
p_paddr of the ELF      the kernel, usually from 16 MiB on
as high as allowed      initrd, page-aligned, below initrd_addr_max and the end of low RAM
======================  ====================================================================

The hole 0xA0000 - 0xE0000 is in no e820 entry: it is neither RAM nor reserved.

Shape: :func:`load_linux` plans everything first, so that a guest that can't fit leaves memory
untouched, then stores. The result is plain data; the engine turns it into CPU state.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ringfence.boot.bzimage import Kernel, open_kernel
from ringfence.boot.elf import ElfImage, load_segments, read_segments
from ringfence.boot.params import (
    BOOT_FLAG_MAGIC,
    E820,
    HEADER_MAGIC,
    KASLR_FLAG,
    LOADED_HIGH,
    LOADER_UNREGISTERED,
    SETUP_RNG_SEED,
    XLF_KERNEL_64,
    BootParams,
    E820Entry,
)
from ringfence.boot.source import ImageSource, read_image
from ringfence.cpu.reset import EntryState
from ringfence.errors import ImageError, UsageError
from ringfence.memory.ram import HIGH_RAM_BASE, PAGE, GuestMemory

GDT_BASE = 0x1000
STACK_LIMIT, STACK_TOP = 0x2000, 0x7000
ZERO_PAGE = 0x7000
SETUP_DATA = 0x8000
PML4_BASE, PDPT_BASE, PD_BASE = 0x9000, 0xA000, 0xB000
MAPPED_GIB = 4
"""GiB that the boot page tables map, from 0 on."""
CMDLINE_BASE, CMDLINE_LIMIT = 0x10000, 0x20000
EBDA_BASE, EBDA_END = 0x9FC00, 0xA0000
BIOS_BASE, BIOS_END = 0xE0000, 0x100000
ELF_CMDLINE_SIZE = 2047
"""Longest command line of a kernel without a setup header (COMMAND_LINE_SIZE - 1 of x86)."""
ELF_INITRD_ADDR_MAX = 0x7FFF_FFFF

BOOT_CS, BOOT_DS = 0x10, 0x18
GDT = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
"""Null, unused, __BOOT_CS (64-bit code), __BOOT_DS (flat data); SDM vol. 3A section 3.4.5."""

# Page table entries, SDM vol. 3A section 4.5.4
_P, _RW, _PS = 1 << 0, 1 << 1, 1 << 7
_LARGE_PAGE = 1 << 21

# SDM vol. 3A section 2.5
CR0_BOOT = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 0
"""PG, WP, NE, ET, PE."""
CR4_BOOT = 1 << 5
"""PAE."""
EFER_BOOT = 1 << 10 | 1 << 8
"""LMA, LME."""


@dataclass(frozen=True)
class Placement:
    """What is where: ``size`` bytes of ``name`` from guest-physical ``base`` on."""

    name: str
    base: int
    size: int

    @property
    def end(self) -> int:
        """First guest-physical address behind it."""
        return self.base + self.size


@dataclass(frozen=True, kw_only=True)
class BootState(EntryState):
    """How to enter the guest, and what lies where; the latter is for people to see."""

    placements: tuple[Placement, ...] = ()
    kernel_version: str = ""


def load_linux(
    memory: GuestMemory,
    *,
    kernel: ImageSource | Kernel,
    initrd: ImageSource | None = None,
    cmdline: str = "",
    rsdp: int | None = None,
    rng_seed: bytes = b"",
) -> BootState:
    """Put a Linux kernel and all that it needs into guest memory.

    Parameters
    ----------
    memory : GuestMemory
        The guest's RAM.
    kernel : bytes, path or Kernel
        A bzImage or a vmlinux; or one that :func:`open_kernel` has unpacked already.
    initrd : bytes or path, optional
        Handed to the kernel as it is.
    cmdline : str
        Kernel command line.
    rsdp : int, optional
        Guest-physical address of the ACPI RSDP; without it the kernel searches the BIOS area.
    rng_seed : bytes
        Up to 1024 bytes for the kernel's random number generator; none without it.

    Raises
    ------
    ImageError
        The kernel or initrd is unreadable, damaged, of another kind, or doesn't fit in memory.
    UsageError
        The command line or another argument makes no sense.
    """
    unpacked = kernel if isinstance(kernel, Kernel) else open_kernel(kernel)
    image = read_segments(unpacked.elf)
    params = _header(unpacked)
    text = _encode_cmdline(cmdline, params.cmdline_size)
    ramdisk = read_image(initrd, "initrd") if initrd is not None else b""
    ramdisk_base = _place(memory, image, len(ramdisk), params.initrd_addr_max)
    placements = [
        Placement("gdt", GDT_BASE, 8 * len(GDT)),
        Placement("stack", STACK_LIMIT, STACK_TOP - STACK_LIMIT),
        Placement("zero page", ZERO_PAGE, PAGE),
        Placement("page tables", PML4_BASE, PD_BASE + MAPPED_GIB * PAGE - PML4_BASE),
        Placement("command line", CMDLINE_BASE, len(text)),
        *(Placement("kernel", segment.paddr, segment.memsz) for segment in image.segments),
    ]

    params.type_of_loader = LOADER_UNREGISTERED
    params.loadflags = params.loadflags & ~KASLR_FLAG | LOADED_HIGH
    params.vid_mode = 0xFFFF
    params.cmd_line_ptr = CMDLINE_BASE
    params.acpi_rsdp_addr = rsdp or 0
    params.set_e820(memory_map(memory))
    if ramdisk:
        params.ramdisk_image, params.ramdisk_size = ramdisk_base, len(ramdisk)
        placements.append(Placement("initrd", ramdisk_base, len(ramdisk)))
        memory.write(ramdisk_base, ramdisk)
    if rng_seed:
        params.setup_data = SETUP_DATA
        node = _setup_data_node(rng_seed)
        placements.append(Placement("setup_data", SETUP_DATA, len(node)))
        memory.write(SETUP_DATA, node)
    load_segments(memory, image)
    memory.write(CMDLINE_BASE, text)
    memory.write(ZERO_PAGE, params.raw)
    memory.write(GDT_BASE, struct.pack(f"<{len(GDT)}Q", *GDT))
    memory.write(PML4_BASE, identity_tables())
    return BootState(
        rip=image.entry,
        rsp=STACK_TOP,
        rsi=ZERO_PAGE,
        cr3=PML4_BASE,
        cr0=CR0_BOOT,
        cr4=CR4_BOOT,
        efer=EFER_BOOT,
        gdt_base=GDT_BASE,
        gdt_limit=8 * len(GDT) - 1,
        cs=BOOT_CS,
        ds=BOOT_DS,
        placements=tuple(sorted(placements, key=lambda placement: placement.base)),
        kernel_version=unpacked.version,
    )


def memory_map(memory: GuestMemory) -> list[E820Entry]:
    """The e820 map of a guest's RAM, ascending."""
    low_end = memory.regions[0].size
    entries = [
        E820Entry(0, EBDA_BASE, E820.RAM),
        E820Entry(EBDA_BASE, EBDA_END - EBDA_BASE, E820.RESERVED),
        E820Entry(BIOS_BASE, BIOS_END - BIOS_BASE, E820.RESERVED),
    ]
    if low_end > BIOS_END:
        entries.append(E820Entry(BIOS_END, low_end - BIOS_END, E820.RAM))
    entries += [E820Entry(r.base, r.size, E820.RAM) for r in memory.regions[1:]]
    return entries


def identity_tables() -> bytes:
    """PML4, PDPT and page directories, to be stored at PML4_BASE: 2 MiB pages, 4 GiB, identity."""
    table = struct.Struct("<512Q")
    links = [PD_BASE + PAGE * gib | _P | _RW for gib in range(MAPPED_GIB)]
    pages = [at * _LARGE_PAGE | _PS | _P | _RW for at in range(512 * MAPPED_GIB)]
    return (
        table.pack(PDPT_BASE | _P | _RW, *[0] * 511)
        + table.pack(*links, *[0] * (512 - MAPPED_GIB))
        + struct.pack(f"<{len(pages)}Q", *pages)
    )


def _header(kernel: Kernel) -> BootParams:
    """A zero page with the kernel's setup header, or one made up for a bare vmlinux."""
    params = BootParams()
    if kernel.header is not None:
        params.copy_header(kernel.header.raw)
        if not params.initrd_addr_max:
            params.initrd_addr_max = ELF_INITRD_ADDR_MAX
        return params
    params.raw[0x201] = 0x66  # the jump's offset: the header ends behind init_size
    params.header, params.boot_flag = HEADER_MAGIC, BOOT_FLAG_MAGIC
    params.version = 0x020C
    params.kernel_alignment = 1 << 24
    params.initrd_addr_max = ELF_INITRD_ADDR_MAX
    params.cmdline_size = ELF_CMDLINE_SIZE
    params.xloadflags = XLF_KERNEL_64
    return params


def _encode_cmdline(cmdline: str, limit: int) -> bytes:
    """The command line as the kernel takes it, NUL included; ``limit`` leaves out the NUL."""
    text = cmdline.encode("utf-8", "surrogateescape")
    limit = min(limit or 255, CMDLINE_LIMIT - CMDLINE_BASE - 1)
    if len(text) > limit:
        raise UsageError(
            f"the command line has {len(text)} bytes: this kernel takes at most {limit}; shorten it"
        )
    if b"\0" in text:
        raise UsageError("the command line has a NUL in it: expected plain text")
    return text + b"\0"


def _setup_data_node(seed: bytes) -> bytes:
    """A ``struct setup_data`` without a successor (boot.rst, field setup_data)."""
    if len(seed) > 1024:
        raise UsageError(f"the random seed has {len(seed)} bytes: expected at most 1024")
    return struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed


def _place(memory: GuestMemory, image: ElfImage, ramdisk_size: int, addr_max: int) -> int:
    """Where the initrd goes: the highest page that is allowed, above the kernel.

    Raises
    ------
    ImageError
        The kernel or the initrd does not fit; says how much memory would do.
    """
    low_end = memory.regions[0].size
    kernel_end = -(-image.end // PAGE) * PAGE
    span = -(-ramdisk_size // PAGE) * PAGE
    ceiling = addr_max + 1
    if kernel_end > HIGH_RAM_BASE:
        raise ImageError(
            f"the kernel wants to be at {image.base:#x} - {image.end:#x}: expected below 4 GiB"
        )
    if kernel_end + span > min(ceiling, HIGH_RAM_BASE):
        raise ImageError(
            f"the initrd has {ramdisk_size >> 20} MiB and must end below {ceiling >> 20} MiB, the"
            f" kernel ends at {kernel_end >> 20} MiB: give a smaller initrd"
        )
    if kernel_end + span > low_end:
        needed = -(-(kernel_end + span) // (1 << 20))
        raise ImageError(
            f"{memory.size >> 20} MiB of memory is too small: the kernel ends at"
            f" {-(-kernel_end // (1 << 20))} MiB, the initrd takes {-(-span // (1 << 20))} MiB;"
            f" give the guest at least {needed} MiB, better {max(64, 2 * needed)} MiB"
        )
    return (min(low_end, ceiling) - span) // PAGE * PAGE
