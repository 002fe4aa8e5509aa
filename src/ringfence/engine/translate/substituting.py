"""The copied instruction: its own bytes, with other registers and another memory operand.

Registers that have no host register of their own where the trace runs are accessed in the block if
they are the operand that can be in memory, or get a *stand-in*: a scratch register, or one that the
instruction does not use, borrowed and given back. Only the numbers in ModRM, SIB and the REX, VEX
or EVEX prefix change.
"""

from __future__ import annotations

from ringfence.engine.translate.assembling import copy_bytes, gs_load, gs_store, move, put
from ringfence.engine.translate.block import gs
from ringfence.engine.translate.emit import R9, R10, R11
from ringfence.engine.translate.operands import (
    combine,
    operand_extension,
    put_operand,
    slot_of,
)
from ringfence.engine.translate.tables import NONE, ROLE_READ, ROLE_WRITE, Form, Insn, Writer
from ringfence.native.dialect import load8, native, native_inline

IN_BLOCK, TURNED = 254, 253
"""In place of a register with an address; see `encode`."""
_GS = 0x65


@native
def is_high_byte(i: Insn, role: int, number: int) -> int:
    """Whether a register operand is AH, CH, DH or BH."""
    return role >> 2 == 1 and not i.rex and not i.vex and number & 0xC == 4


@native
def copy_instruction(w: Writer, i: Insn, f: Form) -> int:
    """Copy an instruction, with its memory operand and registers replaced as needed."""
    w.substitute_count = 0
    memory = i.mod != 3 and i.mod != NONE
    high = 0
    if f.reg_role and is_high_byte(i, f.reg_role, i.reg):
        high = 1
    registers = (not memory and i.mod == 3) or f.low
    if f.rm_role and registers and is_high_byte(i, f.rm_role, i.rm):
        high = 1
    moved = 0
    address = R10 if memory else NONE
    if lives_in_block(w, i, f):
        moved = 1
        address = IN_BLOCK
    elif turns(w, i, f):
        moved = 1
        address = TURNED
    if f.reg_role and address != TURNED:
        moved = moved | note_operand(w, i, f.reg_role, i.reg)
    if f.rm_role and registers and address != IN_BLOCK:
        moved = moved | note_operand(w, i, f.rm_role, i.rm)
    if f.vvvv_role:
        moved = moved | note_operand(w, i, f.vvvv_role, i.vvvv)
    if not memory and not moved and w.long:
        return copy_bytes(w, i.bytes, i.length)
    return substitute(w, i, f, address, high)


@native
def lives_in_block(w: Writer, i: Insn, f: Form) -> int:
    """Whether an operand in a register may be accessed where it is without one: in the block.

    Not where that would be something else: 32-bit writes clear the upper half of a register, BT
    takes memory for a string of bits, XCHG locks it, and some opcodes are other instructions.
    """
    if i.mod != 3 or not f.rm_role or f.low or i.vex:
        return 0
    if not fits_block(w, i, f.rm_role, i.rm) or (f.reg_role and i.reg == i.rm):
        return 0
    opcode = i.opcode
    if i.map == 0:
        if opcode < 0x40:
            return opcode & 7 < 4
        return opcode in (
            0x63, 0x69, 0x6B, 0x80, 0x81, 0x83, 0x84, 0x85, 0x88, 0x89, 0x8A, 0x8B,
            0xC0, 0xC1, 0xC6, 0xC7, 0xD0, 0xD1, 0xD2, 0xD3, 0xF6, 0xF7, 0xFE, 0xFF,
        )  # fmt: skip
    if i.map == 1:
        if opcode & 0xF0 in (0x40, 0x90):  # CMOVcc, SETcc
            return 1
        return opcode in (0x2A, 0x6E, 0xAF, 0xB6, 0xB7, 0xB8, 0xBA, 0xBC, 0xBD, 0xBE, 0xBF)
    return 0


@native_inline
def fits_block(w: Writer, i: Insn, role: int, number: int) -> int:
    """Whether a register is in the block, and may be read and written there as an operand."""
    if w.home[number] != NONE or is_high_byte(i, role, number):
        return 0
    return not role & ROLE_WRITE or role >> 2 != 4


