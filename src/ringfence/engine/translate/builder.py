"""From a guest address to a finished trace: decoding, flags that are live, registers chosen.

A trace is up to `LIMIT` instructions of one page: it runs through conditional jumps that are not
taken and ends at an unconditional transfer, a call of an effect, or the page's end.
"""

from __future__ import annotations

from typing import cast

from ringfence.engine.translate.block import (
    MODE_BASED,
    MODE_CODE32,
    MODE_CPL,
    MODE_ENTERED,
    MODE_FLAT,
    MODE_LONG,
    MODE_SLOW,
    MODE_STACK32,
    MODE_STEP,
)
from ringfence.engine.translate.decoding import decode
from ringfence.engine.translate.describing import ASK, DECODED, MORE_BYTES, STATUS, to_effect
from ringfence.engine.translate.groups import insn_at
from ringfence.engine.translate.tables import (
    CALL,
    CANONICAL,
    JCC,
    JMP,
    LIMIT,
    LOOP,
    NONE,
    PAGE,
    STI,
    Form,
    Insn,
    TraceRow,
    Writer,
)
from ringfence.engine.translate.writer import ends_trace, write_trace
from ringfence.native.dialect import address_of, load8, load64, native, native_inline

WORTHWHILE = 4
"""Accesses that swapping two registers must save, as it costs two loads and stores each way."""
NEVER_DISPLACED = 0x0E10
"""RSP and the homeless ones."""
SPECIAL = 4
"""Registers before this one are displaced only where they are not named: instructions make special
use of them."""
PEEK = 16
"""Instructions looked at to learn whether a jump's target reads flags."""
SWAPS_MAX = 3
TAIL = 16
"""Bytes of a page that ``Writer.straddle`` begins with."""
HOMES_LOW = int.from_bytes(bytes(CANONICAL[:8]), "little")
HOMES_HIGH = int.from_bytes(bytes(CANONICAL[8:]), "little")


@native_inline
def line_mask(start: int, end: int) -> int:
    """Mask of the 64-byte lines of a page that hold bytes [start, end)."""
    first = start >> 6
    last = (end - 1) >> 6
    return ((2 << (last - first)) - 1) << first


@native
def set_mode(w: Writer, mode: int, wide: int, start_rip: int) -> int:
    """Prepare for a trace of a page, at whose first byte RIP would be ``start_rip``, in a mode."""
    w.mode = mode
    w.user = 1 if mode & MODE_CPL == 3 else 0
    w.slow = 1 if mode & MODE_SLOW else 0
    w.entered = 1 if mode & MODE_ENTERED else 0
    w.step = 1 if mode & MODE_STEP else 0
    w.wide = wide
    w.long = 1 if mode & MODE_LONG else 0
    w.width = 4 if mode & MODE_CODE32 else 2
    w.stack = 8 if w.long else 4 if mode & MODE_STACK32 else 2
    w.flat = 1 if mode & (MODE_FLAT | MODE_LONG) else 0
    w.based = 1 if mode & MODE_BASED else 0
    w.start_rip = start_rip
    return 0


@native
def set_arrangement(w: Writer, swaps: int) -> int:
    """Where guest registers live inside the trace."""
    w.swaps = swaps
    w.context = w.mode | w.wide << 31 | swaps << 32
    for n in range(8):
        w.home[n] = HOMES_LOW >> (8 * n)
        w.home[n + 8] = HOMES_HIGH >> (8 * n)
    while swaps:
        w.home[swaps & 15] = w.home[swaps >> 4 & 15]
        w.home[swaps >> 4 & 15] = NONE
        swaps = swaps >> 8
    return 0


# --- reading guest code ---------------------------------------------------------------------------


