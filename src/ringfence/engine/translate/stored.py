"""Placing code natively: relocation, and the traces of a page that come from the disk.

``StoredTrace`` declares the row that the store writes and these functions read. All addresses of
code are executable ones; ``Vcpu.code_alias`` leads to where they can be written.
"""

from __future__ import annotations

from typing import Annotated, cast

from ringfence.engine.translate.block import Vcpu
from ringfence.engine.translate.dispatch import trace_insert, trace_row
from ringfence.engine.translate.trace import RELOC_FAR, RELOC_ITLB, RELOC_VA32, RELOC_VA64
from ringfence.memory.mmu import ITLB_ENTRIES
from ringfence.native.dialect import (
    load64,
    native,
    native_inline,
    sext,
    store8,
    store32,
    store64,
)
from ringfence.native.layout import Struct, u32, u64


class StoredTrace(Struct):
    """One trace's row; positions count from the trace's own code."""

    lines: Annotated[int, u64]
    offset: Annotated[int, u32]
    end: Annotated[int, u32]
    instructions: Annotated[int, u32]
    code: Annotated[int, u32]
    """Where its code starts in the blob's code."""
    length: Annotated[int, u32]
    indirect: Annotated[int, u32]
    checked: Annotated[int, u32]
    local: Annotated[int, u32]
    reenter: Annotated[int, u32]
    reenter_local: Annotated[int, u32]
    relocation: Annotated[int, u32]
    """Index of its first relocation pair."""
    relocations: Annotated[int, u32]
    mark: Annotated[int, u32]
    marks: Annotated[int, u32]
    swaps: Annotated[int, u32]
    dead: Annotated[int, u32]
    """Set in memory once the trace was killed."""


STORED_BYTES = StoredTrace.size


@native
def relocate(code: int, words: int, count: int, page: int, number: int, itlb: int) -> int:
    """Fill in the words of placed code that depend on its place (see ``trace.RELOC_*``).

    ``code`` is the writable host address, ``words`` an array of ``count`` pairs of 32-bit words.
    Returns 1 where an address does not fit the 32 bits that it has.
    """
    bad = 0
    for i in range(count):
        pair = load64(words + i * 8)
        position = code + ((pair & (RELOC_FAR - 1)) >> 2)
        addend = sext(pair >> 32, 32) + (1 << 32 if pair & RELOC_FAR else 0)
        kind = pair & 3
        value = page + addend
        if kind == RELOC_VA32:
            if sext(value, 32) != value:
                bad = 1
            store32(position, value)
        elif kind == RELOC_VA64:
            store64(position, value)
        elif kind == RELOC_ITLB:
            store32(position, itlb + ((value >> 12) & (ITLB_ENTRIES - 1)) * 4)
        else:
            store32(position, number)
    return bad


@native_inline
def write_jump(vcpu: Vcpu, address: int, target: int) -> int:
    """Overwrite placed code with a jump; both are executable addresses."""
    store8(address + vcpu.code_alias, 0xE9)
    store32(address + vcpu.code_alias + 1, target - address - 5)
    return 0


@native_inline
def install_row(
    vcpu: Vcpu, row: StoredTrace, number: int, page: int, itlb: int, code: int, words: int
) -> int:
    """Relocate one trace, and enter it unless there is one already; its entry in force."""
    key = (number << 12) | row.offset
    start = code + row.code
    bad = relocate(
        start + vcpu.code_alias, words + row.relocation * 8, row.relocations, page, number, itlb
    )
    entry = trace_row(vcpu, key)
    if load64(entry + 16) == 0 and not bad:
        trace_insert(vcpu, key, start + row.local, start + row.checked, start + row.indirect)
    return load64(entry + 16)


@native_inline
def row_offset(row: StoredTrace) -> int:
    """The guest offset that a row is for."""
    return row.offset


@native
def install_stored(
    vcpu: Vcpu,
    number: int,
    page: int,
    itlb: int,
    code: int,
    rows: int,
    count: int,
    words: int,
    wanted: int,
) -> int:
    """Relocate and enter the traces of a page that came from the disk.

    ``words`` are the rows' relocation pairs, ``code`` the address of their code. Traces that are
    there already stay. Returns the checked entry of the trace at offset ``wanted``, 0 if it is
    not among them.
    """
    found = 0
    for i in range(count):
        row = cast(StoredTrace, rows + i * STORED_BYTES)
        entry = install_row(vcpu, row, number, page, itlb, code, words)
        if row_offset(row) == wanted:
            found = entry
    return found


@native_inline
def kill_row(vcpu: Vcpu, row: StoredTrace, number: int, code: int, lines: int, miss: int) -> int:
    """Make one trace unreachable if it depends on ``lines``; the lines it still depends on."""
    depends = row.lines
    if not depends & lines:
        return depends
    row.lines = 0
    if row.dead:
        return 0
    row.dead = 1
    vcpu.killed += 1
    start = code + row.code
    indirect = start + row.indirect + vcpu.code_alias
    store32(indirect, 0x2524FF65)  # jmp gs:[disp32]
    store32(indirect + 4, miss)
    checked = start + row.checked
    write_jump(vcpu, checked, start + row.reenter)
    write_jump(vcpu, start + row.local, start + row.reenter_local)
    key = (number << 12) | row.offset
    if load64(trace_row(vcpu, key) + 16) == checked:
        trace_insert(vcpu, key, 0, 0, 0)
    return 0


@native
def kill_stored(
    vcpu: Vcpu, number: int, code: int, rows: int, count: int, lines: int, miss: int
) -> int:
    """The guest wrote to ``lines``: make the stored traces unreachable that depend on them.

    ``miss`` is the displacement of the indirect-miss thunk. Returns the lines that the others
    depend on; ``vcpu.killed`` counts the killed.
    """
    left = 0
    for i in range(count):
        left = left | kill_row(
            vcpu, cast(StoredTrace, rows + i * STORED_BYTES), number, code, lines, miss
        )
    return left


@native_inline
def redirect_row(
    vcpu: Vcpu, row: StoredTrace, code: int, offset: int, checked: int, local: int
) -> int:
    """Lead one trace to its successor's entries if it is dead and at ``offset``."""
    if row.dead and row.offset == offset:
        write_jump(vcpu, code + row.code + row.checked, checked)
        write_jump(vcpu, code + row.code + row.local, local)
    return 0


@native
def redirect_stored(
    vcpu: Vcpu, code: int, rows: int, count: int, offset: int, checked: int, local: int
) -> int:
    """Lead the killed stored traces at ``offset`` to their successor's entries."""
    for i in range(count):
        redirect_row(vcpu, cast(StoredTrace, rows + i * STORED_BYTES), code, offset, checked, local)
    return 0


@native_inline
def succeed_row(
    vcpu: Vcpu, row: StoredTrace, code: int, rows: int, count: int, new_code: int
) -> int:
    """Lead the killed traces among ``rows`` to the new one of the same address."""
    start = new_code + row.code
    redirect_stored(vcpu, code, rows, count, row.offset, start + row.checked, start + row.local)
    return 0


@native
def succeed_stored(
    vcpu: Vcpu, code: int, rows: int, count: int, new_code: int, new_rows: int, new_count: int
) -> int:
    """The same for all traces of a page that came from the disk after others were killed."""
    for i in range(new_count):
        succeed_row(
            vcpu, cast(StoredTrace, new_rows + i * STORED_BYTES), code, rows, count, new_code
        )
    return 0