@native
def turns(w: Writer, i: Insn, f: Form) -> int:
    """Whether the same holds for ModRM.reg, of an instruction that exists in both directions."""
    if i.mod != 3 or i.map or i.vex or i.reg == i.rm or not f.reg_role or not f.rm_role:
        return 0
    opcode = i.opcode
    both = opcode < 0x40 and opcode & 7 < 4
    if not both and opcode not in (0x84, 0x85, 0x88, 0x89, 0x8A, 0x8B):
        return 0
    return fits_block(w, i, f.reg_role, i.reg)


@native
def note_operand(w: Writer, i: Insn, role: int, number: int) -> int:
    """Remember a general register operand; whether its host register is another or none."""
    if is_high_byte(i, role, number):
        return 0
    # Writing less than 32 bits keeps the rest.
    access = role & 3
    if role >> 2 < 4:
        access = access | ROLE_READ
    for n in range(w.substitute_count):
        if w.substitutes[n] == number:
            w.substitute_roles[n] = w.substitute_roles[n] | access
            return w.stand_ins[n] != number
    n = w.substitute_count
    w.substitutes[n] = number
    w.stand_ins[n] = w.home[number]
    w.substitute_roles[n] = access
    w.borrowed[n] = 0
    w.substitute_count = n + 1
    return w.home[number] != number


@native
def borrow(w: Writer, f: Form) -> int:
    """A host register below 8 that the instruction does not use, to be given back."""
    used = 0
    for number in range(16):
        if f.implicit >> number & 1 and w.home[number] != NONE:
            used = used | 1 << w.home[number]
    for n in range(w.substitute_count):
        if w.stand_ins[n] != NONE:
            used = used | 1 << w.stand_ins[n]
    if not used & 0x40:
        return 6
    if not used & 0x80:
        return 7
    if not used & 0x08:
        return 3
    if not used & 0x02:
        return 1
    return 2


@native
def stand_in(w: Writer, number: int) -> int:
    """The host register that an operand has in the instruction being written."""
    for n in range(w.substitute_count):
        if w.substitutes[n] == number:
            return w.stand_ins[n]
    return number


@native
def substitute(w: Writer, i: Insn, f: Form, address: int, high: int) -> int:
    """Write the instruction with host registers in place of guest ones; ``address``: see `encode`.

    Scratch registers serve the homeless ones; when they run out, host registers that the
    instruction does not use are borrowed and given back. AH-BH exclude a REX prefix, so beside
    them whatever needs one has to borrow, too.
    """
    free = 2
    memory = address == R10
    combined = high
    for n in range(w.substitute_count):
        if w.stand_ins[n] == NONE:
            combined = 1
    combined = combined and memory
    if memory:
        free = 1
    if combined:
        combine(w)
    slot = gs("scratch", 1)  # one is enough: there are two scratch registers and three operands
    for n in range(w.substitute_count):
        if w.stand_ins[n] == NONE:
            if free:
                # R9 first where it does not hold the operand's address, then R10.
                w.stand_ins[n] = R10 if free == 1 else R9
                free -= 1
                if w.stand_ins[n] == R10:
                    w.held = 0
            else:
                w.stand_ins[n] = borrow(w, f)
                w.borrowed[n] = 1
                gs_store(w, w.stand_ins[n], slot)
            if w.substitute_roles[n] & ROLE_READ:
                gs_load(w, w.stand_ins[n], slot_of(w.substitutes[n]))
        elif high and w.stand_ins[n] == R11:
            w.stand_ins[n] = NONE
            w.stand_ins[n] = borrow(w, f)
            w.borrowed[n] = 2
            gs_store(w, w.stand_ins[n], slot)
            move(w, w.stand_ins[n], R11)
    if combined:
        address = R9
        if high:
            address = borrow(w, f)
            gs_store(w, address, slot)
            move(w, address, R9)
    encode(w, i, f, address)
    if high and memory:
        gs_load(w, address, slot)
    give_back(w)
    return 0


@native
def give_back(w: Writer) -> int:
    """Behind the instruction: homeless registers to the block, borrowed ones to their owners."""
    for k in range(w.substitute_count):
        n = w.substitute_count - 1 - k
        number = w.substitutes[n]
        host = w.stand_ins[n]
        if w.borrowed[n] == 2:
            move(w, R11, host)
            gs_load(w, host, gs("scratch", 1))
        elif w.home[number] == NONE:
            if w.substitute_roles[n] & ROLE_WRITE:
                gs_store(w, host, slot_of(number))
            if w.borrowed[n]:
                gs_load(w, host, gs("scratch", 1))
    return 0


