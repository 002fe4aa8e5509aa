"""Code pages and their traces: made known, made unreachable, succeeded; all natively.

A *code page* is one linear page that leads to one physical page in one CPU mode; all its traces
are valid together and reach each other without checks. When the guest writes to translated bytes,
the traces that depend on those lines die: their entries are overwritten with jumps to the look-up,
and once the same address is translated again, with jumps to its new trace.

All addresses of code in rows are executable ones; ``Vcpu.code_alias`` leads to where they can be
written.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import CS, EXIT, FAULT, OK, UD
from ringfence.engine.translate.block import (
    EXIT_ASK,
    EXIT_FLUSH,
    EXIT_WRITERS,
    MODE_BASED,
    MODE_CAREFUL,
    MODE_CPL,
    MODE_ENTERED,
    MODE_LONG,
    MODE_SLOW,
    MODE_STEP,
    Vcpu,
    gs,
)
from ringfence.engine.translate.builder import (
    arrangement,
    build,
    count_breaks,
    decode_straddling,
    decode_trace,
    set_arrangement,
    set_mode,
)
from ringfence.engine.translate.describing import ASK, MORE_BYTES
from ringfence.engine.translate.tables import (
    PAGE,
    RELOC_FAR,
    RELOC_ITLB,
    RELOC_VA32,
    RELOC_VA64,
    PageRow,
    TraceRow,
    Writer,
)
from ringfence.memory.coherence import (
    claim_code,
    fence,
    release_code,
    release_write,
    writer_bit,
)
from ringfence.memory.mmu import ITLB_ENTRIES, OFFSET_MASK, PAGE_MASK, tlb_protect_page
from ringfence.memory.walk import walk
from ringfence.memory.walk_state import code_pointer
from ringfence.native.dialect import (
    address_of,
    atomic_and64,
    ctz,
    load32,
    load64,
    native,
    native_inline,
    rdtsc,
    sext,
    store8,
    store32,
    store64,
)

ROW_BYTES = 32
"""Of a row of the page table: the two words of its key, see `key_low`, and the number."""
MODE_BITS = 12
"""Of a mode, in each word of a code page's key."""
LOW32 = 0xFFFFFFFF
GROUP_BITS = 5
"""log2 of the code pages that are kept side by side in the page table."""
GROUP_SHIFT = 12 + GROUP_BITS
WINDOW_BITS = 7
"""log2 of the slots of the trace table in which the traces of one code page begin to be kept: those
of a page are close together, and so are those of pages that came one after the other."""
SLOT_BYTES = 8
"""Of a slot of the trace table: key, number of the trace's row, 32 bits each."""
DEAD_LED = 3
"""Dead traces of an address that are led straight to its newest one: an older one leads to them."""
DEAD_SEEN = 64
"""Dead traces looked at for that."""
WRITERS = 8
"""Status of a fetch from a page that other vCPUs may write to."""
ROOM = 1 << 17
"""Bytes of code and marks that any trace fits in."""
LOW_2G, TOP_2G = 0x7FFFF000, 0xFFFFFFFF80000000
"""Outside of these, addresses of code need more than a sign-extended 32-bit word."""
_ITLB_USER, _ITLB_KERNEL = gs("itlb_user"), gs("itlb_kernel")


@native_inline
def mix(value: int) -> int:
    """Spread a key's bits (a multiplicative hash)."""
    product = value * 0x9E3779B97F4A7C15
    return product ^ (product >> 29)


# --- the two tables that guest code is found by ---------------------------------------------------


@native_inline
def code_base(vcpu: Vcpu, mode: int) -> int:
    """Linear address of code minus RIP."""
    return vcpu.seg_base[CS] & LOW32 if mode & MODE_BASED else 0


@native_inline
def code_address(vcpu: Vcpu, mode: int) -> int:
    """Linear address of RIP."""
    if mode & MODE_LONG:
        return vcpu.rip
    return (vcpu.rip + code_base(vcpu, mode)) & LOW32


