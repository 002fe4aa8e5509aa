"""Native helpers of the engine: finding translations, linking them, leaving them.

All are written in the native dialect and called from the thunks with the block as first argument.
The tables that traces are found by, and the translator that makes them, are in ``pages``.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.exceptions import deliver_exception
from ringfence.cpu.flags import raise_fault
from ringfence.cpu.stack import (
    segment_linear,
)
from ringfence.cpu.state import (
    CS,
    EXIT,
    FAULT,
    GP,
    NO_EXCEPTION,
    OK,
    SS_FAULT,
)
from ringfence.engine.direct.ptrace import SIGURG
from ringfence.engine.direct.stub import KILL
from ringfence.engine.translate.block import (
    ATTENTION_CLEAR,
    EXIT_ATTENTION,
    EXIT_EFFECT,
    EXIT_FETCH_OUTSIDE,
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    MASK_PACKED,
    MODE_BASED,
    MODE_CAREFUL,
    MODE_ENTERED,
    MODE_LONG,
    MODE_SLOW,
    MODE_STEP,
    RUN_DIRECT,
    SLOW_MASKED,
    SLOW_READ,
    SLOW_STACK,
    SLOW_WRITE,
    Vcpu,
)
from ringfence.engine.translate.debugging import boundary, interrupted, undo_begin
from ringfence.engine.translate.modes import jump_forget, mode_changed
from ringfence.engine.translate.pages import (
    LOW32,
    code_address,
    drop_stale_code,
    entry_of,
    go_to,
    page_find,
    trace_at,
    trace_find,
    trace_key,
    translate,
)
from ringfence.engine.translate.tables import ONWARD, TraceRow, Writer
from ringfence.memory.coherence import (
    note_code_write,
    release_split_lock,
    take_split_lock,
)
from ringfence.memory.mmu import (
    ITLB_ENTRIES,
    OFFSET_MASK,
    PAGE_MASK,
    PENDING_DIRECT,
    TLB_ENTRIES,
    host_page,
    linear_write,
    note_access,
    note_large,
    tlb_fill,
    tlb_flush_all,
)
from ringfence.memory.registers import Places, read_register, write_register
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
    popcount,
    rep_movsb,
    slt,
    store8,
    store32,
    store64,
)
from ringfence.native.hostcall import host_call

SLOW_CHANGE = SLOW_READ | SLOW_WRITE
SLOW_RIGHTS = SLOW_CHANGE | SLOW_MASKED


@native_inline
def note_code_page(vcpu: Vcpu, address: int, number: int) -> int:
    """Have code pages found quickly: the page at a linear address, just walked, is ``number``."""
    code = (address >> 12) & (ITLB_ENTRIES - 1)
    if vcpu.cpl == 3:
        vcpu.itlb_user[code] = number
    else:
        vcpu.itlb_kernel[code] = number
        if not vcpu.walk_global and vcpu.code_filled_count < 256:
            vcpu.code_filled[vcpu.code_filled_count] = code
            vcpu.code_filled_count += 1
    return OK


@native
def find_known(vcpu: Vcpu, mode: int, physical: int) -> int:
    """Find the trace at ``rip`` if there is one: OK with ``jump_target`` set, or EXIT."""
    address = code_address(vcpu, mode)
    number = page_find(vcpu, address & PAGE_MASK, physical & PAGE_MASK, mode)
    if number == 0:
        return EXIT
    if not mode & MODE_ENTERED:
        note_code_page(vcpu, address, number)
    trace = trace_find(vcpu, trace_key(number, address & OFFSET_MASK))
    if trace == 0:
        return EXIT
    row = trace_at(cast(Writer, vcpu.writer), trace)
    if not mode & (MODE_ENTERED | MODE_STEP | MODE_BASED):
        store64(vcpu.jump_current + (address & 0xFFFF) * 8, entry_of(cast(TraceRow, row)))
    return go_to(vcpu, cast(TraceRow, row))


@native
def find_code(vcpu: Vcpu, mode: int) -> int:
    """Find or make the translation of ``rip``: OK with ``jump_target`` set, FAULT or EXIT."""
    address = code_address(vcpu, mode)
    user = 4 if vcpu.cpl == 3 else 0
    if mode & MODE_BASED and vcpu.rip > vcpu.seg_limit[CS]:
        return raise_fault(vcpu, GP, 0)
    if walk(vcpu, address, user | 16) != OK:
        return FAULT
    physical = vcpu.walk_pa
    if code_pointer(vcpu, physical) == 0:
        vcpu.exit_reason = EXIT_FETCH_OUTSIDE
        vcpu.exit_data[0] = physical
        return EXIT
    note_large(vcpu, address)
    is_global = vcpu.walk_global
    if find_known(vcpu, mode, physical) == OK:
        return OK
    vcpu.lookup_misses += 1
    status = translate(vcpu, physical, mode)
    if status != OK or mode & MODE_ENTERED:
        return status
    vcpu.walk_global = is_global  # translating may have walked to the following page
    return find_known(vcpu, mode, physical)


@native
def lookup(vcpu: Vcpu) -> int:
    """Decide where guest execution goes on: OK with ``jump_target`` set, or EXIT."""
    vcpu.lookups += 1
    while 1:
        if vcpu.stale_code:
            drop_stale_code(vcpu)
        status = OK
        if vcpu.debug_pending & ~PENDING_DIRECT:
            status = boundary(vcpu)
        if status == OK:
            status = find_code(vcpu, vcpu.mode)
        if status != FAULT:
            return status
        interrupted(vcpu)
        if deliver_exception(vcpu) != OK:
            return EXIT
        # A handler whose code faults, too, may keep this going for ever.
        if vcpu.stop_request:
            vcpu.exit_reason = EXIT_ATTENTION
            return EXIT
    return OK


@native
def onward(vcpu: Vcpu) -> int:
    """As ``lookup``, where control has come from elsewhere; RUN_DIRECT for user code that may."""
    if vcpu.debug_pending & PENDING_DIRECT:
        vcpu.debug_pending = vcpu.debug_pending & ~PENDING_DIRECT
        if vcpu.debug_pending == 0:
            return RUN_DIRECT
    return lookup(vcpu)


@native_inline
def variant_key(vcpu: Vcpu, which: int) -> int:
    """Key of the variant of the code at ``rip``; 0 where there is none yet.

    Guest code at ``rip`` is running, so the identity of its page is the one in the table.
    """
    address = code_address(vcpu, vcpu.mode)
    index = (address >> 12) & (ITLB_ENTRIES - 1)
    number = vcpu.itlb_user[index] if vcpu.cpl == 3 else vcpu.itlb_kernel[index]
    if number == 0:
        return 0
    variant = load32(vcpu.variants + number * 8 + (4 if which == MODE_SLOW else 0))
    return trace_key(variant, address & OFFSET_MASK) if variant else 0


@native
def find_variant(vcpu: Vcpu, which: int) -> int:
    """Find the variant of the code at ``rip`` that MODE_CAREFUL or MODE_SLOW asks for."""
    key = variant_key(vcpu, which)
    if key:
        trace = trace_find(vcpu, key)
        if trace:
            row = trace_at(cast(Writer, vcpu.writer), trace)
            return go_to(vcpu, cast(TraceRow, row))
    return find_code(vcpu, vcpu.mode | which)


@native
def lookup_variant(vcpu: Vcpu, which: int) -> int:
    """As ``lookup``, for a variant; after a fault, for the handler's ordinary code."""
    if vcpu.stale_code:
        drop_stale_code(vcpu)
    status = find_variant(vcpu, which)
    if status != FAULT:
        return status
    return deliver_and_lookup(vcpu)


