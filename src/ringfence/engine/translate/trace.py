"""Building a trace: a run of guest instructions inside one page, as one piece of host code.

A trace has one entry for each way of getting there, in this order in memory:

* *indirect*: R9 holds the guest address wanted; the trace checks that it is its own;
* *checked*: from another code page by a direct jump; the trace checks that its linear page still
  leads to the code page it was made for (one comparison with ``itlb_*``);
* *local*: from the same code page; nothing to check.

All then look at ``attention``. At the indirect and the checked entry the guest's status flags are
parked in the block (or dead); at the local entry they are in the host's flags. A trace knows
whether its own code reads the flags it enters with, so these checks cost no flag juggling almost
everywhere.

Inside, flags move between host and block on demand: a TLB comparison clobbers the host's flags, so
live ones are parked before it and brought back before an instruction that needs them.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass, field

from ringfence.cpu.state import RSP
from ringfence.engine.translate import emit
from ringfence.engine.translate.block import EXIT_EMULATE, MODE_ENTERED, MODE_SLOW, MODE_TF, gs
from ringfence.engine.translate.emit import R9, R10
from ringfence.engine.translate.recipe import (
    _SHIFTS,
    ABSOLUTE,
    CALL,
    CANONICAL,
    EFFECT,
    ESCAPE,
    HOMELESS,
    INDIRECT,
    JCC,
    JMP,
    LOOP,
    MISS,
    MNEMONIC_NAME,
    PLAIN,
    STATUS,
    STI,
    Piece,
    Recipe,
    Recipes,
    Swap,
    decoder,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.x86 import DecoderError, FlowControl, Instruction

PAGE = 4096
LIMIT = 48
"""Instructions of one trace at most."""
SPAN = 512
"""Bytes that a group of accesses may cover; the more, the likelier is a page boundary in it."""
SLOTS = 16
WORTHWHILE = 4
"""Accesses that swapping two registers must save, as it costs two loads and stores each way."""
_NEVER_DISPLACED = 0x0E1F
"""RAX, RCX, RDX, RBX and RSP, of which instructions make special use, and the homeless ones."""
PEEK = 8
"""Instructions looked at to learn whether a jump's target reads flags."""

# Relocations: what a word of the trace depends on besides its content.
RELOC_VA32, RELOC_VA64, RELOC_ITLB, RELOC_PAGE = range(4)
RELOC_FAR = 1 << 29

_RIP = gs("rip")
_ATTENTION = gs("attention")
HOST, PARKED = range(2)


@dataclass(slots=True)
class Trace:
    """A finished trace; positions are offsets into ``code``."""

    offset: int
    end: int
    code: bytearray
    lines: int = 0
    """64-byte lines of the page whose bytes the trace depends on."""
    next_lines: int = 0
    """The same in the following page, for an instruction across the boundary."""
    instructions: int = 0
    indirect: int = 0
    checked: int = 0
    local: int = 0
    reenter: int = 0
    reenter_local: int = 0
    swaps: int = 0
    """Registers arranged otherwise inside: a byte each, homeless register | displaced one << 4."""
    relocations: array[int] = field(default_factory=lambda: array("i"))
    """Pairs: position << 2 | RELOC_*, addend; addends of addresses count from the page's start."""
    marks: array[int] = field(default_factory=lambda: array("I"))
    """Position << 16 | flags are parked << 15 | guest offset, ascending."""
    length: int = 0
    """Bytes of ``code``, which is dropped once it is placed and stored."""
    start: int = 0
    """Host address once it is placed."""

    def forget_code(self) -> None:
        """Free what only placing and storing need."""
        self.code = _NO_CODE
        self.relocations = _NO_RELOCATIONS


_NO_CODE = bytearray()
_NO_RELOCATIONS = array("i")


def line_mask(start: int, end: int) -> int:
    """Mask of the 64-byte lines of a page that hold bytes [start, end)."""
    first, last = start >> 6, (end - 1) >> 6
    return ((2 << (last - first)) - 1) << first


