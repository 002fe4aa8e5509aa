"""The block that GS points at while translated code runs: CPU state, TLBs, the engine's own part.

``gs(name)`` gives the displacement that emitted code uses. GS points at the TLB, so that
the most frequent accesses have an 8-bit displacement.
"""

from __future__ import annotations

from typing import Annotated

from ringfence.memory.mmu import Mmu
from ringfence.native.layout import Array, u8, u16, u32, u64

JUMP_ENTRIES = 1 << 16
GATHER_MAX = 256
EFFECTS_MAX = 160
THUNKS_MAX = 32

# Bits of ``mode``: what a translation depends on besides the bytes translated.
MODE_CPL = 0x3
MODE_LONG = 0x4
MODE_NO_FPU = 0x8
MODE_SSE = 0x10
MODE_AVX = 0x20
MODE_STEP = 0x40
"""Traces of one instruction, with a look-up behind each: for TF, and where the owner steps."""
MODE_AVX512 = 0x400
MODE_TSD = 0x80
MODE_CAREFUL = 0x200
"""Not a CPU mode either: marks traces in which every access looks itself up."""
MODE_ENTERED = 0x300
"""Such traces are entered at their start by a look-up only: they have no checks."""
MODE_SLOW = 0x100
"""Not a CPU mode: marks one-instruction traces whose memory accesses take the slow path."""
MODE_CODE32 = 0x800
"""Outside 64-bit mode: operands and addresses have 32 bits by default (CS.D)."""
MODE_STACK32 = 0x1000
"""Outside 64-bit mode: the stack is addressed by ESP, not SP (SS.B)."""
MODE_FLAT = 0x2000
"""Outside 64-bit mode: ES, CS, SS and DS are what 64-bit mode takes them to be, up to 4 GiB."""
MODE_BASED = 0x4000
"""Outside 64-bit mode: CS has a base or a limit, so that RIP is not the address of the code."""


def bits_of(mode: int) -> int:
    """Default size of code in a mode."""
    return 64 if mode & MODE_LONG else 32 if mode & MODE_CODE32 else 16


SLOW_SIZE = 0xFFF
SLOW_READ, SLOW_WRITE, SLOW_STACK, SLOW_MASKED = 0x10000, 0x20000, 0x40000, 0x80000
"""Kinds of a memory access, beside its size in bytes. SLOW_MASKED: an opmask register says which
elements are accessed; only those may fault."""

# How the elements of a masked access lie (``Form.masking``).
MASK_EACH, MASK_PACKED = 1, 2
"""Element n where bit n is set, counted round and round if there are more bits than elements; or
as many elements as bits are set, one behind the other."""

# Exit reasons of the engine itself, beside those of the effects.
EXIT_ASK = 64
"""The translator needs a form or a recipe (``Writer.want``); ``exit_data`` = mode."""
EXIT_ATTENTION = 65
EXIT_FLUSH = 66
"""A table of the translator, or the code cache, is full; ``exit_data`` = mode."""
EXIT_HOST_FAULT = 67
EXIT_MMIO_READ = 68
EXIT_MMIO_WRITE = 69
EXIT_FETCH_OUTSIDE = 70
EXIT_EMULATE = 71
EXIT_DEBUG = 72
"""The owner's debugger wants to know; ``exit_data`` = STOP_BREAKPOINT, STOP_STEP or Mmu's
PENDING_OWNER bits of watchpoints."""
EXIT_DIRECT = 74
"""A process of user code is lost; ``exit_data`` = its space, whether registers went with it."""
EXIT_EFFECT = 75
"""An effect has come to a device (`mmu.effect_read`)."""
RUN_DIRECT = 3
"""Status of a look-up, beside OK, FAULT and EXIT: the code at ``rip`` is to run directly."""
STOP_BREAKPOINT, STOP_STEP = 1, 2
EXIT_WRITERS = 73
"""Others must not write to a RAM page any more; ``exit_data`` = mode, the page's number."""