@native
def lookup_slow(vcpu: Vcpu) -> int:
    """Where to go on when an access at ``rip`` can't be made inline."""
    vcpu.slow_accesses += 1
    return lookup_variant(vcpu, MODE_SLOW)


@native
def lookup_careful(vcpu: Vcpu) -> int:
    """Where to go on when a shared look-up at ``rip`` does not hold."""
    return lookup_variant(vcpu, MODE_CAREFUL)


@native
def link(vcpu: Vcpu, site: int, within: int) -> int:
    """A direct jump was not linked yet: find its target (``rip``), patch the jump if it is there.

    ``site`` is the executable address of the jump's 32-bit displacement; ``within`` 1 for a target
    in the same code page, whose local entry needs no check.
    """
    wanted = vcpu.rip
    index = (code_address(vcpu, vcpu.mode) >> 12) & (ITLB_ENTRIES - 1)
    page = vcpu.itlb_user[index] if vcpu.cpl == 3 else vcpu.itlb_kernel[index]
    status = lookup(vcpu)
    if status != OK:
        return status
    # An exception while fetching may have led elsewhere than to the jump's target, and a page
    # table changed without a flush to another page than the one that the jump itself is in.
    now = vcpu.itlb_user[index] if vcpu.cpl == 3 else vcpu.itlb_kernel[index]
    if vcpu.rip == wanted and (not within or now == page):
        target = vcpu.jump_target
        if within:
            target = vcpu.found_onward if within == ONWARD else vcpu.found_local
        vcpu.links += 1
        store32(site + vcpu.code_alias, target - (site + 4))
    return OK


