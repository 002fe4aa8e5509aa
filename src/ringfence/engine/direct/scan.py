"""Which pages of code a process may execute: those with no instruction that is silently different.

In a process most sensitive instructions trap, and a trapped one is translated. Some don't, and show
the host's machine in place of the guest's: `critical` instructions in Popek and Goldberg's sense
(``cpu.sensitive``). Code in a page that has the bytes of one of them, wherever, isn't executed
there but translated. Looked for are

CPUID, XGETBV, RDPID, LSL, RDPKRU and WRPKRU, RDPRU, SYSENTER, VMCALL and VMMCALL. RDTSC and RDTSCP
trap by PR_SET_TSC. SGDT, SIDT, SLDT, SMSW and STR trap where UMIP is on, or show what Linux shows
as a dummy there, which `run.eligible` asks of the guest. Selectors, LAR, VERR, VERW and far
transfers behave as in the guest, whose selectors have to be those of Linux (the same).

The bytes alone mean little: one page in ten has them somewhere, mostly in a displacement or an
immediate. So decoding is begun at `STARTS` places in front of them, and as code read from a wrong
start soon falls into step, these vote whether an instruction is there. Code that hides an
instruction from every disassembler gets it executed, and sees the host's answer, as any process
does.

Such a page can be *defused*: in a copy of it, each critical instruction becomes one that is
invalid, and so stops the process and is translated (`defuse`). Who reads the page as data sees that
one byte. As data could also be what looks like an instruction, that is done only where everything
around it looks like a compiler's code.

Where a page ends in the first bytes of one, the page behind it decides; while that is not there, it
is not executed.
"""

from __future__ import annotations

from ringfence.engine.direct.lengths import among, opcode_mask, shape
from ringfence.native.dialect import (
    load8,
    load64,
    native,
    native_inline,
    rep_movsb,
    rep_stosb,
    store8,
)

ONES = 0x0101010101010101
HIGH = 0x8080808080808080
RUN_UP = 160
"""Bytes from the first start to the instruction in question."""
STARTS = 32
FRONT = 256
"""Bytes of the page before that are looked at, too: offsets count from their beginning."""
PAGE_END = FRONT + 4096
SCAN_BYTES = PAGE_END + 64


@native
def is_instruction(room: int, begin: int, offset: int) -> int:
    """Whether the 0F at an offset is an instruction's opcode; bytes are known from ``begin`` on."""
    first = offset - RUN_UP if offset > begin + RUN_UP else begin
    votes = 0
    starts = 0
    for n in range(STARTS):
        at = first + n
        if at <= offset:
            starts += 1
            while at <= offset:
                found = shape(room + at)
                if at + (found >> 8) == offset:
                    votes += 1
                at += found & 0xFF
    return 1 if votes * 4 >= starts else 0


@native
def is_critical(at: int, left: int, before: int) -> int:
    """Whether the bytes behind an 0F are a critical instruction's.

    ``left`` bytes are there; ``before``: so many are in front of the 0F.
    """
    if left == 0:
        return 1
    second = load8(at)
    if second in (0xA2, 0x03, 0x34):  # CPUID, LSL, SYSENTER
        return 1
    if second == 0x01:
        if left == 1:
            return 1
        third = load8(at + 1)
        # VMCALL, XGETBV, VMMCALL, RDPKRU, WRPKRU, RDPRU
        return 1 if third in (0xC1, 0xD0, 0xD9, 0xEE, 0xEF, 0xFD) else 0
    if second == 0xC7 and left > 1 and load8(at + 1) >= 0xF8:
        # RDPID is RDSEED with F3, perhaps a REX prefix between; what isn't seen may be that.
        if before == 0 or load8(at - 2) == 0xF3:
            return 1
        return 1 if load8(at - 2) & 0xF0 == 0x40 and (before == 1 or load8(at - 3) == 0xF3) else 0
    return 0


@native_inline
def first_known(preceding: int) -> int:
    """From where on bytes are known."""
    return 0 if preceding else FRONT


@native
def are_harmless(room: int, begin: int, first: int, end: int) -> int:
    """Whether no critical instruction is in the eight bytes at ``first``."""
    for offset in range(first, first + 8):
        if load8(room + offset) == 0x0F:
            critical = is_critical(room + offset + 1, end - 1 - offset, offset - begin)
            if critical and is_instruction(room, begin, offset):
                return 0
    return 1


