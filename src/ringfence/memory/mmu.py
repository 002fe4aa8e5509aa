"""The virtual CPU's memory management unit: state, software TLB and access by linear address.

A TLB entry is four 64-bit words: read tag, write tag, host address of the page, and that minus the
linear address. A tag is the linear page address; ``address ^ tag`` is then the offset in the page
on a hit and something larger on a miss, so one comparison checks presence, permission and page
crossing together. An entry that must not match holds a tag whose index bits differ from the entry's
own index: no address that selects the entry can match it, canonical or not.

Two TLBs exist, for supervisor and for user accesses; emitted code knows at translation time which
one it uses. Their entries alternate in one array, so that both are within reach of the 8-bit
displacements of emitted code. Pages that hold translated code are never entered as writable (see
`coherence`), nor pages of a ROM; pages outside RAM and ROM, and pages with watched data, are never
entered at all: both take the slow path on every access, which finds a device where a ROM is written
to.

Sources: Intel SDM vol. 3, 4.5 (4-level paging), 4.10 (caching translation information).
"""

from __future__ import annotations

from typing import Annotated

from ringfence.cpu.debug import DR6_B, DR6_BS, data_hits
from ringfence.cpu.state import FAULT, NO_EXCEPTION, OK, PF_WRITE
from ringfence.memory.coherence import Coherent, claim_write, note_code_write
from ringfence.memory.walk import walk
from ringfence.memory.walk_state import PAGE_WRITE, mark_dirty, ram_pointer, rom_pointer
from ringfence.native.dialect import (
    address_of,
    load8,
    load16,
    load32,
    load64,
    native,
    native_inline,
    rep_stosb,
    store8,
    store16,
    store32,
    store64,
)
from ringfence.native.layout import Array, u8, u16, u32, u64

TLB_ENTRIES = 4096
READ_TAG, WRITE_TAG, HOST_PAGE, HOST_DELTA = 0, 8, 16, 24
"""Byte offsets of a supervisor entry's words; a user entry's are USER_ENTRY further."""
USER_ENTRY = 32
NO_PAGE = 1 << 63
"""Tag of an empty one-page TLB. A guest address in that page is not canonical, and with a delta of
0 the access is made at that very address: the host raises the #GP that the guest should get."""
KIND_GLOBAL = 1 << 8
"""Set in ``tlb_kind`` for global pages; the low byte is log2 of the page size."""
OFFSET_MASK = 0xFFF
PAGE_MASK = ~0xFFF & ((1 << 64) - 1)
ITLB_ENTRIES = 1024
NOT_RAM = 3
"""Status of an access whose page lies outside RAM."""
WATCHED = 4
"""Status of filling the TLB for a page with watched data: it is in ``Mmu.value``, not entered."""
OWNER_WATCHES = 8
"""Watchpoints that the machine's owner can have at a time."""
PENDING_GUEST = DR6_B | DR6_BS
PENDING_OWNER_SHIFT = 16
PENDING_OWNER = ((1 << OWNER_WATCHES) - 1) << PENDING_OWNER_SHIFT
PENDING_LOOK = 1 << 31
PENDING_DIRECT = 1 << 30
"""User code is about to go on that is to run directly (see ``engine.direct``)."""
DROPPED_MAX = 32
KEPT_PAGES = 8
"""Of each kind: for reading or writing, by supervisor or user code."""


