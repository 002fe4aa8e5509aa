"""How long an instruction of 64-bit code is, and where in it the opcode stands.

Enough of a decoder to find from one instruction to the next: prefixes, opcode maps, ModRM, SIB, and
the sizes of immediates. What the bytes mean, and whether they mean anything, doesn't matter here.

Source: Intel SDM vol. 2, ch. 2 and appendix A.
"""

from __future__ import annotations

from ringfence.native.dialect import load8, native, native_inline


def opcode_mask(listed: list[int], *spans: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """256 bits for opcodes, the lowest first, as four words.

    ``spans``: further ones, singly or as first and last of a row.
    """
    opcodes = set(listed)
    for span in spans:
        first, last = span if isinstance(span, tuple) else (span, span)
        opcodes.update(range(first, last + 1))
    whole = sum(1 << opcode for opcode in opcodes)
    one, two, three, four = ((whole >> 64 * n) & (1 << 64) - 1 for n in range(4))
    return one, two, three, four


_ARITHMETIC = [8 * n + form for n in range(8) for form in range(4)]
MODRM_0, MODRM_1, MODRM_2, MODRM_3 = opcode_mask(
    _ARITHMETIC, 0x63, 0x69, 0x6B, (0x80, 0x8F), 0xC0, 0xC1, 0xC6, 0xC7, (0xD0, 0xD3), (0xD8, 0xDF),
    0xF6, 0xF7, 0xFE, 0xFF,
)  # fmt: skip
BYTE_0, BYTE_1, BYTE_2, BYTE_3 = opcode_mask(
    [8 * n + 4 for n in range(8)],
    0x6A, 0x6B, (0x70, 0x7F), 0x80, 0x83, 0xA8, (0xB0, 0xB7), 0xC0, 0xC1, 0xC6, 0xCD, (0xE0, 0xE7),
    0xEB,
)  # fmt: skip
WORD_0, WORD_1, WORD_2, WORD_3 = opcode_mask(
    [8 * n + 5 for n in range(8)], 0x68, 0x69, 0x81, 0xA9, 0xC7, (0xB8, 0xBF)
)
PLAIN_0, PLAIN_1, PLAIN_2, PLAIN_3 = opcode_mask(
    [],
    (0x04, 0x0C),
    0x0E,
    (0x30, 0x37),
    0x77,
    (0x80, 0x8F),
    (0xA0, 0xA2),
    (0xA8, 0xAA),
    (0xC8, 0xCF),
)
SHORT_0, SHORT_1, SHORT_2, SHORT_3 = opcode_mask(
    [], 0x0F, (0x70, 0x73), 0xA4, 0xAC, 0xBA, 0xC2, (0xC4, 0xC6)
)
PREFIX_0, PREFIX_1, PREFIX_2, PREFIX_3 = opcode_mask(
    [], 0x26, 0x2E, 0x36, 0x3E, (0x64, 0x67), 0xF0, 0xF2, 0xF3
)
LONGEST = 15


@native_inline
def among(opcode: int, first: int, second: int, third: int, fourth: int) -> int:
    """Whether an opcode's bit is set."""
    low = second if opcode & 64 else first
    high = fourth if opcode & 64 else third
    return (high if opcode & 128 else low) >> (opcode & 63) & 1


@native_inline
def is_prefix(byte: int) -> int:
    """Whether a byte is a legacy prefix or REX."""
    return byte & 0xF0 == 0x40 or among(byte, PREFIX_0, PREFIX_1, PREFIX_2, PREFIX_3)


@native
def operand_length(at: int) -> int:
    """Bytes of ModRM, SIB and displacement."""
    modrm = load8(at)
    mode = modrm >> 6
    if mode == 3:
        return 1
    length = 1
    base = modrm & 7
    if base == 4:
        length = 2
        base = load8(at + 1) & 7
    if mode == 1:
        return length + 1
    if mode == 2 or base == 5:
        return length + 4
    return length


@native
def map_length(at: int, opcode: int, which: int) -> int:
    """Bytes behind an opcode of the maps 0F (1), 0F 38 (2), 0F 3A (3), and those behind."""
    if which == 1:
        if among(opcode, PLAIN_0, PLAIN_1, PLAIN_2, PLAIN_3):
            return 4 if opcode & 0xF0 == 0x80 else 0
        if among(opcode, SHORT_0, SHORT_1, SHORT_2, SHORT_3):
            return operand_length(at) + 1
        return operand_length(at)
    return operand_length(at) + 1 if which == 3 else operand_length(at)


@native
def plain_length(at: int, opcode: int, wide: int, narrow: int, short_address: int) -> int:
    """Bytes behind an opcode of one byte; REX.W, prefix 66 and prefix 67 are given."""
    length = 0
    if among(opcode, MODRM_0, MODRM_1, MODRM_2, MODRM_3):
        length = operand_length(at)
    word = 2 if narrow and not wide else 4
    if opcode & 0xFE == 0xF6 and load8(at) & 0x30 == 0:
        return length + (1 if opcode == 0xF6 else word)
    if among(opcode, BYTE_0, BYTE_1, BYTE_2, BYTE_3):
        return length + 1
    if opcode & 0xF8 == 0xB8 and wide:
        return 8
    if among(opcode, WORD_0, WORD_1, WORD_2, WORD_3):
        return length + word
    if opcode & 0xFE == 0xE8:
        return 4
    if opcode & 0xFC == 0xA0:
        return 4 if short_address else 8
    if opcode == 0xC8:
        return 3
    return 2 if opcode in (0xC2, 0xCA) else length


@native
def shape(at: int) -> int:
    """Length of the instruction at a host address; 256 times the offset of its opcode is added.

    The opcode is that behind prefixes, REX, VEX and EVEX. Up to `LONGEST` bytes and a few more are
    read. Bytes that are no instruction have some length, at least 1.
    """
    begin = at
    narrow = 0
    short_address = 0
    wide = 0
    byte = load8(at)
    while is_prefix(byte) and at - begin < LONGEST:
        wide = 0  # REX counts only where it is the last one
        if byte == 0x66:
            narrow = 1
        elif byte == 0x67:
            short_address = 1
        elif byte & 0xF8 == 0x48:
            wide = 1
        at += 1
        byte = load8(at)
    where = at
    if byte == 0xC5:
        at += 2
        where = at
        at += 1 + map_length(at + 1, load8(at), 1)
    elif byte == 0xC4:
        which = load8(at + 1) & 31
        at += 3
        where = at
        at += 1 + map_length(at + 1, load8(at), which)
    elif byte == 0x62:
        which = load8(at + 1) & 7
        at += 4
        where = at
        at += 1 + map_length(at + 1, load8(at), which)
    elif byte == 0x0F:
        second = load8(at + 1)
        if second == 0x38:
            at += 3 + map_length(at + 3, 0, 2)
        elif second == 0x3A:
            at += 3 + map_length(at + 3, 0, 3)
        else:
            at += 2 + map_length(at + 2, second, 1)
    else:
        at += 1 + plain_length(at + 1, byte, wide, narrow, short_address)
    return at - begin | (where - begin) << 8