@native_inline
def key_low(linear: int, mode: int, base: int) -> int:
    """First word of a code page's key: addresses with a base have 32 bits."""
    return linear | mode & ((1 << MODE_BITS) - 1) | base << 32


@native_inline
def key_high(physical: int, mode: int) -> int:
    """Second word of a code page's key."""
    return physical | mode >> MODE_BITS


@native_inline
def page_home(low: int, high: int) -> int:
    """Where the search for a code page begins: neighbours are side by side, as programs' pages lie.

    So a machine that runs little has few pages of the table.
    """
    group = mix((low >> GROUP_SHIFT) ^ mix(high >> GROUP_SHIFT) ^ low & (1 << MODE_BITS) - 1)
    return group << GROUP_BITS | low >> 12 & (1 << GROUP_BITS) - 1


@native
def page_find(vcpu: Vcpu, linear: int, physical: int, mode: int) -> int:
    """Number of the code page of a linear and a physical page in a mode, or 0."""
    low = key_low(linear, mode, code_base(vcpu, mode))
    high = key_high(physical, mode)
    mask = vcpu.page_rows - 1
    slot = page_home(low, high) & mask
    while 1:
        row = vcpu.page_table + slot * ROW_BYTES
        number = load64(row + 16)
        if number == 0:
            return 0
        if load64(row) == low and load64(row + 8) == high:
            return number
        slot = (slot + 1) & mask
    return 0


@native
def page_insert(vcpu: Vcpu, linear: int, physical: int, mode: int, number: int) -> int:
    """Enter a code page."""
    low = key_low(linear, mode, code_base(vcpu, mode))
    high = key_high(physical, mode)
    mask = vcpu.page_rows - 1
    slot = page_home(low, high) & mask
    while load64(vcpu.page_table + slot * ROW_BYTES + 16):
        slot = (slot + 1) & mask
    row = vcpu.page_table + slot * ROW_BYTES
    store64(row, low)
    store64(row + 8, high)
    store64(row + 16, number)
    return 0


@native
def trace_slot(vcpu: Vcpu, key: int) -> int:
    """Host address of the slot of a trace, or of the free one where it belongs."""
    mask = vcpu.trace_slots - 1
    slot = ((key >> 12 << WINDOW_BITS) + (mix(key) & (1 << WINDOW_BITS) - 1)) & mask
    while 1:
        at = vcpu.trace_table + slot * SLOT_BYTES
        found = load32(at)
        if found in (key, 0):
            return at
        slot = (slot + 1) & mask
    return 0


@native_inline
def trace_insert(vcpu: Vcpu, key: int, number: int) -> int:
    """Enter a trace by the number of its row, or replace it; number 0 removes it."""
    at = trace_slot(vcpu, key)
    store32(at, key)
    store32(at + 4, number)
    return 0


@native_inline
def trace_find(vcpu: Vcpu, key: int) -> int:
    """Number of the row of a trace, by its code page and offset (``trace_key``); 0 for none."""
    return load32(trace_slot(vcpu, key) + 4)


@native_inline
def trace_key(number: int, offset: int) -> int:
    """Key of the trace at an offset of a code page."""
    return number << 12 | offset


# --- rows -----------------------------------------------------------------------------------------


@native_inline
def page_at(w: Writer, number: int) -> int:
    """Address of a code page's row."""
    return w.pages + number * PageRow.size


@native_inline
def trace_at(w: Writer, number: int) -> int:
    """Address of a trace's row; they count from 1, and 0 means none."""
    return w.traces + number * TraceRow.size


@native_inline
def go_to(vcpu: Vcpu, row: TraceRow) -> int:
    """Guest execution goes on in this trace."""
    vcpu.jump_target = row.start + row.checked
    vcpu.found_local = row.start + row.local
    vcpu.found_onward = row.start + row.onward
    return OK


@native_inline
def entry_of(row: TraceRow) -> int:
    """The indirect entry of a trace: where its code starts."""
    return row.start


