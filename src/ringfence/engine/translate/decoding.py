"""Reading guest instructions natively: prefixes, opcode, operands; the form says what they mean.

The encoding is that of SDM vol. 2 ch. 2. A decoder for all of x86 would be a table of thousands of
rows; here the opcode's few bits that decide what an instruction *is* make a key, and the `Form`
found by it says how to go on. A key seen for the first time goes to Python, which asks iced-x86
(`forms`); some hundred keys are all that an operating system uses.
"""

from __future__ import annotations

import functools
from typing import cast

from ringfence.cpu.state import FS, RBP, RBX, RDI, RSI, SS
from ringfence.engine.translate.block import (
    MODE_AVX512,
    MODE_CODE32,
    MODE_LONG,
    MODE_STACK32,
)
from ringfence.engine.translate.describing import (
    ASK,
    LENGTH_MAX,
    apply_form,
    hash_key,
    invalid,
    load_signed,
    too_long,
)
from ringfence.engine.translate.tables import (
    ABSOLUTE,
    F_GROUP,
    FORM_ROWS,
    LOCK,
    NONE,
    P66,
    P67,
    PF2,
    PF3,
    RAW_BYTES,
    WANT_FORM,
    Form,
    Insn,
    Writer,
)
from ringfence.native.dialect import (
    address_of,
    load8,
    load64,
    native,
    native_inline,
)

KEY_VEX, KEY_W, KEY_L, KEY_REGISTERS, KEY_LOCK, KEY_P67, KEY_B = (
    1 << 10, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21,
)  # fmt: skip
KEY_EVEX, KEY_L2, KEY_BROADCAST, KEY_MASKED, KEY_ZEROING, KEY_MAP4 = (1 << n for n in range(40, 46))
"""With EVEX, KEY_VEX is set, too. KEY_BROADCAST: the bit b; KEY_MAP4: bit 2 of the map."""
KEY_PREFIX_SHIFT, KEY_REG_SHIFT, KEY_MODE_SHIFT = 12, 24, 32
KEY_VALID = 1 << 63
"""Parts of a form's key; opcode in the low byte, map in bits 8-9. KEY_P67 and KEY_B are for opcodes
without ModRM only: absolute addresses, and 90h."""
_FS_OVERRIDE, _SS_OVERRIDE = FS + 1, SS + 1


@functools.cache
def no_modrm() -> tuple[set[int], set[int]]:
    """Opcodes of the one-byte and the 0F map that have no ModRM (SDM vol. 2, appendix A)."""
    one = {o for o in range(0x40) if o & 7 > 3} | set(range(0x40, 0x62)) | set(range(0x64, 0x80))
    one -= {0x69, 0x6B}
    one |= set(range(0x90, 0xC0)) | {0xC2, 0xC3} | set(range(0xC8, 0xD0)) | set(range(0xD4, 0xD8))
    one |= set(range(0xE0, 0xF6)) | set(range(0xF8, 0xFE)) | {0x62}
    two = {4, 5, 6, 7, 8, 9, 0x0A, 0x0B, 0x0C, 0x0E, 0x77, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xAA}
    two |= set(range(0x30, 0x40)) - {0x38, 0x3A}
    two |= set(range(0x80, 0x90)) | set(range(0xC8, 0xD0)) | set(range(0x24, 0x28))
    return one, two


@native_inline
def mode_of_key(mode: int) -> int:
    """The bits of a mode that forms depend on: the shape of code, and vector instructions."""
    shape = (0x10 if mode & MODE_LONG else 0) | (0x20 if mode & MODE_CODE32 else 0)
    shape = shape | (0x40 if mode & MODE_STACK32 else 0)
    return shape | ((mode >> 3) & 7) | (8 if mode & MODE_AVX512 else 0)


@native
def find_form(w: Writer, key: int) -> int:
    """Address of the form of a key, 0 if it is not known."""
    slot = hash_key(key) & (FORM_ROWS - 1)
    while 1:
        row: Form = cast(Form, w.forms + slot * Form.size)
        if row.key == key:
            return address_of(row)
        if row.key == 0:
            return 0
        slot = (slot + 1) & (FORM_ROWS - 1)
    return 0


@native
def form_insert(w: Writer, address: int) -> int:
    """Where to put the form with a key: its row, or a free one."""
    key = load64(address)
    slot = hash_key(key) & (FORM_ROWS - 1)
    while 1:
        row = w.forms + slot * Form.size
        if load64(row) == 0 or load64(row) == key:
            return row
        slot = (slot + 1) & (FORM_ROWS - 1)
    return 0


@native
def ask_form(w: Writer, key: int, at: int, length: int) -> int:
    """Leave a question for Python: what becomes of this opcode?"""
    w.want = WANT_FORM
    w.want_key = key
    w.want_length = length
    for n in range(RAW_BYTES):
        w.want_bytes[n] = load8(at + n) if n < length else 0
    return ASK