class Mmu(Coherent):
    """A virtual CPU with its TLBs (see the module's text for the entries)."""

    tlb: Annotated[Array, u64, 32768, 64]
    tlb_kind: Annotated[Array, u16, 8192]
    """What kind of page each entry is for: log2 of its size, KIND_GLOBAL."""
    stack_tag: Annotated[Array, u64, 2]
    """Linear address of the page that the stack was last in, for supervisor and user code: a TLB
    of one writable page, found without computing an index."""
    stack_delta: Annotated[Array, u64, 2]
    """Host minus linear address of that page; 0 while there is none."""
    kept_tag: Annotated[Array, u64, 32]
    """Linear addresses of pages that loops were last in: TLBs of one page, as the stack's. There
    are KEPT_PAGES for supervisor code to read, as many to write, and the same for user code."""
    kept_host: Annotated[Array, u64, 32]
    """Host addresses of these pages; NO_PAGE while there is none."""
    kept_delta: Annotated[Array, u64, 32]
    """Host minus linear addresses; 0 while there is none."""
    itlb_kernel: Annotated[Array, u32, 1024, 64]
    """Code page identity by linear page number, for CPL 0-2; 0 is none."""
    itlb_user: Annotated[Array, u32, 1024, 64]
    filled_user: Annotated[Array, u16, 1024]
    """Indexes filled with non-global pages since the last flush, so that MOV CR3 is cheap."""
    filled_user_count: Annotated[int, u64]
    filled_kernel: Annotated[Array, u16, 1024]
    filled_kernel_count: Annotated[int, u64]
    code_filled: Annotated[Array, u16, 256]
    """Indexes of ``itlb_kernel`` that hold non-global pages; 256 means there may be more."""
    code_filled_count: Annotated[int, u64]
    large_user: Annotated[int, u8]
    """Bit 0: a user-half large page was entered since the last flush; bit 1: a global one."""
    large_kernel: Annotated[int, u8]
    """Whether a large page of the other half was entered since the last flush of everything."""
    watches: Annotated[int, u8]
    """Whether any data is watched, by the guest or by the owner."""
    owner_watches: Annotated[int, u8]
    """How many of the following are in use: first and last address, accesses watched (1 read,
    2 write)."""
    owner_first: Annotated[Array, u64, 8]
    owner_last: Annotated[Array, u64, 8]
    owner_access: Annotated[Array, u8, 8]
    mapping_epoch: Annotated[int, u64]
    """Changes where all that was kept of the page tables has to be given up or compared with them
    again; for those who keep something outside of the TLBs."""
    dropped: Annotated[Array, u64, 32]
    """Pages of which that holds since somebody last looked; more than fit change the epoch."""
    dropped_count: Annotated[int, u64]
    tlb_misses: Annotated[int, u64]
    tlb_flushes: Annotated[int, u64]
    tlb_page_flushes: Annotated[int, u64]
    slow_accesses: Annotated[int, u64]
    last_pa: Annotated[int, u64]
    xsave_header: Annotated[Array, u8, 64]
    """Header of an XSAVE area in guest memory, while XSAVE or XRSTOR works on it."""
    string_source: Annotated[int, u64]
    string_target: Annotated[int, u64]
    """Linear addresses of a string instruction's element, outside 64-bit mode."""
    string_value: Annotated[Array, u64, 3]
    """What the VMM read from devices for an interrupted string instruction, by access."""
    string_ready: Annotated[int, u8]
    """Accesses of the present element that the VMM has carried out, a bit each (see `strings`).
    Non-zero only while the VMM carries out that element."""
    effect_devices: Annotated[int, u8]
    """What an effect's access to a device does (`effect_read`): IGNORED, WANTED or CARRIED_OUT."""
    effect_stopped: Annotated[int, u8]
    """1: an effect has stopped at such an access, and returned FAULT without an exception."""
    effect_read_next: Annotated[int, u64]
    effect_read_count: Annotated[int, u64]
    effect_reads: Annotated[Array, u64, 16]
    """What devices have answered so far, in the order in which the effect asks."""
    effect_write_count: Annotated[int, u64]
    effect_writes: Annotated[Array, u64, 96]
    """What is to be written when the effect is through: physical address, size, value."""


assert Mmu.offset_of("stale_code") % 8 == 0
assert Mmu.offset_of("debug_pending") == Mmu.offset_of("stale_code") + 4


@native_inline
def forget_lone(mmu: Mmu) -> int:
    """Empty all one-page TLBs."""
    for i in range(2):
        mmu.stack_tag[i] = NO_PAGE
        mmu.stack_delta[i] = 0
    for i in range(KEPT_PAGES * 4):
        mmu.kept_tag[i] = NO_PAGE
        mmu.kept_host[i] = NO_PAGE
        mmu.kept_delta[i] = 0
    return 0