@native
def link_careful(vcpu: Vcpu, site: int) -> int:
    """The jump to a careful trace was not linked yet: find it (``rip``), and patch the jump.

    The careful trace belongs to the same linear and physical page, so there is nothing to check on
    the way; one that dies leads to the look-up.
    """
    wanted = vcpu.rip
    status = lookup_careful(vcpu)
    if status == OK and vcpu.rip == wanted:
        # What ends in the following page is good for this once only, and not in the table.
        key = variant_key(vcpu, MODE_CAREFUL)
        if key and trace_find(vcpu, key):
            store32(site + vcpu.code_alias, vcpu.jump_target - (site + 4))
    return status


@native
def wanted(vcpu: Vcpu) -> int:
    """Whether the VMM has something to do for which guest code must be left."""
    if vcpu.stop_request or vcpu.service_request or vcpu.init_pending:
        return 1
    if vcpu.owner_step:
        return 0
    if vcpu.nmi_pending and not vcpu.nmi_blocked:
        return 1
    return 1 if vcpu.irq_request and vcpu.flag_if else 0


@native
def code_is_stale(cpu: Vcpu) -> int:
    """See ``cpu.ports.code_is_stale``."""
    cpu.attention = 1
    if cpu.direct_running:
        host_call(KILL, cpu.direct_running, SIGURG, 0, 0, 0, 0)
    return 0


@native
def attention(vcpu: Vcpu) -> int:
    """A trace head saw ``attention``: OK to go on in the trace, EXIT when the VMM is wanted.

    FAULT where code was written over, this trace's perhaps: look up again.
    """
    vcpu.attentions += 1
    if vcpu.stale_code:
        drop_stale_code(vcpu)
        return FAULT
    if vcpu.interrupt_shadow:
        vcpu.interrupt_shadow = 0
        return OK
    if wanted(vcpu):
        undo_begin(vcpu)
        vcpu.exit_reason = EXIT_ATTENTION
        return EXIT
    # Other threads set their request before ``attention``. So clear with a locked operation and
    # look again: what came in between is seen here, what comes later sets ``attention`` anew.
    atomic_and64(address_of(vcpu.mode), ATTENTION_CLEAR)
    if wanted(vcpu) or vcpu.stale_code:
        vcpu.attention = 1
    return OK


@native_inline
def stack_fault(vcpu: Vcpu, kind: int) -> int:
    """A non-canonical stack address is #SS(0), not #GP(0)."""
    if kind & SLOW_STACK and vcpu.exc_vector == GP:
        vcpu.exc_vector = SS_FAULT
    return FAULT


@native
def note_slow_operand(vcpu: Vcpu, address: int, kind: int) -> int:
    """Note an operand that is watched, as read, written or both; a fault voids the note."""
    if kind & SLOW_READ:
        note_access(vcpu, address, kind & 0xFFF, 0)
    if kind & SLOW_WRITE:
        note_access(vcpu, address, kind & 0xFFF, 1)
    return 0


