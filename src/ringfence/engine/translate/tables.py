"""What the native translator works on: forms, instructions, pages, traces, and its own state.

All of it is declared as ``Struct`` and lives in memory that Python allocates once (`translator`);
no object exists for an instruction, a trace or a page of code.

* A `Form` says what becomes of an opcode (`forms` asks iced-x86 once for each).
* An `Insn` is one decoded guest instruction of the trace being built.
* A `PageRow` is a *code page*: one linear page that leads to one physical page in one mode.
* A `TraceRow` is a trace that was placed.
* The `Writer` is the state of the translator.
"""

from __future__ import annotations

from typing import Annotated

from ringfence.native.layout import Array, Struct, u8, u16, u32, u64

PAGE = 4096
LIMIT = 96
"""Instructions of one trace at most."""
NONE = 255
"""No register, no effect."""
ABSOLUTE = 16
"""Base of an operand whose address the instruction itself gives: relative to RIP."""

# Relocations: what a word of the trace depends on besides its content.
RELOC_VA32, RELOC_VA64, RELOC_ITLB, RELOC_PAGE = range(4)
RELOC_FAR = 1 << 29
"""The addend is 4 GiB more than the word says."""

# Kinds of instructions, as the writer of traces distinguishes them.
PLAIN, JCC, JMP, CALL, INDIRECT, LOOP, EFFECT, STI, DROP = range(9)

CANONICAL = (0, 1, 2, 3, 11, 5, 6, 7, 8, NONE, NONE, NONE, 12, 13, 14, 15)
"""Host register of each guest register between traces; NONE for the block."""
HOMELESS = (9, 10, 11)
"""Guest registers that live in the block, unless a trace arranges its registers otherwise."""

WITHIN, ONWARD = 1, 2
"""A direct jump's target is in the same code page; and it lies ahead."""

HOST, PARKED = range(2)
"""Where the guest's status flags are."""

# Prefixes, as `Insn.prefixes` and the keys of forms have them.
P66, PF2, PF3, LOCK, P67 = 1, 2, 4, 8, 16

# Kinds of forms.
(
    F_NONE,
    F_GROUP,
    F_RAW,
    F_INVALID,
    F_COPY,
    F_LEA,
    F_DROP,
    F_PUSH,
    F_PUSH_IMMEDIATE,
    F_PUSH_MEMORY,
    F_POP,
    F_LEAVE,
    F_RET,
    F_CALL,
    F_JMP,
    F_JCC,
    F_CALL_REGISTER,
    F_JMP_REGISTER,
    F_CALL_MEMORY,
    F_JMP_MEMORY,
    F_CLI,
    F_STI,
    F_DIRECTION,
) = range(23)
"""F_GROUP: the form depends on ModRM.reg, too. F_RAW: Python writes a recipe for each such
instruction. The others are handled in `copying`, by name."""

LOW_INC = 2
"""INC and DEC by the opcodes that are REX prefixes in 64-bit mode: FF /0 and FF /1 there."""

# Roles of operand fields: access in the low bits, size in bytes above.
ROLE_READ, ROLE_WRITE, ROLE_SIZE = 1, 2, 4

# How an instruction moves its first operand by a constant.
MOVE_NONE, MOVE_ADD, MOVE_SUB, MOVE_INC, MOVE_DEC = range(5)

RAW_BYTES = 16


class Form(Struct):
    """What becomes of the instructions of one opcode; flags are masks of ``RflagsBits``."""

    key: Annotated[int, u64]
    kind: Annotated[int, u8]
    immediate: Annotated[int, u8]
    """Bytes of immediate or relative branch operands."""
    reg_role: Annotated[int, u8]
    rm_role: Annotated[int, u8]
    """Of ModRM.rm as a register, or of the register in the opcode's low bits."""
    vvvv_role: Annotated[int, u8]
    vvvv_used: Annotated[int, u8]
    low: Annotated[int, u8]
    """Whether the opcode's low bits are a register; LOW_INC for INC and DEC."""
    memory_access: Annotated[int, u8]
    """ROLE_READ and ROLE_WRITE."""
    memory_size: Annotated[int, u16]
    reads: Annotated[int, u8]
    writes: Annotated[int, u8]
    kills: Annotated[int, u8]
    counted: Annotated[int, u8]
    """Kills flags only if the immediate, a shift count, is not 0."""
    move: Annotated[int, u8]
    operand_size: Annotated[int, u8]
    """Operand size of stack instructions and of jumps in bytes."""
    prefix66: Annotated[int, u8]
    """Whether the host's encoding has the prefix 66, which 16-bit code means the other way."""
    scale: Annotated[int, u8]
    """log2 of the factor of an EVEX instruction's 8-bit displacement (SDM vol. 2, 2.7.5)."""
    masking: Annotated[int, u8]
    """MASK_… of the memory operand; 0 where all of it is accessed."""
    element: Annotated[int, u8]
    """log2 of the size of its elements in bytes."""
    elements: Annotated[int, u8]
    implicit: Annotated[int, u16]
    """Mask of the guest registers used without being named by a field."""
    implicit_written: Annotated[int, u16]


