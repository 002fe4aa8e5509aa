"""One piece of user code: the virtual CPU's registers go into the process, and come back changed.

`run_direct` is called where translated code has returned to user code of an address space that is
to run directly, with the whole CPU state in its block. It lets the process run, maps the pages that
it lacks, and returns at whatever else stops it. Nothing of that is carried out here: the registers
come back as they were in front of the instruction, which is then translated, and does there what it
does, fault, system call or a look at the CPU's identity. A stop because somebody wants the virtual
CPU (``attention``) leaves the CPU between two instructions; it goes on directly afterwards.
"""

from __future__ import annotations

from typing import cast

from ringfence.cpu.components import (
    AVX,
    AVX512_STATE,
    AVX_STATE,
    HEADER,
    HI16_ZMM,
    MXCSR,
    OPMASK,
    SSE_STATE,
    X87_REGISTERS,
    X87_STATE,
    XMM,
    ZMM_HI256,
)
from ringfence.cpu.debug import DR6_BS
from ringfence.cpu.flags import get_rflags
from ringfence.cpu.ports import mode_changed
from ringfence.cpu.state import (
    CR4_FSGSBASE,
    CR4_UMIP,
    EXIT,
    FLAG_AC,
    FLAG_DF,
    FLAG_ID,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    LDTR,
    OK,
    STATUS_FLAGS,
)
from ringfence.cpu.state import CS as SEGMENT_CS
from ringfence.cpu.state import DS as SEGMENT_DS
from ringfence.cpu.state import ES as SEGMENT_ES
from ringfence.cpu.state import FS as SEGMENT_FS
from ringfence.cpu.state import GS as SEGMENT_GS
from ringfence.cpu.state import SS as SEGMENT_SS
from ringfence.engine.direct.mapping import catch_up, fill, look
from ringfence.engine.direct.ptrace import (
    CS,
    DS,
    ES,
    FLAGS,
    FS,
    FS_BASE,
    GET_REGISTERS,
    GET_SIGNAL,
    GS,
    GS_BASE,
    NT_PRSTATUS,
    NT_X86_XSTATE,
    ORIGINAL_RAX,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    SET_REGISTERS,
    SIGNAL_SYSTEM_CALL,
    SIGSEGV,
    SIGSYS,
    SIGTRAP,
    SIGURG,
    SS,
    SYSTEM_CALLS,
    ask,
    registers,
    resume,
)
from ringfence.engine.direct.space import GENERAL_WORDS, Space
from ringfence.engine.translate.block import (
    ATTENTION_CLEAR,
    EXIT_ATTENTION,
    EXIT_DIRECT,
    Vcpu,
)
from ringfence.memory.mmu import PAGE_MASK, PENDING_DIRECT
from ringfence.native.dialect import (
    address_of,
    atomic_and64,
    atomic_or64,
    external,
    load8,
    load32,
    load64,
    native,
    native_inline,
    rep_movsb,
    rep_stosb,
    store16,
    store32,
    store64,
)
from ringfence.native.hostcall import host_call

USER_CS, USER_SS = 0x33, 0x2B
"""Selectors of 64-bit user code in Linux: only guests with the same run directly, as code sees
them."""
DIRECT_SPACES = 8
NOWHERE = 1
"""Not the address of any page table."""
EVENT_COST = 100_000
"""Nanoseconds of computing that a stop must be worth: who stops oftener is better translated."""
BUDGET_MAX = EVENT_COST * 400
CLOCK_GETTIME, CPU_CLOCK = 228, 2
SEGV_MAPERR, SEGV_ACCERR, SI_KERNEL = 1, 2, 0x80
LONGEST = 15
TRIES = 8
"""Page faults of one instruction until it is translated: one that writes to its own page never gets
all the rights that it needs at a time."""
INT3, INT1 = 0xCC, 0xF1


@external
def drop_stale_code(vcpu: Vcpu) -> int:
    """See ``translate.pages``."""
    return 0


@external
def wanted(vcpu: Vcpu) -> int:
    """See ``translate.dispatch``."""
    return 0


@native
def direct_space(vcpu: Vcpu) -> int:
    """The space of the present page tables, if it runs directly; else 0."""
    root = vcpu.cr3 & 0x000FFFFFFFFFF000
    for n in range(DIRECT_SPACES):
        if vcpu.direct_roots[n] == root:
            return vcpu.direct_spaces[n]
    return 0


