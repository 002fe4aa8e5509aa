"""From guest bytes to traces: decoding, choosing registers, and the parts that all traces share."""

from __future__ import annotations

from ringfence.engine.translate import emit
from ringfence.engine.translate.block import MODE_ENTERED, MODE_SLOW, MODE_TF, gs
from ringfence.engine.translate.emit import R10
from ringfence.engine.translate.recipe import (
    _SHIFTS,
    CANONICAL,
    EFFECT,
    HOMELESS,
    MNEMONIC_NAME,
    STATUS,
    STI,
    Recipe,
    Recipes,
    Swap,
    decoder,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.trace import (
    ENDS,
    PAGE,
    RELOC_VA32,
    RELOC_VA64,
    Item,
    Trace,
    line_mask,
)
from ringfence.engine.translate.writer import Head, Tail, TraceWriter
from ringfence.engine.translate.x86 import DecoderError, FlowControl, Instruction

LIMIT = 48
"""Instructions of one trace at most."""
WORTHWHILE = 4
"""Accesses that swapping two registers must save, as it costs two loads and stores each way."""
_NEVER_DISPLACED = 0x0E1F
"""RAX, RCX, RDX, RBX and RSP, of which instructions make special use, and the homeless ones."""
PEEK = 8
"""Instructions looked at to learn whether a jump's target reads flags."""

_RIP = gs("rip")


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
        self.heads: dict[bool, Head] = {}
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
            if kind in ENDS:
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
        TraceWriter(self, trace, data, second).run(items)
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

    def make_tail(self) -> Tail:
        """See ``Tail``; ends with the displacement of the jump back to the trace's body."""
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
        return Tail(code, first_rip, lookup, wrong_address, attention, second_rip)

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