@native
def place_insn(w: Writer, i: Insn, offset: int) -> int:
    """Note where an instruction stands; its length."""
    i.offset = offset
    if not w.long and i.kind in (JMP, JCC, CALL):
        # The instruction pointer is as wide as the operand.
        form: Form = cast(Form, i.form)
        rip = (w.start_rip + offset) & 0xFFFFFFFF
        i.value = ((rip + i.value) & (0xFFFF if form.operand_size == 2 else 0xFFFFFFFF)) - rip
    return i.length


@native_inline
def kind_of(i: Insn) -> int:
    """Kind of an instruction."""
    return i.kind


@native
def count_breaks(w: Writer, linear: int) -> int:
    """How many breakpoints are in a linear page."""
    found = 0
    for n in range(w.break_count):
        if (load64(w.break_table + n * 8) ^ linear) >> 12 == 0:
            found += 1
    return found


@native
def is_broken(w: Writer, offset: int) -> int:
    """Whether there is a breakpoint at an offset of the page being translated."""
    for n in range(w.break_count):
        if load64(w.break_table + n * 8) == w.linear + offset:
            return 1
    return 0


@native
def decode_trace(w: Writer, offset: int) -> int:
    """Decode the trace that starts at ``offset`` of the page: DECODED, MORE_BYTES or ASK."""
    count = 0
    left = 1 if w.slow or w.step else LIMIT
    status = DECODED
    w.broken = 0
    while offset < PAGE and left:
        if w.breaks and is_broken(w, offset):
            if count:
                break
            if not w.entered:
                w.broken = 1
                left = 1
        left -= 1
        i = insn_at(w, count)
        status = decode(w, cast(Insn, i), w.data + offset, PAGE - offset)
        if status == ASK:
            return ASK
        if status == MORE_BYTES:
            break
        offset += place_insn(w, cast(Insn, i), offset)
        count += 1
        kind = kind_of(cast(Insn, i))
        if ends_trace(kind):
            break
        if kind == STI and left:
            left = 1
    w.count = count
    return DECODED if count else MORE_BYTES


@native
def decode_straddling(w: Writer, offset: int, following: int) -> int:
    """Decode the one instruction that begins at ``offset`` and ends in the next page.

    ``following`` is the host address of that page.
    """
    for n in range(TAIL):
        w.straddle[n] = load8(w.data + PAGE - TAIL + n)
        w.straddle[n + TAIL] = load8(following + n)
    at = address_of(w.straddle[0]) + TAIL - (PAGE - offset)
    i: Insn = cast(Insn, insn_at(w, 0))
    status = decode(w, i, at, PAGE - offset + TAIL)
    if status == DECODED:
        place_insn(w, i, offset)
    w.count = 1
    return status


@native
def peek(w: Writer, row: TraceRow, offset: int) -> int:
    """Status flags that code at ``offset`` may read before writing; the trace depends on it."""
    if offset >= PAGE:
        return STATUS
    i: Insn = cast(Insn, address_of(w.peeked[0]))
    start = offset
    live = 0
    killed = 0
    for _n in range(PEEK):
        if offset >= PAGE or decode(w, i, w.data + offset, PAGE - offset) != DECODED:
            # What is unknown may read everything; so may what the next page begins with.
            offset = offset + 15
            break
        offset += i.length
        live = live | (i.reads & ~killed)
        killed = killed | i.kills
        if killed == STATUS or ends_trace(i.kind) or i.kind == JCC or i.kind == LOOP:
            break
    row.lines = row.lines | line_mask(start, offset if offset < PAGE else PAGE)
    return live | (STATUS & ~killed)


@native_inline
def last_live(w: Writer, row: TraceRow, i: Insn) -> int:
    """Status flags live behind the last instruction."""
    if i.kind == JMP:
        return peek(w, row, i.offset + i.value)
    if not ends_trace(i.kind) and not w.slow:
        return peek(w, row, row.end)
    return STATUS