@native
def is_harmless(host: int, preceding: int, following: int, room: int) -> int:
    """Whether the page at a host address has no critical instruction in it, nor begins one.

    ``preceding``, ``following``: host addresses of the pages around it, 0 if not known; ``room``:
    SCAN_BYTES for a copy, which nobody changes meanwhile.
    """
    rep_stosb(room, 0, SCAN_BYTES)
    rep_movsb(room + FRONT, host, 4096)
    end = PAGE_END
    if preceding:
        rep_movsb(room, preceding + 4096 - FRONT, FRONT)
    if following:
        rep_movsb(room + PAGE_END, following, SCAN_BYTES - PAGE_END)
        end = SCAN_BYTES
    begin = first_known(preceding)
    for word in range(FRONT // 8, PAGE_END // 8):
        value = load64(room + word * 8) ^ (ONES * 0x0F)
        # Whether any byte is 0F; which ones is looked at one by one.
        if (value - ONES) & ~value & HIGH and not are_harmless(room, begin, word * 8, end):
            return 0
    return 1


# --- traps in place of critical instructions ----------------------------------------------------

INVALID = 0x06
"""An opcode that is none in 64-bit mode."""
AROUND = 64
"""Bytes before and behind a critical instruction that have to look like code."""
USUAL_0, USUAL_1, USUAL_2, USUAL_3 = opcode_mask(
    [8 * n + form for n in range(8) for form in (1, 3)],
    (0x20, 0x25), (0x28, 0x2D), (0x30, 0x35), (0x38, 0x3D), 0x05, 0x08, 0x0A, 0x0C, 0x0D, 0x15,
    0x1D, (0x50, 0x5F), 0x63, (0x68, 0x6B), (0x70, 0x7F), 0x80, 0x81, (0x83, 0x8B), 0x8D, 0x90,
    0x98, 0x99, 0xA4, 0xA5, (0xA8, 0xAB), (0xB0, 0xC7), 0xC9, (0xD0, 0xD3), 0xE8, 0xE9, 0xEB,
    0xF6, 0xF7, 0xFE, 0xFF, 0x62,
)  # fmt: skip
"""Opcodes of one byte that compilers use much; VEX and EVEX count as such."""
KNOWN_0, KNOWN_1, KNOWN_2, KNOWN_3 = opcode_mask(
    [], 0x01, 0x03, 0x05, 0x0B, 0x0D, (0x10, 0x17), 0x1E, 0x1F, (0x28, 0x2F), 0x31, 0x34, 0x38,
    0x3A,
    (0x40, 0x4F), (0x51, 0x76), 0x77, (0x7E, 0xA2), 0xA3, 0xAE, 0xAF, 0xB0, 0xB1, 0xB3, 0xB6, 0xB7,
    (0xBA, 0xBF), 0xC0, 0xC1, 0xC2, (0xC4, 0xCF), (0xD1, 0xFE),
)  # fmt: skip
"""The same behind an 0F."""


@native
def is_usual(at: int, where: int) -> int:
    """Whether a compiler might have written an instruction, whose opcode is at ``where``."""
    first = load8(at)
    if first in (0xC4, 0xC5, 0x62):
        return 1
    opcode = load8(where)
    if opcode == 0x0F:
        return among(load8(where + 1), KNOWN_0, KNOWN_1, KNOWN_2, KNOWN_3)
    return among(opcode, USUAL_0, USUAL_1, USUAL_2, USUAL_3)


@native
def is_code(room: int, at: int, offset: int) -> int:
    """Whether decoding from ``at`` on finds nothing but usual instructions around ``offset``.

    One of them has to begin, behind its prefixes, at ``offset``.
    """
    met = 0
    while at < offset + AROUND and at < PAGE_END:
        found = shape(room + at)
        where = at + (found >> 8)
        if where == offset:
            met = 1
        if at + AROUND > offset and not is_usual(room + at, room + where):
            return 0
        at += found & 0xFF
    return met


@native
def is_certain(room: int, begin: int, offset: int) -> int:
    """Whether the 0F at an offset is an instruction's opcode beyond doubt."""
    if offset < begin + RUN_UP:
        return 0
    votes = 0
    for n in range(STARTS):
        votes += is_code(room, offset - RUN_UP + n, offset)
    return 1 if votes * 4 >= STARTS * 3 else 0


@native
def is_critical_here(room: int, begin: int, offset: int) -> int:
    """Whether a critical instruction's opcode is at an offset of a copy."""
    if load8(room + offset) != 0x0F:
        return 0
    left = SCAN_BYTES - 1 - offset
    critical = is_critical(room + offset + 1, left, offset - begin)
    return critical and is_instruction(room, begin, offset)


@native
def defuse(room: int, preceding: int) -> int:
    """Put traps in place of critical instructions, in a copy that `is_harmless` made.

    0 where one of them is not certain to be an instruction; then nothing is changed.
    """
    begin = first_known(preceding)
    for offset in range(FRONT, PAGE_END):
        if is_critical_here(room, begin, offset) and not is_certain(room, begin, offset):
            return 0
    offset = PAGE_END
    while offset > FRONT:
        # Backwards: what is in front of the others, by which they are found, is as it was.
        offset -= 1
        if is_critical_here(room, begin, offset):
            store8(room + offset, INVALID)
    return 1