class RawRecipe(Struct):
    """A recipe that Python wrote for one instruction (`recipe`), in one mode and arrangement.

    It holds for all instructions that differ in their displacement only. The pieces of code stand
    behind the row, each at the distance from the row's start that its field gives, and behind each
    piece its fixes, at a multiple of 8: a row may lie anywhere, and be kept on disk.
    """

    context: Annotated[int, u64]
    raw: Annotated[Array, u8, RAW_BYTES]
    kind: Annotated[int, u8]
    reads: Annotated[int, u8]
    writes: Annotated[int, u8]
    kills: Annotated[int, u8]
    clobbers: Annotated[int, u8]
    addressing: Annotated[int, u8]
    """What goes between ``lead`` and ``before``: NO_ADDRESS, LINEAR or EFFECTIVE."""
    effect: Annotated[int, u16]
    written: Annotated[int, u16]
    fixed: Annotated[int, u16]
    named: Annotated[int, u32]
    """Up to four guest registers that operands name, a byte each; NONE for none."""
    extent: Annotated[int, u32]
    """Bytes of the row with all that stands behind it, a multiple of 8."""
    lead: Annotated[int, u32]
    lead_length: Annotated[int, u32]
    lead_fixes: Annotated[int, u32]
    before: Annotated[int, u32]
    before_length: Annotated[int, u32]
    before_fixes: Annotated[int, u32]
    op: Annotated[int, u32]
    op_length: Annotated[int, u32]
    op_fixes: Annotated[int, u32]
    after: Annotated[int, u32]
    after_length: Annotated[int, u32]
    after_fixes: Annotated[int, u32]
    operands: Annotated[int, u32]
    operands_length: Annotated[int, u32]
    operands_fixes: Annotated[int, u32]


class Fix(Struct):
    """What to put at a position of a recipe's code."""

    position: Annotated[int, u32]
    what: Annotated[int, u32]
    kind: Annotated[int, u32]
    """Of the access, as the miss thunk wants it."""
    retry: Annotated[int, u32]
    """Position of the look-up."""
    write: Annotated[int, u32]


FIX_MISS, FIX_ESCAPE = range(2)
"""FIX_MISS: a look-up's jump to its stub. FIX_ESCAPE: a jump to a stub that leaves the whole
instruction to the recipe's effect."""
NO_ADDRESS, LINEAR, EFFECTIVE = range(3)
"""R9 = the memory operand's address, with or without its segment's base."""


