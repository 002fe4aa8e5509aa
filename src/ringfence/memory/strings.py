"""String instructions on guest memory: MOVS, STOS, LODS, SCAS, CMPS, with and without REP.

Each call works through whole pages with the host's own block instructions where that gives the
same result, and element by element elsewhere. Registers move on as elements complete, so a fault
in the middle leaves the state that the SDM demands (vol. 2, REP). A call does a bounded amount of
work and then returns with RIP unchanged, so that interrupts are seen between two calls.

Operand convention (``cpu.op``): [0] element size in bytes; [1] the operation; [2] repeat prefix
(0, 1 = REP/REPE, 2 = REPNE); [3] bits 0-1: width of addresses (0, 1, 2: 64, 32, 16 bits), bits
8-15: segment register of the source plus one where its base counts, else 0, CHECKED: outside
64-bit mode, where each element is checked against its segment and the target's is ES.
"""

# ruff: noqa: SIM109 - the dialect has no membership test

from __future__ import annotations

from ringfence.cpu.stack import segment_linear, within_segment
from ringfence.cpu.state import (
    ES,
    EXIT,
    FAULT,
    FLAG_RF,
    OK,
    RAX,
    RCX,
    RDI,
    RSI,
    STATUS_FLAGS,
)
from ringfence.memory.coherence import note_code_write
from ringfence.memory.mmu import (
    OFFSET_MASK,
    PAGE_MASK,
    PENDING_LOOK,
    Mmu,
    host_page,
    linear_read,
    linear_write,
    load_sized,
    note_access,
    store_sized,
    watched_page,
)
from ringfence.native.dialect import (
    native,
    native_inline,
    rep_movsb,
    rep_stosb,
    store64,
)

MOVS, STOS, LODS, SCAS, CMPS = range(5)
CHECKED = 1 << 16
BOUND = 1 << 16
"""Elements that one call handles at most."""
EXIT_MMIO_STRING = 32
"""Exit: an element outside RAM; ``exit_data`` = physical address, size, which access, value."""
READ_SOURCE, WRITE, READ_TARGET = range(3)
"""Which access of an element; bit n of ``Mmu.string_ready`` says that n has been carried out."""


@native_inline
def advance(mmu: Mmu, register: int, bytes_: int, mask: int) -> int:
    """Move an index register on, modulo its address size."""
    value = mmu.gpr[register]
    # A 32-bit result clears the upper half; a 16-bit one leaves the rest alone.
    kept = value & ~mask if mask == 0xFFFF else 0
    mmu.gpr[register] = kept | ((value + bytes_) & mask)
    return 0


@native_inline
def uses_source(kind: int) -> int:
    """Whether an operation reads where RSI points."""
    return kind == MOVS or kind == LODS or kind == CMPS


@native
def check_element(mmu: Mmu, kind: int, size: int, source: int, target: int, sreg: int) -> int:
    """Check an element's offsets against their segments; ``string_source`` and ``…_target``."""
    if uses_source(kind):
        if segment_linear(mmu, sreg, source, size, 0):
            return FAULT
        mmu.string_source = mmu.linear
    if kind != LODS:
        if segment_linear(mmu, ES, target, size, kind == MOVS or kind == STOS):
            return FAULT
        mmu.string_target = mmu.linear
    return OK


@native
def elements_within(mmu: Mmu, kind: int, size: int, count: int, sreg: int, mask: int) -> int:
    """How many of ``count`` elements from here on are within their segments, one at least."""
    bytes_ = count * size
    source = mmu.gpr[RSI] & mask
    target = mmu.gpr[RDI] & mask
    write = kind == MOVS or kind == STOS
    while bytes_ > size:
        fits = 1 if source + bytes_ - 1 <= mask and target + bytes_ - 1 <= mask else 0
        if kind == MOVS and fits:
            fits = within_segment(mmu, sreg, source, bytes_, 0)
        if fits:
            fits = within_segment(mmu, ES, target, bytes_, write)
        if fits:
            return bytes_ // size
        bytes_ = (bytes_ >> 1) & ~(size - 1)
    return 1