@native
def disarm(vcpu: Vcpu, space: int) -> int:
    """Translate an address space's code from now on."""
    for n in range(DIRECT_SPACES):
        if vcpu.direct_spaces[n] == space:
            vcpu.direct_roots[n] = NOWHERE
    return 0


@native
def eligible(vcpu: Vcpu, space: Space) -> int:
    """Whether the code at RIP would behave in a process as it does in the guest."""
    if vcpu.mode != vcpu.direct_mode or vcpu.xcr0 != vcpu.xstate_mask:
        return 0
    if vcpu.cr4 & (CR4_FSGSBASE | CR4_UMIP) != CR4_FSGSBASE | CR4_UMIP:
        return 0
    if vcpu.seg_selector[SEGMENT_CS] != USER_CS or vcpu.seg_selector[SEGMENT_SS] != USER_SS:
        return 0
    if vcpu.seg_selector[SEGMENT_ES] | vcpu.seg_selector[SEGMENT_DS]:
        return 0
    if vcpu.seg_selector[SEGMENT_FS] | vcpu.seg_selector[SEGMENT_GS] | vcpu.seg_selector[LDTR]:
        return 0
    if not vcpu.flag_if or vcpu.other_flags & ~(FLAG_ID | FLAG_RF | FLAG_NT):
        return 0
    if vcpu.watches or vcpu.break_count or vcpu.interrupt_shadow:
        return 0
    if vcpu.seg_base[SEGMENT_FS] >> 47 or vcpu.seg_base[SEGMENT_GS] >> 47 or vcpu.rip >> 47:
        return 0
    return 1 if look(vcpu, space.stub) == 0 else 0


# --- registers -----------------------------------------------------------------------------------


@native
def put_general(vcpu: Vcpu, space: Space) -> int:
    """General registers, RIP, RFLAGS and segments of the guest's, for the process."""
    word = address_of(space.general[0])
    store64(word + RAX * 8, vcpu.gpr[0])
    store64(word + RCX * 8, vcpu.gpr[1])
    store64(word + RDX * 8, vcpu.gpr[2])
    store64(word + RBX * 8, vcpu.gpr[3])
    store64(word + RSP * 8, vcpu.gpr[4])
    store64(word + RBP * 8, vcpu.gpr[5])
    store64(word + RSI * 8, vcpu.gpr[6])
    store64(word + RDI * 8, vcpu.gpr[7])
    store64(word + R8 * 8, vcpu.gpr[8])
    store64(word + R9 * 8, vcpu.gpr[9])
    store64(word + R10 * 8, vcpu.gpr[10])
    store64(word + R11 * 8, vcpu.gpr[11])
    store64(word + R12 * 8, vcpu.gpr[12])
    store64(word + R13 * 8, vcpu.gpr[13])
    store64(word + R14 * 8, vcpu.gpr[14])
    store64(word + R15 * 8, vcpu.gpr[15])
    store64(word + ORIGINAL_RAX * 8, 0xFFFFFFFFFFFFFFFF)
    store64(word + RIP * 8, vcpu.rip)
    store64(word + CS * 8, USER_CS)
    store64(word + SS * 8, USER_SS)
    store64(word + FLAGS * 8, get_rflags(vcpu) & ~FLAG_RF)
    store64(word + FS_BASE * 8, vcpu.seg_base[SEGMENT_FS])
    store64(word + GS_BASE * 8, vcpu.seg_base[SEGMENT_GS])
    store64(word + DS * 8, 0)
    store64(word + ES * 8, 0)
    store64(word + FS * 8, 0)
    store64(word + GS * 8, 0)
    return OK


@native_inline
def take_segment(vcpu: Vcpu, number: int, selector: int) -> int:
    """User code has loaded a segment register; it gets data segments of its own level only."""
    if vcpu.seg_selector[number] != selector:
        vcpu.seg_selector[number] = selector
        vcpu.seg_base[number] = 0
        vcpu.seg_limit[number] = 0xFFFFFFFF
        vcpu.seg_attr[number] = FLAT_DATA if selector & 0xFFFC else 0
    return OK


FLAT_DATA, FLAT_CODE32 = 0xCF3, 0xCFB
"""Attributes of Linux's user segments."""


