"""Writing one trace: entries, instructions with their look-ups and flags, exits, stubs."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.cpu.state import RSP
from ringfence.engine.translate import emit
from ringfence.engine.translate.block import EXIT_EMULATE, gs
from ringfence.engine.translate.emit import R9, R10
from ringfence.engine.translate.groups import Group, find_groups
from ringfence.engine.translate.recipe import (
    ABSOLUTE,
    CALL,
    EFFECT,
    ESCAPE,
    INDIRECT,
    JCC,
    JMP,
    LOOP,
    MISS,
    PLAIN,
    STATUS,
    STI,
    Piece,
    Recipe,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.trace import (
    ENDS,
    HOST,
    PAGE,
    PARKED,
    RELOC_FAR,
    RELOC_ITLB,
    RELOC_PAGE,
    RELOC_VA32,
    RELOC_VA64,
    Item,
    Trace,
    line_mask,
)

if TYPE_CHECKING:
    from ringfence.engine.translate.builder import Builder

_RIP = gs("rip")
_ATTENTION = gs("attention")


@dataclass(slots=True)
class Head:
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
class Tail:
    """What the entries' checks jump to when they fail; positions count from its start."""

    code: bytes
    first_rip: int
    lookup: int
    wrong_address: int
    attention: int
    second_rip: int


class TraceWriter:
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
        self.groups: dict[int, Group] = {}
        self.group_misses: list[tuple[int, int, Group, int, Recipe, int]] = []

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
        elif last.kind not in ENDS and not self.b.slow:
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
            self.groups = find_groups(items, self.b.recipes.user)
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
        if kind not in ENDS:
            self.jump(offset + recipe.length, bool(live_after))
        self.stubs(start)

    # --- shared look-ups ------------------------------------------------------------------------

    def group_address(self, group: Group) -> None:
        """R9 = lowest address of a group, as seen from its first member."""
        if group.base == ABSOLUTE:
            self.load_address(R9, group.low)
            return
        load, host = self.b.recipes.guest(group.base, R9)
        self.out += load + emit.lea(R9, host, disp=group.low)

    def open_group(self, group: Group, offset: int, recipe: Recipe, value: int) -> None:
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

    def group_check(self, group: Group) -> None:
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
            self.b.heads[live] = Head(
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