@native_inline
def live_before(w: Writer, row: TraceRow, i: Insn, live: int) -> int:
    """Status flags live before an instruction, given those behind it."""
    i.live = live
    if (i.kind == JCC or i.kind == LOOP) and live != STATUS:
        live = live | peek(w, row, i.offset + i.value)
    i.alive = (live & ~i.kills) | i.reads
    return i.alive


@native
def find_live(w: Writer, row: TraceRow) -> int:
    """Fill in the flags live behind each instruction; those live before the first."""
    live = last_live(w, row, cast(Insn, insn_at(w, w.count - 1)))
    for n in range(w.count):
        live = live_before(w, row, cast(Insn, insn_at(w, w.count - 1 - n)), live)
    return live


# --- registers -----------------------------------------------------------------------------------


@native
def count_uses(w: Writer, i: Insn) -> int:
    """Count the guest registers that an instruction's operands name; addresses count twice."""
    for k in range(4):
        number = (i.named >> (8 * k)) & 0xFF
        if number < 16:
            w.uses[number] += 1
    if i.base < 16:
        w.uses[i.base] += 1
    if i.index < 16:
        w.uses[i.index] += 1
    return i.fixed


@native
def arrangement(w: Writer) -> int:
    """Registers to be swapped in a trace: busy homeless ones for idle ones that have a home.

    A byte each, as in ``TraceRow.swaps``; 0 where it does not pay.
    """
    if w.entered or w.step:
        return 0
    for number in range(16):
        w.uses[number] = 0
    fixed = NEVER_DISPLACED
    for n in range(w.count):
        fixed = fixed | count_uses(w, cast(Insn, insn_at(w, n)))
    if w.uses[9] + w.uses[10] + w.uses[11] < WORTHWHILE:
        return 0
    swaps = 0
    for n in range(SWAPS_MAX):
        # The busiest homeless register left.
        busy = 9
        if w.uses[10] > w.uses[busy]:
            busy = 10
        if w.uses[11] > w.uses[busy]:
            busy = 11
        uses = w.uses[busy]
        if uses < WORTHWHILE:
            break
        idle = least_used(w, fixed)
        if idle == NONE or w.uses[idle] + WORTHWHILE > uses:
            break
        fixed = fixed | 1 << idle
        swaps = swaps | (busy | idle << 4) << (8 * n)
        w.uses[busy] = 0
    return swaps


@native
def least_used(w: Writer, fixed: int) -> int:
    """The register named least among those not ``fixed``, or NONE."""
    best = NONE
    fewest = 1 << 16
    for k in range(16):
        number = (k + SPECIAL) & 15
        if not fixed >> number & 1:
            uses = w.uses[number]
            if uses < fewest and (number >= SPECIAL or uses == 0):
                fewest = uses
                best = number
    return best


# --- the whole ------------------------------------------------------------------------------------


@native_inline
def end_of(i: Insn) -> int:
    """Offset behind an instruction."""
    return i.offset + i.length


@native_inline
def settle_sti(w: Writer, i: Insn) -> int:
    """STI as the last instruction of a trace: its shadow is the effect's to cast."""
    if i.kind == STI:
        to_effect(i, w.effect_sti)
    return 0


@native
def build(w: Writer, row: TraceRow, offset: int) -> int:
    """Write the decoded trace and fill in its row."""
    settle_sti(w, cast(Insn, insn_at(w, w.count - 1)))
    if w.broken:
        to_effect(cast(Insn, insn_at(w, 0)), w.effect_breakpoint)
    end = end_of(cast(Insn, insn_at(w, w.count - 1)))
    row.offset = offset
    row.end = end
    row.instructions = w.count
    row.swaps = w.swaps
    row.lines = line_mask(offset, end if end < PAGE else PAGE)
    row.next_lines = line_mask(0, end - PAGE) if end > PAGE else 0
    alive = find_live(w, row)
    row.mark = w.mark_count
    w.relocation_count = 0
    write_trace(w, row, alive)
    row.length = w.out - w.code
    row.marks = w.mark_count - row.mark
    return 0
