"""From one guest instruction to the host code that carries it out: copied, with what must change.

Nearly every instruction is *copied*. What changes: memory operands (effective address into R9,
look-up, then the access; see `operands`) and registers that have no host register of their own
where the trace runs (guest RSP is in R11; the homeless ones are in the block; see `substituting`).
Each instruction is written in two parts, as a recipe has them (`recipe`): what goes *before* may
clobber the host's flags, the *operation* must not, apart from what the instruction itself does.

Sensitive and odd instructions have recipes that Python wrote; their code is placed here.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import FS, RBP, RSP, SS
from ringfence.engine.translate.assembling import (
    GS_MOVE_BYTE,
    T_READ,
    T_WRITE,
    add_miss,
    copy_bytes,
    gs_byte,
    gs_call,
    gs_load,
    gs_store,
    lea,
    load_address,
    move,
    move_imm64,
    move_r10,
    move_simm32,
    put,
    put_template,
    set_rip,
    word,
)
from ringfence.engine.translate.block import SLOW_MASKED, SLOW_STACK, SLOW_WRITE, gs
from ringfence.engine.translate.describing import segment_of
from ringfence.engine.translate.emit import R9, R10, R11
from ringfence.engine.translate.keeping import look_up_kept
from ringfence.engine.translate.operands import (
    combine,
    guest,
    load_r9,
    put_access,
    set_guest,
    slot_of,
)
from ringfence.engine.translate.substituting import copy_instruction
from ringfence.engine.translate.tables import (
    ABSOLUTE,
    EFFECTIVE,
    F_CALL,
    F_CALL_MEMORY,
    F_CALL_REGISTER,
    F_CLI,
    F_COPY,
    F_DIRECTION,
    F_INVALID,
    F_JMP_MEMORY,
    F_JMP_REGISTER,
    F_LEA,
    F_LEAVE,
    F_POP,
    F_PUSH,
    F_PUSH_IMMEDIATE,
    F_PUSH_MEMORY,
    F_RAW,
    F_RET,
    FIX_ESCAPE,
    FIX_MISS,
    LINEAR,
    NONE,
    RELOC_VA32,
    Escape,
    Fix,
    Form,
    Insn,
    RawRecipe,
    Template,
    Writer,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.native.dialect import (
    address_of,
    native,
    native_inline,
    sext,
    store32,
)

_FS_OVERRIDE = FS + 1
_KEEP = gs("scratch", 2)
"""Where a value waits while a second memory operand is prepared."""
_SLOW, _COMMIT, _SEGMENT = THUNK["slow"], THUNK["commit"], THUNK["segment"]
_TRUNCATE = 0xC98945
"""``mov r9d, r9d``"""
_TRUNCATE_16 = 0xC9B70F45
"""``movzx r9d, r9w``"""
_STORE_R10 = 0x11894D
"""``mov [r9], r10``"""
_STORE_R10W = 0x11894566
"""``mov [r9], r10w``"""


# --- memory operands -----------------------------------------------------------------------------


@native
def effective_address(w: Writer, i: Insn) -> int:
    """R9 = effective address of the memory operand, without a segment; the flags survive."""
    narrow = i.address < 8
    if i.address == 2:
        return narrow_address(w, i)
    if i.base == ABSOLUTE:
        load_address(w, R9, i.offset + i.value)
        if narrow:
            put(w, _TRUNCATE, 3)
        return 0
    disp = i.displacement
    base = NONE
    index = NONE
    if i.base != NONE:
        base = guest(w, i.base, R9)
    if i.index != NONE:
        index = guest(w, i.index, R10)
    if base == NONE and index == NONE:
        if narrow:
            disp = disp & 0xFFFFFFFF
        if sext(disp, 32) == disp:
            move_simm32(w, R9, disp)
        else:
            move_imm64(w, R9, disp)
    elif index == NONE and disp == 0:
        if narrow:
            # mov r9d, base
            put(w, 0x8941 | (base >> 3) << 2 | (0xC1 | (base & 7) << 3) << 16, 3)
        elif base != R9:
            move(w, R9, base)
    else:
        lea(w, R9, base, index, i.scale, disp, narrow)
    return 0


@native
def narrow_address(w: Writer, i: Insn) -> int:
    """The same for a 16-bit address."""
    if i.base == NONE:
        return move_simm32(w, R9, i.displacement & 0xFFFF)
    lea(w, R9, i.base, i.index, 0, i.displacement, 1)
    return put(w, _TRUNCATE_16, 4)


@native
def stack_address(w: Writer, distance: int, size: int, write: int) -> int:
    """R9 = linear address of a place on the stack, counted from RSP."""
    if w.stack == 8:
        return lea(w, R9, R11, NONE, 0, distance, 0)
    lea(w, R9, R11, NONE, 0, distance, 1)
    if w.stack == 2:
        put(w, _TRUNCATE_16, 4)
    if not w.flat:
        through_segment(w, SS, size, write)
    return 0


@native
def through_segment(w: Writer, number: int, size: int, write: int) -> int:
    """R9 = linear address of offset R9 in a segment, checked; RIP is set. Clobbers the flags."""
    move_r10(w, size | (number | write << 3) << 16)
    gs_call(w, _SEGMENT)
    return 0


@native
def operand_address(w: Writer, i: Insn) -> int:
    """R9 = linear address of the operand whose look-up `before` does.

    The flags survive in 64-bit mode, where shared look-ups count on it.
    """
    kind = i.form_kind
    write = 1 if i.access & SLOW_WRITE else 0
    size = i.access & 0xFFF
    if not w.long:
        if kind in (F_PUSH, F_PUSH_IMMEDIATE, F_CALL):
            return stack_address(w, 0 - size, size, 1)
        if kind in (F_POP, F_RET):
            return stack_address(w, 0, size, 0)
        if kind == F_LEAVE:
            # With a 32-bit stack only; the other is an effect.
            lea(w, R9, RBP, NONE, 0, 0, 1)
            return 0 if w.flat else through_segment(w, SS, size, 0)
        effective_address(w, i)
        number = segment_of(i)
        if not w.flat or number >= FS:
            through_segment(w, number, size if size else 1, write)
    elif kind in (F_PUSH, F_PUSH_IMMEDIATE, F_CALL):
        lea(w, R9, R11, NONE, 0, i.shared_displacement, 0)
    elif kind in (F_POP, F_RET):
        move(w, R9, R11)
    elif kind == F_LEAVE:
        move(w, R9, RBP)
    else:
        effective_address(w, i)
        if i.segment >= _FS_OVERRIDE:
            gs_load(w, R10, gs("seg_base") + (i.segment - 1) * 8)
            lea(w, R9, R9, R10, 0, 0, 0)
    return 0


@native
def look_up(w: Writer, i: Insn, kind: int) -> int:
    """R9 = linear address; then R9 + R10 is where to access as ``kind`` says."""
    if w.slow:
        if kind & SLOW_MASKED:
            tell_mask(w, i, cast(Form, i.form))
        move_r10(w, kind)
        gs_call(w, _SLOW)
        move_r10(w, 0)
        return 0
    write = 1 if kind & SLOW_WRITE else 0
    if i.kept:
        retry = w.out
        add_miss(w, look_up_kept(w, i), retry, write, kind, i.offset, i.kept)
        return 0
    number = (T_WRITE if write else T_READ) + w.user
    start = put_template(w, number)
    t: Template = cast(Template, w.templates + number * Template.size)
    store32(start + t.size_word, 0x1000 - (kind & 0xFFF))
    add_miss(w, start + t.target_word, start, write, kind, i.offset, 0)
    return 0


@native_inline
def tell_mask(w: Writer, i: Insn, f: Form) -> int:
    """Before a slow access: the opmask register, and how it tells elements apart."""
    put(w, 0x91F8E1C465, 5)  # kmovq gs:[…], k
    put(w, 0x2504 | (i.evex_high & 7) << 3, 2)
    put(w, gs("slow_mask"), 4)
    put(w, 0x2504C765, 4)  # mov dword ptr gs:[…], …
    put(w, gs("slow_masking"), 4)
    put(w, f.masking | f.element << 8 | f.elements << 16, 4)
    return 0


@native_inline
def commit(w: Writer) -> int:
    """After a write in a slow trace."""
    if w.slow:
        gs_call(w, _COMMIT)
    return 0


@native
def push_look_up(w: Writer, i: Insn, size: int) -> int:
    """R9 + R10 = where a push goes."""
    stack_address(w, 0 - size, size, 1)
    look_up(w, i, size | SLOW_WRITE | SLOW_STACK)
    return 0


@native
def before(w: Writer, i: Insn) -> int:
    """What goes before the operation and may clobber the flags."""
    kind = i.form_kind
    if not w.long and i.clobbers:
        set_rip(w, i.offset)  # for the checks of segments
    if kind == F_RAW:
        recipe: RawRecipe = cast(RawRecipe, i.recipe)
        place_piece(w, i, recipe.lead, recipe.lead_length, recipe.lead_fixes)
        if recipe.addressing == LINEAR:
            operand_address(w, i)
        elif recipe.addressing == EFFECTIVE:
            effective_address(w, i)
        place_piece(w, i, recipe.before, recipe.before_length, recipe.before_fixes)
        return 0
    if not i.clobbers or kind == F_INVALID:
        return 0
    if kind == F_CALL_REGISTER:
        load_target(w, i)
        return push_return_address(w, i)
    form: Form = cast(Form, i.form)
    size = form.operand_size
    operand_address(w, i)
    look_up(w, i, i.access)
    if kind == F_JMP_MEMORY:
        load_r9(w, size)
    elif kind == F_CALL_MEMORY:
        load_r9(w, size)
        push_return_address(w, i)
    elif kind == F_PUSH_MEMORY:
        load_r9(w, size)
        gs_store(w, R9, _KEEP)
        push_look_up(w, i, size)
    return 0


@native
def load_target(w: Writer, i: Insn) -> int:
    """R9 = the guest register that a call or jump goes to."""
    form: Form = cast(Form, i.form)
    host = guest(w, i.rm, R9)
    if form.operand_size == 2:
        # movzx r9d, host16
        return put(w, 0xB70F44 | host >> 3 | (0xC8 | host & 7) << 24, 4)
    if host != R9:
        move(w, R9, host)
    return 0


@native
def push_return_address(w: Writer, i: Insn) -> int:
    """Keep R9, a call's target, and push the return address."""
    form: Form = cast(Form, i.form)
    gs_store(w, R9, _KEEP)
    push_look_up(w, i, form.operand_size)
    return store_return_address(w, i, form.operand_size)