@native_inline
def compare_flags(mmu: Mmu, left: int, right: int, size: int) -> int:
    """Status flags of ``left - right`` at an operand size in bytes."""
    bits = size * 8
    mask = 0xFFFFFFFFFFFFFFFF if bits == 64 else (1 << bits) - 1
    left = left & mask
    right = right & mask
    result = (left - right) & mask
    flags = 0
    if left < right:
        flags = flags | 1
    parity = result ^ (result >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    if not parity & 1:
        flags = flags | 4
    if (left ^ right ^ result) & 0x10:
        flags = flags | 0x10
    if result == 0:
        flags = flags | 0x40
    if result >> (bits - 1):
        flags = flags | 0x80
    if ((left ^ right) & (left ^ result)) >> (bits - 1):
        flags = flags | 0x800
    mmu.status = (mmu.status & ~STATUS_FLAGS) | flags
    return 0


@native
def outside(mmu: Mmu, size: int, which: int) -> int:
    """Leave for the VMM: an element that is not in RAM (``last_pa`` is its physical address)."""
    mmu.exit_reason = EXIT_MMIO_STRING
    mmu.exit_data[0] = mmu.last_pa
    mmu.exit_data[1] = size
    mmu.exit_data[2] = which
    return EXIT


@native
def read_element(mmu: Mmu, address: int, size: int, user: int, which: int) -> int:
    """Read one element; EXIT for one outside RAM unless the VMM has just provided it."""
    if (address & OFFSET_MASK) + size <= 4096:
        host = host_page(mmu, address, 4 if user else 0)
        if host:
            if mmu.watches:
                note_access(mmu, address, size, 0)
            mmu.value = load_sized(host + (address & OFFSET_MASK), size)
            return OK
        if mmu.status_word == FAULT:
            return FAULT
        if mmu.string_ready >> which & 1:
            mmu.value = mmu.string_value[which]
            return OK
        return outside(mmu, size, which)
    return linear_read(mmu, address, size, user)


@native
def write_element(mmu: Mmu, address: int, size: int, value: int, user: int) -> int:
    """Write one element; EXIT for one outside RAM, with the value in ``exit_data[3]``."""
    if (address & OFFSET_MASK) + size <= 4096:
        host = host_page(mmu, address, 6 if user else 2)
        if host:
            store_sized(host + (address & OFFSET_MASK), size, value)
            note_code_write(mmu, host + (address & OFFSET_MASK), size)
            if mmu.watches:
                note_access(mmu, address, size, 1)
            return OK
        if mmu.status_word == FAULT:
            return FAULT
        if mmu.string_ready >> WRITE & 1:
            return OK
        mmu.exit_data[3] = value
        return outside(mmu, size, WRITE)
    return linear_write(mmu, address, size, value, user)


@native_inline
def room(address: int) -> int:
    """Bytes from an address to the end of its page."""
    return 4096 - (address & OFFSET_MASK)


@native_inline
def unwatched_page(mmu: Mmu, address: int, access: int) -> int:
    """As ``host_page``; 0 also for a page whose accesses have to be looked at one by one."""
    page = host_page(mmu, address, access)
    if mmu.watches and page and watched_page(mmu, address & PAGE_MASK):
        page = 0
    return page


@native
def block_move(mmu: Mmu, source: int, target: int, bytes_: int, size: int, user: int) -> int:
    """Forward copy inside one source and one target page; bytes done, 0 to go element-wise."""
    take = bytes_
    if room(source) < take:
        take = room(source)
    if room(target) < take:
        take = room(target)
    access = 4 if user else 0
    from_page = unwatched_page(mmu, source, access)
    if from_page == 0:
        return 0
    to_page = unwatched_page(mmu, target, access | 2)
    if to_page == 0:
        return 0
    to = to_page + (target & OFFSET_MASK)
    origin = from_page + (source & OFFSET_MASK)
    take = take & ~(size - 1)
    if take == 0 or (to > origin and to - origin < size):
        return 0
    rep_movsb(to, origin, take)
    note_code_write(mmu, to, take)
    return take


@native
def block_store(mmu: Mmu, target: int, bytes_: int, size: int, user: int) -> int:
    """Fill inside one page; bytes done, 0 to go element-wise."""
    take = bytes_
    if room(target) < take:
        take = room(target)
    take = take & ~(size - 1)
    if take == 0:
        return 0
    page = unwatched_page(mmu, target, 6 if user else 2)
    if page == 0:
        return 0
    to = page + (target & OFFSET_MASK)
    value = mmu.gpr[RAX]
    if size == 1:
        rep_stosb(to, value, take)
    elif size == 8:
        for i in range(take >> 3):
            store64(to + i * 8, value)
    else:
        for i in range(take // size):
            store_sized(to + i * size, size, value)
    note_code_write(mmu, to, take)
    return take


@native
def fx_string(mmu: Mmu) -> int:
    """Carry out one string instruction (see the module's text for the operands)."""
    size = mmu.op[0]
    kind = mmu.op[1]
    repeat = mmu.op[2]
    width = mmu.op[3] & 3
    checked = mmu.op[3] & CHECKED
    segment = (mmu.op[3] >> 8) & 0xFF
    user = 1 if mmu.cpl == 3 else 0
    base = mmu.seg_base[segment - 1] if segment else 0
    step = 0 - size if mmu.flag_df else size
    # Where traps may be due, they are between two elements (SDM vol. 3, 18.3.1.2 and .4).
    bound = 1 if mmu.debug_pending else BOUND
    mask = 0xFFFFFFFFFFFFFFFF
    if width:
        mask = 0xFFFFFFFF if width == 1 else 0xFFFF
    while 1:
        left = 1
        if repeat:
            left = mmu.gpr[RCX] & mask
            if left == 0:
                mmu.rip = mmu.next_rip
                return OK
            if bound == 0 or mmu.stale_code or mmu.debug_pending & ~PENDING_LOOK:
                if mmu.debug_pending:
                    # It goes on, and its breakpoint counted before its first element.
                    mmu.other_flags = mmu.other_flags | FLAG_RF
                return OK
        source = (mmu.gpr[RSI] & mask) + base
        target = mmu.gpr[RDI] & mask
        want = left if left < bound else bound
        if checked:
            if check_element(mmu, kind, size, mmu.gpr[RSI] & mask, target, segment - 1):
                return FAULT
            source = mmu.string_source
            target = mmu.string_target
            if repeat and not mmu.flag_df and (kind == MOVS or kind == STOS):
                want = elements_within(mmu, kind, size, want, segment - 1, mask)
        done = 0
        if repeat and not mmu.flag_df and left > 1:
            if kind == MOVS:
                done = block_move(mmu, source, target, want * size, size, user)
            elif kind == STOS:
                done = block_store(mmu, target, want * size, size, user)
            done = done // size
        if kind == MOVS and done:
            advance(mmu, RSI, done * size, mask)
            advance(mmu, RDI, done * size, mask)
        elif kind == STOS and done:
            advance(mmu, RDI, done * size, mask)
        else:
            done = 1
            status = element(mmu, kind, size, source, target, user)
            if status == EXIT:
                return EXIT
            mmu.string_ready = 0
            if status != OK:
                return status
            if uses_source(kind):
                advance(mmu, RSI, step, mask)
            if kind != LODS:
                advance(mmu, RDI, step, mask)
        if not repeat:
            mmu.rip = mmu.next_rip
            return OK
        left = (left - done) & mask
        mmu.gpr[RCX] = (mmu.gpr[RCX] & ~mask | left) if width == 2 else left
        bound = bound - done if bound > done else 0
        if kind == SCAS or kind == CMPS:
            zero = 1 if mmu.status & 0x40 else 0
            if zero != (1 if repeat == 1 else 0):
                mmu.rip = mmu.next_rip
                return OK
    return OK


@native
def element(mmu: Mmu, kind: int, size: int, source: int, target: int, user: int) -> int:
    """One element of a string instruction, index registers unchanged."""
    status = OK
    if kind == STOS:
        return write_element(mmu, target, size, mmu.gpr[RAX], user)
    if kind == SCAS:
        status = read_element(mmu, target, size, user, READ_TARGET)
        if status == OK:
            compare_flags(mmu, mmu.gpr[RAX], mmu.value, size)
        return status
    if kind == CMPS:
        status = read_element(mmu, source, size, user, READ_SOURCE)
        if status != OK:
            return status
        left = mmu.value
        status = read_element(mmu, target, size, user, READ_TARGET)
        if status == OK:
            compare_flags(mmu, left, mmu.value, size)
        return status
    status = read_element(mmu, source, size, user, READ_SOURCE)
    if status != OK:
        return status
    value = mmu.value
    if kind == MOVS:
        return write_element(mmu, target, size, value, user)
    if size >= 4:
        mmu.gpr[RAX] = value
    elif size == 2:
        mmu.gpr[RAX] = (mmu.gpr[RAX] & ~0xFFFF) | value
    else:
        mmu.gpr[RAX] = (mmu.gpr[RAX] & ~0xFF) | value
    return OK
