"""Bringing a process's memory in line with the guest's page tables.

A page is mapped when user code touches it: `fill` asks the page walk, which checks the access and
sets accessed and dirty flags as for a TLB, and maps what the entry then allows. `look` reads the
tables without setting anything; neighbours that need no flag set come along (`AROUND`).

A page of code with critical instructions is mapped as a *copy* in which these are traps
(`scan.defuse`), as far as it is certain that they are instructions; else it is not executed.

Three things keep a page from being writable though the guest's entry allows it: translated code in
it (see `memory.coherence`; the right to write is claimed as for a TLB), a dirty log that has not
seen it written, and that it is executed: a process has no page that is both. A page that the guest
may write *and* execute changes sides as it is used, and is scanned each time.

Where the architecture empties a TLB, ``Mmu.mapping_epoch`` changes, or single pages are noted in
``Mmu.dropped``. Before the process runs again, pages are *compared* with the tables and only what
changed is unmapped: switching between address spaces and back drops nothing.
"""

from __future__ import annotations

from ringfence.cpu.state import OK, PF_FETCH, PF_USER, PF_WRITE
from ringfence.engine.direct.ptrace import carry_out
from ringfence.engine.direct.scan import FRONT, defuse, is_harmless
from ringfence.engine.direct.space import (
    DEFUSED,
    EXECUTE,
    NO_PAGE,
    ORDER_WORDS,
    ORDERS,
    READ,
    RIGHTS,
    ROWS,
    WRITE,
    Space,
    note_row,
    release_copy,
    remove_row,
    remove_rows,
    row_of,
    take_copy,
)
from ringfence.engine.direct.stub import (
    BYTES,
    DESCRIPTOR_COPIES,
    DESCRIPTOR_RAM,
    END,
    MMAP,
    MUNMAP,
)
from ringfence.memory.coherence import CODE_BITS, claim_write, code_bit
from ringfence.memory.mmu import OFFSET_MASK, PAGE_MASK, TLB_ENTRIES, Mmu
from ringfence.memory.walk import (
    PTE_A,
    PTE_ADDRESS,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    walk,
)
from ringfence.memory.walk_state import mark_dirty, ram_pointer
from ringfence.native.dialect import (
    address_of,
    load8,
    load64,
    native,
    native_inline,
    rep_movsb,
    store64,
)

LOWEST = 1 << 16
"""Linux lets no process map addresses below, by default (vm.mmap_min_addr)."""


AROUND = 32
"""Pages, aligned, that are mapped together if nothing stands against it."""
ALL_LINES = (1 << 64) - 1
_FIXED_SHARED_POPULATED = 0x8011


@native
def look(mmu: Mmu, page: int) -> int:
    """Where in RAM user code finds a page, with rights in the low bits; 0: only a walk can say."""
    table = mmu.cr3 & PTE_ADDRESS
    allowed = PTE_W | PTE_U
    no_execute = 0
    shift = 39
    while 1:
        pointer = ram_pointer(mmu, table + ((page >> shift) & 511) * 8)
        if pointer == 0:
            return 0
        entry = load64(pointer)
        if entry & (PTE_P | PTE_A) != PTE_P | PTE_A or entry & mmu.reserved_bits:
            return 0
        allowed = allowed & entry
        no_execute = no_execute | (entry & PTE_NX)
        if shift == 12:
            break
        if entry & PTE_PS:
            if shift == 39 or entry & ((1 << shift) - 1) & PTE_ADDRESS & ~0x1FFF:
                return 0
            break
        table = entry & PTE_ADDRESS
        shift -= 9
    if not allowed & PTE_U:
        return 0
    low = (1 << shift) - 1
    host = ram_pointer(mmu, (entry & PTE_ADDRESS & ~low) | (page & low))
    if host == 0:
        return 0
    rights = READ if no_execute else READ | EXECUTE
    if allowed & PTE_W and entry & PTE_D:
        rights = rights | WRITE
    return ((host & PAGE_MASK) - mmu.ram_host) | rights


@native_inline
def may_write(mmu: Mmu, offset: int) -> int:
    """Whether a page of RAM can be written to without anybody having to know."""
    if mmu.dirty_map and not load8(mmu.dirty_map + (offset >> 12)):
        return 0
    return claim_write(mmu, offset >> 12)


@native
def host_of(mmu: Mmu, page: int) -> int:
    """Host address of a page that user code can read, 0 for others."""
    leaf = look(mmu, page)
    return mmu.ram_host + (leaf & PAGE_MASK) if leaf else 0


@native
def may_execute(mmu: Mmu, space: Space, page: int, offset: int) -> int:
    """Whether code in a page behaves as in the guest."""
    before = host_of(mmu, page - 4096)
    behind = host_of(mmu, page + 4096)
    return is_harmless(mmu.ram_host + offset, before, behind, address_of(space.copy[0]))


