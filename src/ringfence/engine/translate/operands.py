"""Where a memory operand is once it was looked up, and the encodings that access it there.

Every operand is at a base register + R10 + a displacement, and R10 is what a look-up found: host
minus linear address, or the host page for R9, an offset in it. `aim` says which: behind a look-up
of its own an operand is at R9 + R10; one that shares a look-up is reached from the guest's own base
register, without computing its address. What R10 holds is remembered in ``Writer.held``, so that
neighbours load it once; whatever writes R10 forgets it (see ``assembling``).
"""

from __future__ import annotations

from ringfence.cpu.state import RBP
from ringfence.engine.translate.assembling import (
    gs_load,
    gs_store,
    load_address,
    move,
    put,
    word,
)
from ringfence.engine.translate.block import gs
from ringfence.engine.translate.emit import R9, R10, R11
from ringfence.engine.translate.tables import (
    ABSOLUTE,
    F_CALL,
    F_LEAVE,
    F_POP,
    F_PUSH,
    F_PUSH_IMMEDIATE,
    F_RET,
    NONE,
    RELOC_VA32,
    Insn,
    Writer,
)
from ringfence.native.dialect import native, native_inline, sext

_SIB_R10 = 0x10
"""SIB byte: index R10, factor 1."""
_SIB_R10_ALONE = 0x15


@native_inline
def slot_of(number: int) -> int:
    """Displacement of the block's place for a guest register without a host register."""
    if number >= 9 and number <= 11:
        return gs("gpr") + number * 8
    return gs("displaced") + number * 8


@native
def guest(w: Writer, number: int, scratch: int) -> int:
    """Host register that has a guest register's value, ``scratch`` if it must be loaded."""
    host = w.home[number]
    if host == NONE:
        gs_load(w, scratch, slot_of(number))
        return scratch
    return host


@native
def set_guest(w: Writer, number: int, register: int) -> int:
    """Copy a host register into a guest register."""
    host = w.home[number]
    if host == NONE:
        gs_store(w, register, slot_of(number))
    else:
        move(w, host, register)
    return 0


# --- where it is ---------------------------------------------------------------------------------


@native_inline
def aim_r9(w: Writer) -> int:
    """The operand is at R9 + R10."""
    w.operand_base = R9
    w.operand_displacement = 0
    return 0


@native
def aim_shared(w: Writer, i: Insn, slot: int) -> int:
    """The operand's look-up is shared, and what it found in a slot: no address is computed."""
    kind = i.form_kind
    w.operand_displacement = 0
    if kind in (F_PUSH, F_PUSH_IMMEDIATE, F_CALL):
        w.operand_base = R11
        w.operand_displacement = i.shared_displacement
    elif kind in (F_POP, F_RET):
        w.operand_base = R11
    elif kind == F_LEAVE:
        w.operand_base = RBP
    elif i.base != ABSOLUTE:
        w.operand_base = guest(w, i.base, R9)
        w.operand_displacement = i.displacement
    elif w.wide:
        load_address(w, R9, i.offset + i.value)
        w.operand_base = R9
    else:
        w.operand_base = NONE
        w.operand_displacement = i.offset + i.value
    if w.held != slot:
        gs_load(w, R10, slot)
        w.held = slot
    return 0


# --- encodings -----------------------------------------------------------------------------------


@native_inline
def operand_extension(w: Writer) -> int:
    """The bits X and B of a prefix, for index and base."""
    return 2 if w.operand_base == NONE else 2 | w.operand_base >> 3


@native
def put_operand(w: Writer, register: int, short: int) -> int:
    """ModRM, SIB and displacement; ``short``: whether a displacement may have 8 bits."""
    base = w.operand_base
    displacement = w.operand_displacement
    reg = (register & 7) << 3
    if base == NONE:
        put(w, 4 | reg | _SIB_R10_ALONE << 8, 2)
        word(w, w.out, RELOC_VA32, displacement)
        put(w, 0, 4)
        return 0
    mode = 0x80
    size = 4
    if displacement == 0 and base & 7 != 5:
        mode = 0
        size = 0
    elif short and sext(displacement, 8) == displacement:
        mode = 0x40
        size = 1
    put(w, mode | 4 | reg | (_SIB_R10 | base & 7) << 8, 2)
    put(w, displacement, size)
    return 0


@native
def put_access(w: Writer, opcode: int, size: int, register: int) -> int:
    """An instruction with a one-byte opcode, a register of 2, 4 or 8 bytes, and the operand."""
    if size == 2:
        put(w, 0x66, 1)
    rex = (0x48 if size == 8 else 0x40) | (register >> 3) << 2 | operand_extension(w)
    put(w, rex | opcode << 8, 2)
    return put_operand(w, register, 1)


@native
def combine(w: Writer) -> int:
    """``lea r9, [operand]``."""
    return put_access(w, 0x8D, 8, R9)


@native
def load_r9(w: Writer, size: int) -> int:
    """``mov r9, [operand]``, zero-extended from 2, 4 or 8 bytes."""
    if size != 2:
        return put_access(w, 0x8B, size, R9)
    put(w, 0x44 | operand_extension(w) | 0xB70F << 8, 3)  # movzx r9d, word
    return put_operand(w, R9, 1)