@native
def encode(w: Writer, i: Insn, f: Form, address: int) -> int:
    """Write the instruction with its operands' stand-ins.

    ``address``: NONE without memory operand, R10 for what `operands` knows of, IN_BLOCK where
    ModRM.rm is a guest register in the block, TURNED where ModRM.reg is one and the operands have
    to change places, else the register that holds it.
    """
    reg = i.reg
    rm = i.rm
    vvvv = i.vvvv
    opcode = i.opcode
    block = slot_of(rm)
    bare = 0
    if address == TURNED:
        block = slot_of(reg)
        reg = rm
        if not is_high_byte(i, f.rm_role, rm):
            reg = stand_in(w, rm)
            bare = needs_rex(f.rm_role, reg)
        if opcode & 0xFE != 0x84:  # TEST has no direction
            opcode = opcode ^ 2
    elif f.reg_role and not is_high_byte(i, f.reg_role, reg):
        reg = stand_in(w, reg)
        bare = bare | needs_rex(f.reg_role, reg)
    if address in (IN_BLOCK, TURNED):
        put(w, _GS, 1)
    elif f.rm_role and (f.low or i.mod == 3) and not is_high_byte(i, f.rm_role, rm):
        rm = stand_in(w, rm)
        bare = bare | needs_rex(f.rm_role, rm)
    if f.vvvv_role:
        vvvv = stand_in(w, vvvv)
    memory = address != NONE
    extension = 0
    if address == R10:
        extension = operand_extension(w)
    elif address in (IN_BLOCK, TURNED):
        extension = 0
    elif address != NONE:
        extension = address >> 3
    else:
        extension = rm >> 3
    extension = extension | (reg >> 3) << 2
    if i.vex == 4:
        put_evex(w, i, extension, memory)
    elif i.vex:
        payload = i.vex_payload & 0x87 | (vvvv ^ 15) << 3
        put(w, 0xC4 | ((extension ^ 7) << 5 | i.map) << 8 | payload << 16 | i.opcode << 24, 4)
    else:
        for n in range(i.rex_at):
            put_prefix(w, load8(i.bytes + n))
        if not w.long and f.prefix66:
            put(w, 0x66, 1)
        if i.rex or extension or bare:
            put(w, 0x40 | i.rex & 8 | extension, 1)
        if i.map:
            put(w, 0x0F, 1)
        if i.map == 2:
            put(w, 0x38, 1)
        elif i.map == 3:
            put(w, 0x3A, 1)
        put(w, opcode & 0xF8 | rm & 7 if f.low == 1 else opcode, 1)
    if i.mod != NONE:
        if address == R10:
            put_operand(w, reg, i.vex != 4)
        elif address in (IN_BLOCK, TURNED):
            put(w, (reg & 7) << 3 | 0x2504, 2)
            put(w, block, 4)
        elif address != NONE:
            put(w, (reg & 7) << 3 | address & 7, 1)
        else:
            put(w, 0xC0 | (reg & 7) << 3 | rm & 7, 1)
    copy_bytes(w, i.bytes + i.immediate_at, i.length - i.immediate_at)
    return 0


@native
def put_evex(w: Writer, i: Insn, extension: int, memory: int) -> int:
    """EVEX prefix and opcode; R', V', the mask and, for registers, X stay as they are."""
    kept = i.evex_low & 0x17
    changed = extension ^ 7
    if not memory:
        kept = kept | i.evex_low & 0x40
        changed = changed & 5
    put(w, 0x62 | (kept | changed << 5) << 8 | i.vex_payload << 16 | i.evex_high << 24, 4)
    put(w, i.opcode, 1)
    return 0


@native_inline
def needs_rex(role: int, host: int) -> int:
    """Whether a byte register needs a REX prefix to be what it is."""
    return role >> 2 == 1 and host & 0xC == 4


@native_inline
def put_prefix(w: Writer, byte: int) -> int:
    """Keep a legacy prefix, unless it was about the address."""
    if byte == 0x66 and not w.long:
        return 0
    if byte == 0x66 or byte == 0xF2 or byte == 0xF3 or byte == 0xF0:
        put(w, byte, 1)
    return 0
