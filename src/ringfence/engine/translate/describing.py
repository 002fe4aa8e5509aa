"""What an instruction's form says of it: operands and what they do, flags, what its kind is about.

The second half of decoding: `decoding` has parsed the bytes and found the form, or for F_RAW the
recipe is looked up here, by the bytes themselves.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.state import DS, FS, RBP, RSP, SS
from ringfence.engine.translate.block import (
    MODE_CPL,
    SLOW_MASKED,
    SLOW_READ,
    SLOW_STACK,
    SLOW_WRITE,
)
from ringfence.engine.translate.tables import (
    ABSOLUTE,
    CALL,
    DROP,
    EFFECT,
    F_CALL,
    F_CALL_MEMORY,
    F_CALL_REGISTER,
    F_CLI,
    F_COPY,
    F_DROP,
    F_INVALID,
    F_JCC,
    F_JMP,
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
    F_STI,
    INDIRECT,
    JCC,
    JMP,
    LOW_INC,
    MOVE_ADD,
    MOVE_DEC,
    MOVE_INC,
    MOVE_SUB,
    NONE,
    P67,
    PLAIN,
    RAW_BYTES,
    RECIPE_ROWS,
    ROLE_READ,
    ROLE_WRITE,
    STI,
    WANT_RECIPE,
    Form,
    Insn,
    RawRecipe,
    Writer,
)
from ringfence.native.dialect import (
    address_of,
    load8,
    load16,
    load32,
    load64,
    native,
    native_inline,
    sext,
    store64,
)

DECODED, MORE_BYTES, ASK = range(3)
"""Results of `decode`; ASK leaves the question in ``Writer.want…``."""
LENGTH_MAX = 15
STATUS = 0x3F
"""All status flags, as iced-x86's ``RflagsBits``."""
_NOT_NAMED = 0xFFFFFFFF
_HIGH_BYTE_FIXED = 0xE0
"""RBP, RSI, RDI: one may have to stand in where AH-BH exclude others."""
_FS_OVERRIDE, _SS_OVERRIDE = FS + 1, SS + 1


@native_inline
def hash_key(key: int) -> int:
    """Spread a key's bits."""
    product = key * 0x9E3779B97F4A7C15
    return product >> 40


@native_inline
def hash_raw(context: int, low: int, high: int) -> int:
    """Spread an instruction's bytes and what else its recipe depends on."""
    return hash_key(context ^ (low * 3) ^ hash_key(high) ^ (high << 7))


@native
def find_recipe(w: Writer, low: int, high: int) -> int:
    """Address of the recipe for 16 bytes (padded with zeros) in the present context, or 0."""
    slot = hash_raw(w.context, low, high) & (RECIPE_ROWS - 1)
    while 1:
        found = load64(w.recipes + slot * 8)
        if found == 0:
            return 0
        row: RawRecipe = cast(RawRecipe, found)
        at = address_of(row.raw[0])
        if row.context == w.context and load64(at) == low and load64(at + 8) == high:
            return found
        slot = (slot + 1) & (RECIPE_ROWS - 1)
    return 0


@native
def recipe_insert(w: Writer, address: int) -> int:
    """Enter a recipe in the table."""
    row: RawRecipe = cast(RawRecipe, address)
    at = address_of(row.raw[0])
    slot = hash_raw(row.context, load64(at), load64(at + 8)) & (RECIPE_ROWS - 1)
    while load64(w.recipes + slot * 8):
        slot = (slot + 1) & (RECIPE_ROWS - 1)
    store64(w.recipes + slot * 8, address)
    return 0


@native
def load_signed(at: int, size: int) -> int:
    """A signed little-endian number of 0, 1, 2, 4 or 8 bytes."""
    if size == 1:
        return sext(load8(at), 8)
    if size == 4:
        return sext(load32(at), 32)
    if size == 2:
        return sext(load16(at), 16)
    if size == 8:
        return load64(at)
    return 0


