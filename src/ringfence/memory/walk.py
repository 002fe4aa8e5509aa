"""The page walk: guest-linear to guest-physical, in all of x86's paging modes.

Four levels in long mode, PAE's three and the old two outside: the loop is one, started at another
level, with entries of 8 or 4 bytes. PAE's four page-directory pointers are read on each walk, as
AMD's processors may, not kept in registers; what is reserved in them is checked then.

Permissions, reserved bits, accessed and dirty flags and the error code follow Intel SDM vol. 3,
4.3 to 4.8. Accessed flags are set in every entry used once the access is known to be allowed, the
dirty flag in the last one on a write; both in the entry that was read and in no other. Where
another CPU has changed it meanwhile, the walk begins anew: what was just cleared must stay so.
"""

from __future__ import annotations

from ringfence.cpu.state import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    FAULT,
    FLAG_AC,
    GP,
    OK,
    PF,
    PF_FETCH,
    PF_PRESENT,
    PF_RESERVED,
    PF_USER,
    PF_WRITE,
)
from ringfence.memory.walk_state import PAGE_USER, PAGE_WRITE, Walker, mark_dirty, ram_pointer
from ringfence.native.dialect import (
    atomic_cas32,
    atomic_cas64,
    load32,
    load64,
    native,
    native_inline,
    sext,
)

PTE_P, PTE_W, PTE_U, PTE_A, PTE_D, PTE_PS, PTE_G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
PTE_NX = 1 << 63
PTE_ADDRESS = 0x000FFFFFFFFFF000
CHANGED = 5
"""Status of a walk whose last entry another CPU changed under it."""
TRIES = 64
"""Walks until another CPU that keeps changing the entry is answered with a page fault."""
PAE_RESERVED = 0x7FF << 52
"""Bits that software may use in long mode, but not in PAE paging."""


@native_inline
def page_fault(walker: Walker, address: int, error: int) -> int:
    """Make a page fault pending."""
    walker.exc_vector = PF
    walker.exc_error = error
    walker.exc_address = address
    return FAULT


@native
def refuses(walker: Walker, access: int, allowed: int, no_execute: int) -> int:
    """Whether the rights collected on the way don't allow an access (SDM vol. 3, 4.6.1)."""
    denied = 0
    if access & PF_USER:
        if not allowed & PTE_U:
            denied = 1
        if access & PF_WRITE and not allowed & PTE_W:
            denied = 1
    else:
        if access & PF_WRITE and not allowed & PTE_W and walker.cr0 & CR0_WP:
            denied = 1
        if allowed & PTE_U:
            if access & PF_FETCH:
                if walker.cr4 & CR4_SMEP:
                    denied = 1
            elif walker.cr4 & CR4_SMAP and not walker.other_flags & FLAG_AC:
                denied = 1
    if access & PF_FETCH and no_execute:
        denied = 1
    return denied


@native
def walk_narrow(walker: Walker, address: int, access: int, error: int) -> int:
    """The walk through 32-bit paging's two levels (SDM vol. 3, 4.3)."""
    pointer = ram_pointer(walker, (walker.cr3 & 0xFFFFF000) + (address >> 22) * 4)
    if pointer == 0:
        return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
    directory = load32(pointer)
    walker.walk_references += 1
    if not directory & PTE_P:
        return page_fault(walker, address, error)
    large = directory & PTE_PS and walker.cr4 & CR4_PSE
    allowed = directory & (PTE_W | PTE_U)
    last = pointer
    entry = directory
    shift = 22
    if large:
        # PSE-36: bits 32-39 of the address are in bits 13-20; bit 21 is reserved.
        if directory & 0x200000:
            return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
        frame = (directory & 0xFFC00000) | ((directory & 0x1FE000) << 19)
    else:
        shift = 12
        last = ram_pointer(walker, (directory & 0xFFFFF000) + ((address >> 12) & 1023) * 4)
        if last == 0:
            return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
        entry = load32(last)
        walker.walk_references += 1
        if not entry & PTE_P:
            return page_fault(walker, address, error)
        allowed = allowed & entry
        frame = entry & 0xFFFFF000
    if refuses(walker, access, allowed, 0):
        return page_fault(walker, address, error | PF_PRESENT)
    if not large and not directory & PTE_A:
        atomic_cas32(pointer, directory, directory | PTE_A)
        mark_dirty(walker, pointer)
    want = PTE_A | PTE_D if access & PF_WRITE else PTE_A
    if entry & want != want:
        if not atomic_cas32(last, entry, entry | want):
            return CHANGED
        mark_dirty(walker, last)
        entry = entry | want
    low = (1 << shift) - 1
    walker.walk_pa = frame | (address & low)
    walker.walk_shift = shift
    return walk_done(walker, access, entry, allowed)