class Builder:
    """Builds traces of one mode.

    Parameters
    ----------
    recipes : Recipes
        The recipes of this mode, kind of addresses and speed of memory access.
    mode : int
        Bits of ``block.MODE_*``.
    effects : dict
        Effect name -> number.
    """

    def __init__(self, recipes: Recipes, mode: int, effects: dict[str, int]) -> None:
        self.recipes = recipes
        self.mode = mode
        self.effects = effects
        self.slow = bool(mode & MODE_SLOW)
        self.entered = bool(mode & MODE_ENTERED)
        self.step = bool(mode & MODE_TF)
        self.high = not recipes.wide
        self.swap_in = self.swap_out = b""
        for homeless, displaced in recipes.swaps:
            host = CANONICAL[displaced]
            aside, own = gs("displaced", displaced), gs("gpr", homeless)
            self.swap_in += emit.gs_store(host, aside) + emit.gs_load(host, own)
            self.swap_out += emit.gs_store(host, own) + emit.gs_load(host, aside)
        self.miss_stubs: dict[tuple[bool, int], tuple[bytes, int]] = {}
        self.address = RELOC_VA32 if self.high else RELOC_VA64
        self.heads: dict[bool, _Head] = {}
        self.tail = self.make_tail()
        self.link_stubs = (self.make_link_stub("link_page"), self.make_link_stub("link_local"))

    # --- reading guest code ---------------------------------------------------------------

    def decode(self, data: bytes, offset: int) -> list[Item]:
        """Instructions of the trace that starts at ``offset`` of the page ``data``.

        ``data`` may hold the start of the next page, for an instruction across the boundary: then
        that instruction makes a trace of its own. An empty list asks for those bytes.
        """
        found: list[Item] = []
        source = decoder(data, offset)
        decode = source.decode_out
        instruction = Instruction()
        recipes = self.recipes
        known = recipes.known
        left = 1 if self.slow or self.step else LIMIT
        while offset < PAGE and left:
            left -= 1
            decode(instruction)
            length = instruction.len
            end = offset + length
            if end > PAGE and found:
                break
            raw = data[offset:end]
            pair = known.get(raw)
            if pair is None:
                if instruction.is_invalid and source.last_error == DecoderError.NO_MORE_BYTES:
                    break
                pair = recipes.make(instruction, raw, source)
            recipe, value = pair
            found.append((offset, recipe, value))
            offset = end
            kind = recipe.kind
            if kind in _ENDS:
                break
            if kind == STI:
                left = min(left, 1)
        return found

    def peek(self, data: bytes, offset: int) -> tuple[int, int]:
        """Status flags that code at ``offset`` may read before writing; where the look ended."""
        if not 0 <= offset < PAGE:
            return STATUS, 0
        source = decoder(data, offset)
        instruction = Instruction()
        live = killed = 0
        for _ in range(PEEK):
            source.decode_out(instruction)
            if instruction.is_invalid:
                return live | STATUS & ~killed, min(PAGE, offset + 15)
            offset += instruction.len
            live |= instruction.rflags_read & STATUS & ~killed
            if instruction.flow_control != FlowControl.NEXT:
                break
            modified: int = instruction.rflags_modified & STATUS
            # A count of zero, in a shift or a repeated comparison, leaves the flags as they were.
            if instruction.has_rep_prefix or instruction.has_repne_prefix:
                modified = 0
            if modified and MNEMONIC_NAME[instruction.mnemonic] not in _SHIFTS:
                killed |= modified
                if killed == STATUS:
                    return live, min(PAGE, offset)
        return live | STATUS & ~killed, min(PAGE, offset)

    # --- building ---------------------------------------------------------------------------

    def arrangement(self, items: list[Item]) -> tuple[Swap, ...]:
        """Registers to be swapped in a trace: busy homeless ones for idle ones that have a home."""
        if self.entered or self.step:
            return ()
        if sum([recipe.homeless for _, recipe, _ in items]) < WORTHWHILE:
            return ()
        uses = [0] * 16
        fixed = _NEVER_DISPLACED
        for _, recipe, _ in items:
            fixed |= recipe.fixed
            for number in recipe.named:
                uses[number] += 1
        busy = sorted((n for n in HOMELESS if uses[n] >= WORTHWHILE), key=lambda n: -uses[n])
        if not busy:
            return ()
        idle = sorted((n for n in range(16) if not fixed >> n & 1), key=lambda n: uses[n])
        return tuple(
            (b, i) for b, i in zip(busy, idle, strict=False) if uses[b] - uses[i] >= WORTHWHILE
        )

    def build(self, items: list[Item], data: bytes, second: int = 0) -> Trace:
        """Build the trace of ``items``, decoded from the page ``data``.

        ``second`` is the identity of the following code page, for an instruction across the
        boundary.
        """
        if items[-1][1].kind == STI:
            at, recipe, _ = items.pop()
            last = Recipe(recipe.length, EFFECT, STATUS, clobbers=True, effect="fx_sti")
            items.append((at, last, 0))
        offset = items[0][0]
        end = items[-1][0] + items[-1][1].length
        trace = Trace(offset, end, bytearray(), instructions=len(items))
        for n, (homeless, displaced) in enumerate(self.recipes.swaps):
            trace.swaps |= (homeless | displaced << 4) << (8 * n)
        trace.lines = line_mask(offset, min(end, PAGE))
        if end > PAGE:
            trace.next_lines = line_mask(0, end - PAGE)
        _Work(self, trace, data, second).run(items)
        trace.length = len(trace.code)
        return trace

    def rip_code(self) -> tuple[bytes, int]:
        """Code that sets ``Cpu.rip``, and the position in it of the word to relocate."""
        if self.high:
            return emit.gs_store_imm(_RIP, 0), 9
        return emit.mov_imm64(R10, 0) + emit.gs_store(R10, _RIP), 2

    def make_link_stub(self, thunk: str) -> tuple[bytes, int, int]:
        """A stub for a jump not linked yet: code, positions of RIP's and of the site's word."""
        code, rip = self.rip_code()
        lea = len(code) + 3
        code += b"\x4c\x8d\x15\0\0\0\0"  # lea r10, [rip + site]
        return code + emit.gs_jump(THUNK[thunk]), rip, lea

    def make_tail(self) -> _Tail:
        """See ``_Tail``; ends with the displacement of the jump back to the trace's body."""
        set_rip, rip = self.rip_code()
        code = emit.PARK
        first_rip = len(code) + rip
        code += set_rip
        lookup = len(code)
        code += emit.gs_jump(THUNK["lookup"])
        wrong_address = len(code)
        code += emit.gs_jump(THUNK["indirect_miss"])
        attention = len(code)
        second_rip = attention + rip
        code += set_rip + emit.gs_call(THUNK["attention"]) + b"\xe9\0\0\0\0"
        return _Tail(code, first_rip, lookup, wrong_address, attention, second_rip)

    def miss_stub(self, write: bool, kind: int) -> tuple[bytes, int]:
        """A stub for a missed TLB look-up: code up to its jump back, position of RIP's word."""
        key = (write, kind)
        made = self.miss_stubs.get(key)
        if made is None:
            head = emit.tlb_recover(write, self.recipes.user) + self.swap_out
            set_rip, rip = self.rip_code()
            tail = emit.mov_imm32(R10, kind) + emit.gs_call(THUNK["miss"])
            tail += self.swap_in + b"\xe9\0\0\0\0"
            made = self.miss_stubs[key] = (head + set_rip + tail, len(head) + rip)
        return made