@native
def apply_form(w: Writer, i: Insn, f: Form, n: int, limit: int, available: int) -> int:
    """The second half of decoding: what the form says of an instruction parsed up to ``n``."""
    if f.kind == F_INVALID or (i.vex and f.kind != F_RAW and not f.vvvv_used and i.vvvv):
        return invalid(w, i, n)
    at = i.bytes
    end = n + f.immediate
    if end > limit:
        return too_long(w, i, available)
    i.length = end
    if i.displacement_size == 1:
        i.displacement = i.displacement << f.scale
    i.immediate = load_signed(at + n, f.immediate)
    i.value = i.immediate + end
    if i.base == ABSOLUTE:
        i.value = i.displacement + end
        if i.prefixes & P67:
            i.value = sext(i.value, 32)
    i.form_kind = f.kind
    i.access = f.memory_size
    if f.kind == F_RAW:
        return apply_recipe(w, i)
    if f.low == LOW_INC:
        i.reg = (i.opcode >> 3) & 1
        i.opcode = 0xFF
        i.mod = 3
    i.reads = f.reads
    i.writes = f.writes
    i.kills = f.kills
    if f.counted and i.immediate & 0x1F == 0:
        i.kills = 0
    i.kind = PLAIN
    i.clobbers = 0
    i.shared_base = NONE
    i.adjusted = NONE
    i.fixed = f.implicit
    i.written = f.implicit_written
    i.named = _NOT_NAMED
    i.stepped = NONE
    memory = f.memory_access
    if i.base != NONE and i.base != ABSOLUTE:
        name_register(i, i.base)
    if i.index != NONE:
        name_register(i, i.index)
    if memory and i.mod != 3 and i.mod != NONE:
        i.clobbers = 1
        describe_access(i, f)
    if f.reg_role:
        use_register(i, f.reg_role, i.reg)
    if f.rm_role and (i.mod == 3 or f.low):
        use_register(i, f.rm_role, i.rm)
    if f.vvvv_role:
        use_register(i, f.vvvv_role, i.vvvv)
    if f.move:
        note_move(i, f)
    if f.kind != F_COPY:
        describe_special(w, i, f)
    if not w.long:
        i.shared_base = NONE
        i.adjusted = NONE
    return DECODED


@native_inline
def segment_of(i: Insn) -> int:
    """The segment register that a memory operand goes through, outside 64-bit mode."""
    if i.segment:
        return i.segment - 1
    return SS if i.base == RSP or i.base == RBP else DS


@native
def name_register(i: Insn, number: int) -> int:
    """Note that an operand names a guest register."""
    i.named = (i.named << 8) | number
    return 0


@native
def use_register(i: Insn, role: int, number: int) -> int:
    """Note a register operand."""
    if role >> 2 == 1 and not i.rex and not i.vex and number & 0xC == 4:
        # AH, CH, DH, BH
        number = number & 3
        i.fixed = i.fixed | (1 << number) | _HIGH_BYTE_FIXED
    else:
        name_register(i, number)
    if role & ROLE_WRITE:
        i.written = i.written | (1 << number)
    return 0


@native
def describe_access(i: Insn, f: Form) -> int:
    """What the memory operand's access is, and whether its look-up can be shared."""
    size = f.memory_size
    read = f.memory_access & ROLE_READ
    write = f.memory_access & ROLE_WRITE
    access = size | (SLOW_READ if read else 0) | (SLOW_WRITE if write else 0)
    if f.masking:
        access = access | SLOW_MASKED
    if i.segment == _SS_OVERRIDE or (i.segment == 0 and (i.base == RSP or i.base == RBP)):
        access = access | SLOW_STACK
    i.access = access
    if i.index != NONE or i.base == NONE or i.segment >= _FS_OVERRIDE or i.address != 8:
        return 0
    i.shared_base = i.base
    i.shared_displacement = i.displacement
    i.shared_size = size
    i.shared_write = 1 if write else 0
    return 0


@native
def note_move(i: Insn, f: Form) -> int:
    """An instruction that moves a whole register by a constant."""
    if i.mod == 3:
        number = i.rm
        if f.rm_role >> 2 >= 4:
            i.stepped = number
        if f.rm_role >> 2 != 8:
            return 0
    else:
        return 0
    i.adjusted = number
    if f.move == MOVE_ADD:
        i.adjustment = i.immediate
    elif f.move == MOVE_SUB:
        i.adjustment = 0 - i.immediate
    elif f.move == MOVE_INC:
        i.adjustment = 1
    elif f.move == MOVE_DEC:
        i.adjustment = 0 - 1
    return 0


@native_inline
def stack_slot(i: Insn, base: int, distance: int, size: int, write: int) -> int:
    """The memory operand is the stack's slot at a constant distance from a register."""
    i.clobbers = 1
    i.access = size | SLOW_STACK | (SLOW_WRITE if write else SLOW_READ)
    i.shared_base = base
    i.shared_displacement = distance
    i.shared_size = size
    i.shared_write = write
    return 0