@native_inline
def start_rip(page: PageRow) -> int:
    """RIP of a code page's first byte; with a base it may lie before 0, modulo 2**32."""
    if page.mode & MODE_LONG:
        return page.linear
    return (page.linear - page.base) & LOW32


@native
def code_page(vcpu: Vcpu, w: Writer, linear: int, physical: int, mode: int) -> int:
    """The number of the code page of an address, made if it is new."""
    number = page_find(vcpu, linear, physical, mode)
    if number:
        return number
    number = w.page_count
    w.page_count = number + 1
    index = (code_pointer(vcpu, physical) - vcpu.ram_host) >> 12
    page: PageRow = cast(PageRow, page_at(w, number))
    page.linear = linear
    page.index = index
    page.mode = mode
    page.base = code_base(vcpu, mode)
    start = start_rip(page)
    page.wide = 1 if start >= LOW_2G and start < TOP_2G else 0
    page.live = 0
    page.dead = 0
    page.across = 0
    page.next_of_index = load32(w.page_of_index + index * 4)
    store32(w.page_of_index + index * 4, number)
    page_insert(vcpu, linear, physical, mode, number)
    if mode & MODE_ENTERED:
        normal = page_find(vcpu, linear, physical, mode & ~MODE_ENTERED)
        if normal:
            slow = 4 if mode & MODE_SLOW else 0
            store32(vcpu.variants + normal * 8 + slow, number)
    return number


@native
def mark_lines(vcpu: Vcpu, index: int, lines: int) -> int:
    """Note which lines of a RAM page hold translated code."""
    at = vcpu.code_lines + index * 8
    store64(at, load64(at) | lines)
    return 0


@native
def begin_reading(vcpu: Vcpu, which: int, index: int) -> int:
    """Code is about to be read from a RAM page; 1 if others have to be kept from writing first.

    ``which``: 0 for the page, 1 for the following one of an instruction across both.
    """
    writers = claim_code(vcpu, index)
    if writers & writer_bit(vcpu):
        tlb_protect_page(vcpu, vcpu.ram_host + (index << 12))
        release_write(vcpu, index)
    vcpu.reading[which] = index + 1
    fence(vcpu)
    return 1 if writers & ~writer_bit(vcpu) else 0


@native_inline
def end_reading(vcpu: Vcpu) -> int:
    """What was read is translated, or will be read again."""
    vcpu.reading[0] = 0
    vcpu.reading[1] = 0
    return 0


# --- placing --------------------------------------------------------------------------------------


@native
def relocate(w: Writer, page: PageRow, number: int) -> int:
    """Fill in the words of a trace that depend on its place (see ``tables.RELOC_*``).

    Returns 1 where an address does not fit the 32 bits that it has.
    """
    bad = 0
    itlb = _ITLB_USER if page.mode & MODE_CPL == 3 else _ITLB_KERNEL
    for i in range(w.relocation_count):
        pair = load64(w.relocations + i * 8)
        position = w.code + ((pair & (RELOC_FAR - 1)) >> 2)
        addend = sext(pair >> 32, 32) + (1 << 32 if pair & RELOC_FAR else 0)
        kind = pair & 3
        value = page.linear + addend
        if not page.mode & MODE_LONG:
            value = (value if kind == RELOC_ITLB else value - page.base) & LOW32
        if kind == RELOC_VA32:
            if sext(value, 32) != value:
                bad = 1
            store32(position, value)
        elif kind == RELOC_VA64:
            store64(position, value)
        elif kind == RELOC_ITLB:
            store32(position, itlb + ((value >> 12) & (ITLB_ENTRIES - 1)) * 4)
        else:
            store32(position, number)
    return bad


@native_inline
def write_jump(vcpu: Vcpu, address: int, target: int) -> int:
    """Overwrite placed code with a jump; both are executable addresses."""
    store8(address + vcpu.code_alias, 0xE9)
    store32(address + vcpu.code_alias + 1, target - address - 5)
    return 0