@native
def tlb_flush_all(mmu: Mmu) -> int:
    """Drop everything from both TLBs and the code page identities."""
    forget_lone(mmu)
    mmu.mapping_epoch += 1
    mmu.tlb_flushes += 1
    for i in range(TLB_ENTRIES):
        never = (i ^ 1) << 12
        mmu.tlb[i * 8] = never
        mmu.tlb[i * 8 + 1] = never
        mmu.tlb_kind[i * 2] = 0
        mmu.tlb[i * 8 + 4] = never
        mmu.tlb[i * 8 + 5] = never
        mmu.tlb_kind[i * 2 + 1] = 0
    for i in range(ITLB_ENTRIES):
        mmu.itlb_kernel[i] = 0
        mmu.itlb_user[i] = 0
    mmu.filled_user_count = 0
    mmu.filled_kernel_count = 0
    mmu.large_user = 0
    mmu.large_kernel = 0
    return 0


@native
def tlb_flush_nonglobal(mmu: Mmu) -> int:
    """Drop what a write to CR3 drops: translations of pages without the G bit."""
    forget_lone(mmu)
    mmu.mapping_epoch += 1
    mmu.tlb_flushes += 1
    if mmu.filled_user_count > 512 or mmu.filled_kernel_count > 512:
        return flush_nonglobal_scan(mmu)
    for i in range(mmu.filled_user_count):
        index = mmu.filled_user[i]
        if not mmu.tlb_kind[index * 2 + 1] & KIND_GLOBAL:
            never = (index ^ 1) << 12
            mmu.tlb[index * 8 + 4] = never
            mmu.tlb[index * 8 + 5] = never
    for i in range(mmu.filled_kernel_count):
        index = mmu.filled_kernel[i]
        if not mmu.tlb_kind[index * 2] & KIND_GLOBAL:
            never = (index ^ 1) << 12
            mmu.tlb[index * 8] = never
            mmu.tlb[index * 8 + 1] = never
    mmu.filled_user_count = 0
    mmu.filled_kernel_count = 0
    mmu.large_user = mmu.large_user & 2
    flush_code_nonglobal(mmu)
    return 0


@native
def flush_nonglobal_scan(mmu: Mmu) -> int:
    """The same by looking at every entry, for when the lists of filled entries ran over."""
    for index in range(TLB_ENTRIES):
        never = (index ^ 1) << 12
        if not mmu.tlb_kind[index * 2 + 1] & KIND_GLOBAL:
            mmu.tlb[index * 8 + 4] = never
            mmu.tlb[index * 8 + 5] = never
        if not mmu.tlb_kind[index * 2] & KIND_GLOBAL:
            mmu.tlb[index * 8] = never
            mmu.tlb[index * 8 + 1] = never
    mmu.filled_user_count = 0
    mmu.filled_kernel_count = 0
    mmu.large_user = mmu.large_user & 2
    flush_code_nonglobal(mmu)
    return 0


@native_inline
def flush_code_nonglobal(mmu: Mmu) -> int:
    """Forget code page identities of non-global pages."""
    rep_stosb(address_of(mmu.itlb_user[0]), 0, ITLB_ENTRIES * 4)
    if mmu.code_filled_count >= 256:
        rep_stosb(address_of(mmu.itlb_kernel[0]), 0, ITLB_ENTRIES * 4)
    else:
        for i in range(mmu.code_filled_count):
            mmu.itlb_kernel[mmu.code_filled[i]] = 0
    mmu.code_filled_count = 0
    return 0


