"""XSAVE and XRSTOR: vector state between the CPU's block and guest memory.

Emitted code has put the live state into ``Cpu.xsave`` before it calls these effects, and takes it
back from there afterwards. That area is in standard format; the guest's may be compacted, in which
components follow each other without gaps. SDM vol. 1, 13.7 to 13.10; ``cpu.components``.
"""

from __future__ import annotations

from ringfence.cpu.components import (
    AVX,
    COMPACTED,
    HEADER,
    LAST,
    LEGACY_BYTES,
    MXCSR,
    MXCSR_MASK,
    SSE_STATE,
    X87_REGISTERS,
    X87_STATE,
    XCOMP_BV,
    XMM,
    component_offset,
    component_size,
)
from ringfence.cpu.reset import FCW_RESET, MXCSR_RESET
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
    rep_stosb,
    store16,
    store32,
    store64,
)

XSAVE, XSAVEOPT, XSAVEC = range(3)
"""Kinds of `fx_xsave`, in ``op[0]``."""
_HEADER_BYTES, _XMM_BYTES = 64, 256


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
def settle(mmu: Mmu, features: int) -> int:
    """Fill components that are in their initial configuration with just that, byte by byte."""
    area = address_of(mmu.xsave[0])
    idle = features & ~load64(area + HEADER)
    if idle & X87_STATE:
        rep_stosb(area, 0, MXCSR)
        store16(area, FCW_RESET)
        rep_stosb(area + X87_REGISTERS, 0, XMM - X87_REGISTERS)
    if idle & SSE_STATE:
        rep_stosb(area + XMM, 0, _XMM_BYTES)
    for n in range(AVX.number, LAST + 1):
        if idle >> n & 1:
            rep_stosb(area + component_offset(n), 0, component_size(n))
    return OK


@native
def copy_legacy(mmu: Mmu, address: int, parts: int, write: int) -> int:
    """x87 and XMM registers, as far as ``parts`` has them."""
    area = address_of(mmu.xsave[0])
    status = OK
    if parts & X87_STATE:
        status = copy_guest(mmu, address, area, MXCSR, write)
        if status == OK:
            size = XMM - X87_REGISTERS
            status = copy_guest(mmu, address + X87_REGISTERS, area + X87_REGISTERS, size, write)
    if status == OK and parts & SSE_STATE:
        status = copy_guest(mmu, address + XMM, area + XMM, _XMM_BYTES, write)
    return status


@native
def span(parts: int, compacted: int) -> int:
    """Bytes from the area's start to the end of the last of some components."""
    at = LEGACY_BYTES
    end = at
    for n in range(AVX.number, LAST + 1):
        size = component_size(n)
        if compacted == 0:
            at = component_offset(n)
        elif not compacted >> n & 1:
            size = 0
        if size and parts >> n & 1:
            end = at + size
        at += size
    return end


@native
def reachable(mmu: Mmu, address: int, size: int, access: int) -> int:
    """Whether all pages of an area, of which there are two at most, can be accessed; or FAULT."""
    access = access | (4 if mmu.cpl == 3 else 0)
    if host_page(mmu, address, access) == 0 and mmu.status_word == FAULT:
        return FAULT
    if host_page(mmu, address + size - 1, access) == 0 and mmu.status_word == FAULT:
        return FAULT
    return OK


@native
def copy_extended(mmu: Mmu, address: int, parts: int, compacted: int, write: int) -> int:
    """The components behind the header that ``parts`` has.

    ``compacted``: 0 for the standard format, else the components that the area has room for.
    """
    at = LEGACY_BYTES
    for n in range(AVX.number, LAST + 1):
        size = component_size(n)
        if compacted == 0:
            at = component_offset(n)
        elif not compacted >> n & 1:
            size = 0
        if size and parts >> n & 1:
            place = address_of(mmu.xsave[0]) + component_offset(n)
            status = copy_guest(mmu, address + at, place, size, write)
            if status != OK:
                return status
        at += size
    return OK