@native
def install(vcpu: Vcpu, w: Writer, page: PageRow, row: TraceRow, number: int) -> int:
    """Make a relocated trace known; ``number`` is its row's. A living one of its address dies."""
    key = trace_key(row.page, row.offset)
    if trace_find(vcpu, key):
        retire(vcpu, w, page, row.offset, 0 - 1)
    row.next = page.live
    page.live = number
    mark_lines(vcpu, page.index, row.lines)
    trace_insert(vcpu, key, number)
    if page.dead:
        succeed(vcpu, w, page, row)
    return 0


@native
def succeed(vcpu: Vcpu, w: Writer, page: PageRow, row: TraceRow) -> int:
    """Lead the dead traces of an address to its new one."""
    led = 0
    number = page.dead
    for _n in range(DEAD_SEEN):
        if number == 0 or led >= DEAD_LED:
            break
        old: TraceRow = cast(TraceRow, trace_at(w, number))
        if old.offset == row.offset and not page.mode & MODE_ENTERED:
            write_jump(vcpu, old.start + old.checked, row.start + row.checked)
            write_jump(vcpu, old.start + old.local, row.start + row.local)
            write_jump(vcpu, old.start + old.onward, row.start + row.local)
            led += 1
        number = old.next
    return 0


@native
def kill(vcpu: Vcpu, w: Writer, page: PageRow, row: TraceRow, number: int) -> int:
    """Make trace ``number`` unreachable; its code stays until the cache is flushed."""
    w.invalidated += 1
    row.dead = 1
    start = row.start
    if not page.mode & MODE_ENTERED:
        indirect = start + vcpu.code_alias
        store32(indirect, 0x2524FF65)  # jmp gs:[disp32]
        store32(indirect + 4, w.indirect_miss)
        write_jump(vcpu, start + row.checked, start + row.reenter)
        write_jump(vcpu, start + row.local, start + row.reenter_local)
        write_jump(vcpu, start + row.onward, start + row.reenter_local)
    elif page.mode & MODE_CAREFUL:
        # Reached by links, with RIP set: look up again.
        store32(start + vcpu.code_alias, 0x2524FF65)
        store32(start + vcpu.code_alias + 4, w.careful)
    key = trace_key(row.page, row.offset)
    if trace_find(vcpu, key) == number:
        trace_insert(vcpu, key, 0)
    return 0


@native
def retire(vcpu: Vcpu, w: Writer, page: PageRow, offset: int, lines: int) -> int:
    """Kill a page's traces that depend on ``lines``; the lines that the others depend on.

    ``offset`` limits it to the traces of one address, unless it is PAGE.
    """
    left = 0
    number = page.live
    previous = 0
    while number:
        row: TraceRow = cast(TraceRow, trace_at(w, number))
        following = row.next
        if row.lines & lines and (offset == PAGE or row.offset == offset):
            kill(vcpu, w, page, row, number)
            if previous:
                unlink_behind(cast(TraceRow, trace_at(w, previous)), following)
            else:
                page.live = following
            row.next = page.dead
            page.dead = number
        else:
            left = left | row.lines
            previous = number
        number = following
    return left


@native_inline
def unlink_behind(row: TraceRow, following: int) -> int:
    """Take the next trace out of a page's list."""
    row.next = following
    return 0


@native
def retire_across(vcpu: Vcpu, w: Writer, page: PageRow, lines: int) -> int:
    """The same for instructions that only end in a page; the lines still depended on."""
    left = 0
    number = page.across
    kept = 0
    while number:
        row: TraceRow = cast(TraceRow, trace_at(w, number))
        following = row.next_across
        if not row.dead and row.next_lines & lines:
            retire_one(vcpu, w, cast(PageRow, page_at(w, row.page)), row)
        elif not row.dead:
            left = left | row.next_lines
            row.next_across = kept
            kept = number
        number = following
    page.across = kept
    return left


@native
def retire_one(vcpu: Vcpu, w: Writer, page: PageRow, row: TraceRow) -> int:
    """Kill a trace for the sake of the bytes that it has in the following page."""
    return retire(vcpu, w, page, row.offset, row.lines)