@native
def tlb_flush_page(mmu: Mmu, address: int) -> int:
    """Drop one linear page from both TLBs, the whole of it where it is a large page."""
    forget_lone(mmu)
    note_dropped(mmu, address & PAGE_MASK)
    mmu.tlb_page_flushes += 1
    index = (address >> 12) & (TLB_ENTRIES - 1)
    page = address & PAGE_MASK
    never = (index ^ 1) << 12
    if mmu.tlb[index * 8] == page or mmu.tlb[index * 8 + 1] == page:
        mmu.tlb[index * 8] = never
        mmu.tlb[index * 8 + 1] = never
    if mmu.tlb[index * 8 + 4] == page or mmu.tlb[index * 8 + 5] == page:
        mmu.tlb[index * 8 + 4] = never
        mmu.tlb[index * 8 + 5] = never
    code = (address >> 12) & (ITLB_ENTRIES - 1)
    mmu.itlb_kernel[code] = 0
    mmu.itlb_user[code] = 0
    large = mmu.large_kernel if address >> 63 else mmu.large_user
    if large:
        flush_large(mmu, address)
    return 0


@native_inline
def note_dropped(mmu: Mmu, page: int) -> int:
    """Note a page for ``dropped``."""
    if mmu.dropped_count == DROPPED_MAX:
        mmu.mapping_epoch += 1
    else:
        mmu.dropped[mmu.dropped_count] = page
        mmu.dropped_count += 1
    return 0


@native
def flush_large(mmu: Mmu, address: int) -> int:
    """Drop all entries that share a large page with ``address``."""
    mmu.mapping_epoch += 1
    for index in range(TLB_ENTRIES):
        never = (index ^ 1) << 12
        shift = mmu.tlb_kind[index * 2] & 0xFF
        if shift > 12 and (mmu.tlb[index * 8] ^ address) >> shift == 0:
            mmu.tlb[index * 8] = never
            mmu.tlb[index * 8 + 1] = never
        shift = mmu.tlb_kind[index * 2 + 1] & 0xFF
        if shift > 12 and (mmu.tlb[index * 8 + 4] ^ address) >> shift == 0:
            mmu.tlb[index * 8 + 4] = never
            mmu.tlb[index * 8 + 5] = never
    for index in range(ITLB_ENTRIES):
        mmu.itlb_kernel[index] = 0
        mmu.itlb_user[index] = 0
    return 0


@native
def tlb_protect_page(mmu: Mmu, host_page: int) -> int:
    """A RAM page came to hold translated code: no entry may write to it any more."""
    forget_lone(mmu)
    mmu.mapping_epoch += 1
    for index in range(TLB_ENTRIES):
        never = (index ^ 1) << 12
        if mmu.tlb[index * 8 + 2] == host_page:
            mmu.tlb[index * 8 + 1] = never
        if mmu.tlb[index * 8 + 6] == host_page:
            mmu.tlb[index * 8 + 5] = never
    return 0


@native_inline
def note_large(mmu: Mmu, address: int) -> int:
    """Remember that the page just walked to is a large one, so that INVLPG drops all of it."""
    if mmu.walk_shift > 12:
        if address >> 63:
            mmu.large_kernel = 1
        else:
            mmu.large_user = mmu.large_user | (3 if mmu.walk_global else 1)
    return 0


@native
def watched_page(mmu: Mmu, page: int) -> int:
    """Whether any byte of a linear page is watched."""
    if data_hits(mmu, page, 4096, 1):
        return 1
    for n in range(mmu.owner_watches):
        if mmu.owner_first[n] & PAGE_MASK <= page and page <= mmu.owner_last[n]:
            return 1
    return 0


@native
def note_access(mmu: Mmu, address: int, size: int, write: int) -> int:
    """Guest code has read or written data while something is watched: note what it hit."""
    pending = data_hits(mmu, address, size, write)
    last = address + size - 1
    for n in range(mmu.owner_watches):
        apart = mmu.owner_last[n] < address or last < mmu.owner_first[n]
        if not apart and mmu.owner_access[n] & (2 if write else 1):
            pending = pending | 1 << (PENDING_OWNER_SHIFT + n)
    mmu.debug_pending = mmu.debug_pending | pending
    return 0