@native
def narrow_access(vcpu: Vcpu, kind: int) -> int:
    """From a masked access's kind to that of the part from its first to its last element.

    ``slow_skipped`` is how far that part lies from the operand's start, ``slow_mask`` becomes the
    mask of the elements in memory. An operand is in two pages at most, so the part's ends decide
    about faults.
    """
    masking = vcpu.slow_masking & 0xFF
    shift = (vcpu.slow_masking >> 8) & 0xFF
    size = kind & 0xFFF
    kind = kind & ~0xFFF
    bits = vcpu.slow_mask & ((1 << (vcpu.slow_masking >> 16)) - 1)
    mask = 0
    if masking == MASK_PACKED:
        mask = (1 << popcount(bits)) - 1
    else:
        while bits:
            mask = mask | (bits & ((1 << (size >> shift)) - 1))
            bits = bits >> (size >> shift)
    vcpu.slow_mask = mask
    if mask == 0:
        return kind
    first = ctz(mask)
    last = first
    for n in range(first, 64):
        if mask >> n & 1:
            last = n
    vcpu.slow_skipped = first << shift
    return kind | (last + 1 - first) << shift


@native
def first_touched(vcpu: Vcpu, boundary: int) -> int:
    """Where a masked access begins behind ``boundary``; both count from its first element."""
    shift = (vcpu.slow_masking >> 8) & 0xFF
    for n in range(64):
        end = ((n + 1) << shift) - vcpu.slow_skipped
        if vcpu.slow_mask >> n & 1 and slt(boundary, end):
            start = end - (1 << shift)
            return boundary if slt(start, boundary) else start
    return boundary


@native
def commit_elements(vcpu: Vcpu) -> int:
    """Write back the elements of a masked access; their pages were found writable."""
    shift = (vcpu.slow_masking >> 8) & 0xFF
    start = vcpu.slow_address - vcpu.slow_skipped
    user = 1 if vcpu.cpl == 3 else 0
    for n in range(64):
        if vcpu.slow_mask >> n & 1:
            value = load64(vcpu.slow_pointer + (n << shift))
            linear_write(vcpu, start + (n << shift), 1 << shift, value, user)
    return OK


FIRST_PART, SECOND_PART = 1, 2
"""Which parts of a slow operand are outside RAM (``Vcpu.slow_outside``)."""


@native_inline
def answered(vcpu: Vcpu, size: int) -> int:
    """Whether a device's register was read into the operand, here and now."""
    if vcpu.registers == 0 or vcpu.slow_kind & SLOW_MASKED:
        return 0
    registers: Places = cast(Places, vcpu.registers)
    if read_register(registers, vcpu.slow_pa, size, vcpu.slow_pointer) == 0:
        return 0
    vcpu.answered_reads += 1
    return 1


@native_inline
def accepted(vcpu: Vcpu, size: int) -> int:
    """Whether the operand was written to a device's register, here and now."""
    if vcpu.registers == 0 or vcpu.slow_kind & SLOW_MASKED:
        return 0
    registers: Places = cast(Places, vcpu.registers)
    value = load32(vcpu.slow_pointer)
    if write_register(registers, vcpu.slow_pa, size, value) == 0:
        return 0
    vcpu.answered_writes += 1
    return 1