@native
def store_return_address(w: Writer, i: Insn, size: int) -> int:
    """Push the return address."""
    if size == 8 and not w.wide:
        put_access(w, 0xC7, 8, 0)
        word(w, w.out, RELOC_VA32, i.offset + i.length)
        put(w, 0, 4)
    else:
        combine(w)
        load_address(w, R10, i.offset + i.length)
        store_r10(w, size)
    commit(w)
    move_stack(w, 0 - size)
    return 0


@native
def move_stack(w: Writer, distance: int) -> int:
    """RSP += distance; the flags survive, R10 does not."""
    if w.stack == 2:
        lea(w, R10, R11, NONE, 0, distance, 1)
        put(w, 0xD3894566, 4)  # mov r11w, r10w
    else:
        lea(w, R11, R11, NONE, 0, distance, w.stack == 4)
    return 0


# --- operations -----------------------------------------------------------------------------------


@native
def operation(w: Writer, i: Insn) -> int:
    """The instruction itself, its operand where `operands` was told that it is."""
    kind = i.form_kind
    f: Form = cast(Form, i.form)
    if kind == F_COPY:
        copy_instruction(w, i, f)
    elif kind == F_RAW:
        recipe: RawRecipe = cast(RawRecipe, i.recipe)
        place_piece(w, i, recipe.op, recipe.op_length, recipe.op_fixes)
    elif kind == F_LEA:
        load_effective(w, i, f)
    elif kind == F_PUSH:
        push_register(w, i, f.operand_size)
    elif kind == F_PUSH_IMMEDIATE:
        put_access(w, 0xC7, f.operand_size, 0)
        put(w, i.immediate, 2 if f.operand_size == 2 else 4)
        commit(w)
        move_stack(w, 0 - f.operand_size)
    elif kind == F_PUSH_MEMORY:
        combine(w)
        gs_load(w, R10, _KEEP)
        store_r10(w, f.operand_size)
        commit(w)
        move_stack(w, 0 - f.operand_size)
    elif kind == F_POP:
        pop_register(w, i, f.operand_size)
    elif kind == F_LEAVE:
        load_r9(w, f.operand_size)
        lea(w, R11, RBP, NONE, 0, f.operand_size, f.operand_size == 4)
        move(w, RBP, R9)
    elif kind == F_RET:
        load_r9(w, f.operand_size)
        move_stack(w, f.operand_size + (i.immediate & 0xFFFF))
    elif kind == F_CALL:
        store_return_address(w, i, f.operand_size)
    elif kind == F_JMP_REGISTER:
        load_target(w, i)
    elif kind in (F_CALL_REGISTER, F_CALL_MEMORY):
        gs_load(w, R9, _KEEP)
    elif kind == F_CLI:
        gs_byte(w, GS_MOVE_BYTE, gs("flag_if"), 0)
    elif kind == F_DIRECTION:
        gs_byte(w, GS_MOVE_BYTE, gs("flag_df"), i.opcode & 1)
    return 0


