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

Where a page ends in the first bytes of one, the page behind it decides; while that is not there, it
is not executed.
"""

from __future__ import annotations

from ringfence.engine.direct.lengths import shape
from ringfence.native.dialect import load8, load64, native, rep_movsb, rep_stosb

ONES = 0x0101010101010101
HIGH = 0x8080808080808080
RUN_UP = 96
"""Bytes from the first start to the instruction in question."""
STARTS = 32
SCAN_BYTES = 4096 + 64


@native
def is_instruction(page: int, offset: int) -> int:
    """Whether the 0F at an offset of a page is an instruction's opcode."""
    first = offset - RUN_UP if offset > RUN_UP else 0
    votes = 0
    starts = 0
    for n in range(STARTS):
        at = first + n
        if at <= offset:
            starts += 1
            while at <= offset:
                found = shape(page + at)
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


@native
def are_harmless(page: int, first: int, left: int) -> int:
    """The same of the eight bytes at ``first``; ``left`` bytes are known from the page's start."""
    for offset in range(first, first + 8):
        if load8(page + offset) == 0x0F:
            critical = is_critical(page + offset + 1, left - 1 - offset, offset)
            if critical and is_instruction(page, offset):
                return 0
    return 1


@native
def is_harmless(host: int, following: int, room: int) -> int:
    """Whether the page at a host address has no critical instruction in it, nor begins one.

    ``following``: host address of the page behind it, 0 if that is not known; ``room``: SCAN_BYTES
    for a copy, which nobody changes meanwhile.
    """
    rep_movsb(room, host, 4096)
    rep_stosb(room + 4096, 0, SCAN_BYTES - 4096)
    left = 4096
    if following:
        rep_movsb(room + 4096, following, SCAN_BYTES - 4096)
        left = SCAN_BYTES
    host = room
    for word in range(512):
        value = load64(host + word * 8) ^ (ONES * 0x0F)
        # Whether any byte is 0F; which ones is looked at one by one.
        if (value - ONES) & ~value & HIGH and not are_harmless(host, word * 8, left):
            return 0
    return 1
