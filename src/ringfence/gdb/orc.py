"""How to unwind a Linux kernel's stack: its ORC tables, as the call frame information GDB reads.

Distributions' kernels have no frame pointers and no DWARF. They have ORC instead: for each place in
the code, from which register and at which distance the caller's frame is found. Translated row by
row into DWARF's instructions, this gives GDB exact backtraces, through interrupts and system calls,
too. What ORC doesn't know, the callers' other registers, is said to be unknown.

Sources: Linux, arch/x86/include/asm/orc_types.h and kernel/unwind_orc.c, before and since 6.4;
DWARF 4, 6.4 (Call Frame Information) and 7.23; AMD64 psABI, figure 3.36 (register numbers).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# DWARF register numbers.
RDX, RBP, RSP, RDI, R10, R13, RIP = 1, 6, 7, 5, 10, 13, 16
SAVED = {
    15: 0x00, 14: 0x08, 13: 0x10, 12: 0x18, RBP: 0x20, 3: 0x28, 11: 0x30, 10: 0x38, 9: 0x40,
    8: 0x48, 0: 0x50, 2: 0x58, RDX: 0x60, 4: 0x68, RDI: 0x70, RIP: 0x80, RSP: 0x98,
}  # fmt: skip
"""Where ``struct pt_regs`` has the registers, by DWARF number."""
SAVED_PARTIAL = {RIP: 0x00, RSP: 0x18}
"""The same of the frame that the CPU pushes."""
# ORC's registers, as far as it finds frames by them.
ORC_PREV_SP, ORC_BP, ORC_SP, ORC_BP_INDIRECT, ORC_SP_INDIRECT = 1, 4, 5, 8, 9
ORC_DIRECT = {2: RDX, 3: RDI, ORC_BP: RBP, ORC_SP: RSP, 6: R10, 7: R13}
CALL, REGS, REGS_PARTIAL, NOTHING = "call", "regs", "partial", "nothing"
OLD_TYPES = (CALL, REGS, REGS_PARTIAL, NOTHING)
NEW_TYPES = (NOTHING, NOTHING, CALL, REGS, REGS_PARTIAL, NOTHING, NOTHING, NOTHING)
_DATA_ALIGN = -8


@dataclass(frozen=True, slots=True)
class Row:
    """How to unwind from an address on: see ``struct orc_entry``."""

    address: int
    sp_offset: int
    bp_offset: int
    sp_reg: int
    bp_reg: int
    kind: str


def read_orc(addresses: bytes, entries: bytes, base: int, *, new: bool) -> list[Row]:
    """Rows by address, of the sections ``.orc_unwind_ip`` (at ``base``) and ``.orc_unwind``.

    ``new``: the entries are as since Linux 6.4 (which has a section ``.orc_header``).
    """
    rows = []
    places = struct.iter_unpack("<i", addresses[: len(addresses) & ~3])
    for n, ((distance,), (sp, bp, bits)) in enumerate(
        zip(places, struct.iter_unpack("<hhH", entries[: len(entries) // 6 * 6]), strict=False)
    ):
        kind = NEW_TYPES[bits >> 8 & 7] if new else OLD_TYPES[bits >> 8 & 3]
        if not new and bits >> 10 & 1:
            kind = NOTHING  # the end of the stack
        rows.append(Row(base + 4 * n + distance, sp, bp, bits & 15, bits >> 4 & 15, kind))
    rows.sort(key=lambda row: row.address)
    return rows


def debug_frame(rows: Sequence[Row], starts: Sequence[int], end: int) -> bytes:
    """A section ``.debug_frame``, with an entry for each function.

    Parameters
    ----------
    rows : sequence of Row
        By address.
    starts : sequence of int
        Where functions begin, ascending.
    end : int
        Where the last one ends.
    """
    out = bytearray(_common())
    known = [row.address for row in rows]
    for start, stop in pairwise((*starts, end)):
        first = max(bisect_right(known, start) - 1, 0)
        last = bisect_right(known, stop - 1)
        if start < stop and rows and known[first] < stop:
            body = struct.pack("<IQQ", 0, start, stop - start)
            body += b"".join(_instructions(rows[first:last], start))
            out += _record(body)
    return bytes(out)


def _common() -> bytes:
    """The entry that all others refer to (CIE): nothing is known but what rows say."""
    undefined = b"".join(bytes((0x07, number)) for number in range(16) if number not in (RBP, RSP))
    head = struct.pack("<IBB", 0xFFFFFFFF, 1, 0) + _unsigned(1) + _signed(_DATA_ALIGN)
    return _record(head + bytes((RIP,)) + _def_cfa(RSP, 8) + _offset(RIP, -8) + undefined)


def _record(body: bytes) -> bytes:
    padding = -(len(body) + 4) % 8
    return struct.pack("<I", len(body) + padding) + body + bytes(padding)


def _instructions(rows: Sequence[Row], start: int) -> Iterator[bytes]:
    """Call frame instructions from a function's start on."""
    at = start
    before: Row | None = None
    for row in rows:
        if row.address > at:
            yield b"\x04" + struct.pack("<I", row.address - at)  # DW_CFA_advance_loc4
            at = row.address
        yield from _rules(row, before)
        before = row