@native
def take_general(vcpu: Vcpu, space: Space) -> int:
    """The same registers of the process's, for the guest."""
    word = address_of(space.general[0])
    vcpu.gpr[0] = load64(word + RAX * 8)
    vcpu.gpr[1] = load64(word + RCX * 8)
    vcpu.gpr[2] = load64(word + RDX * 8)
    vcpu.gpr[3] = load64(word + RBX * 8)
    vcpu.gpr[4] = load64(word + RSP * 8)
    vcpu.gpr[5] = load64(word + RBP * 8)
    vcpu.gpr[6] = load64(word + RSI * 8)
    vcpu.gpr[7] = load64(word + RDI * 8)
    vcpu.gpr[8] = load64(word + R8 * 8)
    vcpu.gpr[9] = load64(word + R9 * 8)
    vcpu.gpr[10] = load64(word + R10 * 8)
    vcpu.gpr[11] = load64(word + R11 * 8)
    vcpu.gpr[12] = load64(word + R12 * 8)
    vcpu.gpr[13] = load64(word + R13 * 8)
    vcpu.gpr[14] = load64(word + R14 * 8)
    vcpu.gpr[15] = load64(word + R15 * 8)
    vcpu.rip = load64(word + RIP * 8)
    flags = load64(word + FLAGS * 8)
    vcpu.status = flags & STATUS_FLAGS
    vcpu.flag_df = 1 if flags & FLAG_DF else 0
    vcpu.other_flags = flags & OTHER_OF_USER
    take_segment(vcpu, SEGMENT_DS, load64(word + DS * 8) & 0xFFFF)
    take_segment(vcpu, SEGMENT_ES, load64(word + ES * 8) & 0xFFFF)
    take_segment(vcpu, SEGMENT_FS, load64(word + FS * 8) & 0xFFFF)
    take_segment(vcpu, SEGMENT_GS, load64(word + GS * 8) & 0xFFFF)
    vcpu.seg_base[SEGMENT_FS] = load64(word + FS_BASE * 8)
    vcpu.seg_base[SEGMENT_GS] = load64(word + GS_BASE * 8)
    selector = load64(word + CS * 8) & 0xFFFF
    if selector != USER_CS:
        vcpu.seg_selector[SEGMENT_CS] = selector
        vcpu.seg_attr[SEGMENT_CS] = FLAT_CODE32
        vcpu.seg_limit[SEGMENT_CS] = 0xFFFFFFFF
    vcpu.seg_selector[SEGMENT_SS] = load64(word + SS * 8) & 0xFFFF
    if selector != USER_CS or vcpu.other_flags & FLAG_TF:
        mode_changed(vcpu)
    return OK


OTHER_OF_USER = FLAG_ID | FLAG_NT | FLAG_AC | FLAG_TF
"""Flags that user code changes, beside status flags and DF: with AC and TF."""


@native_inline
def move_component(vcpu: Vcpu, space: Space, number: int, offset: int, size: int, out: int) -> int:
    """Copy one component to (``out``) or from the process's layout."""
    ours = address_of(vcpu.xsave[0]) + offset
    theirs = space.vector + space.vector_offsets[number]
    if out:
        rep_movsb(theirs, ours, size)
    else:
        rep_movsb(ours, theirs, size)
    return OK


@native_inline
def move_components(vcpu: Vcpu, space: Space, present: int, out: int) -> int:
    """Copy all components behind the header that are present."""
    if present & AVX_STATE:
        move_component(vcpu, space, AVX.number, AVX.offset, AVX.size, out)
    if present & 1 << OPMASK.number:
        move_component(vcpu, space, OPMASK.number, OPMASK.offset, OPMASK.size, out)
    if present & 1 << ZMM_HI256.number:
        move_component(vcpu, space, ZMM_HI256.number, ZMM_HI256.offset, ZMM_HI256.size, out)
    if present & 1 << HI16_ZMM.number:
        move_component(vcpu, space, HI16_ZMM.number, HI16_ZMM.offset, HI16_ZMM.size, out)
    return OK