class Insn(Struct):
    """One guest instruction of the trace being built."""

    bytes: Annotated[int, u64]
    form: Annotated[int, u64]
    recipe: Annotated[int, u64]
    value: Annotated[int, u64]
    """Branch target or address relative to RIP, minus the instruction's address."""
    displacement: Annotated[int, u64]
    displacement_at: Annotated[int, u8]
    displacement_size: Annotated[int, u8]
    immediate: Annotated[int, u64]
    offset: Annotated[int, u32]
    """In the page."""
    length: Annotated[int, u32]
    kind: Annotated[int, u8]
    form_kind: Annotated[int, u8]
    prefixes: Annotated[int, u8]
    segment: Annotated[int, u8]
    """Number of the segment register overriding, plus 1; 0 for none."""
    address: Annotated[int, u8]
    """Bytes of an address: 8, 4 or 2."""
    rex: Annotated[int, u8]
    rex_at: Annotated[int, u8]
    """Position behind the legacy prefixes."""
    vex: Annotated[int, u8]
    """Bytes of the VEX or EVEX prefix: 0, 2, 3 or 4."""
    vex_payload: Annotated[int, u8]
    """W vvvv L pp, as in the last byte of a three-byte VEX prefix; of EVEX, its third byte."""
    evex_low: Annotated[int, u8]
    """R X B R' mmm: the second byte of an EVEX prefix."""
    evex_high: Annotated[int, u8]
    """z L'L b V' aaa: the fourth."""
    map: Annotated[int, u8]
    opcode: Annotated[int, u8]
    mod: Annotated[int, u8]
    """3 for registers; NONE without ModRM."""
    reg: Annotated[int, u8]
    rm: Annotated[int, u8]
    """Register in ModRM.rm or in the opcode."""
    vvvv: Annotated[int, u8]
    base: Annotated[int, u8]
    """Guest register, ABSOLUTE or NONE."""
    index: Annotated[int, u8]
    scale: Annotated[int, u8]
    """log2 of the factor."""
    immediate_at: Annotated[int, u8]
    reads: Annotated[int, u8]
    writes: Annotated[int, u8]
    kills: Annotated[int, u8]
    live: Annotated[int, u8]
    """Status flags live after it."""
    alive: Annotated[int, u8]
    """Status flags live before it, or where it jumps to."""
    clobbers: Annotated[int, u8]
    """Whether what goes before the instruction itself changes the host's flags."""
    shared_base: Annotated[int, u8]
    """Base of an operand whose look-up can be shared, or NONE."""
    shared_write: Annotated[int, u8]
    adjusted: Annotated[int, u8]
    """The one register that only moves by a constant, ``adjustment``; NONE for none."""
    stepped: Annotated[int, u8]
    """The same register, or one of which 32 bits move so."""
    kept: Annotated[int, u8]
    """Number of the kept page that its look-up compares with, plus 1; 0 for none."""
    group: Annotated[int, u8]
    """Index of its group, or NONE."""
    opens: Annotated[int, u8]
    """How many look-ups of groups stand before it that begin later."""
    shared_size: Annotated[int, u16]
    written: Annotated[int, u16]
    fixed: Annotated[int, u16]
    effect: Annotated[int, u16]
    access: Annotated[int, u32]
    """Kind of the memory operand's access, as the miss thunk wants it."""
    named: Annotated[int, u32]
    """As in `RawRecipe`."""
    shared_displacement: Annotated[int, u64]
    adjustment: Annotated[int, u64]


class Group(Struct):
    """Accesses that share a look-up; distances count from the base's value at the first one."""

    low: Annotated[int, u64]
    high: Annotated[int, u64]
    moved: Annotated[int, u64]
    """How far the base has moved since the first access."""
    shift: Annotated[int, u64]
    """How far it moves from where the look-up is to the first access."""
    slot: Annotated[int, u32]
    base: Annotated[int, u8]
    first: Annotated[int, u8]
    members: Annotated[int, u8]
    write: Annotated[int, u8]
    opens: Annotated[int, u8]
    """Index of the instruction before which the look-up is."""
    indexed: Annotated[int, u8]
    """Whether it is a lone access whose address has an index, too."""
    kept: Annotated[int, u8]
    """As in `Insn`."""


class Miss(Struct):
    """A look-up's jump to its stub."""

    position: Annotated[int, u64]
    retry: Annotated[int, u64]
    kind: Annotated[int, u32]
    offset: Annotated[int, u32]
    write: Annotated[int, u8]
    kept: Annotated[int, u8]
    """As in `Insn`."""


class Link(Struct):
    """A direct jump out of the trace."""

    position: Annotated[int, u64]
    target: Annotated[int, u64]
    within: Annotated[int, u8]
    """0 to another code page, WITHIN, or ONWARD."""
    park: Annotated[int, u8]
    conditional: Annotated[int, u8]


class Escape(Struct):
    """A jump to a stub that leaves a whole instruction to its effect."""

    position: Annotated[int, u64]
    insn: Annotated[int, u64]


class PageRow(Struct):
    """One linear page in one mode."""

    linear: Annotated[int, u64]
    index: Annotated[int, u32]
    """RAM page index (offset in RAM / 4096)."""
    mode: Annotated[int, u32]
    wide: Annotated[int, u32]
    """Whether addresses of code need 64-bit constants here."""
    base: Annotated[int, u32]
    """CS's base: linear address minus RIP. 0 in 64-bit mode."""
    next_of_index: Annotated[int, u32]
    """The next code page of the same RAM page."""
    live: Annotated[int, u32]
    """Newest living trace."""
    dead: Annotated[int, u32]
    """Newest dead trace."""
    across: Annotated[int, u32]
    """Newest trace of the page before this one whose instruction ends here."""