def _rules(row: Row, before: Row | None) -> Iterator[bytes]:
    """What changes from one row to the next."""
    kind = _kind(row)
    was = CALL if before is None else _kind(before)
    saved = {REGS: SAVED, REGS_PARTIAL: SAVED_PARTIAL}.get(kind, {})
    if kind != was:
        for number in {REGS: SAVED, REGS_PARTIAL: SAVED_PARTIAL, NOTHING: (RIP,)}.get(was, ()):
            yield bytes((0x06, number))  # DW_CFA_restore_extended
    if kind == NOTHING:
        yield bytes((0x07, RIP))  # DW_CFA_undefined: there is no caller
        return
    yield _frame(row)
    if kind != was:
        for number, place in saved.items():
            yield _offset(number, place)
    if kind != REGS:
        if row.bp_reg == ORC_PREV_SP:
            yield _offset(RBP, row.bp_offset)
        else:
            yield bytes((0x08, RBP))  # DW_CFA_same_value


def _kind(row: Row) -> str:
    known = row.sp_reg in ORC_DIRECT or row.sp_reg in (ORC_BP_INDIRECT, ORC_SP_INDIRECT)
    return row.kind if known else NOTHING


def _frame(row: Row) -> bytes:
    """How the canonical frame address is found: where the caller's stack is."""
    if row.sp_reg in ORC_DIRECT:
        return _def_cfa(ORC_DIRECT[row.sp_reg], row.sp_offset)
    if row.sp_reg == ORC_BP_INDIRECT:
        expression = bytes((0x70 + RBP,)) + _signed(row.sp_offset) + b"\x06"  # breg, deref
    else:
        expression = bytes((0x70 + RSP, 0, 0x06)) + b"\x11" + _signed(row.sp_offset) + b"\x22"
    return b"\x0f" + _unsigned(len(expression)) + expression  # DW_CFA_def_cfa_expression


def _def_cfa(register: int, offset: int) -> bytes:
    if offset >= 0:
        return b"\x0c" + _unsigned(register) + _unsigned(offset)
    return b"\x12" + _unsigned(register) + _signed(offset // _DATA_ALIGN)  # DW_CFA_def_cfa_sf


def _offset(register: int, place: int) -> bytes:
    """DW_CFA_offset_extended_sf: the register is saved at so many bytes from the frame address."""
    return b"\x11" + _unsigned(register) + _signed(place // _DATA_ALIGN)


def _unsigned(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _signed(value: int) -> bytes:
    out = bytearray()
    while not -0x40 <= value < 0x40:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value & 0x7F))