class Vcpu(Mmu):
    """One virtual CPU of the binary-translation engine."""

    self_address: Annotated[int, u64]
    mode: Annotated[int, u32]
    attention: Annotated[int, u8]
    """Non-zero: the next trace head leaves guest code. Any thread may set it."""
    irq_request: Annotated[int, u8]
    """An external interrupt is deliverable by the interrupt controllers. Set by any thread."""
    gather: Annotated[int, u8]
    """Whether the gathered ports may be served here (see ``gather``). Cleared by any thread."""
    service_request: Annotated[int, u8]
    """Gathered bytes have waited long enough, a device has done something beside the guest, or
    another vCPU waits for this one to be outside. Set by any thread."""
    gather_value: Annotated[int, u8]
    gather_write: Annotated[int, u16]
    gather_read: Annotated[int, u16]
    gathered_count: Annotated[int, u32]
    gathered: Annotated[Array, u8, 256]
    owner_step: Annotated[int, u8]
    """The owner wants to stop behind the next instruction; external interrupts wait."""
    stepped: Annotated[int, u8]
    """An instruction has run in MODE_STEP since `debugging.begin`."""
    owner_skip: Annotated[int, u64]
    """Address of the breakpoint that the owner has seen, to go on over it; see `debugging`."""
    begun_flags: Annotated[int, u32]
    """TF and RF as they were when the present instruction began in MODE_STEP."""
    passing: Annotated[int, u8]
    """The present instruction has a breakpoint that does not count: MODE_STEP for once."""
    breaks: Annotated[int, u64]
    """Host address of the linear addresses at which any breakpoint is, 64 bits each; behind
    them is room for as many."""
    break_count: Annotated[int, u32]
    owner_breaks: Annotated[int, u64]
    """The same, of the owner's."""
    owner_break_count: Annotated[int, u32]
    stop_request: Annotated[int, u8]
    """The owner wants ``run`` to return. Set by any thread."""
    parked: Annotated[int, u16]
    """Status flags on their way between pieces of guest code: OF in bit 0, the others as LAHF has
    them in bits 8-15. ``Cpu.status`` holds them once control leaves for an effect or the VMM."""
    jump_target: Annotated[int, u64]
    """Host address to continue at."""
    found_local: Annotated[int, u64]
    """Local entry of the trace that the last look-up found."""
    found_onward: Annotated[int, u64]
    """Its entry for jumps forward."""
    resume_pc: Annotated[int, u64]
    """Where a slow access returns to, inside its trace."""
    slow_pointer: Annotated[int, u64]
    """Host address that a slow access hands to its instruction."""
    slow_kind: Annotated[int, u64]
    """Size in bytes, plus SLOW_READ and SLOW_WRITE."""
    slow_address: Annotated[int, u64]
    slow_skipped: Annotated[int, u64]
    """Bytes at the operand's start that are not accessed."""
    slow_mask: Annotated[int, u64]
    """The opmask register of a masked access."""
    slow_masking: Annotated[int, u32]
    """``Form.masking`` of it, log2 of the elements' size << 8, number of elements << 16."""
    slow_pa: Annotated[int, u64]
    slow_second_pa: Annotated[int, u64]
    """Of the part in the following page."""
    slow_outside: Annotated[int, u8]
    registers: Annotated[int, u64]
    """Host address of the board's `memory.registers.Places`; 0: every access leaves."""
    answered_reads: Annotated[int, u64]
    answered_writes: Annotated[int, u64]
    """Accesses to devices that were done without leaving guest code."""
    shared: Annotated[Array, u64, 16]
    """Host minus linear address of pages that several accesses of a trace share."""
    displaced: Annotated[Array, u64, 16]
    """Guest registers whose host register a trace uses for a busier one, while it runs."""
    scratch: Annotated[Array, u64, 8]
    """Save slots of emitted code: 0 RAX, 1 borrowed register, 2-5 values between two accesses."""
    host_rsp: Annotated[int, u64]
    fault_pc: Annotated[int, u64]
    fault_trap: Annotated[int, u64]
    code_start: Annotated[int, u64]
    code_end: Annotated[int, u64]
    code_alias: Annotated[int, u64]
    """Writable address of a byte of the code cache minus its executable address."""
    thunks: Annotated[Array, u64, THUNKS_MAX]
    effect_number: Annotated[int, u32]
    """Which effect was called last."""
    effects: Annotated[Array, u64, EFFECTS_MAX]
    jump_current: Annotated[int, u64]
    """The jump table of the current privilege level."""
    jump_kernel: Annotated[Array, u64, JUMP_ENTRIES, 4096]
    jump_user: Annotated[Array, u64, JUMP_ENTRIES, 4096]
    trace_table: Annotated[int, u64]
    trace_slots: Annotated[int, u64]
    page_table: Annotated[int, u64]
    page_rows: Annotated[int, u64]
    writer: Annotated[int, u64]
    """Host address of the translator's state (``tables.Writer``)."""
    variants: Annotated[int, u64]
    """Host address of two 32-bit words per code page number: the numbers of its careful and of its
    slow variant."""
    mode_kernel: Annotated[int, u32]
    mode_user: Annotated[int, u32]
    """The modes that the two jump tables were filled under."""
    unknown_targets: Annotated[int, u8]
    """The jump tables don't hold for the present mode (MODE_BASED): every target is looked up."""
    seg_top: Annotated[Array, u64, 16]
    """Outside 64-bit mode: the last byte of each segment that may be read, then of each that may be
    written; what lies above is looked at by ``segment_access``."""
    direct_roots: Annotated[Array, u64, 8]
    """Page tables whose user code runs directly (see ``engine.direct``)."""
    direct_spaces: Annotated[Array, u64, 8]
    """Host addresses of their spaces."""
    direct_mode: Annotated[int, u32]
    """The mode that such code has to be in."""
    direct_running: Annotated[int, u64]
    """Number of the process that runs now; 0: none does."""
    user_entries: Annotated[int, u64]
    """How often user code was begun or gone on with."""
    links: Annotated[int, u64]
    lookups: Annotated[int, u64]
    lookup_misses: Annotated[int, u64]
    attentions: Annotated[int, u64]
    effect_calls: Annotated[int, u64]
    pauses_left: Annotated[int, u32]
    """PAUSEs until the host's CPU is offered to others (see ``spinning``)."""
    yields: Annotated[int, u64]
    """How often it was."""
    xstate_mask: Annotated[int, u32]
    """Components of vector state that change hands between guest and host: bits of XCR0."""
    xcomp_bv: Annotated[int, u64]
    """XCOMP_BV for the host's XSAVEC and XRSTOR, or 0 to use XSAVE. With AVX-512 the compacted
    format saves time, as it leaves out what is not in use, and it lies the same on every host."""
    host_init: Annotated[Array, u8, 1024, 64]
    """An XSAVE area in its initial configuration, for the host between two runs."""
    bounce: Annotated[Array, u8, 1152, 64]


ATTENTION_CLEAR = 0xFFFFFF00FFFFFFFF
"""Mask that clears ``attention`` in the aligned 64-bit word that starts at ``mode``."""
assert Vcpu.offset_of("mode") % 8 == 0
assert Vcpu.offset_of("attention") == Vcpu.offset_of("mode") + 4

_BASE = Vcpu.offset_of("tlb")


def gs(name: str, index: int = 0) -> int:
    """Displacement from GS of a field of the block."""
    return Vcpu.offset_of(name, index) - _BASE


GS_BIAS = _BASE
"""GS base minus the block's address."""