@native
def tlb_fill(mmu: Mmu, address: int, access: int) -> int:
    """Walk the page tables and enter the page; OK, FAULT, NOT_RAM or WATCHED.

    ``access`` holds PF_WRITE and PF_USER as in a page-fault error code. ``mmu.last_pa`` is left at
    the guest-physical address, ``mmu.value`` at the host page (0 where it is not RAM, nor ROM that
    is read).
    """
    mmu.tlb_misses += 1
    if walk(mmu, address, access) != OK:
        return FAULT
    physical = mmu.walk_pa
    mmu.last_pa = physical
    host = ram_pointer(mmu, physical & PAGE_MASK)
    writable = mmu.walk_perms & PAGE_WRITE
    if host == 0 and not access & PF_WRITE:
        host = rom_pointer(mmu, physical & PAGE_MASK)
        writable = 0
    mmu.value = host
    if host == 0:
        return NOT_RAM
    if access & PF_WRITE:
        mark_dirty(mmu, host)
    if mmu.watches and watched_page(mmu, address & PAGE_MASK):
        return WATCHED
    index = (address >> 12) & (TLB_ENTRIES - 1)
    never = (index ^ 1) << 12
    page = address & PAGE_MASK
    if writable:
        writable = claim_write(mmu, (host - mmu.ram_host) >> 12)
    if writable and mmu.dirty_map and not load8(mmu.dirty_map + ((host - mmu.ram_host) >> 12)):
        writable = 0  # a page becomes writable by its first write, which is thereby noticed
    kind = mmu.walk_shift | (KIND_GLOBAL if mmu.walk_global else 0)
    if access & 4:
        mmu.tlb[index * 8 + 4] = page
        mmu.tlb[index * 8 + 5] = page if writable else never
        mmu.tlb[index * 8 + 6] = host
        mmu.tlb[index * 8 + 7] = host - page
        mmu.tlb_kind[index * 2 + 1] = kind
        if not mmu.walk_global and mmu.filled_user_count < 1024:
            mmu.filled_user[mmu.filled_user_count] = index
            mmu.filled_user_count += 1
    else:
        mmu.tlb[index * 8] = page
        mmu.tlb[index * 8 + 1] = page if writable else never
        mmu.tlb[index * 8 + 2] = host
        mmu.tlb[index * 8 + 3] = host - page
        mmu.tlb_kind[index * 2] = kind
        if not mmu.walk_global and mmu.filled_kernel_count < 1024:
            mmu.filled_kernel[mmu.filled_kernel_count] = index
            mmu.filled_kernel_count += 1
    note_large(mmu, address)
    return OK


@native
def host_page(mmu: Mmu, address: int, access: int) -> int:
    """Host address of the page of a linear address, through the TLB.

    0 where there is none: then ``mmu.status_word`` is FAULT or NOT_RAM.
    """
    index = (address >> 12) & (TLB_ENTRIES - 1)
    page = address & PAGE_MASK
    entry = index * 8 + (4 if access & 4 else 0)
    if mmu.tlb[entry + (1 if access & 2 else 0)] == page:
        return mmu.tlb[entry + 2]
    status = tlb_fill(mmu, address, access)
    mmu.status_word = status
    return mmu.value if status in (OK, WATCHED) else 0


@native_inline
def load_sized(host: int, size: int) -> int:
    """Read 1 to 8 bytes of host memory."""
    if size == 8:
        return load64(host)
    if size == 4:
        return load32(host)
    if size == 2:
        return load16(host)
    if size == 1:
        return load8(host)
    value = 0
    for i in range(size):
        value = value | (load8(host + i) << (8 * i))
    return value


@native_inline
def store_sized(host: int, size: int, value: int) -> int:
    """Write 1 to 8 bytes of host memory."""
    if size == 8:
        store64(host, value)
    elif size == 4:
        store32(host, value)
    elif size == 2:
        store16(host, value)
    elif size == 1:
        store8(host, value)
    else:
        for i in range(size):
            store8(host + i, value >> (8 * i))
    return 0


