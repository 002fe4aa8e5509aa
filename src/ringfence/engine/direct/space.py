"""A guest address space that runs directly: its process, and the pages that this has.

A `Space` is one structure in memory, made by Python and worked on by native code. Pages are rows,
in the order of their mapping, and found by a table of their numbers that is probed linearly. A row
says where in guest RAM the page is and with which rights it is mapped. Rows are a cache of the
guest's page tables as a TLB is one, and `mapping` compares them with the tables where a TLB would
be emptied.
"""

from __future__ import annotations

from typing import Annotated

from ringfence.native.dialect import address_of, native, native_inline, rep_stosb
from ringfence.native.layout import Array, Struct, u8, u16, u64

ROWS = 1 << 15
"""Pages that a process has at most; each is an area of its memory map in the worst case, of which
Linux allows 65,530."""
INDEX = 1 << 16
GONE = INDEX - 1
"""In the index: a page was here."""
NO_PAGE = 1
"""In a row: the page was dropped."""
READ, WRITE, EXECUTE = 1, 2, 4
"""Rights, in the low bits of a row's second word; the same as PROT_READ and so on."""
RIGHTS = 7
DEFUSED = 8
"""In a row, beside rights: what is mapped is a copy, with traps in place of some instructions."""
COPIES = 64
"""Such pages that a process has at most."""
ORDERS = 256
ORDER_WORDS = 7
GENERAL_WORDS = 27
"""Words of user_regs_struct (Linux, asm/user_64.h)."""


class Space(Struct):
    """One guest address space; addresses are the host's but for ``stub``."""

    root: Annotated[int, u64]
    """Guest-physical address of its page tables."""
    process: Annotated[int, u64]
    """The process's number."""
    stub: Annotated[int, u64]
    """Address of our page in the process; orders are in the pages behind it."""
    orders: Annotated[int, u64]
    """Where the same orders are in our own memory: system calls, ORDER_WORDS words each."""
    ordered: Annotated[int, u64]
    epoch: Annotated[int, u64]
    """``Mmu.mapping_epoch`` as of the last comparison with the guest's tables."""
    page_count: Annotated[int, u64]
    gone_count: Annotated[int, u64]
    vector: Annotated[int, u64]
    """The process's vector state, as PTRACE_GETREGSET lays it out…"""
    vector_bytes: Annotated[int, u64]
    """…and its size."""
    vector_offsets: Annotated[Array, u64, 8]
    """Where the host has the components 2 to 7."""
    foreign: Annotated[int, u64]
    """Components that the host has there and guests don't."""
    general: Annotated[Array, u64, 27]
    """The process's registers as last read, or to be written."""
    own: Annotated[Array, u64, 27]
    """Registers to carry out orders with."""
    request: Annotated[Array, u64, 2]
    """A struct iovec for ptrace."""
    information: Annotated[Array, u64, 16]
    """A siginfo_t."""
    status: Annotated[int, u64]
    """The last wait status."""
    stuck_at: Annotated[int, u64]
    stuck: Annotated[int, u64]
    """The instruction of the last page fault, and how many it has had."""
    awaited: Annotated[int, u64]
    """A page that the guest's kernel has to provide first; mapped before the next run. 0: none."""
    broken: Annotated[int, u64]
    """An order could not be carried out: what is mapped is not known any more."""
    budget: Annotated[int, u64]
    """See `policy`; not below 0."""
    failed: Annotated[int, u64]
    """Stops have cost more than computing was worth."""
    ran: Annotated[int, u64]
    """CPU time of the process as last looked at, in nanoseconds."""
    runs: Annotated[int, u64]
    faults: Annotated[int, u64]
    copies: Annotated[int, u64]
    """Where copies of pages are, COPIES pages, in our memory…"""
    copied: Annotated[Array, u64, 64]
    """…and of which pages; 0 for none."""
    copy: Annotated[Array, u8, 4416, 64]
    """Room for a page that is scanned."""
    index: Annotated[Array, u16, 65536]
    rows: Annotated[Array, u64, 65536]
    """Page address or NO_PAGE; offset in guest RAM with rights in its low bits."""


@native_inline
def bucket(page: int) -> int:
    """Where the search for a page begins."""
    return ((page >> 12) * 0x9E3779B97F4A7C15) >> 48


@native
def row_of(space: Space, page: int) -> int:
    """Number of a page's row plus 1; 0 where it is not mapped."""
    at = bucket(page)
    while 1:
        number = space.index[at]
        if number == 0:
            return 0
        if number != GONE and space.rows[(number - 1) * 2] == page:
            return number
        at = (at + 1) & (INDEX - 1)
    return 0


@native
def note_row(space: Space, page: int, leaf: int) -> int:
    """Note a page that was not mapped; there must be room."""
    number = space.page_count + 1
    space.page_count = number
    space.rows[(number - 1) * 2] = page
    space.rows[(number - 1) * 2 + 1] = leaf
    at = bucket(page)
    while space.index[at] != 0:
        at = (at + 1) & (INDEX - 1)
    space.index[at] = number
    return number


@native
def take_copy(space: Space, page: int) -> int:
    """Number of the copy of a page plus 1, a free one if there is none yet; 0: all are taken."""
    free = 0
    for n in range(COPIES):
        if space.copied[n] == page:
            return n + 1
        if space.copied[n] == 0:
            free = n + 1
    if free:
        space.copied[free - 1] = page
    return free


@native
def release_copy(space: Space, page: int) -> int:
    """The copy of a page is of no use any more."""
    for n in range(COPIES):
        if space.copied[n] == page:
            space.copied[n] = 0
    return 0


@native
def remove_row(space: Space, number: int) -> int:
    """Forget a page."""
    page = space.rows[(number - 1) * 2]
    if space.rows[(number - 1) * 2 + 1] & DEFUSED:
        release_copy(space, page)
    at = bucket(page)
    while space.index[at] != number:
        at = (at + 1) & (INDEX - 1)
    space.index[at] = GONE
    space.rows[(number - 1) * 2] = NO_PAGE
    space.gone_count += 1
    return 0


@native
def remove_rows(space: Space) -> int:
    """Forget all pages."""
    rep_stosb(address_of(space.index[0]), 0, INDEX * 2)
    rep_stosb(address_of(space.copied[0]), 0, COPIES * 8)
    space.page_count = 0
    space.gone_count = 0
    return 0