@native
def put_vector(vcpu: Vcpu, space: Space) -> int:
    """The guest's vector and x87 state, for the process.

    X87 and SSE are given as present always, in their initial configuration if need be: MXCSR
    counts with them.
    """
    ours = address_of(vcpu.xsave[0])
    theirs = space.vector
    present = load64(ours + HEADER) & vcpu.xstate_mask
    if present & X87_STATE:
        rep_movsb(theirs, ours, MXCSR)
        rep_movsb(theirs + X87_REGISTERS, ours + X87_REGISTERS, XMM - X87_REGISTERS)
    else:
        rep_stosb(theirs, 0, MXCSR)
        store16(theirs, 0x37F)
        rep_stosb(theirs + X87_REGISTERS, 0, XMM - X87_REGISTERS)
    if present & SSE_STATE:
        rep_movsb(theirs + XMM, ours + XMM, 256)
    else:
        rep_stosb(theirs + XMM, 0, 256)
    store32(theirs + MXCSR, load32(ours + MXCSR))
    store64(theirs + HEADER, present | X87_STATE | SSE_STATE | space.foreign)
    return move_components(vcpu, space, present & (AVX_STATE | AVX512_STATE), 1)


@native
def take_vector(vcpu: Vcpu, space: Space) -> int:
    """The same of the process's, for the guest."""
    ours = address_of(vcpu.xsave[0])
    theirs = space.vector
    present = load64(theirs + HEADER) & vcpu.xstate_mask
    rep_movsb(ours, theirs, MXCSR)
    store32(ours + MXCSR, load32(theirs + MXCSR))
    rep_movsb(ours + X87_REGISTERS, theirs + X87_REGISTERS, XMM + 256 - X87_REGISTERS)
    store64(ours + HEADER, present | X87_STATE | SSE_STATE)
    return move_components(vcpu, space, present & (AVX_STATE | AVX512_STATE), 0)


# --- the loop ------------------------------------------------------------------------------------


@native_inline
def put_registers(space: Space) -> int:
    """Write ``general`` into the process; a status."""
    where = address_of(space.general[0])
    return registers(space, SET_REGISTERS, NT_PRSTATUS, where, GENERAL_WORDS * 8)


@native_inline
def take_registers(space: Space) -> int:
    """Read ``general`` from the process; a status."""
    where = address_of(space.general[0])
    return registers(space, GET_REGISTERS, NT_PRSTATUS, where, GENERAL_WORDS * 8)


@native
def must_stop(vcpu: Vcpu) -> int:
    """Whether guest code is to be left; takes ``attention`` as ``dispatch.attention`` does."""
    if vcpu.attention == 0:
        return 0
    if wanted(vcpu) or vcpu.stale_code:
        return 1
    atomic_and64(address_of(vcpu.mode), ATTENTION_CLEAR)
    if wanted(vcpu) or vcpu.stale_code:
        vcpu.attention = 1
    return vcpu.attention


@native
def is_fetch(space: Space, address: int) -> int:
    """Whether the access that failed may have been that of the next instruction's bytes.

    Data beside the code that uses them are in a page that is executed, and so readable.
    """
    rip = space.general[RIP]
    if (rip ^ address) & PAGE_MASK == 0:
        return 1
    return 1 if address & 0xFFF == 0 and address - rip < LONGEST else 0


@native
def repair(vcpu: Vcpu, space: Space) -> int:
    """The process stopped by SIGSEGV: whether a page was missing that is there now."""
    if ask(space, GET_SIGNAL, 0, address_of(space.information[0])) != OK:
        return 0
    code = space.information[1] & 0xFFFFFFFF
    if code != SEGV_MAPERR and code != SEGV_ACCERR:
        return 0
    address = space.information[2]
    space.faults += 1
    if space.general[RIP] != space.stuck_at:
        space.stuck_at = space.general[RIP]
        space.stuck = 0
    space.stuck += 1
    if space.stuck > TRIES:
        space.stuck = 0
        return 0
    if is_fetch(space, address) and fill(vcpu, space, address, 1):
        return 1
    if fill(vcpu, space, address, 0):
        return 1
    space.awaited = address & PAGE_MASK
    return 0


@native
def process_time(space: Space) -> int:
    """Nanoseconds of CPU time that the process has used."""
    clock = ~space.process << 3 | CPU_CLOCK
    host_call(CLOCK_GETTIME, clock, address_of(space.request[0]), 0, 0, 0, 0)
    return space.request[0] * 1_000_000_000 + space.request[1]


@native
def charge(vcpu: Vcpu, space: Space, events: int) -> int:
    """Account for a run; who stops too often is translated from now on."""
    used = process_time(space)
    budget = space.budget
    if budget < BUDGET_MAX:
        budget += used - space.ran
    space.ran = used
    space.runs += 1
    cost = events * EVENT_COST
    if budget < cost:
        space.budget = 0
        space.failed = 1
        return disarm(vcpu, address_of(space.root))
    space.budget = budget - cost
    return OK