IGNORED, WANTED, CARRIED_OUT = range(3)
EFFECT_READS, EFFECT_WRITES = 16, 32
"""Accesses to devices that one instruction is granted; more read ones, and vanish."""


@native
def effect_read(mmu: Mmu, size: int) -> int:
    """Read at most 8 bytes outside RAM, at ``last_pa``, for an effect; FAULT stops it.

    Effects are native code and devices are not. So an effect that comes to a device is given up,
    as it may be at a page fault, and the VMM runs it again and again (CARRIED_OUT): up to the next
    read whose answer it doesn't have yet, and then through. Whoever else reads here sees ones.
    """
    mmu.value = (1 << (8 * size)) - 1 if size < 8 else 0xFFFFFFFFFFFFFFFF
    if mmu.effect_devices == IGNORED or mmu.effect_read_count >= EFFECT_READS:
        return OK
    if mmu.effect_read_next < mmu.effect_read_count:
        mmu.value = mmu.effect_reads[mmu.effect_read_next] & mmu.value
        mmu.effect_read_next += 1
        return OK
    mmu.exit_data[0] = mmu.last_pa
    mmu.exit_data[1] = size
    mmu.effect_stopped = 1
    mmu.exc_vector = NO_EXCEPTION
    return FAULT


@native
def effect_write(mmu: Mmu, physical: int, size: int, value: int) -> int:
    """Write outside RAM for an effect: note it for its end, or stop the effect."""
    if mmu.effect_devices == WANTED:
        mmu.exit_data[1] = 0
        mmu.effect_stopped = 1
        mmu.exc_vector = NO_EXCEPTION
        return FAULT
    if mmu.effect_devices == CARRIED_OUT and mmu.effect_write_count < EFFECT_WRITES:
        at = mmu.effect_write_count * 3
        mmu.effect_writes[at] = physical
        mmu.effect_writes[at + 1] = size
        mmu.effect_writes[at + 2] = value
        mmu.effect_write_count += 1
    return OK


@native
def linear_read(mmu: Mmu, address: int, size: int, user: int) -> int:
    """See ``cpu.ports.linear_read``."""
    access = 4 if user else 0
    offset = address & OFFSET_MASK
    host = host_page(mmu, address, access)
    first = size
    if offset + size > 4096:
        first = 4096 - offset
    value = 0
    if host == 0:
        if mmu.status_word == FAULT:
            return FAULT
        if effect_read(mmu, first):
            return FAULT
        value = mmu.value
    else:
        value = load_sized(host + offset, first)
    if first < size:
        host = host_page(mmu, address + first, access)
        if host == 0:
            if mmu.status_word == FAULT:
                return FAULT
            if effect_read(mmu, size - first):
                return FAULT
            value = value | mmu.value << (8 * first)
        else:
            value = value | (load_sized(host, size - first) << (8 * first))
    if mmu.watches:
        note_access(mmu, address, size, 0)
    mmu.value = value
    return OK


@native
def linear_write(mmu: Mmu, address: int, size: int, value: int, user: int) -> int:
    """See ``cpu.ports.linear_write``."""
    access = 6 if user else 2
    offset = address & OFFSET_MASK
    first = size
    if offset + size > 4096:
        first = 4096 - offset
    host = host_page(mmu, address, access)
    if host == 0 and mmu.status_word == FAULT:
        return FAULT
    physical = mmu.last_pa
    second = 0
    if first < size:
        second = host_page(mmu, address + first, access)
        if second == 0:
            if mmu.status_word == FAULT:
                return FAULT
            if effect_write(mmu, mmu.last_pa, size - first, value >> (8 * first)):
                return FAULT
    if host == 0:
        if effect_write(mmu, physical, first, value):
            return FAULT
    else:
        store_sized(host + offset, first, value)
        note_code_write(mmu, host + offset, first)
    if second:
        store_sized(second, size - first, value >> (8 * first))
        note_code_write(mmu, second, size - first)
    if mmu.watches:
        note_access(mmu, address, size, 1)
    return OK