@native
def may_defuse(mmu: Mmu, space: Space, page: int, offset: int) -> int:
    """Make a copy of a page, which `may_execute` has read, with traps for critical instructions.

    The page has to be known as code already, so that nobody can write to it unnoticed; from now on
    all of its lines count as such.
    """
    index = offset >> 12
    use = load64(mmu.page_use + index * 8)
    if not use & code_bit(mmu) or use & ~CODE_BITS:
        return 0
    room = address_of(space.copy[0])
    if not defuse(room, host_of(mmu, page - 4096)):
        return 0
    number = take_copy(space, page)
    if number == 0:
        return 0
    rep_movsb(space.copies + ((number - 1) << 12), room + FRONT, 4096)
    store64(mmu.code_lines + index * 8, ALL_LINES)
    return 1


@native
def granted(mmu: Mmu, space: Space, page: int, leaf: int, fetched: int) -> int:
    """The page's leaf with the rights that the process gets; ``fetched``: it is to be executed."""
    offset = leaf & PAGE_MASK
    rights = leaf & RIGHTS
    if rights & EXECUTE:
        if rights & WRITE and not fetched:
            rights = rights & ~EXECUTE
        elif may_execute(mmu, space, page, offset):
            rights = rights & ~WRITE
        elif may_defuse(mmu, space, page, offset):
            return offset | READ | EXECUTE | DEFUSED
        else:
            rights = rights & ~EXECUTE
    if rights & WRITE and not may_write(mmu, offset):
        rights = rights & ~WRITE
    return offset | rights


# --- orders ---------------------------------------------------------------------------------------


@native
def order(space: Space, number: int, address: int, length: int, rights: int, where: int) -> int:
    """Have the process do a system call; a status, as room may have to be made first.

    ``where``: offset in what is mapped, with its descriptor in the low bits.
    """
    if space.ordered == ORDERS and carry_out(space) != OK:
        return 1
    at = space.orders + space.ordered * ORDER_WORDS * 8
    store64(at, number)
    store64(at + 8, address)
    store64(at + 16, length)
    store64(at + 24, rights)
    store64(at + 32, _FIXED_SHARED_POPULATED)
    store64(at + 40, where & OFFSET_MASK)
    store64(at + 48, where & PAGE_MASK)
    space.ordered += 1
    return OK


@native
def order_page(space: Space, page: int, leaf: int) -> int:
    """Have a page mapped; what continues the order before becomes a part of it."""
    if leaf & DEFUSED:
        copy = (take_copy(space, page) - 1) << 12
        return order(space, MMAP, page, 4096, leaf & RIGHTS, copy | DESCRIPTOR_COPIES)
    if space.ordered:
        at = space.orders + (space.ordered - 1) * ORDER_WORDS * 8
        length = load64(at + 16)
        if (
            load64(at) == MMAP
            and load64(at + 8) + length == page
            and load64(at + 24) == leaf & RIGHTS
            and load64(at + 40) == DESCRIPTOR_RAM
            and load64(at + 48) + length == leaf & PAGE_MASK
        ):
            store64(at + 16, length + 4096)
            return OK
    return order(space, MMAP, page, 4096, leaf & RIGHTS, leaf & PAGE_MASK | DESCRIPTOR_RAM)


@native
def unmap_all(space: Space) -> int:
    """Begin with an empty process."""
    space.ordered = 0
    remove_rows(space)
    order(space, MUNMAP, 0, space.stub, 0, 0)
    return order(space, MUNMAP, space.stub + BYTES, END - space.stub - BYTES, 0, 0)


@native
def put_page(space: Space, page: int, leaf: int) -> int:
    """Map a page, or map it anew with other rights."""
    number = row_of(space, page)
    if number:
        if space.rows[(number - 1) * 2 + 1] & ~leaf & DEFUSED:
            release_copy(space, page)
        space.rows[(number - 1) * 2 + 1] = leaf
    else:
        note_row(space, page, leaf)
    return order_page(space, page, leaf)


# --- pages come ----------------------------------------------------------------------------------


@native
def permitted(mmu: Mmu, address: int, access: int) -> int:
    """Whether user code may access an address; sets flags as the walk does, leaves no exception."""
    vector = mmu.exc_vector
    error = mmu.exc_error
    where = mmu.exc_address
    status = walk(mmu, address, PF_USER | access)
    mmu.exc_vector = vector
    mmu.exc_error = error
    mmu.exc_address = where
    return 1 if status == OK else 0