@native_inline
def vex_prefix(payload: int) -> int:
    """The legacy prefix that pp in a VEX or EVEX prefix stands for: 66, F3, F2."""
    pp = payload & 3
    if pp == 1:
        return P66
    if pp == 2:
        return PF3
    return PF2 if pp == 3 else 0


@native_inline
def evex_key(high: int) -> int:
    """What of z L'L b V' aaa tells forms apart: not which mask, but whether there is one."""
    key = (KEY_L if high & 0x20 else 0) | (KEY_L2 if high & 0x40 else 0)
    key = key | (KEY_BROADCAST if high & 0x10 else 0) | (KEY_ZEROING if high & 0x80 else 0)
    return key | (KEY_MASKED if high & 7 else 0)


@native
def decode(w: Writer, i: Insn, at: int, available: int) -> int:
    """Decode the instruction at host address ``at``, of which ``available`` bytes may be read."""
    i.bytes = at
    prefixes = 0
    segment = 0
    rex = 0
    n = 0
    byte = 0
    limit = available if available < LENGTH_MAX else LENGTH_MAX
    while 1:
        if n >= limit:
            return too_long(w, i, available)
        byte = load8(at + n)
        if byte & 0xF0 == 0x40:
            if not w.long:
                break
            rex = byte
        else:
            if byte == 0x66:
                prefixes = prefixes | P66
            elif byte == 0xF2:
                prefixes = (prefixes & ~PF3) | PF2
            elif byte == 0xF3:
                prefixes = (prefixes & ~PF2) | PF3
            elif byte == 0x67:
                prefixes = prefixes | P67
            elif byte == 0xF0:
                prefixes = prefixes | LOCK
            elif byte & 0xFE == 0x64:
                segment = byte - 0x64 + _FS_OVERRIDE
            elif byte & 0xE7 == 0x26:
                # ES, CS, SS, DS: without effect in 64-bit mode, but for what a fault is called.
                if segment < _FS_OVERRIDE or not w.long:
                    segment = ((byte >> 3) & 3) + 1
            else:
                break
            rex = 0
        n += 1
    i.rex = rex
    i.rex_at = n - 1 if rex else n
    i.prefixes = prefixes
    i.segment = segment
    i.vex = 0
    i.mod = NONE
    i.base = NONE
    i.index = NONE
    i.recipe = 0
    i.displacement_size = 0
    i.address = 8
    if not w.long:
        i.address = w.width ^ 6 if prefixes & P67 else w.width
    elif prefixes & P67:
        i.address = 4
    map = 0
    w_bit = (rex >> 3) & 1
    key = 0
    if byte == 0x0F:
        map = 1
        n += 1
        if n >= limit:
            return too_long(w, i, available)
        byte = load8(at + n)
        if byte == 0x38 or byte == 0x3A:
            map = 2 + ((byte >> 1) & 1)
            n += 1
            if n >= limit:
                return too_long(w, i, available)
            byte = load8(at + n)
    elif (byte == 0xC4 or byte == 0xC5) and is_vector_prefix(w, at + n):
        i.vex = 2 if byte == 0xC5 else 3
        if n + i.vex >= limit:
            return too_long(w, i, available)
        payload = load8(at + n + 1)
        rex = ((payload >> 5) ^ 4) & 4
        map = 1
        if byte == 0xC4:
            map = payload & 0x1F
            rex = ((payload >> 5) & 7) ^ 7
            payload = load8(at + n + 2)
            w_bit = payload >> 7
        else:
            payload = payload & 0x7F
        n += i.vex
        if map == 0 or map > 3 or prefixes & (P66 | PF2 | PF3 | LOCK) or i.rex:
            return invalid(w, i, n)
        i.vvvv = ((payload >> 3) & 15) ^ 15
        if not w.long:
            # Eight registers: the bits for more are ignored, or were part of the prefix's ModRM.
            rex = 0
            i.vvvv = i.vvvv & 7
        i.vex_payload = payload
        prefixes = vex_prefix(payload)
        key = KEY_VEX | (KEY_L if payload & 4 else 0)
        byte = load8(at + n)
    elif byte == 0x62 and is_vector_prefix(w, at + n):
        if n + 4 >= limit:
            return too_long(w, i, available)
        i.vex = 4
        payload = load8(at + n + 1)
        i.evex_low = payload
        map = payload & 7
        rex = ((payload >> 5) & 7) ^ 7
        reserved = payload & 8
        payload = load8(at + n + 2)
        i.vex_payload = payload
        reserved = reserved | (payload & 4 ^ 4)
        high = load8(at + n + 3)
        i.evex_high = high
        n += 4
        if map in (0, 4, 7) or reserved or prefixes & (P66 | PF2 | PF3 | LOCK) or i.rex:
            return invalid(w, i, n)
        w_bit = payload >> 7
        i.vvvv = (((payload >> 3) & 15) ^ 15) | ((high & 8 ^ 8) << 1)
        if not w.long:
            rex = 0
            i.vvvv = i.vvvv & 7
        prefixes = vex_prefix(payload)
        key = KEY_VEX | KEY_EVEX | evex_key(high) | (KEY_MAP4 if map & 4 else 0)
        byte = load8(at + n)
    elif byte == 0x8F:
        if n + 1 >= limit:
            return too_long(w, i, available)
        if load8(at + n + 1) & 0x1F >= 8:
            return invalid(w, i, n + 1)  # XOP
    elif byte == 0x82 and not w.long:
        byte = 0x80  # the same group, once more
    n += 1
    i.map = map
    i.opcode = byte
    key = key | KEY_VALID | byte | ((map & 3) << 8) | ((prefixes & 7) << KEY_PREFIX_SHIFT)
    key = key | (KEY_W if w_bit else 0) | (KEY_LOCK if prefixes & LOCK else 0)
    key = key | (mode_of_key(w.mode) << KEY_MODE_SHIFT)
    i.reg = 0
    i.rm = (byte & 7) | ((rex & 1) << 3)
    reg_field = 0
    modrm_follows = w.has_modrm[(map << 8) | byte]
    if byte == 0x62 and map == 0:
        modrm_follows = 1  # BOUND
    if map > 1 or i.vex == 4 or (i.vex and byte != 0x77) or modrm_follows:
        if n >= limit:
            return too_long(w, i, available)
        modrm = load8(at + n)
        n += 1
        mod = modrm >> 6
        if map == 1 and byte & 0xFC == 0x20:
            mod = 3  # MOV from and to CR and DR look at no more
        rm = modrm & 7
        reg_field = (modrm >> 3) & 7
        i.mod = mod
        i.reg = reg_field | ((rex & 4) << 1)
        i.rm = rm | ((rex & 1) << 3)
        if mod == 3:
            key = key | KEY_REGISTERS
        elif i.address == 2:
            size = narrow_operand(i, mod, rm)
            if n + size > limit:
                return too_long(w, i, available)
            i.displacement = load_signed(at + n, size)
            i.displacement_at = n
            i.displacement_size = size
            n += size
        else:
            size = 1 if mod == 1 else 4 if mod == 2 else 0
            i.base = i.rm
            if rm == 4:
                if n >= limit:
                    return too_long(w, i, available)
                sib = load8(at + n)
                n += 1
                index = ((sib >> 3) & 7) | ((rex & 2) << 2)
                if index != 4:
                    i.index = index
                    i.scale = sib >> 6
                i.base = (sib & 7) | ((rex & 1) << 3)
                if sib & 7 == 5 and mod == 0:
                    i.base = NONE
                    size = 4
            elif rm == 5 and mod == 0:
                i.base = ABSOLUTE if w.long else NONE
                size = 4
            if n + size > limit:
                return too_long(w, i, available)
            i.displacement = load_signed(at + n, size)
            i.displacement_at = n
            i.displacement_size = size
            n += size
    elif prefixes & P67:
        key = key | KEY_P67
    elif byte == 0x90 and map == 0 and rex & 1:
        key = key | KEY_B  # XCHG, not NOP
    form = find_form(w, key)
    if form == 0:
        return ask_form(w, key, at, limit)
    if load8(form + Form.offset_of("kind")) == F_GROUP:
        key = key | ((reg_field + 1) << KEY_REG_SHIFT)
        form = find_form(w, key)
        if form == 0:
            return ask_form(w, key, at, limit)
    i.form = form
    i.immediate_at = n
    return apply_form(w, i, cast(Form, form), n, limit, available)


@native_inline
def is_vector_prefix(w: Writer, at: int) -> int:
    """Whether C4, C5 or 62 is the prefix of a vector instruction, not LES, LDS or BOUND.

    Those have a memory operand, which only 64-bit mode needn't tell apart.
    """
    return w.long or load8(at + 1) >= 0xC0


@native
def narrow_operand(i: Insn, mod: int, rm: int) -> int:
    """The registers of a memory operand with a 16-bit address; bytes of displacement."""
    i.base = RBX
    if rm == 2 or rm == 3 or rm == 6:
        i.base = RBP
    elif rm == 4:
        i.base = RSI
    elif rm == 5:
        i.base = RDI
    if rm < 4:
        i.index = RDI if rm & 1 else RSI
        i.scale = 0
    if mod == 0:
        if rm == 6:
            i.base = NONE
            return 2
        return 0
    return mod