class TraceRow(Struct):
    """One trace; positions count from its code's start."""

    lines: Annotated[int, u64]
    """64-byte lines of the page whose bytes the trace depends on."""
    next_lines: Annotated[int, u64]
    """The same in the following page, for an instruction across the boundary."""
    start: Annotated[int, u64]
    """Executable address of its code."""
    offset: Annotated[int, u32]
    """Guest address in the page."""
    end: Annotated[int, u32]
    instructions: Annotated[int, u32]
    length: Annotated[int, u32]
    """Bytes of code."""
    checked: Annotated[int, u32]
    local: Annotated[int, u32]
    reenter: Annotated[int, u32]
    reenter_local: Annotated[int, u32]
    onward: Annotated[int, u32]
    """Where jumps forward within the page enter."""
    mark: Annotated[int, u32]
    """Index of its first mark: position << 16 | flags are parked << 15 | guest offset."""
    marks: Annotated[int, u32]
    swaps: Annotated[int, u32]
    """Registers arranged otherwise inside: a byte each, homeless register | displaced one << 4."""
    page: Annotated[int, u32]
    next: Annotated[int, u32]
    """Next older trace of the page that lives, or that is dead."""
    next_across: Annotated[int, u32]
    dead: Annotated[int, u32]


class Template(Struct):
    """Code that is the same everywhere but for some words; made by `templates`."""

    length: Annotated[int, u32]
    size_word: Annotated[int, u32]
    """Position of a look-up's comparison."""
    target_word: Annotated[int, u32]
    """Position of a jump's displacement."""
    code: Annotated[Array, u8, 116]


TEMPLATES = 32
WANT_FORM, WANT_RECIPE = 1, 2
FORM_ROWS = 1 << 13
RECIPE_ROWS = 1 << 15
RECIPE_BYTES = 8 << 20
MISSES_MAX, LINKS_MAX, ESCAPES_MAX = LIMIT * 4, LIMIT + 2, LIMIT * 8