@native
def slow_access(vcpu: Vcpu, address: int, kind: int) -> int:
    """Prepare one memory operand by hand: crossing pages, in code pages, or outside RAM.

    In one page of RAM the instruction works on the operand itself, so that a locked one stays
    locked. Else the operand's bytes are gathered in ``bounce``, and nothing is written before
    ``slow_commit``. Some registers of devices are read here (`memory.registers`). OK, FAULT, or
    EXIT_MMIO_READ for the VMM to fill it.
    """
    release_split_lock(vcpu)
    # As far from a 64-byte boundary as the operand is, for instructions that want it aligned.
    vcpu.slow_pointer = address_of(vcpu.bounce[0]) + (address & 63)
    vcpu.slow_skipped = 0
    if kind & SLOW_MASKED:
        kind = narrow_access(vcpu, kind)
        address += vcpu.slow_skipped
    size = kind & 0xFFF
    user = 4 if vcpu.cpl == 3 else 0
    access = user | (2 if kind & SLOW_WRITE else 0)
    vcpu.slow_address = address
    vcpu.slow_kind = kind
    vcpu.slow_outside = 0
    if size == 0:
        return OK
    start = vcpu.slow_pointer + vcpu.slow_skipped
    offset = address & OFFSET_MASK
    first = size
    if offset + size > 4096:
        first = 4096 - offset
    if vcpu.watches:
        note_slow_operand(vcpu, address, kind)
    page = host_page(vcpu, address, access)
    if page == 0 and vcpu.status_word == FAULT:
        return stack_fault(vcpu, kind)
    if page == 0:
        vcpu.slow_outside = FIRST_PART
    vcpu.slow_pa = vcpu.last_pa
    second = 0
    if first < size:
        touched = first
        if kind & SLOW_MASKED:
            touched = first_touched(vcpu, first)
        second = host_page(vcpu, address + touched, access)
        if second == 0:
            if vcpu.status_word == FAULT:
                return stack_fault(vcpu, kind)
            vcpu.slow_outside = vcpu.slow_outside | SECOND_PART
            vcpu.slow_second_pa = vcpu.last_pa
        if kind & SLOW_MASKED:
            vcpu.slow_outside = 0  # elements across RAM's edge read ones there, and vanish
    if page and first == size:
        vcpu.slow_pointer = page + offset - vcpu.slow_skipped
        return OK
    if page and second and not vcpu.alone and kind & SLOW_RIGHTS == SLOW_CHANGE:
        take_split_lock(vcpu)
    if page:
        rep_movsb(start, page + offset, first)
    else:
        for i in range(first):
            store8(start + i, 0xFF)
    if second:
        rep_movsb(start + first, second, size - first)
    else:
        for i in range(first, size):
            store8(start + i, 0xFF)
    if vcpu.slow_outside and kind & SLOW_READ:
        if first == size and answered(vcpu, size):
            return OK
        return outside_parts(vcpu, EXIT_MMIO_READ, first, size - first)
    return OK


@native
def outside_parts(vcpu: Vcpu, reason: int, first: int, second: int) -> int:
    """Leave for the VMM with the parts of a slow operand that are outside RAM, one in each page."""
    vcpu.exit_reason = reason
    vcpu.exit_data[0] = vcpu.slow_pa
    vcpu.exit_data[1] = first if vcpu.slow_outside & FIRST_PART else 0
    vcpu.exit_data[2] = vcpu.slow_second_pa
    vcpu.exit_data[3] = second if vcpu.slow_outside & SECOND_PART else 0
    return EXIT


@native
def slow_commit(vcpu: Vcpu) -> int:
    """Write a slow access's operand back: OK, or EXIT_MMIO_WRITE for the VMM to do it."""
    size = vcpu.slow_kind & 0xFFF
    address = vcpu.slow_address
    if size == 0:
        return OK
    access = 6 if vcpu.cpl == 3 else 2
    offset = address & OFFSET_MASK
    first = size
    if offset + size > 4096:
        first = 4096 - offset
    if first == size:
        if vcpu.slow_outside:
            if accepted(vcpu, size):
                return OK
            return outside_parts(vcpu, EXIT_MMIO_WRITE, size, 0)
        note_code_write(vcpu, vcpu.slow_pointer + vcpu.slow_skipped, size)
        return OK
    if vcpu.slow_kind & SLOW_MASKED:
        return commit_elements(vcpu)
    page = host_page(vcpu, address, access)
    if page:
        rep_movsb(page + offset, vcpu.slow_pointer, first)
        note_code_write(vcpu, page + offset, first)
    second = host_page(vcpu, address + first, access)
    if second:
        rep_movsb(second, vcpu.slow_pointer + first, size - first)
        note_code_write(vcpu, second, size - first)
    release_split_lock(vcpu)
    if vcpu.slow_outside:
        return outside_parts(vcpu, EXIT_MMIO_WRITE, first, size - first)
    return OK


@native
def tlb_reset(vcpu: Vcpu) -> int:
    """First use of a block: empty TLBs and jump tables."""
    tlb_flush_all(vcpu)
    jump_forget(vcpu)
    mode_changed(vcpu)
    return 0


