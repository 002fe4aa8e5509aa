"""Writing one trace: entries, instructions with their look-ups and flags, exits, stubs.

A *trace* is a run of guest instructions inside one page, as one piece of host code. It has one
entry for each way of getting there, in this order in memory:

* *indirect*: R9 holds the guest address wanted; the trace checks that it is its own;
* *checked*: from another code page by a direct jump; the trace checks that its linear page still
  leads to the code page it was made for (one comparison with ``itlb_*``);
* *local*: from the same code page; nothing to check;
* *onward*: the same by a jump forward, which no endless loop consists of.

All but the last then look at ``attention``. At the indirect and the checked entry the status
flags are parked in the block (or dead); at the others they are in the host's flags. A trace knows
whether its own code reads the flags it enters with, so these checks cost no flag juggling almost
everywhere.

Inside, flags move between host and block on demand: a TLB comparison clobbers the host's flags, so
live ones are parked before it and brought back before an instruction that needs them.
"""

from __future__ import annotations

from typing import cast

from ringfence.engine.translate.assembling import (
    GS_COMPARE_BYTE,
    GS_MOVE_BYTE,
    T_CHECKED,
    T_INDIRECT,
    T_PARK,
    T_PARK_R10,
    T_RECOVER,
    T_RECOVER_WRITE,
    add_link,
    aim,
    copy_bytes,
    gs_byte,
    gs_call,
    gs_jump,
    gs_load,
    gs_store,
    gs_store_immediate,
    jump_back,
    load_address,
    move_r10,
    park,
    put,
    put_template,
    set_rip,
    swap_in,
    swap_out,
    unpark,
    word,
)
from ringfence.engine.translate.block import EXIT_EMULATE, gs
from ringfence.engine.translate.copying import (
    after,
    before,
    needs_after,
    operand_address,
    operation,
)
from ringfence.engine.translate.emit import PARK, R9, R10
from ringfence.engine.translate.groups import find_groups, group_at, insn_at
from ringfence.engine.translate.keeping import find_kept, keep_page, restore_r9
from ringfence.engine.translate.operands import aim_r9, aim_shared
from ringfence.engine.translate.sharing import (
    early_stub,
    group_opened,
    group_stub,
    open_early_groups,
    open_look_up,
)
from ringfence.engine.translate.tables import (
    CALL,
    EFFECT,
    HOST,
    INDIRECT,
    JCC,
    JMP,
    LOOP,
    NONE,
    ONWARD,
    PAGE,
    PARKED,
    PLAIN,
    RELOC_ITLB,
    RELOC_PAGE,
    STI,
    WITHIN,
    Escape,
    Group,
    Insn,
    Link,
    Miss,
    RawRecipe,
    TraceRow,
    Writer,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.native.dialect import (
    address_of,
    native,
    native_inline,
    store8,
    store32,
)

EFFECT_EMULATE = 0xFFFF
"""Number that stands for leaving the instruction to the VMM."""
_PARK_BYTES = len(PARK)
_RIP, _ATTENTION = gs("rip"), gs("attention")
_T_EFFECT, _T_EFFECT_VECTOR = THUNK["effect"], THUNK["effect_vector"]
_T_EMULATE, _T_LOOKUP, _T_MISS = THUNK["emulate"], THUNK["lookup"], THUNK["miss"]
_T_ATTENTION, _T_INDIRECT_MISS = THUNK["attention"], THUNK["indirect_miss"]
_T_STRADDLE, _T_LINK_PAGE, _T_LINK_LOCAL, _T_LINK_ONWARD = (
    THUNK["straddle"], THUNK["link_page"], THUNK["link_local"], THUNK["link_onward"],
)  # fmt: skip


@native_inline
def ends_trace(kind: int) -> int:
    """Whether an instruction of this kind ends a trace."""
    return kind in (JMP, CALL, INDIRECT, EFFECT)


@native
def mark(w: Writer, position: int, parked: int, offset: int) -> int:
    """Note where an instruction's code starts, for whoever looks up a host address."""
    store32(w.marks + w.mark_count * 4, (position - w.code) << 16 | parked << 15 | offset)
    w.mark_count += 1
    return 0


@native
def write_trace(w: Writer, row: TraceRow, alive: int) -> int:
    """Write the whole trace at ``w.out``; ``alive`` are the flags live at its start."""
    first: Insn = cast(Insn, insn_at(w, 0))
    start = first.offset
    w.code = w.out
    w.miss_count = 0
    w.link_count = 0
    w.escape_count = 0
    w.group_miss_count = 0
    w.early_miss_count = 0
    w.back_edge_count = 0
    w.live_head = 1
    w.held = 0
    w.state = HOST
    row.checked = 0
    row.local = 0
    row.onward = 0
    w.enables = 0
    if w.entered:
        w.state = PARKED
        if w.slow:
            set_rip(w, start)
        for n in range(w.count):
            forget_group(cast(Insn, insn_at(w, n)))
    else:
        w.live_head = 1 if alive else 0
        write_head(w, row, start)
        find_groups(w)
        find_kept(w)
        swap_in(w)
        w.held = 0
        w.inside = w.out
    for n in range(w.count):
        write_instruction(w, cast(Insn, insn_at(w, n)), n)
    last: Insn = cast(Insn, insn_at(w, w.count - 1))
    if not ends_trace(last.kind):
        write_jump(w, last.offset + last.length, last.live, WITHIN)
    write_stubs(w, row, start)
    return 0


@native_inline
def forget_group(i: Insn) -> int:
    """Every access looks itself up, in the TLB."""
    i.group = NONE
    i.opens = 0
    i.kept = 0
    return 0


@native
def write_instruction(w: Writer, i: Insn, n: int) -> int:
    """One guest instruction: what goes before it, itself, and what follows from it."""
    kind = i.kind
    mark(w, w.out, 1, i.offset)
    aim_r9(w)
    if i.opens:
        open_early_groups(w, i, n)
    if i.group != NONE and group_opened(w, i, n):
        g: Group = cast(Group, group_at(w, i.group))
        if g.indexed:
            operand_address(w, i)
            gs_load(w, R10, g.slot)
        else:
            aim_shared(w, i, g.slot)
    else:
        if i.clobbers and i.alive:
            park(w, i.alive)
        if i.group != NONE:
            open_look_up(w, i, cast(Group, group_at(w, i.group)))
        else:
            before(w, i)
    if kind == PLAIN:
        write_plain(w, i)
    elif kind == JCC:
        unpark(w, i.alive)
        write_conditional(w, i)
    elif kind in (JMP, CALL):
        operation(w, i)
        write_jump(w, i.offset + i.value, i.live, ahead(w, i))
    elif kind == INDIRECT:
        operation(w, i)
        leave_indirect(w)
    elif kind == EFFECT:
        write_effect(w, i)
    elif kind == STI:
        write_sti(w, i.live)
    elif kind == LOOP:
        if i.reads:
            unpark(w, i.alive)
        write_counted(w, i)
    return 0


@native
def write_plain(w: Writer, i: Insn) -> int:
    """An ordinary instruction's own part."""
    if w.state == PARKED:
        if i.reads or (i.writes and i.live & ~i.kills):
            unpark(w, i.alive)
        elif i.writes:
            w.state = HOST
    mark(w, w.out, w.state, i.offset)
    operation(w, i)
    if needs_after(w, i):
        if i.live:
            park(w, i.live)
        after(w, i)
    return 0


# --- entries --------------------------------------------------------------------------------------


@native
def write_head(w: Writer, row: TraceRow, start: int) -> int:
    """The three entries; see the module's text."""
    if w.wide:
        load_address(w, R10, start)
        put(w, 0xD1394D, 3)  # cmp r9, r10
    else:
        put(w, 0xF98149, 7)  # cmp r9, simm32
        word(w, w.out - 4, 0, start)
    put(w, 0x850F, 6)
    w.wrong_address = w.out - 4
    row.checked = w.out - w.code
    w.page_checks[0] = page_check(w, 0, 0)
    if w.second:
        w.page_checks[1] = page_check(w, PAGE, w.second)
    if w.live_head:
        put(w, 0xEB | _PARK_BYTES << 8, 2)
    row.local = w.out - w.code
    if w.live_head:
        put_template(w, T_PARK)
        w.state = PARKED
    gs_byte(w, GS_COMPARE_BYTE, _ATTENTION, 0)
    put(w, 0x850F, 6)
    w.attention = w.out - 4
    w.body = w.out
    row.onward = row.local if w.live_head else w.out - w.code
    if w.step:
        gs_byte(w, GS_MOVE_BYTE, gs("stepped"), 1)
    return 0


@native
def page_check(w: Writer, distance: int, number: int) -> int:
    """Compare a linear page's identity; position of the jump taken when it differs."""
    put(w, 0x253C8165, 4)  # cmp dword gs:[disp], imm32
    word(w, w.out, RELOC_ITLB, distance)
    if distance:
        # The following page's number is not this page's: such traces are never stored.
        store32(w.out + 4, number)
    else:
        word(w, w.out + 4, RELOC_PAGE, 0)
    w.out += 8
    put(w, 0x850F, 6)
    return w.out - 4


# --- exits ----------------------------------------------------------------------------------------


@native
def write_effect(w: Writer, i: Insn) -> int:
    """Leave the trace for the effect library."""
    swap_out(w)
    set_rip(w, i.offset)
    if i.effect == EFFECT_EMULATE:
        gs_store_immediate(w, gs("exit_reason"), EXIT_EMULATE)
        gs_jump(w, _T_EMULATE)
        return 0
    move_r10(w, i.effect | i.length << 16)
    vector = i.effect == w.effect_vector_low or i.effect == w.effect_vector_high
    gs_jump(w, _T_EFFECT_VECTOR if vector else _T_EFFECT)
    return 0


@native
def write_sti(w: Writer, live: int) -> int:
    """Set IF; the trace ends behind the next instruction, where interrupts are seen."""
    w.enables = 1
    gs_byte(w, GS_MOVE_BYTE, gs("flag_if"), 1)
    if not live or w.state == PARKED:
        gs_byte(w, GS_COMPARE_BYTE, gs("irq_request"), 0)
        put(w, 0x0974, 2)  # je behind the next instruction
    gs_byte(w, GS_MOVE_BYTE, _ATTENTION, 1)
    return 0


@native
def write_jump(w: Writer, target: int, live: int, near: int) -> int:
    """End of the trace: go on at a known address; ``near``: how, if it is in the same page."""
    if w.slow:
        if live:
            park(w, live)
        load_address(w, R9, target)
        return go_to_r9(w, T_CHECKED)
    if loops(w, target):
        return pass_again(w)
    swap_out(w)
    within = near if target < PAGE and w.state != PARKED else 0
    if not within and live:
        park(w, live)
    put(w, 0xE9, 5)
    add_link(w, target, within, 0, 0)
    return 0


@native
def leave_indirect(w: Writer) -> int:
    """End of the trace: go on at the guest address in R9."""
    if w.state == HOST:
        put_template(w, T_PARK_R10)
        w.state = PARKED
    swap_out(w)
    if w.step and not w.slow:
        gs_jump(w, _T_INDIRECT_MISS)
    else:
        go_to_r9(w, T_CHECKED if w.slow else T_INDIRECT)
    return 0


@native
def go_to_r9(w: Writer, template: int) -> int:
    """Go on at the guest address in R9: by the jump table, if it holds for this mode."""
    if w.based:
        gs_store(w, R9, _RIP)
        return gs_jump(w, _T_LOOKUP)
    return put_template(w, template + w.user)


@native_inline
def ahead(w: Writer, i: Insn) -> int:
    """How a direct jump within the page goes: ONWARD if forward, and nothing is to be looked at."""
    return ONWARD if i.offset < i.offset + i.value and not w.enables else WITHIN


@native_inline
def loops(w: Writer, target: int) -> int:
    """Whether a jump leads to the trace's own start with its registers arranged already."""
    first: Insn = cast(Insn, insn_at(w, 0))
    return w.swaps and target == first.offset and not w.live_head


@native
def write_conditional(w: Writer, i: Insn) -> int:
    """A conditional jump out of the trace; not taken goes on inside."""
    target = i.offset + i.value
    if loops(w, target):
        put(w, 0x70 | (i.opcode & 15) ^ 1, 2)
        over = w.out
        pass_again(w)
        store8(over - 1, w.out - over)
        return 0
    put(w, 0x800F | (i.opcode & 15) << 8, 6)
    within = ahead(w, i) if target < PAGE and not w.slow else 0
    add_link(w, target, within, not within, 1)
    return 0


@native
def write_counted(w: Writer, i: Insn) -> int:
    """JRCXZ and LOOP have 8-bit displacements only: they jump over a jump."""
    target = i.offset + i.value
    within = target < PAGE and w.state == HOST and not w.slow
    operation(w, i)
    put(w, 0x00EB02, 3)  # to behind the jump that is taken when the loop is not
    over = w.out
    swap_out(w)
    if not within and w.state != PARKED:
        put_template(w, T_PARK)
    put(w, 0xE9, 5)
    store8(over - 1, w.out - over)
    add_link(w, target, within, 0, 0)
    return 0


# --- what is rarely executed ----------------------------------------------------------------------


@native
def loop_stub(w: Writer, start: int) -> int:
    """Where the trace's jumps to its own start go when attention is wanted."""
    for n in range(w.back_edge_count):
        aim(w, w.back_edges[n], w.out)
    swap_out(w)
    set_rip(w, start)
    gs_call(w, _T_ATTENTION)
    swap_in(w)
    jump_back(w, w.inside)
    return 0


@native
def pass_again(w: Writer) -> int:
    """Go on inside the trace, at its start, or in a stub if attention is wanted."""
    gs_byte(w, GS_COMPARE_BYTE, _ATTENTION, 0)
    put(w, 0x840F, 6)
    aim(w, w.out - 4, w.inside)
    put(w, 0xE9, 5)
    w.back_edges[w.back_edge_count] = w.out - 4
    w.back_edge_count += 1
    return 0


@native_inline
def miss_stub(w: Writer, miss: Miss) -> int:
    """A missed look-up of one access: fill the TLB and try again, or do it by hand."""
    aim(w, miss.position, w.out)
    if miss.kept:
        restore_r9(w, miss.kept)
        missing = keep_page(w, miss.kept, miss.write, miss.kind & 0xFFF)
        jump_back(w, miss.retry)
        aim(w, missing, w.out)
    put_template(w, (T_RECOVER_WRITE if miss.write else T_RECOVER) + w.user)
    swap_out(w)
    set_rip(w, miss.offset)
    move_r10(w, miss.kind)
    gs_call(w, _T_MISS)
    swap_in(w)
    jump_back(w, miss.retry)
    return 0


@native_inline
def link_stub(w: Writer, link: Link) -> int:
    """A direct jump that was not linked yet."""
    aim(w, link.position, w.out)
    site = link.position
    if link.park or (link.conditional and w.swaps):
        swap_out(w)
        if link.park:
            put_template(w, T_PARK)
        put(w, 0xE9, 5)
        site = w.out - 4
        aim(w, site, w.out)
    if w.slow:
        load_address(w, R9, link.target)
        return go_to_r9(w, T_INDIRECT)
    if w.step:
        set_rip(w, link.target)
        if link.within:
            put_template(w, T_PARK)
        gs_jump(w, _T_LOOKUP)
        return 0
    set_rip(w, link.target)
    put(w, 0x158D4C, 3)  # lea r10, [rip + site]
    put(w, site - w.out - 4, 4)
    thunk = _T_LINK_PAGE
    if link.within:
        thunk = _T_LINK_ONWARD if link.within == ONWARD else _T_LINK_LOCAL
    gs_jump(w, thunk)
    return 0


@native
def escape_stub(w: Writer, i: Insn) -> int:
    """Leave a whole instruction to its effect."""
    recipe: RawRecipe = cast(RawRecipe, i.recipe)
    copy_bytes(w, i.recipe + recipe.operands, recipe.operands_length)
    write_effect(w, i)
    return 0


@native
def escape_stubs(w: Writer) -> int:
    """One stub for all the escapes of an instruction."""
    last = 0
    stub = 0
    for n in range(w.escape_count):
        escape: Escape = cast(Escape, address_of(w.escapes[0]) + n * Escape.size)
        if escape.insn != last:
            last = escape.insn
            stub = w.out
            escape_stub(w, cast(Insn, last))
        aim(w, escape.position, stub)
    return 0


@native
def write_stubs(w: Writer, row: TraceRow, start: int) -> int:
    """All that is reached by jumps out of the trace's straight line."""
    for n in range(w.miss_count):
        miss_stub(w, cast(Miss, address_of(w.misses[0]) + n * Miss.size))
    for n in range(w.group_miss_count):
        i: Insn = cast(Insn, w.group_misses[n * 3 + 2])
        g: Group = cast(Group, group_at(w, i.group))
        group_stub(w, i, g, w.group_misses[n * 3], w.group_misses[n * 3 + 1])
    for n in range(w.early_miss_count):
        early_stub(w, cast(Insn, w.early_misses[n * 2 + 1]), w.early_misses[n * 2])
    escape_stubs(w)
    for n in range(w.link_count):
        link_stub(w, cast(Link, address_of(w.links[0]) + n * Link.size))
    if w.back_edge_count:
        loop_stub(w, start)
    row.reenter = 0
    row.reenter_local = 0
    if not w.entered:
        write_tail(w, row, start)
    return 0


@native
def write_tail(w: Writer, row: TraceRow, start: int) -> int:
    """What the entries' checks jump to when they fail."""
    row.reenter_local = w.out - w.code
    put_template(w, T_PARK)
    reenter = w.out
    row.reenter = reenter - w.code
    set_rip(w, start)
    if w.second:
        # Both pages are looked up.
        move_r10(w, w.second)
        gs_jump(w, _T_STRADDLE)
    else:
        gs_jump(w, _T_LOOKUP)
    aim(w, w.page_checks[0], reenter)
    if w.second:
        aim(w, w.page_checks[1], reenter)
    aim(w, w.wrong_address, w.out)
    gs_jump(w, _T_INDIRECT_MISS)
    aim(w, w.attention, w.out)
    set_rip(w, start)
    gs_call(w, _T_ATTENTION)
    jump_back(w, w.body)
    return 0