@native_inline
def next_of_index(page: PageRow) -> int:
    """See ``PageRow``."""
    return page.next_of_index


@native
def invalidate(vcpu: Vcpu, index: int, lines: int) -> int:
    """The guest wrote to ``lines`` of a RAM page: drop the traces that depend on them."""
    w: Writer = cast(Writer, vcpu.writer)
    vcpu.mapping_epoch += 1  # the process of user code may execute a copy of the page
    left = 0
    number = load32(w.page_of_index + index * 4)
    while number:
        page = page_at(w, number)
        left = left | retire(vcpu, w, cast(PageRow, page), PAGE, lines)
        left = left | retire_across(vcpu, w, cast(PageRow, page), lines)
        number = next_of_index(cast(PageRow, page))
    store64(vcpu.code_lines + index * 8, left)
    if left == 0:
        release_code(vcpu, index)
    return 0


@native
def drop_stale_code(vcpu: Vcpu) -> int:
    """Invalidate what was written over since the last time (see `memory.coherence`)."""
    atomic_and64(address_of(vcpu.stale_code), 0xFFFFFFFF00000000)
    for n in range(vcpu.stale_group_words):
        word = vcpu.stale_groups + n * 8
        if load64(word):
            groups = atomic_and64(word, 0)
            while groups:
                drop_stale_group(vcpu, n << 6 | ctz(groups))
                groups = groups & (groups - 1)
    return 0


@native
def drop_stale_group(vcpu: Vcpu, group: int) -> int:
    """The same for the 64 RAM pages of a word of the middle level."""
    pages = atomic_and64(vcpu.stale_pages + group * 8, 0)
    while pages:
        index = group << 6 | ctz(pages)
        invalidate(vcpu, index, atomic_and64(vcpu.stale_lines + index * 8, 0))
        pages = pages & (pages - 1)
    return 0


@native
def forget_code(vcpu: Vcpu) -> int:
    """No RAM page holds translated code any more (of this vCPU's)."""
    w: Writer = cast(Writer, vcpu.writer)
    vcpu.mapping_epoch += 1
    for number in range(1, w.page_count):
        forget_code_page(vcpu, w, cast(PageRow, page_at(w, number)))
    return 0


@native_inline
def forget_code_page(vcpu: Vcpu, w: Writer, page: PageRow) -> int:
    """The same for one page."""
    store64(vcpu.code_lines + page.index * 8, 0)
    store32(w.page_of_index + page.index * 4, 0)
    release_code(vcpu, page.index)
    return 0


# --- a new trace ----------------------------------------------------------------------------------


@native_inline
def leave(vcpu: Vcpu, reason: int, mode: int) -> int:
    """Python is wanted."""
    vcpu.exit_reason = reason
    vcpu.exit_data[0] = mode
    return EXIT


@native_inline
def stop_writers(vcpu: Vcpu, index: int, mode: int) -> int:
    """Other vCPUs' TLBs may let them write to a RAM page that is to be translated from."""
    vcpu.exit_data[1] = index
    return leave(vcpu, EXIT_WRITERS, mode)


@native_inline
def is_full(w: Writer) -> int:
    """Whether any table or the code cache may not take another trace."""
    return (
        w.cache_used + ROOM > w.cache_size
        or w.page_count + 2 > w.page_limit
        or w.trace_count + 1 > w.trace_limit
        or w.mark_count + ROOM > w.mark_limit
    )


@native
def translate(vcpu: Vcpu, physical: int, mode: int) -> int:
    """Translate the code at RIP, at guest-physical address ``physical``, and make it known.

    OK with ``jump_target`` and ``found_local`` set; FAULT where fetching its last bytes faults,
    with the exception pending; EXIT where Python is wanted first.
    """
    began = rdtsc()
    w: Writer = cast(Writer, vcpu.writer)
    if is_full(w):
        return leave(vcpu, EXIT_FLUSH, mode)
    linear = code_address(vcpu, mode) & PAGE_MASK
    number = code_page(vcpu, w, linear, physical & PAGE_MASK, mode)
    status = translate_in(vcpu, w, cast(PageRow, page_at(w, number)), number, mode)
    end_reading(vcpu)
    w.translation_ticks += rdtsc() - began
    return status