@native
def after(w: Writer, i: Insn) -> int:
    """What goes behind the operation; it may clobber the flags, so only where they are safe."""
    if i.form_kind == F_RAW:
        recipe: RawRecipe = cast(RawRecipe, i.recipe)
        place_piece(w, i, recipe.after, recipe.after_length, recipe.after_fixes)
    elif needs_after(w, i):
        gs_call(w, _COMMIT)
    return 0


@native_inline
def needs_after(w: Writer, i: Insn) -> int:
    """Whether `after` writes anything."""
    if i.form_kind == F_RAW:
        recipe: RawRecipe = cast(RawRecipe, i.recipe)
        return recipe.after_length
    if i.form_kind == F_COPY and w.slow and i.clobbers and i.access & SLOW_WRITE:
        return 1
    return 0


@native
def store_r10(w: Writer, size: int) -> int:
    """``mov [r9], r10`` of 2, 4 or 8 bytes."""
    if size == 8:
        put(w, _STORE_R10, 3)
    elif size == 4:
        put(w, 0x118945, 3)
    else:
        put(w, _STORE_R10W, 4)
    return 0


@native
def push_register(w: Writer, i: Insn, size: int) -> int:
    """PUSH of a general register."""
    host = w.home[i.rm]
    if host == NONE:
        combine(w)
        gs_load(w, R10, slot_of(i.rm))
        store_r10(w, size)
    else:
        put_access(w, 0x89, size, host)
    commit(w)
    move_stack(w, 0 - size)
    return 0