@native
def code_byte(vcpu: Vcpu, address: int) -> int:
    """A byte of code that ran just now."""
    leaf = look(vcpu, address & PAGE_MASK)
    if leaf == 0:
        return 0
    return load8(vcpu.ram_host + (leaf & PAGE_MASK) + (address & 0xFFF))


@native
def settle_breakpoint(vcpu: Vcpu, space: Space) -> int:
    """The same for INT3 and INT1, which leave RIP behind them, or should."""
    rip = space.general[RIP]
    behind = code_byte(vcpu, rip - 1)
    if ask(space, GET_SIGNAL, 0, address_of(space.information[0])) != OK:
        return OK
    if space.information[1] & 0xFFFFFFFF == SI_KERNEL:
        space.general[RIP] = rip - 1 if behind == INT3 else rip - 2  # INT3 has a longer form
    elif behind == INT1:
        space.general[RIP] = rip - 1
    return OK


@native
def settle_stop(vcpu: Vcpu, space: Space, signal: int) -> int:
    """Take registers back to the front of the instruction that stopped the process."""
    if signal == SIGNAL_SYSTEM_CALL:
        space.general[RIP] = space.general[RIP] - 2
        space.general[RAX] = space.general[ORIGINAL_RAX]
    elif signal == SIGTRAP:
        if space.general[FLAGS] & FLAG_TF:
            vcpu.debug_pending = vcpu.debug_pending | DR6_BS  # of the instruction behind POPF
        else:
            settle_breakpoint(vcpu, space)
    elif signal == SIGSYS and ask(space, GET_SIGNAL, 0, address_of(space.information[0])) == OK:
        # The host's vsyscall page was called, and the host had returned from there.
        space.general[RIP] = space.information[2]
        space.general[RSP] = space.general[RSP] - 8
    return OK


@native
def follow_process(vcpu: Vcpu, space: Space) -> int:
    """Let the process run guest code, page fault by page fault; the signal that ended that.

    0 where the process is lost, SIGURG where somebody wants the virtual CPU.
    """
    signal = SIGURG
    while not must_stop(vcpu):
        if put_registers(space) != OK:
            return 0
        vcpu.exit_data[1] = 1  # from now on the process has what there is of registers
        signal = resume(space, SYSTEM_CALLS)
        if signal == 0 or take_registers(space) != OK:
            return 0
        if signal != SIGURG and (signal != SIGSEGV or not repair(vcpu, space)):
            settle_stop(vcpu, space, signal)
            return signal
    return SIGURG


@native
def run_direct(vcpu: Vcpu) -> int:
    """Run user code directly: OK to go on at RIP by translation, or EXIT."""
    at = direct_space(vcpu)
    if at == 0:
        return OK
    return run_space(vcpu, cast(Space, at))


@native
def run_space(vcpu: Vcpu, space: Space) -> int:
    """The same, the space being known."""
    if not eligible(vcpu, space):
        return OK
    if vcpu.stale_code:
        drop_stale_code(vcpu)
    before = space.faults
    vcpu.exit_reason = EXIT_DIRECT
    vcpu.exit_data[0] = address_of(space.root)
    vcpu.exit_data[1] = 0
    if space.broken or catch_up(vcpu, space) != OK:
        return EXIT
    if space.budget == 0:
        disarm(vcpu, address_of(space.root))
        return OK
    put_general(vcpu, space)
    put_vector(vcpu, space)
    if registers(space, SET_REGISTERS, NT_X86_XSTATE, space.vector, space.vector_bytes) != OK:
        return EXIT
    atomic_or64(address_of(vcpu.direct_running), space.process)
    signal = follow_process(vcpu, space)
    atomic_and64(address_of(vcpu.direct_running), 0)
    if signal == 0:
        return EXIT
    if registers(space, GET_REGISTERS, NT_X86_XSTATE, space.vector, space.vector_bytes) != OK:
        return EXIT
    take_general(vcpu, space)
    take_vector(vcpu, space)
    if signal == SIGURG:
        charge(vcpu, space, space.faults - before)
        vcpu.debug_pending = vcpu.debug_pending | PENDING_DIRECT
        vcpu.exit_reason = EXIT_ATTENTION
        return EXIT
    charge(vcpu, space, space.faults - before + 1)
    return OK