@native_inline
def moves_stack(i: Insn, distance: int) -> int:
    """RSP moves by a constant."""
    i.written = i.written | (1 << RSP)
    i.adjusted = RSP
    i.stepped = RSP
    i.adjustment = distance
    return 0


@native
def describe_special(w: Writer, i: Insn, f: Form) -> int:
    """What instructions are about that are not simply copied."""
    kind = f.kind
    size = f.operand_size
    if kind == F_LEA:
        if i.base == i.reg and i.index == NONE and f.reg_role >> 2 == 8 and i.address == 8:
            i.adjusted = i.base
            i.stepped = i.base
            i.adjustment = i.displacement
    elif kind == F_DROP:
        i.kind = DROP
    elif kind in (F_PUSH, F_PUSH_IMMEDIATE):
        stack_slot(i, RSP, 0 - size, size, 1)
        moves_stack(i, 0 - size)
    elif kind == F_PUSH_MEMORY:
        i.shared_base = NONE
        moves_stack(i, 0 - size)
    elif kind == F_POP:
        stack_slot(i, RSP, 0, size, 0)
        if i.rm != RSP:
            moves_stack(i, size)
    elif kind == F_LEAVE:
        stack_slot(i, RBP, 0, size, 0)
        i.fixed = i.fixed | (1 << RBP)
        i.written = i.written | (1 << RBP) | (1 << RSP)
    elif kind == F_RET:
        stack_slot(i, RSP, 0, size, 0)
        i.kind = INDIRECT
        i.written = 1 << RSP
    elif kind == F_CALL:
        stack_slot(i, RSP, 0 - size, size, 1)
        i.kind = CALL
        i.written = 1 << RSP
    elif kind == F_JMP:
        i.kind = JMP
    elif kind == F_JCC:
        i.kind = JCC
    elif kind in (F_CALL_REGISTER, F_CALL_MEMORY):
        i.kind = INDIRECT
        i.clobbers = 1
        i.shared_base = NONE
        i.written = 1 << RSP
    elif kind == F_JMP_REGISTER:
        i.kind = INDIRECT
    elif kind == F_JMP_MEMORY:
        i.kind = INDIRECT
        i.shared_base = NONE
    elif kind == F_CLI:
        if w.mode & MODE_CPL:
            return to_effect(i, w.effect_cli)
    elif kind == F_STI:
        if w.mode & MODE_CPL:
            return to_effect(i, w.effect_sti)
        i.kind = STI
    return 0


@native
def to_effect(i: Insn, effect: int) -> int:
    """The instruction is a call of an effect without operands."""
    i.kind = EFFECT
    i.form_kind = F_INVALID
    i.effect = effect
    i.reads = STATUS
    i.writes = 0
    i.kills = 0
    i.clobbers = 1
    i.written = 0
    i.fixed = 0
    i.named = _NOT_NAMED
    i.shared_base = NONE
    i.adjusted = NONE
    return DECODED


@native
def invalid(w: Writer, i: Insn, length: int) -> int:
    """An instruction that is none, or not on this CPU: #UD."""
    i.length = length
    return to_effect(i, w.effect_ud)


@native
def too_long(w: Writer, i: Insn, available: int) -> int:
    """The bytes ran out: at the page's end, or after the 15 that an instruction may have."""
    if available < LENGTH_MAX:
        return MORE_BYTES
    return invalid(w, i, LENGTH_MAX)


@native
def apply_recipe(w: Writer, i: Insn) -> int:
    """Find what Python has written for just this instruction, or one at another displacement."""
    at = i.bytes
    for n in range(RAW_BYTES):
        w.want_bytes[n] = load8(at + n) if n < i.length else 0
    for n in range(i.displacement_size):
        w.want_bytes[i.displacement_at + n] = 0
    packed = address_of(w.want_bytes[0])
    found = find_recipe(w, load64(packed), load64(packed + 8))
    if found == 0:
        w.want = WANT_RECIPE
        w.want_length = i.length
        return ASK
    i.recipe = found
    row: RawRecipe = cast(RawRecipe, found)
    i.kind = row.kind
    i.reads = row.reads
    i.writes = row.writes
    i.kills = row.kills
    i.clobbers = row.clobbers
    i.effect = row.effect
    i.written = row.written
    i.fixed = row.fixed
    i.named = row.named
    i.shared_base = NONE
    i.adjusted = NONE
    return DECODED
