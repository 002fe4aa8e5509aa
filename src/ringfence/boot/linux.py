"""Load Linux by its boot protocols and say with what registers to enter it.

The kernel proper (vmlinux) is entered with RSI at the zero page, interrupts off, and flat segments
__BOOT_CS and __BOOT_DS: at ``startup_64`` in 64-bit mode, paging on with an identity map (boot.rst,
"64-bit Boot Protocol"), or at ``startup_32`` in protected mode without paging ("32-bit Boot
Protocol"). No decompressor runs, so there is no KASLR. A bzImage without a kernel that we can
unpack is entered in the same way where it begins.

Of low memory (see `layout`) the zero page, setup_data with a seed for the random number generator,
if one is given, and for 64-bit kernels the page tables are used. The kernel lies where its ELF file
says, usually from 16 MiB on; the initrd as high as allowed, page-aligned, below initrd_addr_max and
the end of low RAM.
"""

from __future__ import annotations

import struct

from ringfence.boot.bzimage import Kernel, flat_program, open_kernel
from ringfence.boot.elf import Program, load_segments, read_segments
from ringfence.boot.layout import (
    BOOT_CS,
    BOOT_DS,
    CMDLINE_BASE,
    CMDLINE_LIMIT,
    CR0_LONG,
    CR0_PROTECTED,
    CR4_LONG,
    EFER_LONG,
    GDT_BASE,
    PML4_BASE,
    STACK_LIMIT,
    STACK_TOP,
    BootState,
    Placement,
    check_fits,
    encode_text,
    identity_tables,
    memory_map,
    store_gdt,
)
from ringfence.boot.params import (
    BOOT_FLAG_MAGIC,
    HEADER_MAGIC,
    KASLR_FLAG,
    LOADED_HIGH,
    LOADER_UNREGISTERED,
    SETUP_RNG_SEED,
    XLF_KERNEL_64,
    BootParams,
)
from ringfence.boot.source import ImageSource, read_image
from ringfence.errors import ImageError, UsageError
from ringfence.memory.ram import HIGH_RAM_BASE, PAGE, GuestMemory

ZERO_PAGE = 0x7000
SETUP_DATA = 0x8000
ELF_CMDLINE_SIZE = 2047
"""Longest command line of a kernel without a setup header (COMMAND_LINE_SIZE - 1 of x86)."""
ELF_INITRD_ADDR_MAX = 0x7FFF_FFFF
OLD_INITRD_ADDR_MAX = 0x37FF_FFFF
"""What kernels before protocol 2.03 take (boot.rst, initrd_addr_max)."""


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
        A bzImage or a vmlinux; or what :func:`open_kernel` has made of it already.
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
    image = read_segments(unpacked.elf) if unpacked.elf else flat_program(unpacked)
    params = _header(unpacked, image)
    text = _encode_cmdline(cmdline, params.cmdline_size)
    ramdisk = read_image(initrd, "initrd") if initrd is not None else b""
    ramdisk_base = _place(memory, image, len(ramdisk), params.initrd_addr_max)
    placements = [
        Placement("stack", STACK_LIMIT, STACK_TOP - STACK_LIMIT),
        Placement("zero page", ZERO_PAGE, PAGE),
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
    gdt, gdt_limit = store_gdt(memory, image.bits)
    placements.append(gdt)
    if image.bits == 64:
        tables = identity_tables()
        placements.append(Placement("page tables", PML4_BASE, len(tables)))
        memory.write(PML4_BASE, tables)
    long = image.bits == 64
    return BootState(
        rip=image.entry,
        rsp=STACK_TOP,
        rsi=ZERO_PAGE,
        cr3=PML4_BASE if long else 0,
        cr0=CR0_LONG if long else CR0_PROTECTED,
        cr4=CR4_LONG if long else 0,
        efer=EFER_LONG if long else 0,
        gdt_base=GDT_BASE,
        gdt_limit=gdt_limit,
        cs=BOOT_CS,
        ds=BOOT_DS,
        placements=tuple(sorted(placements, key=lambda placement: placement.base)),
        kernel_version=unpacked.version,
    )


def _header(kernel: Kernel, image: Program) -> BootParams:
    """A zero page with the kernel's setup header, or one made up for a bare vmlinux."""
    params = BootParams()
    if kernel.header is not None:
        params.copy_header(kernel.header.raw)
        if not params.initrd_addr_max:
            params.initrd_addr_max = OLD_INITRD_ADDR_MAX
        if not kernel.elf:
            params.code32_start = image.base
        return params
    params.raw[0x201] = 0x66  # the jump's offset: the header ends behind init_size
    params.header, params.boot_flag = HEADER_MAGIC, BOOT_FLAG_MAGIC
    params.version = 0x020C
    params.kernel_alignment = 1 << 24
    params.initrd_addr_max = ELF_INITRD_ADDR_MAX
    params.cmdline_size = ELF_CMDLINE_SIZE
    params.xloadflags = XLF_KERNEL_64 if image.bits == 64 else 0
    return params


def _encode_cmdline(cmdline: str, limit: int) -> bytes:
    """The command line as the kernel takes it, NUL included; ``limit`` leaves out the NUL."""
    text = encode_text(cmdline)
    limit = min(limit or 255, CMDLINE_LIMIT - CMDLINE_BASE - 1)
    if len(text) - 1 > limit:
        raise UsageError(
            f"the command line has {len(text) - 1} bytes: this kernel takes at most {limit};"
            " shorten it"
        )
    return text


def _setup_data_node(seed: bytes) -> bytes:
    """A ``struct setup_data`` without a successor (boot.rst, field setup_data)."""
    if len(seed) > 1024:
        raise UsageError(f"the random seed has {len(seed)} bytes: expected at most 1024")
    return struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed


def _place(memory: GuestMemory, image: Program, ramdisk_size: int, addr_max: int) -> int:
    """Where the initrd goes: the highest page that is allowed, above the kernel.

    Raises
    ------
    ImageError
        The kernel or the initrd does not fit; says how much memory would do.
    """
    kernel_end = -(-image.end // PAGE) * PAGE
    span = -(-ramdisk_size // PAGE) * PAGE
    ceiling = addr_max + 1
    if kernel_end <= HIGH_RAM_BASE and kernel_end + span > min(ceiling, HIGH_RAM_BASE):
        raise ImageError(
            f"the initrd has {ramdisk_size >> 20} MiB and must end below {ceiling >> 20} MiB, the"
            f" kernel ends at {kernel_end >> 20} MiB: give a smaller initrd"
        )
    check_fits(memory, image, span, "the initrd")
    return (min(memory.regions[0].size, ceiling) - span) // PAGE * PAGE