@native
def translate_in(vcpu: Vcpu, w: Writer, page: PageRow, number: int, mode: int) -> int:
    """The same within a code page."""
    if begin_reading(vcpu, 0, page.index):
        return stop_writers(vcpu, page.index, mode)
    w.data = vcpu.ram_host + (page.index << 12)
    w.linear = page.linear
    w.break_table = vcpu.breaks
    w.break_count = vcpu.break_count
    w.breaks = 0
    if vcpu.break_count and not mode & MODE_STEP:
        w.breaks = count_breaks(w, page.linear)
    offset = code_address(vcpu, mode) & OFFSET_MASK
    set_mode(w, mode, page.wide, start_rip(page))
    set_arrangement(w, 0)
    w.second = 0
    status = decode_trace(w, offset)
    if status == MORE_BYTES:
        status = fetch_across(vcpu, w, page, offset, mode)
        if status == FAULT:
            return FAULT
        if status == WRITERS:
            return stop_writers(vcpu, vcpu.reading[1] - 1, mode)
    if status == ASK:
        return leave(vcpu, EXIT_ASK, mode)
    swaps = arrangement(w)
    if swaps and not w.second:
        set_arrangement(w, swaps)
        if decode_trace(w, offset) == ASK:
            return leave(vcpu, EXIT_ASK, mode)
    return finish(vcpu, w, page, number, offset)


@native
def fetch_across(vcpu: Vcpu, w: Writer, page: PageRow, offset: int, mode: int) -> int:
    """Decode an instruction that ends in the following page.

    FAULT if that can't be fetched, WRITERS if others may write to that page.
    """
    address = page.linear + PAGE
    if not mode & MODE_LONG:
        address = address & LOW32
    user = 4 if mode & MODE_CPL == 3 else 0
    if walk(vcpu, address, user | 16) != OK:
        return FAULT
    following = vcpu.walk_pa & PAGE_MASK
    host = code_pointer(vcpu, following)
    if host == 0:
        # What is not RAM reads as all ones, as where the engine fetches from there.
        vcpu.exc_vector = UD
        vcpu.exc_error = 0
        return FAULT
    w.second = code_page(vcpu, w, address, following, mode)
    if begin_reading(vcpu, 1, (host - vcpu.ram_host) >> 12):
        return WRITERS
    return decode_straddling(w, offset, host)


@native
def finish(vcpu: Vcpu, w: Writer, page: PageRow, number: int, offset: int) -> int:
    """Write the decoded trace to the cache and make it known."""
    fresh = w.trace_count
    row: TraceRow = cast(TraceRow, trace_at(w, fresh))
    row.page = number
    row.dead = 0
    w.out = w.cache_start + w.cache_used
    build(w, row, offset)
    if relocate(w, page, number):
        # A relative address needs more than 32 bits after all: again, with 64-bit constants.
        w.mark_count = row.mark
        page.wide = 1
        return translate_in(vcpu, w, page, number, page.mode)
    start = w.code - vcpu.code_alias
    row.start = start
    w.cache_used += (row.length + 15) & ~15
    w.trace_count = fresh + 1
    w.instructions += row.instructions
    w.blocks += 1
    w.bytes += row.length
    install(vcpu, w, page, row, fresh)
    if w.second:
        cross(vcpu, cast(PageRow, page_at(w, w.second)), row, fresh)
        if w.entered:
            # Entered without a check of the second page: good for this once only.
            trace_insert(vcpu, trace_key(number, offset), 0)
    return go_to(vcpu, row)


@native
def cross(vcpu: Vcpu, second: PageRow, row: TraceRow, number: int) -> int:
    """A trace whose instruction ends in a second page depends on that, too."""
    row.next_across = second.across
    second.across = number
    mark_lines(vcpu, second.index, row.next_lines)
    return 0
