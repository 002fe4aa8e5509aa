"""XSAVE and XRSTOR: vector state between the CPU's block and guest memory.

Emitted code has put the live state into ``Cpu.xsave`` (all components, standard format) before it
calls these effects, and takes it back from there afterwards. SDM vol. 1, 13.7 and 13.8.
"""

from __future__ import annotations

from ringfence.cpu.state import CR4_OSXSAVE, FAULT, GP, OK, RAX, RDX, UD
from ringfence.memory.coherence import note_code_write
from ringfence.memory.mmu import OFFSET_MASK, Mmu, host_page, note_access
from ringfence.native.dialect import (
    address_of,
    load32,
    load64,
    native,
    native_inline,
    rep_movsb,
    store32,
    store64,
)

MXCSR, MXCSR_MASK, XMM, HEADER, YMM = 24, 28, 160, 512, 576


@native_inline
def fail(mmu: Mmu, vector: int) -> int:
    """Make an exception with error code 0 pending."""
    mmu.exc_vector = vector
    mmu.exc_error = 0
    return FAULT


@native
def copy_guest(mmu: Mmu, address: int, host: int, size: int, write: int) -> int:
    """Copy between guest-linear and host memory, page by page; FAULT at the first bad page."""
    access = (4 if mmu.cpl == 3 else 0) | (2 if write else 0)
    while size:
        take = 4096 - (address & OFFSET_MASK)
        if take > size:
            take = size
        page = host_page(mmu, address, access)
        if page:
            at = page + (address & OFFSET_MASK)
            if write:
                rep_movsb(at, host, take)
                note_code_write(mmu, at, take)
            else:
                rep_movsb(host, at, take)
            if mmu.watches:
                note_access(mmu, address, take, write)
        elif mmu.status_word == FAULT:
            return FAULT
        address += take
        host += take
        size -= take
    return OK


@native_inline
def request(mmu: Mmu) -> int:
    """The requested-feature bitmap: EDX:EAX and XCR0."""
    return ((mmu.gpr[RDX] << 32) | (mmu.gpr[RAX] & 0xFFFFFFFF)) & mmu.xcr0


@native
def fx_xsave(mmu: Mmu) -> int:
    """XSAVE to ``ea``."""
    if not mmu.cr4 & CR4_OSXSAVE:
        return fail(mmu, UD)
    address = mmu.ea
    if address & 63:
        return fail(mmu, GP)
    features = request(mmu)
    area = address_of(mmu.xsave[0])
    access = (4 if mmu.cpl == 3 else 0) | 2
    if host_page(mmu, address + 831, access) == 0 and mmu.status_word == FAULT:
        return FAULT
    status = OK
    if features & 1:
        status = copy_guest(mmu, address, area, MXCSR, 1)
        if status == OK:
            status = copy_guest(mmu, address + 32, area + 32, XMM - 32, 1)
    if status == OK and features & 6:
        status = copy_guest(mmu, address + MXCSR, area + MXCSR, 8, 1)
    if status == OK and features & 2:
        status = copy_guest(mmu, address + XMM, area + XMM, 256, 1)
    if status == OK and features & 4:
        status = copy_guest(mmu, address + YMM, area + YMM, 256, 1)
    if status != OK:
        return status
    scratch = address_of(mmu.xsave[0]) + 896
    status = copy_guest(mmu, address + HEADER, scratch, 8, 0)
    if status != OK:
        return status
    store64(scratch, (load64(scratch) & ~features) | (load64(area + HEADER) & features))
    status = copy_guest(mmu, address + HEADER, scratch, 8, 1)
    if status == OK:
        mmu.rip = mmu.next_rip
    return status


@native
def fx_xrstor(mmu: Mmu) -> int:
    """XRSTOR from ``ea``; only the standard format, as compaction is not advertised."""
    if not mmu.cr4 & CR4_OSXSAVE:
        return fail(mmu, UD)
    address = mmu.ea
    if address & 63:
        return fail(mmu, GP)
    features = request(mmu)
    area = address_of(mmu.xsave[0])
    scratch = area + 896
    status = copy_guest(mmu, address + HEADER, scratch, 64, 0)
    if status != OK:
        return status
    present = load64(scratch)
    reserved = 0
    for i in range(7):
        reserved = reserved | load64(scratch + 8 + i * 8)
    if reserved or present & ~mmu.xcr0:
        return fail(mmu, GP)
    if features & 6:
        status = copy_guest(mmu, address + MXCSR, scratch, 4, 0)
        if status != OK:
            return status
        allowed = load32(area + MXCSR_MASK)
        if load32(scratch) & ~allowed:
            return fail(mmu, GP)
        store32(area + MXCSR, load32(scratch))
    held = load64(area + HEADER)
    if features & present & 1:
        status = copy_guest(mmu, address, area, MXCSR, 0)
        if status == OK:
            status = copy_guest(mmu, address + 32, area + 32, XMM - 32, 0)
    if status == OK and features & present & 2:
        status = copy_guest(mmu, address + XMM, area + XMM, 256, 0)
    if status == OK and features & present & 4:
        status = copy_guest(mmu, address + YMM, area + YMM, 256, 0)
    if status != OK:
        return status
    store64(area + HEADER, (held & ~features) | (present & features))
    mmu.rip = mmu.next_rip
    return OK