@native
def pop_register(w: Writer, i: Insn, size: int) -> int:
    """POP of a general register."""
    number = i.rm
    host = w.home[number]
    if host == NONE:
        load_r9(w, size)
        if size == 2:
            gs_load(w, R10, slot_of(number))
            put(w, 0xCA894566, 4)  # mov r10w, r9w
            gs_store(w, R10, slot_of(number))
        else:
            gs_store(w, R9, slot_of(number))
    elif size == 2 and number == RSP:
        load_r9(w, 2)
        move_stack(w, 2)
        put(w, 0xCB894566, 4)  # mov r11w, r9w
        return 0
    else:
        put_access(w, 0x8B, size, host)
        if number == RSP:
            return 0
    move_stack(w, size)
    return 0


@native
def load_effective(w: Writer, i: Insn, f: Form) -> int:
    """LEA, straight into its host register where all its registers have one."""
    size = f.reg_role >> 2
    number = i.reg
    host = w.home[number]
    if host != NONE and size != 2 and i.address == 8 and i.base not in (ABSOLUTE, NONE):
        base = w.home[i.base]
        index = NONE if i.index == NONE else w.home[i.index]
        if base != NONE and (index != NONE or i.index == NONE):
            return lea(w, host, base, index, i.scale, i.displacement, size == 4)
    effective_address(w, i)
    if size == 4:
        put(w, _TRUNCATE, 3)
    if size != 2:
        return set_guest(w, number, R9)
    if host == NONE:
        gs_load(w, R10, slot_of(number))
        put(w, 0xCA894566, 4)  # mov r10w, r9w
        gs_store(w, R10, slot_of(number))
    else:
        # mov host16, r9w
        put(w, 0x66 | (0x44 | host >> 3) << 8 | 0x890000 | (0xC8 | host & 7) << 24, 4)
    return 0


# --- recipes --------------------------------------------------------------------------------------


@native
def place_piece(w: Writer, i: Insn, distance: int, length: int, fixes: int) -> int:
    """Append a piece of an instruction's recipe; its ``fixes`` stand behind it."""
    if length == 0:
        return 0
    base = w.out
    code = i.recipe + distance
    w.held = 0
    copy_bytes(w, code, length)
    at = code + ((length + 7) & ~7)
    for n in range(fixes):
        place_fix(w, i, cast(Fix, at + n * Fix.size), base)
    return 0


@native_inline
def place_fix(w: Writer, i: Insn, fix: Fix, base: int) -> int:
    """Fill in, or note for later, what depends on the place."""
    position = base + fix.position
    if fix.what == FIX_MISS:
        add_miss(w, position, base + fix.retry, fix.write, fix.kind, i.offset, 0)
    elif fix.what == FIX_ESCAPE:
        escape: Escape = cast(Escape, address_of(w.escapes[0]) + w.escape_count * Escape.size)
        escape.position = position
        escape.insn = address_of(i)
        w.escape_count += 1
    return 0