@native
def tlb_miss(vcpu: Vcpu, address: int, kind: int) -> int:
    """An inline look-up missed: OK once the page is entered, FAULT, or EXIT for the slow path.

    ``kind``: size in bytes, plus SLOW_WRITE for a write (then also of a read-modify-write).
    """
    size = kind & 0xFFF
    if (address & OFFSET_MASK) + size > 4096:
        return EXIT
    user = 1 if vcpu.cpl == 3 else 0
    write = 1 if kind & SLOW_WRITE else 0
    entry = ((address >> 12) & (TLB_ENTRIES - 1)) * 8 + user * 4
    if vcpu.tlb[entry + write] == address & PAGE_MASK:
        return OK  # what missed was a group of accesses that crosses into the next page
    status = tlb_fill(vcpu, address, user * 4 | write * 2)
    if status == FAULT and not kind & SLOW_MASKED:
        return stack_fault(vcpu, kind)
    if status != OK:
        vcpu.exc_vector = NO_EXCEPTION
        return EXIT
    if write and vcpu.tlb[entry + 1] != address & PAGE_MASK:
        return EXIT
    return OK


@native
def deliver_and_lookup(vcpu: Vcpu) -> int:
    """Deliver the pending exception and find the handler's code."""
    if vcpu.effect_stopped:
        vcpu.exit_reason = EXIT_EFFECT
        return EXIT
    interrupted(vcpu)
    if deliver_exception(vcpu) != OK:
        return EXIT
    return lookup(vcpu)


@native_inline
def next_page(vcpu: Vcpu) -> int:
    """The linear page behind the one that RIP is in."""
    page = (code_address(vcpu, vcpu.mode) & PAGE_MASK) + 4096
    return page if vcpu.mode & MODE_LONG else page & LOW32


@native
def segment_access(vcpu: Vcpu, offset: int, kind: int) -> int:
    """An access that ``seg_top`` doesn't allow at once: OK with its address, or FAULT.

    ``kind``: size in bytes, the segment's number << 16, 1 << 19 for a write.
    """
    status = segment_linear(vcpu, kind >> 16 & 7, offset, kind & 0xFFFF, kind >> 19)
    vcpu.slow_address = vcpu.linear
    return status


@native
def straddle(vcpu: Vcpu, wanted: int) -> int:
    """A trace across a page boundary found one of its two pages unknown: look both up.

    ``wanted`` is the identity that the second page had when the trace was made.
    """
    address = next_page(vcpu)
    user = 4 if vcpu.cpl == 3 else 0
    status = lookup(vcpu)
    if status != OK or next_page(vcpu) != address:
        return status
    if walk(vcpu, address, user | 16) != OK:
        return deliver_and_lookup(vcpu)
    number = page_find(vcpu, address, vcpu.walk_pa & PAGE_MASK, vcpu.mode)
    if number != wanted:
        # The page changed: translate anew, which replaces the trace.
        walk(vcpu, code_address(vcpu, vcpu.mode), user | 16)
        status = translate(vcpu, vcpu.walk_pa, vcpu.mode)
        return deliver_and_lookup(vcpu) if status == FAULT else status
    note_code_page(vcpu, address, number)
    return OK


@native
def stack_miss(vcpu: Vcpu, address: int, kind: int) -> int:
    """The one-page TLB of the stack missed: enter the page, and make it the stack's if writable.

    As ``tlb_miss`` for the access itself.
    """
    user = 1 if vcpu.cpl == 3 else 0
    page = address & PAGE_MASK
    entry = ((address >> 12) & (TLB_ENTRIES - 1)) * 8 + user * 4
    if vcpu.tlb[entry + 1] != page or (address & OFFSET_MASK) + (kind & 0xFFF) > 4096:
        status = tlb_miss(vcpu, address, kind)
        if status != OK:
            return status
    if vcpu.tlb[entry + 1] == page:
        vcpu.stack_tag[user] = page
        vcpu.stack_delta[user] = vcpu.tlb[entry + 2] - page
    return OK
