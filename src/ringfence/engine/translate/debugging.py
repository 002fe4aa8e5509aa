"""Between two instructions: single steps, breakpoints and watchpoints of the guest and its owner.

Ordinary code pays nothing for any of this. A **watched page** is never entered in the TLBs, so that
accesses to it are made by hand, where `note_access` compares addresses. An **address with a
breakpoint** is translated as a call of `fx_breakpoint`, a trace of its own. **Single steps**, and
instructions whose breakpoint is to be passed, run in MODE_STEP: traces of one instruction, each
found by a look-up. All three come to `boundary`, which the look-up calls while ``debug_pending``
says so: there, and only there, is decided what happens before the next instruction.

An instruction *begins* there, too, and is known to have run when the look-up comes again with
``stepped`` set (its trace does that behind the check for attention). What an interrupt or a second
look-up of its page puts in between does not count as running it.

Sources: Intel SDM vol. 3, 18.3.1 (when debug exceptions come), 6.8.3 (MOV SS), 6.9 (priorities).
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.debug import (
    DR6_BS,
    DR7_ENABLE,
    RW_ACCESS,
    RW_EXECUTE,
    RW_WRITE,
    armed,
    execution_hits,
    raise_debug,
)
from ringfence.cpu.state import (
    EXIT,
    FLAG_RF,
    FLAG_TF,
    OK,
    SHADOW_MOV_SS,
    SHADOW_STI,
)
from ringfence.engine.translate.block import (
    EXIT_DEBUG,
    MODE_STEP,
    STOP_BREAKPOINT,
    STOP_STEP,
    Vcpu,
)
from ringfence.engine.translate.builder import line_mask
from ringfence.engine.translate.pages import code_address, page_at, retire
from ringfence.engine.translate.tables import PAGE, PageRow, Writer
from ringfence.memory.mmu import (
    OFFSET_MASK,
    PAGE_MASK,
    PENDING_GUEST,
    PENDING_LOOK,
    PENDING_OWNER,
    tlb_flush_all,
)
from ringfence.native.dialect import external, load64, native, native_inline, store64

BREAKS_MAX = 1024
"""Breakpoints of the owner's."""
NO_SKIP = 1 << 63
"""No address of code."""
LONGEST = 15
"""Bytes of an instruction."""


@external
def mode_changed(cpu: Vcpu) -> int:
    """See ``cpu.ports``."""
    return 0


# --- what stops an instruction ------------------------------------------------------------------


@native
def has_break(table: int, count: int, address: int) -> int:
    """Whether an address is in a table of addresses."""
    for n in range(count):
        if load64(table + n * 8) == address:
            return 1
    return 0


@native_inline
def owner_stops(vcpu: Vcpu, why: int) -> int:
    """Leave for the owner's debugger."""
    vcpu.exit_reason = EXIT_DEBUG
    vcpu.exit_data[0] = why
    return EXIT


@native
def undo_begin(vcpu: Vcpu) -> int:
    """The instruction that was to run has not: an interrupt or another look-up came before it."""
    if not vcpu.stepped:
        vcpu.other_flags = vcpu.other_flags | (vcpu.begun_flags & FLAG_RF)
        vcpu.begun_flags = 0
    return OK


@native
def begin(vcpu: Vcpu) -> int:
    """Let the instruction at RIP run, in MODE_STEP if it takes that."""
    flags = vcpu.other_flags & (FLAG_TF | FLAG_RF)
    vcpu.begun_flags = flags
    vcpu.other_flags = vcpu.other_flags & ~FLAG_RF
    vcpu.passing = has_break(vcpu.breaks, vcpu.break_count, code_address(vcpu, vcpu.mode))
    vcpu.debug_pending = vcpu.debug_pending & ~PENDING_LOOK
    mode_changed(vcpu)
    if not vcpu.mode & MODE_STEP:
        vcpu.begun_flags = 0
    return OK


@native
def end_instruction(vcpu: Vcpu) -> int:
    """Settle the instruction that ran: its single-step trap, the end of what it was let pass."""
    undo_begin(vcpu)
    if vcpu.stepped:
        vcpu.stepped = 0
        if not vcpu.other_flags & FLAG_RF or code_address(vcpu, vcpu.mode) != vcpu.owner_skip:
            vcpu.owner_skip = NO_SKIP  # else it is a string instruction that goes on
        if vcpu.begun_flags & FLAG_TF:
            vcpu.debug_pending = vcpu.debug_pending | DR6_BS
        vcpu.begun_flags = 0
        return 1
    return 0