Item = tuple[int, Recipe, int]
"""Offset in the page, recipe, relative address (see ``Recipes.make``)."""


@dataclass(slots=True)
class _Head:
    """The entries of a trace, the same but for some words in all of a mode."""

    code: bytes
    start_word: int
    """Relocation of the trace's own address."""
    page_words: tuple[int, ...]
    """Relocations of the page check."""
    wrong_address: int
    page_checks: list[int]
    attention: int
    checked: int
    local: int


@dataclass(slots=True)
class _Tail:
    """What the entries' checks jump to when they fail; positions count from its start."""

    code: bytes
    first_rip: int
    lookup: int
    wrong_address: int
    attention: int
    second_rip: int


@dataclass(slots=True)
class _Group:
    """Accesses that share a look-up; distances count from the base's value at the first one."""

    base: int
    first: int
    low: int
    high: int
    members: list[int] = field(default_factory=list)
    write: bool = False
    moved: int = 0
    """How far the base has moved since the first access."""
    slot: int = 0


_ENDS = {JMP, CALL, INDIRECT, EFFECT}


class _Work:
    """The state of building one trace."""

    def __init__(self, builder: Builder, trace: Trace, data: bytes, second: int) -> None:
        self.b = builder
        self.trace = trace
        self.out = trace.code
        self.relocations = trace.relocations
        self.data = data
        self.second = second
        self.state = HOST
        self.misses: list[tuple[int, int, bool, int, int]] = []
        self.links: list[tuple[int, int, bool, bool, bool]] = []
        self.back_edges: list[int] = []
        self.live_head = True
        self.inside = 0
        self.escapes: list[tuple[int, int, Recipe]] = []
        self.groups: dict[int, _Group] = {}
        self.group_misses: list[tuple[int, int, _Group, int, Recipe, int]] = []

    # --- words that depend on the place ------------------------------------------------------

    def word(self, position: int, kind: int, addend: int) -> None:
        """Remember a word to be filled in when the trace is placed.

        What a displacement of 2 GiB leads to may be too far from the page's start for a signed
        word: RELOC_FAR then stands for the difference, 4 GiB.
        """
        if addend >= 1 << 31:
            position |= RELOC_FAR >> 2
            addend -= 1 << 32
        self.relocations.append(position << 2 | kind)
        self.relocations.append(addend)

    def set_rip(self, offset: int) -> None:
        """``Cpu.rip`` = page + offset; uses R10 for far addresses."""
        at = len(self.out)
        if self.b.high:
            self.out += emit.gs_store_imm(_RIP, 0)
            self.word(at + 9, RELOC_VA32, offset)
        else:
            self.out += emit.mov_imm64(R10, 0) + emit.gs_store(R10, _RIP)
            self.word(at + 2, RELOC_VA64, offset)

    def load_address(self, register: int, offset: int) -> None:
        """``register`` = page + offset."""
        at = len(self.out)
        if self.b.high:
            self.out += emit.mov_simm32(register, 0)
            self.word(at + 3, RELOC_VA32, offset)
        else:
            self.out += emit.mov_imm64(register, 0)
            self.word(at + 2, RELOC_VA64, offset)

    def place(self, piece: Piece, offset: int, value: int, recipe: Recipe | None = None) -> None:
        """Append a recipe's code for the instruction at ``offset``."""
        base = len(self.out)
        self.out += piece.code
        for position, what, data in piece.fixes:
            if what == MISS:
                retry, write, kind = data
                self.misses.append((base + position, base + retry, write, kind, offset))
            elif what == ESCAPE:
                assert recipe is not None
                self.escapes.append((base + position, offset, recipe))
            else:
                addend = offset + (value if data is None else data)
                self.word(base + position, self.b.address, addend)

    def park(self) -> None:
        """Move live flags out of the host's flags."""
        if self.state == HOST:
            self.out += emit.PARK
            self.state = PARKED

    # --- the trace ------------------------------------------------------------------------------

    def liveness(self, items: list[Item]) -> list[int]:
        """Flags live after each instruction, and before the first one (last element)."""
        trace = self.trace
        last_offset, last, value = items[-1]
        live: int = STATUS
        if last.kind == JMP:
            live = self.peek(last_offset + value)
        elif last.kind not in _ENDS and not self.b.slow:
            live = self.peek(trace.end)
        after: list[int] = []
        for offset, recipe, value in reversed(items):
            after.append(live)
            if recipe.kind in (JCC, LOOP) and live != STATUS:
                live |= self.peek(offset + value)
            live = live & ~recipe.kills | recipe.reads
        after.reverse()
        after.append(live)
        return after

    def peek(self, offset: int) -> int:
        live, end = self.b.peek(self.data, offset)
        if end:
            self.trace.lines |= line_mask(offset, end)
        return live

    def run(self, items: list[Item]) -> None:
        """Emit the whole trace."""
        after = self.liveness(items)
        start = items[0][0]
        if self.b.entered:
            self.state = PARKED
            if self.b.slow:
                self.set_rip(start)
        else:
            self.live_head = bool(after[-1])
            self.head(start, self.live_head)
            self.share(items)
            self.out += self.b.swap_in
            self.inside = len(self.out)
        groups = self.groups
        out = self.out
        place = self.place
        marks = self.trace.marks
        for n, ((offset, recipe, value), live_after) in enumerate(zip(items, after, strict=False)):
            kind = recipe.kind
            marks.append(len(out) << 16 | PARKED << 15 | offset)
            group = groups.get(n)
            if group is not None and group.first != n:
                assert recipe.shared is not None
                place(recipe.shared.address, offset, value)
                out += emit.gs_load(R10, group.slot)
            else:
                if recipe.clobbers and live_after & ~recipe.kills | recipe.reads:
                    self.park()
                if group is not None:
                    self.open_group(group, offset, recipe, value)
                elif recipe.before.code:
                    place(recipe.before, offset, value, recipe)
            if kind == PLAIN:
                self.plain(offset, recipe, value, live_after)
            elif kind == JCC:
                self.need_flags()
                self.conditional(offset + value, recipe)
            elif kind in (JMP, CALL):
                place(recipe.op, offset, value)
                self.jump(offset + value, bool(live_after))
            elif kind == INDIRECT:
                place(recipe.op, offset, value)
                self.leave_indirect()
            elif kind == EFFECT:
                self.effect(offset, recipe)
            elif kind == STI:
                self.sti(live_after)
            elif kind == LOOP:
                if recipe.reads:
                    self.need_flags()
                self.counted(offset + value, recipe)
        if kind not in _ENDS:
            self.jump(offset + recipe.length, bool(live_after))
        self.stubs(start)

    # --- shared look-ups ------------------------------------------------------------------------

    def share(self, items: list[Item]) -> None:
        """Find accesses near each other off one base register: they share one TLB look-up.

        The first of a group checks for all of it, also for what lies behind a side exit. Should
        the whole not lie in one page with the rights that the group needs, the rest of the trace
        is left for a *careful* trace, in which every access looks itself up.
        """
        opened: dict[int, _Group] = {}
        found: list[_Group] = []
        for n, (offset, recipe, value) in enumerate(items):
            shared = recipe.shared
            if shared is None:
                if not opened:
                    continue
            else:
                base = shared.base
                at = offset + value if shared.displacement is None else shared.displacement
                group = opened.get(base)
                if group is not None:
                    at += group.moved
                    low, high = min(group.low, at), max(group.high, at + shared.size)
                    if high - low > SPAN or abs(low) >= (1 << 31) - (1 << 16):
                        group = None
                        at -= opened[base].moved
                if group is None:
                    group = opened[base] = _Group(base, n, at, at + shared.size)
                    found.append(group)
                else:
                    group.low, group.high = low, high
                group.members.append(n)
                group.write = group.write or shared.write
            written = recipe.written
            if recipe.adjusted >= 0:
                written &= ~(1 << recipe.adjusted)
                group = opened.get(recipe.adjusted)
                if group is not None:
                    group.moved += recipe.adjustment
            if written:
                for base in [base for base in opened if written >> base & 1]:
                    del opened[base]
        used = 0
        for group in found:
            if group.base == RSP:
                group.slot = gs("stack_delta", int(self.b.recipes.user))
                for n in group.members:
                    self.groups[n] = group
            elif len(group.members) > 1 and used < SLOTS:
                group.slot = gs("shared", used)
                used += 1
                for n in group.members:
                    self.groups[n] = group

    def group_address(self, group: _Group) -> None:
        """R9 = lowest address of a group, as seen from its first member."""
        if group.base == ABSOLUTE:
            self.load_address(R9, group.low)
            return
        load, host = self.b.recipes.guest(group.base, R9)
        self.out += load + emit.lea(R9, host, disp=group.low)

    def open_group(self, group: _Group, offset: int, recipe: Recipe, value: int) -> None:
        """The first access of a group: look all of it up."""
        user = self.b.recipes.user
        shared = recipe.shared
        assert shared is not None
        self.group_address(group)
        self.group_check(group)
        position = len(self.out) - 4
        back = len(self.out)
        if group.base == RSP:
            self.place(shared.address, offset, value)
            self.out += emit.gs_load(R10, group.slot)
        else:
            self.out += emit.tlb_delta(group.write, user, group.slot)
            self.place(shared.address, offset, value)
        self.group_misses.append((position, back, group, offset, recipe, value))

    def group_check(self, group: _Group) -> None:
        """Look R9 up for a whole group, up to the displacement of the jump taken on a miss."""
        user = self.b.recipes.user
        size = group.high - group.low
        if group.base == RSP:
            self.out += emit.stack_check(size, user)
        else:
            check, position = emit.tlb_check(size, group.write, user)
            self.out += check[: position + 4]

    def group_stubs(self) -> None:
        """A group's look-up missed: enter the page of its first access, try once more."""
        out = self.out
        for position, back, group, offset, recipe, value in self.group_misses:
            self.aim(position)
            shared = recipe.shared
            assert shared is not None
            self.place(shared.address, offset, value)
            out += self.b.swap_out
            self.set_rip(offset)
            thunk = THUNK["stack_miss" if group.base == RSP else "miss"]
            out += emit.mov_imm32(R10, shared.kind) + emit.gs_call(thunk) + self.b.swap_in
            self.group_address(group)
            self.group_check(group)
            jump = len(out) - 4
            out += b"\xe9\0\0\0\0"
            self.aim(len(out) - 4, back)
            self.aim(jump)
            out += self.b.swap_out + emit.gs_jump(THUNK["careful"])

    def plain(self, offset: int, recipe: Recipe, value: int, live_after: int) -> None:
        """An ordinary instruction's own part."""
        if self.state == PARKED:
            if recipe.reads or (recipe.writes and live_after & ~recipe.kills):
                self.need_flags()
            elif recipe.writes:
                self.state = HOST
        self.trace.marks.append(len(self.out) << 16 | self.state << 15 | offset)
        self.place(recipe.op, offset, value)
        if recipe.after.code:
            if live_after:
                self.park()
            self.place(recipe.after, offset, value)

    def need_flags(self) -> None:
        """Bring parked flags back into the host's flags."""
        if self.state == PARKED:
            self.out += emit.UNPARK
            self.state = HOST

    def head(self, start: int, live: bool) -> None:
        """The three entries; see the module's text."""
        out, trace = self.out, self.trace
        known = self.b.heads.get(live)
        if known is not None and not self.second:
            out += known.code
            self.relocations.extend((known.start_word, start, *known.page_words))
            self.wrong_address, self.page_checks = known.wrong_address, known.page_checks
            self.attention, self.body = known.attention, len(out)
            trace.checked, trace.local = known.checked, known.local
            if live:
                self.state = PARKED
            return
        trace.indirect = 0
        at = len(out)
        if self.b.high:
            out += b"\x49\x81\xf9\0\0\0\0"  # cmp r9, simm32
            self.word(at + 3, RELOC_VA32, start)
        else:
            self.load_address(R10, start)
            out += b"\x4d\x39\xd1"  # cmp r9, r10
        out += b"\x0f\x85\0\0\0\0"
        self.wrong_address = len(out) - 4
        trace.checked = len(out)
        self.page_checks = [self.page_check(0, 0)]
        if self.second:
            self.page_checks.append(self.page_check(PAGE, self.second))
        if live:
            out += b"\xeb" + bytes((len(emit.PARK),))
        trace.local = len(out)
        if live:
            out += emit.PARK
            self.state = PARKED
        out += emit.gs_compare_byte(_ATTENTION, 0) + b"\x0f\x85\0\0\0\0"
        self.attention = len(out) - 4
        self.body = len(out)
        if not self.second:
            words = tuple(self.relocations)
            self.b.heads[live] = _Head(
                bytes(out),
                words[0],
                words[2:],
                self.wrong_address,
                self.page_checks,
                self.attention,
                trace.checked,
                trace.local,
            )

    def page_check(self, distance: int, number: int) -> int:
        """Compare a linear page's identity; position of the jump taken when it differs."""
        out = self.out
        at = len(out)
        out += b"\x65\x81\x3c\x25\0\0\0\0\0\0\0\0\x0f\x85\0\0\0\0"
        self.word(at + 4, RELOC_ITLB, distance)
        if distance:
            # The following page's number is not this page's: such traces are never stored.
            struct.pack_into("<I", out, at + 8, number)
        else:
            self.word(at + 8, RELOC_PAGE, 0)
        return len(out) - 4

    def effect(self, offset: int, recipe: Recipe) -> None:
        """Leave the trace for the effect library."""
        self.out += self.b.swap_out
        self.set_rip(offset)
        if recipe.effect == "emulate":
            self.out += emit.gs_store_imm(gs("exit_reason"), EXIT_EMULATE)
            self.out += emit.gs_jump(THUNK["emulate"])
            return
        number = self.b.effects[recipe.effect]
        self.out += emit.mov_imm32(R10, number | recipe.length << 16)
        thunk = "effect_vector" if recipe.effect in ("fx_xsave", "fx_xrstor") else "effect"
        self.out += emit.gs_jump(THUNK[thunk])

    def sti(self, live_after: int) -> None:
        """Set IF; the trace ends behind the next instruction, where interrupts are seen."""
        self.out += emit.gs_store_byte(gs("flag_if"), 1)
        raise_attention = emit.gs_store_byte(_ATTENTION, 1)
        if not live_after or self.state == PARKED:
            self.out += emit.gs_compare_byte(gs("irq_request"), 0)
            self.out += b"\x74" + bytes((len(raise_attention),))
        self.out += raise_attention

    def jump(self, target: int, live: bool) -> None:
        """End of the trace: go on at a known address."""
        if self.b.slow:
            if live:
                self.park()
            self.load_address(R9, target)
            self.out += emit.checked_jump(self.b.recipes.user, THUNK["lookup"])
            return
        if self.loops(target):
            self.out += b"\xe9\0\0\0\0"
            self.back_edges.append(len(self.out) - 4)
            return
        self.out += self.b.swap_out
        within = 0 <= target < PAGE
        if self.state == PARKED or not within:
            if live:
                self.park()
            within = False
        self.out += b"\xe9\0\0\0\0"
        self.links.append((len(self.out) - 4, target, within, False, False))

    def leave_indirect(self) -> None:
        """End of the trace: go on at the guest address in R9."""
        if self.state == HOST:
            self.out += emit.park(R10)
            self.state = PARKED
        self.out += self.b.swap_out
        if self.b.step:
            self.out += emit.gs_store(R9, _RIP) + emit.mov_imm32(R10, self.b.effects["fx_step"])
            self.out += emit.gs_jump(THUNK["effect"])
        elif self.b.slow:
            self.out += emit.checked_jump(self.b.recipes.user, THUNK["lookup"])
        else:
            self.out += emit.indirect_jump(self.b.recipes.user)

    def loops(self, target: int) -> bool:
        """Whether a jump leads to the trace's own start with its registers arranged already."""
        return bool(self.b.swap_in) and target == self.trace.offset and not self.live_head

    def conditional(self, target: int, recipe: Recipe) -> None:
        """A conditional jump out of the trace; not taken goes on inside."""
        self.out += bytes((0x0F, recipe.condition)) + b"\0\0\0\0"
        if self.loops(target):
            self.back_edges.append(len(self.out) - 4)
            return
        within = 0 <= target < PAGE and not self.b.slow
        self.links.append((len(self.out) - 4, target, within, not within, True))

    def counted(self, target: int, recipe: Recipe) -> None:
        """JRCXZ and LOOP have 8-bit displacements only: they jump over a jump."""
        within = 0 <= target < PAGE and self.state == HOST and not self.b.slow
        park = self.b.swap_out
        park += b"" if within or self.state == PARKED else emit.PARK
        self.out += recipe.op.code + b"\x02" + b"\xeb" + bytes((len(park) + 5,))
        self.out += park + b"\xe9\0\0\0\0"
        self.links.append((len(self.out) - 4, target, within, False, False))

    def loop_stub(self, start: int) -> None:
        """Where the trace's jumps to its own start go: in again, unless attention is wanted."""
        out = self.out
        for position in self.back_edges:
            self.aim(position)
        out += emit.gs_compare_byte(_ATTENTION, 0) + b"\x0f\x84\0\0\0\0"
        self.aim(len(out) - 4, self.inside)
        out += self.b.swap_out
        self.set_rip(start)
        out += emit.gs_call(THUNK["attention"]) + self.b.swap_in + b"\xe9\0\0\0\0"
        self.aim(len(out) - 4, self.inside)

    # --- what is rarely executed -----------------------------------------------------------------

    def aim(self, position: int, target: int | None = None) -> None:
        """Point the 32-bit displacement at ``position`` to a place in the trace (default: here)."""
        goal = len(self.out) if target is None else target
        struct.pack_into("<i", self.out, position, goal - position - 4)

    def stubs(self, start: int) -> None:
        out, trace = self.out, self.trace
        pack = struct.pack_into
        relocate = self.relocations.extend
        address = self.b.address
        for position, retry, write, kind, offset in self.misses:
            at = len(out)
            pack("<i", out, position, at - position - 4)
            code, rip = self.b.miss_stub(write, kind)
            out += code
            relocate(((at + rip) << 2 | address, offset))
            end = len(out)
            pack("<i", out, end - 4, retry - end)
        self.group_stubs()
        last = -1
        for position, offset, recipe in self.escapes:
            if offset != last:
                last, stub = offset, len(out)
                out += recipe.operands
                self.effect(offset, recipe)
            self.aim(position, stub)
        for position, target, within, park, conditional in self.links:
            self.aim(position)
            site = position
            if park or (conditional and self.b.swap_out):
                out += self.b.swap_out + (emit.PARK if park else b"") + b"\xe9\0\0\0\0"
                site = len(out) - 4
                self.aim(site)
            if self.b.slow:
                self.load_address(R9, target)
                out += emit.indirect_jump(self.b.recipes.user)
                continue
            if self.b.step:
                self.set_rip(target)
                if within:
                    out += emit.PARK
                out += emit.mov_imm32(R10, self.b.effects["fx_step"])
                out += emit.gs_jump(THUNK["effect"])
                continue
            at = len(out)
            code, rip, lea = self.b.link_stubs[within]
            out += code
            self.word(at + rip, address, target)
            pack("<i", out, at + lea, site - at - lea - 4)
        if self.back_edges:
            self.loop_stub(start)
        if self.b.entered:
            return
        trace.reenter_local = len(out)
        trace.reenter = len(out) + len(emit.PARK)
        for position in self.page_checks:
            self.aim(position, trace.reenter)
        tail = self.b.tail
        self.aim(self.wrong_address, trace.reenter_local + tail.wrong_address)
        self.aim(self.attention, trace.reenter_local + tail.attention)
        at = trace.reenter_local
        out += tail.code
        relocate(((at + tail.first_rip) << 2 | address, start))
        relocate(((at + tail.second_rip) << 2 | address, start))
        self.aim(len(out) - 4, self.body)
        if self.second:
            # Both pages are looked up: the jump to the look-up goes to another thunk.
            self.aim_straddle(at + tail.lookup)

    def aim_straddle(self, position: int) -> None:
        """Replace the jump at ``position`` by one out of line to the straddle thunk."""
        out = self.out
        out[position] = 0xE9
        self.aim(position + 1)
        out += emit.mov_imm32(R10, self.second) + emit.gs_jump(THUNK["straddle"])
