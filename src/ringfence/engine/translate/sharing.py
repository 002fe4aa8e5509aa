"""Writing the look-ups that groups of accesses share (see ``groups``), and what a miss leads to."""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import RSP
from ringfence.engine.translate.assembling import (
    T_DELTA,
    T_READ,
    T_STACK,
    T_STACK_PAGE,
    T_WRITE,
    aim,
    gs_call,
    gs_jump,
    gs_load,
    gs_store,
    jump_back,
    lea,
    load_address,
    move_r10,
    park,
    put,
    put_template,
    set_rip,
    swap_in,
    swap_out,
)
from ringfence.engine.translate.block import gs
from ringfence.engine.translate.copying import operand_address
from ringfence.engine.translate.emit import R9, R10
from ringfence.engine.translate.groups import group_at, insn_at
from ringfence.engine.translate.keeping import compare_kept, keep_page
from ringfence.engine.translate.operands import aim_shared, guest
from ringfence.engine.translate.tables import ABSOLUTE, NONE, Group, Insn, Template, Writer
from ringfence.engine.translate.thunks import THUNK
from ringfence.native.dialect import address_of, native, native_inline, store32

_T_MISS, _T_STACK_MISS = THUNK["miss"], THUNK["stack_miss"]
_T_LINK_CAREFUL = THUNK["link_careful"]


@native
def group_opened(w: Writer, i: Insn, n: int) -> int:
    """Whether an instruction's group was looked up before it."""
    g: Group = cast(Group, group_at(w, i.group))
    return g.opens != n


@native
def group_address(w: Writer, g: Group) -> int:
    """R9 = lowest address of a group, as seen from its first member."""
    if g.indexed:
        return operand_address(w, cast(Insn, insn_at(w, g.first)))
    if g.base == ABSOLUTE:
        return load_address(w, R9, g.low)
    return lea(w, R9, guest(w, g.base, R9), NONE, 0, g.low + g.shift, 0)


@native
def group_check(w: Writer, g: Group) -> int:
    """Look R9 up for a whole group; the position of the displacement of the jump on a miss."""
    if g.kept:
        return compare_kept(w, g.kept, g.high - g.low)
    number = T_WRITE + w.user if g.write else T_READ + w.user
    if g.base == RSP:
        number = T_STACK + w.user
    start = put_template(w, number)
    t: Template = cast(Template, w.templates + number * Template.size)
    store32(start + t.size_word, 0x1000 - (g.high - g.low))
    w.out = start + t.target_word + 4
    return w.out - 4


@native
def keep_delta(w: Writer, g: Group) -> int:
    """Behind a group's look-up: keep what it found, unless that is kept anyway.

    R10 has it then, but for the stack's.
    """
    if g.base == RSP:
        if g.opens != g.first:
            gs_load(w, R10, gs("stack_delta") + w.user * 8)
            gs_store(w, R10, g.slot)
    elif not g.kept:
        number = T_DELTA + w.user
        start = put_template(w, number)
        t: Template = cast(Template, w.templates + number * Template.size)
        store32(start + t.size_word, g.slot)
        w.held = g.slot
    return 0


@native
def open_early_groups(w: Writer, i: Insn, n: int) -> int:
    """The look-ups of groups that begin later but are done before this instruction."""
    if i.alive:
        park(w, i.alive)
    for number in range(w.group_count):
        open_early_group(w, i, cast(Group, group_at(w, number)), n)
    return 0


@native_inline
def open_early_group(w: Writer, i: Insn, g: Group, n: int) -> int:
    """One of them; where it misses, everything from here on is done carefully."""
    if g.opens == n and g.first != n:
        group_address(w, g)
        k = w.early_miss_count * 2
        w.early_misses[k] = group_check(w, g)
        w.early_misses[k + 1] = address_of(i)
        w.early_miss_count += 1
        keep_delta(w, g)
    return 0


@native
def early_stub(w: Writer, i: Insn, position: int) -> int:
    """Where a group's early look-up missed."""
    aim(w, position, w.out)
    return leave_carefully(w, i.offset)


@native
def leave_carefully(w: Writer, offset: int) -> int:
    """Go on from an instruction in its careful trace, by a jump that is linked the first time."""
    swap_out(w)
    set_rip(w, offset)
    put(w, 0xE9, 5)
    put(w, 0x158D4C, 3)  # lea r10, [rip - 11]: the displacement of the jump before
    put(w, 0 - 11, 4)
    gs_jump(w, _T_LINK_CAREFUL)
    return 0


@native
def open_look_up(w: Writer, i: Insn, g: Group) -> int:
    """The first access of a group: look all of it up."""
    group_address(w, g)
    position = group_check(w, g)
    back = w.out
    keep_delta(w, g)
    if g.indexed:
        operand_address(w, i)
    else:
        aim_shared(w, i, g.slot)
    n = w.group_miss_count * 3
    w.group_misses[n] = position
    w.group_misses[n + 1] = back
    w.group_misses[n + 2] = address_of(i)
    w.group_miss_count += 1
    return 0


@native
def group_stub(w: Writer, i: Insn, g: Group, position: int, back: int) -> int:
    """A group's look-up missed: enter the page of its first access, and try once more.

    What crosses into another page can't be helped so; and the stack's page may just be another one.
    """
    aim(w, position, w.out)
    group_address(w, g)
    put(w, 0xCA8945, 3)  # mov r10d, r9d
    put(w, 0xE28141, 3)  # and r10d, 0xfff
    put(w, 0xFFF, 4)
    put(w, 0xFA8141, 3)  # cmp r10d, imm32
    put(w, 0x1000 - (g.high - g.low), 4)
    put(w, 0x870F, 6)  # ja
    crossing = w.out - 4
    if g.base == RSP or g.kept:
        missing = change_page(w, g)
        jump_back(w, back)
        aim(w, missing, w.out)
    operand_address(w, i)
    swap_out(w)
    set_rip(w, i.offset)
    move_r10(w, i.access)
    gs_call(w, _T_STACK_MISS if g.base == RSP else _T_MISS)
    swap_in(w)
    group_address(w, g)
    jump = change_page(w, g) if g.kept else group_check(w, g)
    jump_back(w, back)
    aim(w, jump, w.out)
    aim(w, crossing, w.out)
    return leave_carefully(w, i.offset)


@native
def change_page(w: Writer, g: Group) -> int:
    """Keep the page of R9, or make it the stack's; the jump taken if it is not in the TLB."""
    if g.kept:
        return keep_page(w, g.kept, g.write, g.high - g.low)
    number = T_WRITE + w.user
    start = put_template(w, number)
    t: Template = cast(Template, w.templates + number * Template.size)
    store32(start + t.size_word, 0x1000 - (g.high - g.low))
    w.out = start + t.target_word + 4
    put_template(w, T_STACK_PAGE + w.user)
    return start + t.target_word