@native
def boundary(vcpu: Vcpu) -> int:
    """Before the instruction at RIP: OK, FAULT with a #DB pending, or EXIT for the owner."""
    ran = end_instruction(vcpu)
    if vcpu.interrupt_shadow == SHADOW_MOV_SS and vcpu.rip == vcpu.next_rip:
        # Traps wait for the instruction behind MOV SS, but for its single step, which is lost.
        vcpu.interrupt_shadow = SHADOW_STI
        vcpu.debug_pending = vcpu.debug_pending & ~DR6_BS
        return begin(vcpu)
    watched = vcpu.debug_pending & PENDING_OWNER
    if watched or (ran and vcpu.owner_step):
        vcpu.debug_pending = vcpu.debug_pending & ~PENDING_OWNER
        return owner_stops(vcpu, watched if watched else STOP_STEP)
    traps = vcpu.debug_pending & PENDING_GUEST
    if traps:
        vcpu.debug_pending = vcpu.debug_pending & ~PENDING_GUEST
        return raise_debug(vcpu, traps)
    if vcpu.break_count:
        address = code_address(vcpu, vcpu.mode)
        known = has_break(vcpu.owner_breaks, vcpu.owner_break_count, address)
        if known and address != vcpu.owner_skip:
            return owner_stops(vcpu, STOP_BREAKPOINT)
        if not vcpu.other_flags & FLAG_RF:
            hit = execution_hits(vcpu, address)
            if hit:
                return raise_debug(vcpu, hit)
    return begin(vcpu)


@native
def interrupted(vcpu: Vcpu) -> int:
    """An exception is about to be delivered: what the instruction noted is void.

    For an owner who steps, coming to the handler is a step.
    """
    vcpu.debug_pending = vcpu.debug_pending & ~(PENDING_GUEST | PENDING_OWNER)
    undo_begin(vcpu)
    vcpu.begun_flags = 0
    vcpu.stepped = vcpu.owner_step
    return OK


@native
def fx_breakpoint(vcpu: Vcpu) -> int:
    """What stands for an instruction with a breakpoint: look closer."""
    vcpu.debug_pending = vcpu.debug_pending | PENDING_LOOK
    return OK


@native
def step_masked(cpu: Vcpu) -> int:
    """See ``cpu.ports``."""
    cpu.begun_flags = cpu.begun_flags & ~FLAG_TF
    return 0


@native
def debug_note(cpu: Vcpu, bits: int) -> int:
    """See ``cpu.ports``."""
    cpu.debug_pending = cpu.debug_pending | bits
    return 0


@native
def wants_step(vcpu: Vcpu) -> int:
    """Whether the next instruction runs in MODE_STEP."""
    return vcpu.other_flags & FLAG_TF or vcpu.owner_step or vcpu.passing


# --- arming ---------------------------------------------------------------------------------------


@native
def retire_address(vcpu: Vcpu, address: int) -> int:
    """Drop the traces that hold the instruction at a linear address, wherever it leads."""
    w: Writer = cast(Writer, vcpu.writer)
    offset = address & OFFSET_MASK
    lines = line_mask(offset, offset + LONGEST if offset + LONGEST < PAGE else PAGE)
    for number in range(1, w.page_count):
        retire_in(vcpu, w, cast(PageRow, page_at(w, number)), address & PAGE_MASK, lines)
    return 0


@native_inline
def retire_in(vcpu: Vcpu, w: Writer, page: PageRow, linear: int, lines: int) -> int:
    """The same in one code page, if it is the one."""
    if page.linear == linear:
        retire(vcpu, w, page, PAGE, lines)
    return 0


@native
def retire_missing(vcpu: Vcpu, table: int, count: int, other: int, others: int) -> int:
    """Drop the traces of the addresses of one table that are not in the other."""
    for n in range(count):
        address = load64(table + n * 8)
        if not has_break(other, others, address):
            retire_address(vcpu, address)
    return 0


@native
def debug_changed(cpu: Vcpu) -> int:
    """See ``cpu.ports``; also after a change of the owner's breakpoints and watchpoints."""
    had = cpu.break_count
    old = cpu.breaks + (BREAKS_MAX + 4) * 8
    for n in range(had):
        store64(old + n * 8, load64(cpu.breaks + n * 8))
    count = cpu.owner_break_count
    for n in range(count):
        store64(cpu.breaks + n * 8, load64(cpu.owner_breaks + n * 8))
    execution = armed(cpu, 1 << RW_EXECUTE) if cpu.dr[7] & DR7_ENABLE else 0
    for n in range(4):
        if execution >> n & 1:
            store64(cpu.breaks + count * 8, cpu.dr[n])
            count += 1
    cpu.break_count = count
    retire_missing(cpu, cpu.breaks, count, old, had)
    retire_missing(cpu, old, had, cpu.breaks, count)
    watches = cpu.owner_watches or armed(cpu, 1 << RW_WRITE | 1 << RW_ACCESS)
    if watches or cpu.watches:
        tlb_flush_all(cpu)
    cpu.watches = 1 if watches else 0
    return 0