class Writer(Struct):
    """State of the native translator."""

    # --- tables that Python fills
    has_modrm: Annotated[Array, u8, 512]
    """By opcode, for the one-byte and the 0F map."""
    forms: Annotated[int, u64]
    recipes: Annotated[int, u64]
    """Host addresses of `RawRecipe`, by hash."""
    templates: Annotated[int, u64]
    effect_ud: Annotated[int, u32]
    effect_sti: Annotated[int, u32]
    effect_cli: Annotated[int, u32]
    effect_breakpoint: Annotated[int, u32]
    effect_vector_low: Annotated[int, u32]
    effect_vector_high: Annotated[int, u32]
    """The two effects on the vector state."""
    # --- what has to be asked of Python
    want: Annotated[int, u32]
    want_length: Annotated[int, u32]
    want_key: Annotated[int, u64]
    want_bytes: Annotated[Array, u8, RAW_BYTES]
    # --- the mode of the trace being built
    mode: Annotated[int, u32]
    user: Annotated[int, u32]
    slow: Annotated[int, u8]
    entered: Annotated[int, u8]
    step: Annotated[int, u8]
    wide: Annotated[int, u8]
    long: Annotated[int, u8]
    """64-bit mode."""
    width: Annotated[int, u8]
    """Outside 64-bit mode: default size of operands and addresses in bytes, 2 or 4."""
    stack: Annotated[int, u8]
    """Bytes of the stack pointer."""
    flat: Annotated[int, u8]
    based: Annotated[int, u8]
    start_rip: Annotated[int, u64]
    """RIP of the page's first byte."""
    context: Annotated[int, u64]
    """Mode, width of addresses and arrangement: what recipes depend on."""
    swaps: Annotated[int, u32]
    home: Annotated[Array, u8, 16]
    """Host register of each guest register, NONE for the block."""
    # --- the trace being built
    data: Annotated[int, u64]
    """Host address of the guest page."""
    straddle: Annotated[Array, u8, 32]
    """The end of the page and the beginning of the next, for an instruction across both."""
    second: Annotated[int, u32]
    """Number of the following code page, for an instruction across the boundary."""
    linear: Annotated[int, u64]
    """Its linear address."""
    break_table: Annotated[int, u64]
    break_count: Annotated[int, u32]
    """`Vcpu.breaks` while a trace is made."""
    breaks: Annotated[int, u32]
    """How many of them are in the page; none count for MODE_STEP."""
    broken: Annotated[int, u8]
    """Whether the trace stands for a breakpoint at its first instruction."""
    uses: Annotated[Array, u16, 16]
    """How often the trace's operands name each guest register."""
    count: Annotated[int, u32]
    items: Annotated[Array, u8, Insn.size * LIMIT, 8]
    peeked: Annotated[Array, u8, Insn.size, 8]
    groups: Annotated[Array, u8, Group.size * LIMIT, 8]
    group_count: Annotated[int, u32]
    opened: Annotated[Array, u8, 17]
    kept_count: Annotated[int, u8]
    code: Annotated[int, u64]
    """Writable host address of the trace's first byte."""
    out: Annotated[int, u64]
    """Where the next byte goes."""
    state: Annotated[int, u8]
    live_head: Annotated[int, u8]
    enables: Annotated[int, u8]
    """Whether the trace sets IF: what follows has to look at ``attention``."""
    inside: Annotated[int, u64]
    """Behind the code that arranges registers."""
    body: Annotated[int, u64]
    wrong_address: Annotated[int, u64]
    page_checks: Annotated[Array, u64, 2]
    attention: Annotated[int, u64]
    misses: Annotated[Array, u8, Miss.size * MISSES_MAX, 8]
    miss_count: Annotated[int, u32]
    links: Annotated[Array, u8, Link.size * LINKS_MAX, 8]
    link_count: Annotated[int, u32]
    escapes: Annotated[Array, u8, Escape.size * ESCAPES_MAX, 8]
    escape_count: Annotated[int, u32]
    group_misses: Annotated[Array, u64, LIMIT * 3]
    """Position of the jump, place to come back to, instruction."""
    group_miss_count: Annotated[int, u32]
    early_misses: Annotated[Array, u64, LIMIT * 2]
    """Position of the jump, instruction before which the look-up is."""
    early_miss_count: Annotated[int, u32]
    back_edges: Annotated[Array, u64, LINKS_MAX]
    back_edge_count: Annotated[int, u32]
    operand_base: Annotated[int, u8]
    """Where the operand of the instruction being written is, beside R10: see `operands`."""
    operand_displacement: Annotated[int, u64]
    held: Annotated[int, u32]
    """Displacement of the slot whose value R10 has at this place of the trace, or 0."""
    substitutes: Annotated[Array, u8, 4]
    """Guest registers that have a stand-in in the instruction being written, and those."""
    stand_ins: Annotated[Array, u8, 4]
    substitute_roles: Annotated[Array, u8, 4]
    borrowed: Annotated[Array, u8, 4]
    substitute_count: Annotated[int, u32]
    # --- traces and pages
    cache_start: Annotated[int, u64]
    """Writable address of the code cache."""
    cache_size: Annotated[int, u64]
    cache_used: Annotated[int, u64]
    pages: Annotated[int, u64]
    page_count: Annotated[int, u32]
    """Numbers given so far, with 0, which means none."""
    page_limit: Annotated[int, u32]
    page_of_index: Annotated[int, u64]
    """Host address of a 32-bit word per RAM page: its newest code page."""
    traces: Annotated[int, u64]
    trace_count: Annotated[int, u32]
    trace_limit: Annotated[int, u32]
    marks: Annotated[int, u64]
    mark_count: Annotated[int, u32]
    mark_limit: Annotated[int, u32]
    relocations: Annotated[int, u64]
    """Pairs of position << 2 | RELOC_*, addend from the page's start, of the trace being built."""
    relocation_count: Annotated[int, u32]
    lines: Annotated[int, u64]
    indirect_miss: Annotated[int, u32]
    """Displacement of the thunk."""
    careful: Annotated[int, u32]
    """Displacement of the thunk."""
    # --- statistics
    instructions: Annotated[int, u64]
    blocks: Annotated[int, u64]
    bytes: Annotated[int, u64]
    invalidated: Annotated[int, u64]
    translation_ticks: Annotated[int, u64]
    """TSC ticks spent building."""