@native
def fx_xsave(mmu: Mmu) -> int:
    """XSAVE, XSAVEOPT or XSAVEC (``op[0]``) to ``ea``.

    XSAVEOPT leaves out what is in its initial configuration, but not what was not modified.
    """
    if not mmu.cr4 & CR4_OSXSAVE:
        return fail(mmu, UD)
    address = mmu.ea
    if address & 63:
        return fail(mmu, GP)
    features = request(mmu)
    area = address_of(mmu.xsave[0])
    header = address_of(mmu.xsave_header[0])
    kind = mmu.op[0]
    in_use = load64(area + HEADER)
    if load32(area + MXCSR) != MXCSR_RESET:
        in_use = in_use | SSE_STATE
    in_use = in_use & features
    saved = in_use
    if kind == XSAVE:
        saved = features
    compacted = features if kind == XSAVEC else 0
    # Either page is checked before anything is written.
    if reachable(mmu, address, span(features, compacted), 2) != OK:
        return FAULT
    settle(mmu, saved)
    status = copy_legacy(mmu, address, saved, 1)
    if status == OK and (saved & SSE_STATE or (kind != XSAVEC and features & 6)):
        status = copy_guest(mmu, address + MXCSR, area + MXCSR, 8, 1)
    if status == OK:
        status = copy_extended(mmu, address, saved, compacted, 1)
    if status == OK:
        status = copy_guest(mmu, address + HEADER, header, 8, 0)
    if status != OK:
        return status
    size = 8
    if kind == XSAVEC:
        size = 16
        store64(header, in_use)
        store64(header + XCOMP_BV - HEADER, features | COMPACTED)
    else:
        store64(header, (load64(header) & ~features) | in_use)
    status = copy_guest(mmu, address + HEADER, header, size, 1)
    if status == OK:
        mmu.rip = mmu.next_rip
    return status


@native
def fx_xrstor(mmu: Mmu) -> int:
    """XRSTOR from ``ea``, in either format; everything is checked before anything is taken."""
    if not mmu.cr4 & CR4_OSXSAVE:
        return fail(mmu, UD)
    address = mmu.ea
    if address & 63:
        return fail(mmu, GP)
    features = request(mmu)
    area = address_of(mmu.xsave[0])
    header = address_of(mmu.xsave_header[0])
    status = copy_guest(mmu, address + HEADER, header, _HEADER_BYTES, 0)
    if status != OK:
        return status
    present = load64(header)
    room = load64(header + XCOMP_BV - HEADER)
    reserved = load64(header + 16)
    allowed = mmu.xcr0
    if room & COMPACTED:
        room = room & ~COMPACTED
        reserved = reserved | (room & ~allowed)
        allowed = room
        for i in range(3, 8):
            reserved = reserved | load64(header + i * 8)
    else:
        reserved = reserved | room
        room = 0
    if reserved or present & ~allowed:
        return fail(mmu, GP)
    mxcsr = load32(area + MXCSR)
    if load64(header + XCOMP_BV - HEADER) == 0:
        if features & 6:
            status = copy_guest(mmu, address + MXCSR, header + 16, 4, 0)
            mxcsr = load32(header + 16)
    elif features & SSE_STATE:
        mxcsr = MXCSR_RESET
        if present & SSE_STATE:
            status = copy_guest(mmu, address + MXCSR, header + 16, 4, 0)
            mxcsr = load32(header + 16)
    if status != OK:
        return status
    if mxcsr & ~load32(area + MXCSR_MASK):
        return fail(mmu, GP)
    # What can't be read must not be half of what is restored.
    if reachable(mmu, address, span(features & present, room), 0) != OK:
        return FAULT
    status = copy_legacy(mmu, address, features & present, 0)
    if status == OK:
        status = copy_extended(mmu, address, features & present, room, 0)
    if status != OK:
        return status
    store32(area + MXCSR, mxcsr)
    store64(area + HEADER, (load64(area + HEADER) & ~features) | (present & features))
    mmu.rip = mmu.next_rip
    return OK
