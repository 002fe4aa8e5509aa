"""Look-ups in loops: pages that are kept, so that the next pass finds them without an index.

A trace that jumps to its own start accesses, pass after pass, mostly the same pages. Where the
registers of an operand's address stay or move by constants, its look-up compares with a *kept page*
(``Mmu.kept_tag``): one comparison, and neither index nor entry to be computed. Where that misses,
the page is looked up in the TLB and kept. Accesses of a trace that may be in different pages have
kept pages of their own; traces share them, by chance.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import RSP
from ringfence.engine.translate.assembling import (
    T_READ,
    T_RECOVER,
    T_RECOVER_WRITE,
    T_WRITE,
    gs_load,
    gs_store,
    load_entry,
    put,
    put_template,
)
from ringfence.engine.translate.block import SLOW_WRITE, gs
from ringfence.engine.translate.emit import R9, R10
from ringfence.engine.translate.groups import group_at, insn_at
from ringfence.engine.translate.tables import (
    ABSOLUTE,
    F_COPY,
    JCC,
    JMP,
    NONE,
    Group,
    Insn,
    Template,
    Writer,
)
from ringfence.memory.mmu import (
    HOST_DELTA,
    HOST_PAGE,
    KEPT_PAGES,
    READ_TAG,
    USER_ENTRY,
)
from ringfence.native.dialect import native, native_inline, store32

_KEEP = gs("scratch", 0)
"""Where an address waits while its page is kept."""


# --- which accesses ------------------------------------------------------------------------------


@native_inline
def leads_to(i: Insn, start: int) -> int:
    """Whether an instruction jumps to an offset in the page."""
    return i.kind in (JCC, JMP) and i.offset + i.value == start


@native_inline
def strays(i: Insn) -> int:
    """Mask of the registers that an instruction changes otherwise than by a constant."""
    steady = 0 if i.stepped == NONE else 1 << i.stepped
    return i.written & ~steady


@native_inline
def stays(number: int, straying: int) -> int:
    """Whether a register of an address, if it is one, stays near from pass to pass."""
    if number in (NONE, ABSOLUTE):
        return 1
    return not straying >> number & 1


@native
def find_kept(w: Writer) -> int:
    """Choose the look-ups that use kept pages, in a trace whose groups are known."""
    looping = 0
    straying = 0
    strayed = 0
    start = offset_of(cast(Insn, insn_at(w, 0)))
    for n in range(w.count):
        i: Insn = cast(Insn, insn_at(w, n))
        i.kept = 0
        strayed = strayed | strays(i)
        if leads_to(i, start):
            looping = n + 1
            straying = strayed
    if w.slow or w.step or not w.long:
        return 0
    w.kept_count = 0
    for number in range(w.group_count):
        keep_group(w, cast(Group, group_at(w, number)), looping, straying)
    for n in range(looping):
        keep_access(w, cast(Insn, insn_at(w, n)), straying)
    return 0


@native_inline
def offset_of(i: Insn) -> int:
    """Where an instruction is in its page."""
    return i.offset


@native
def take_kept(w: Writer, write: int) -> int:
    """Number of a kept page for a look-up of the trace, plus 1; 0: there are no more."""
    if w.kept_count == KEPT_PAGES:
        return 0
    first: Insn = cast(Insn, insn_at(w, 0))
    number = (first.offset + w.kept_count) & (KEPT_PAGES - 1)
    w.kept_count += 1
    return (w.user * 2 + write) * KEPT_PAGES + number + 1


@native
def keep_group(w: Writer, g: Group, looping: int, straying: int) -> int:
    """A group whose look-up stands where its first access is."""
    first: Insn = cast(Insn, insn_at(w, g.first))
    if (
        g.first >= looping
        or first.group == NONE
        or g.base == RSP
        or g.indexed
        or g.opens != g.first
    ):
        return 0
    if stays(g.base, straying):
        g.kept = take_kept(w, g.write)
    if g.kept:
        g.slot = gs("kept_delta") + (g.kept - 1) * 8
    return 0


@native
def keep_access(w: Writer, i: Insn, straying: int) -> int:
    """An access without a group."""
    alone = i.group == NONE and i.form_kind == F_COPY and i.clobbers
    if alone and stays(i.base, straying) and stays(i.index, straying):
        i.kept = take_kept(w, 1 if i.access & SLOW_WRITE else 0)
    return 0


# --- their code ----------------------------------------------------------------------------------


@native
def compare_kept(w: Writer, kept: int, size: int) -> int:
    """R9 = offset of address R9 in a kept page; where the displacement of the jump is if it is in
    another, or the access leaves the page."""
    put(w, 0x250C334C65, 5)  # xor r9, gs:[kept_tag]
    put(w, gs("kept_tag") + (kept - 1) * 8, 4)
    put(w, 0xF98149, 3)  # cmp r9, 0x1000 - size
    put(w, 0x1000 - size, 4)
    put(w, 0x870F, 6)  # ja
    return w.out - 4


@native
def look_up_kept(w: Writer, i: Insn) -> int:
    """R9 = linear address; then R9 + R10 is where to access; the jump as `compare_kept` says."""
    position = compare_kept(w, i.kept, i.access & 0xFFF)
    gs_load(w, R10, gs("kept_host") + (i.kept - 1) * 8)
    return position


@native
def restore_r9(w: Writer, kept: int) -> int:
    """Where `compare_kept` missed: R9 is the address again."""
    put(w, 0x250C334C65, 5)  # xor r9, gs:[kept_tag]
    return put(w, gs("kept_tag") + (kept - 1) * 8, 4)


@native
def keep_page(w: Writer, kept: int, write: int, size: int) -> int:
    """Look R9 up in the TLB and keep the page; the position of the jump on a miss there.

    R9 survives a hit. After a miss it is to be recovered, as after any look-up.
    """
    number = T_WRITE + w.user if write else T_READ + w.user
    start = put_template(w, number)
    t: Template = cast(Template, w.templates + number * Template.size)
    store32(start + t.size_word, 0x1000 - size)
    w.out = start + t.target_word + 4
    missing = w.out - 4
    user = w.user * USER_ENTRY
    put_template(w, (T_RECOVER_WRITE if write else T_RECOVER) + w.user)
    gs_store(w, R9, _KEEP)
    load_entry(w, R9, READ_TAG + user)
    gs_store(w, R9, gs("kept_tag") + (kept - 1) * 8)
    load_entry(w, R9, HOST_PAGE + user)
    gs_store(w, R9, gs("kept_host") + (kept - 1) * 8)
    load_entry(w, R10, HOST_DELTA + user)
    gs_store(w, R10, gs("kept_delta") + (kept - 1) * 8)
    gs_load(w, R9, _KEEP)
    return missing