@native
def fill(mmu: Mmu, space: Space, address: int, fetched: int) -> int:
    """User code could not access a byte: whether it can now. The process has to stand still.

    ``fetched``: it was the next instruction's. What else it was, a write or a read, is not known;
    a page that is mapped can be read.
    """
    page = address & PAGE_MASK
    if page < LOWEST or page >= END or page - space.stub < BYTES:
        return 0
    if space.page_count >= ROWS - AROUND or space.gone_count > ROWS // 2:
        unmap_all(space)
    number = row_of(space, page)
    had = space.rows[(number - 1) * 2 + 1] if number else 0
    access = 0
    if fetched:
        access = PF_FETCH
    elif number:
        access = PF_WRITE
    if not permitted(mmu, address, access):
        return 0
    leaf = look(mmu, page)
    if leaf == 0:
        return 0
    if access & PF_WRITE:
        mark_dirty(mmu, mmu.ram_host + (leaf & PAGE_MASK))
    leaf = granted(mmu, space, page, leaf, fetched)
    if leaf == had:
        return 0
    if fetched and not leaf & EXECUTE:
        return 0
    if access & PF_WRITE and not leaf & WRITE:
        return 0
    if put_page(space, page, leaf) != OK:
        return 0
    first = page & ~(AROUND * 4096 - 1)
    for n in range(AROUND):
        put_if_there(mmu, space, first + n * 4096)
    return 1 if carry_out(space) == OK else 0


@native
def put_if_there(mmu: Mmu, space: Space, page: int) -> int:
    """Map a page if it isn't, and if the guest's tables allow that without a flag to be set."""
    inside = page >= LOWEST and page < END and page - space.stub >= BYTES
    if inside and space.page_count < ROWS and not row_of(space, page):
        leaf = look(mmu, page)
        if leaf:
            return put_page(space, page, granted(mmu, space, page, leaf, 0))
    return OK


# --- and go --------------------------------------------------------------------------------------


@native
def still_holds(mmu: Mmu, page: int, row: int) -> int:
    """Whether the guest's tables still say of a page what its row does."""
    leaf = look(mmu, page)
    if (leaf ^ row) & PAGE_MASK or leaf == 0:
        return 0
    if row & ~leaf & RIGHTS:
        return 0
    if row & DEFUSED:
        # Any write there has changed that; the page is read anew when it is executed next.
        return 1 if load64(mmu.code_lines + (row >> 12) * 8) == ALL_LINES else 0
    if row & WRITE:
        if load64(mmu.page_use + (row >> 12) * 8) & CODE_BITS:
            return 0
        if mmu.dirty_map and not load8(mmu.dirty_map + (row >> 12)):
            return 0
    return 1


@native
def drop_row(space: Space, number: int) -> int:
    """Unmap one page."""
    page = space.rows[(number - 1) * 2]
    remove_row(space, number)
    return order(space, MUNMAP, page, 4096, 0, 0)


@native
def is_wrong(mmu: Mmu, space: Space, n: int) -> int:
    """Whether row ``n`` is of a page that is mapped otherwise by now."""
    page = space.rows[n * 2]
    return 1 if page != NO_PAGE and not still_holds(mmu, page, space.rows[n * 2 + 1]) else 0


@native
def compare_all(mmu: Mmu, space: Space) -> int:
    """Unmap what the guest's tables no longer say.

    Where that is most of it, another program has come to use these tables; whatever the old one had
    earned by computing, the new one has to earn first (see `policy`).
    """
    wrong = 0
    for n in range(space.page_count):
        if is_wrong(mmu, space, n):
            wrong += 1
    if wrong * 2 > space.page_count - space.gone_count:
        space.budget = 0
        return unmap_all(space)
    for n in range(space.page_count):
        if wrong and is_wrong(mmu, space, n):
            drop_row(space, n + 1)
    return OK


@native
def begin_with(mmu: Mmu, space: Space) -> int:
    """Map what user code has used lately, as the TLB has it."""
    for index in range(TLB_ENTRIES):
        page = mmu.tlb[index * 8 + 4]
        if page >> 12 & (TLB_ENTRIES - 1) == index:
            put_if_there(mmu, space, page)
    return OK


@native
def catch_up(mmu: Mmu, space: Space) -> int:
    """Before the process runs: do what a TLB would have been told since it ran last; a status."""
    if space.epoch != mmu.mapping_epoch:
        compare_all(mmu, space)
        space.epoch = mmu.mapping_epoch
    else:
        for n in range(mmu.dropped_count):
            number = row_of(space, mmu.dropped[n])
            if number and not still_holds(mmu, mmu.dropped[n], space.rows[(number - 1) * 2 + 1]):
                drop_row(space, number)
    mmu.dropped_count = 0
    if space.page_count == 0:
        begin_with(mmu, space)
    if space.awaited:
        put_if_there(mmu, space, space.awaited)
        space.awaited = 0
    return carry_out(space)