@native
def walk_done(walker: Walker, access: int, entry: int, allowed: int) -> int:
    """What a successful walk says of the page's permissions."""
    writable = 0
    if entry & PTE_D and (allowed & PTE_W or (not access & PF_USER and not walker.cr0 & CR0_WP)):
        writable = PAGE_WRITE
    walker.walk_perms = writable | (allowed & PTE_U)
    walker.walk_global = 1 if entry & PTE_G and walker.cr4 & 0x80 else 0
    return OK


@native
def walk(walker: Walker, address: int, access: int) -> int:
    """Translate a linear address; OK with ``walk_*`` filled, or FAULT with the exception pending.

    ``access``: PF_WRITE, PF_USER, PF_FETCH as in an error code. A non-canonical address is #GP(0).
    """
    walker.walks += 1
    for _ in range(TRIES):
        status = walk_tables(walker, address, access)
        if status != CHANGED:
            return status
    return page_fault(walker, address, access & (PF_WRITE | PF_USER))


@native_inline
def mark_accessed(walker: Walker, pointer: int) -> int:
    """Set the accessed flag of an entry that leads to another table."""
    entry = load64(pointer)
    if entry & (PTE_P | PTE_A) == PTE_P:
        atomic_cas64(pointer, entry, entry | PTE_A)
        mark_dirty(walker, pointer)
    return 0


@native
def walk_tables(walker: Walker, address: int, access: int) -> int:
    """The same, or CHANGED where the last entry is not what it was any more."""
    long = walker.efer & EFER_LMA
    if not long:
        address = address & 0xFFFFFFFF
    elif sext(address, 48) != address:
        walker.exc_vector = GP
        walker.exc_error = 0
        walker.exc_address = address
        return FAULT
    if not walker.cr0 & CR0_PG:
        walker.walk_pa = address
        walker.walk_perms = PAGE_WRITE | PAGE_USER
        walker.walk_shift = 12
        walker.walk_global = 0
        return OK
    wide = walker.cr4 & CR4_PAE
    nxe = walker.efer & EFER_NXE if wide else 0
    error = access & (PF_WRITE | PF_USER)
    if access & PF_FETCH and (nxe or walker.cr4 & CR4_SMEP):
        error = error | PF_FETCH
    reserved = walker.reserved_bits
    if not nxe:
        reserved = reserved | PTE_NX
    table = walker.cr3 & PTE_ADDRESS
    allowed = PTE_W | PTE_U
    no_execute = 0
    level = 4
    shift = 39
    top = 4
    entry = 0
    if not long:
        if not wide:
            return walk_narrow(walker, address, access, error)
        # Pointers have no permissions; all bits but P, PWT, PCD and the address are reserved.
        table = walker.cr3 & 0xFFFFFFE0
        pointer = ram_pointer(walker, table + ((address >> 30) & 3) * 8)
        entry = load64(pointer) if pointer else PTE_NX | PTE_P
        walker.walk_references += 1
        if not entry & PTE_P:
            return page_fault(walker, address, error)
        if entry & (walker.reserved_bits | PTE_NX | 0x1E6):
            return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
        table = entry & PTE_ADDRESS
        level = 2
        shift = 21
        top = 2
        reserved = reserved | PAE_RESERVED
    while 1:
        pointer = ram_pointer(walker, table + ((address >> shift) & 511) * 8)
        if pointer == 0:
            # Paging structures outside RAM read as all ones: reserved bits are set.
            return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
        entry = load64(pointer)
        walker.walk_references += 1
        if not entry & PTE_P:
            return page_fault(walker, address, error)
        if entry & reserved:
            return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
        allowed = allowed & entry
        no_execute = no_execute | (entry & PTE_NX)
        walker.walk_entry[level - 1] = pointer
        if level == 1:
            break
        if entry & PTE_PS:
            # Level 4 has no large pages; in the others the address bits below the page's
            # size, but for PAT (bit 12), are reserved.
            if level == 4 or entry & ((1 << shift) - 1) & PTE_ADDRESS & ~0x1FFF:
                return page_fault(walker, address, error | PF_PRESENT | PF_RESERVED)
            break
        table = entry & PTE_ADDRESS
        level -= 1
        shift -= 9
    if refuses(walker, access, allowed, no_execute):
        return page_fault(walker, address, error | PF_PRESENT)
    used = level
    while used < top:
        mark_accessed(walker, walker.walk_entry[used])
        used += 1
    last = walker.walk_entry[level - 1]
    want = PTE_A | PTE_D if access & PF_WRITE else PTE_A
    if entry & want != want:
        if not atomic_cas64(last, entry, entry | want):
            return CHANGED
        mark_dirty(walker, last)
        entry = entry | want
    low = (1 << shift) - 1
    walker.walk_pa = (entry & PTE_ADDRESS & ~low) | (address & low)
    walker.walk_shift = shift
    return walk_done(walker, access, entry, allowed)
