"""What Python does for the native translator: memory, forms, recipes, statistics.

Traces are made, placed and dropped natively (``builder``, ``pages``). Native code leaves when it
meets an opcode or an odd instruction for the first time (`Translator.answer`), or a full table
(`flush`).
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringfence.cpu.state import TSC_RATIO_ONE
from ringfence.engine.translate import pages, special, templates
from ringfence.engine.translate.block import MODE_CAREFUL, MODE_LONG, MODE_SLOW
from ringfence.engine.translate.codecache import CodeCache
from ringfence.engine.translate.forms import Forms, no_modrm, write_form
from ringfence.engine.translate.natives import EFFECT_NUMBERS
from ringfence.engine.translate.recipe import Piece, Recipe, Recipes
from ringfence.engine.translate.tables import (
    FORM_ROWS,
    NONE,
    PAGE,
    RECIPE_BYTES,
    RECIPE_ROWS,
    TEMPLATES,
    WANT_FORM,
    Fix,
    Form,
    PageRow,
    RawRecipe,
    Template,
    TraceRow,
    Writer,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.writer import EFFECT_EMULATE
from ringfence.engine.translate.x86 import Decoder

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library

NUMBER_MAX = 50_000
"""Code pages until all translations are dropped."""
TRACES_MAX = 1 << 18
MARKS_MAX = 1 << 22
FORMS_MAX = FORM_ROWS // 2
RECIPES_MAX = RECIPE_ROWS // 2
RELOCATIONS_MAX = 1 << 14
"""Of one trace."""
assert special.KEEP  # importing the module enters its recipes in the table


class Answers:
    """What any vCPU of a machine has asked already, so that the next one gets it at once."""

    def __init__(self) -> None:
        self._forms: dict[tuple[int, int], dict[str, int]] = {}
        self._recipes: dict[tuple[int, int, bytes], Recipe] = {}

    def form(self, key: int, mode: int, make: Callable[[], dict[str, int]]) -> dict[str, int]:
        """The fields of a form."""
        found = self._forms.get((key, mode))
        if found is None:
            if len(self._forms) >= FORMS_MAX:
                self._forms.clear()
            found = self._forms[key, mode] = make()
        return found

    def recipe(self, mode: int, swaps: int, raw: bytes, make: Callable[[], Recipe]) -> Recipe:
        """A recipe."""
        found = self._recipes.get((mode, swaps, raw))
        if found is None:
            if len(self._recipes) >= RECIPES_MAX:
                self._recipes.clear()
            found = self._recipes[mode, swaps, raw] = make()
        return found


class Translator:
    """Owns the code cache and the translator's tables of one vCPU."""

    def __init__(
        self,
        memory: GuestMemory,
        view: Any,
        library: Library,
        offers: Callable[[str], bool],
        answers: Answers,
    ) -> None:
        self.answers = answers
        self.memory = memory
        self.view = view
        self.block = view.self_address
        self.cache = CodeCache()
        self.forms = Forms(offers)
        self._form_insert = library.function("form_insert", 2)
        self._recipe_insert = library.function("recipe_insert", 2)
        self._jump_forget = library.function("jump_forget", 1)
        self._forget_code = library.function("forget_code", 1)
        self._flush_all = library.function("tlb_flush_all", 1)
        self._pages: list[mmap.mmap] = []
        self.address = self._allocate(Writer.size)
        self.writer = Writer.at(self.address)
        self._recipes_at = self._allocate(RECIPE_BYTES)
        self._recipes_used = 0
        self.recipe_count = self.form_count = 0
        self._makers: dict[tuple[int, int], Recipes] = {}
        self.full_flushes = 0
        self._prepare()
        view.writer = self.address

    def _allocate(self, size: int) -> int:
        made = mmap.mmap(-1, -(-size // 4096) * 4096)
        self._pages.append(made)
        return ctypes.addressof(ctypes.c_char.from_buffer(made))

    def _prepare(self) -> None:
        """Fill in what does not change."""
        w = self.writer
        for map_number, opcodes in enumerate(no_modrm()):
            for opcode in range(256):
                w.has_modrm[map_number << 8 | opcode] = opcode not in opcodes
        w.forms = self._allocate(FORM_ROWS * Form.size)
        w.recipes = self._allocate(RECIPE_ROWS * 8)
        w.templates = self._allocate(TEMPLATES * Template.size)
        templates.fill(w.templates)
        w.effect_ud = EFFECT_NUMBERS["fx_ud"]
        w.effect_sti = EFFECT_NUMBERS["fx_sti"]
        w.effect_cli = EFFECT_NUMBERS["fx_cli"]
        w.effect_breakpoint = EFFECT_NUMBERS["fx_breakpoint"]
        w.effect_vector_low = EFFECT_NUMBERS["fx_xsave"]
        w.effect_vector_high = EFFECT_NUMBERS["fx_xrstor"]
        w.cache_start, w.cache_size = self.cache.alias, self.cache.size
        w.pages = self._allocate(NUMBER_MAX * PageRow.size)
        w.page_limit = NUMBER_MAX
        w.page_of_index = self._allocate((self.memory.mapped >> 12) * 4)
        w.traces = self._allocate(TRACES_MAX * TraceRow.size)
        w.trace_limit = TRACES_MAX
        w.marks = self._allocate(MARKS_MAX * 4)
        w.mark_limit = MARKS_MAX
        w.relocations = self._allocate(RELOCATIONS_MAX * 8)
        w.indirect_miss = THUNK["indirect_miss"] & 0xFFFFFFFF
        w.careful = THUNK["careful"] & 0xFFFFFFFF
        w.page_count = w.trace_count = 1

    # --- questions -------------------------------------------------------------------------------

    def answer(self, mode: int) -> None:
        """Make the form or the recipe that native code asks for."""
        w = self.writer
        raw = bytes(w.want_bytes[: w.want_length])
        if w.want == WANT_FORM:
            if self.form_count >= FORMS_MAX:
                ctypes.memset(w.forms, 0, FORM_ROWS * Form.size)
                self.form_count = 0
            key = w.want_key
            row = (ctypes.c_uint64 * 1)(key)
            at = self._form_insert(self.address, ctypes.addressof(row))
            fields = self.answers.form(key, mode, lambda: self.forms.describe(raw, key, mode))
            write_form(Form.at(at), key, fields)
            self.form_count += 1
        else:
            self.write_recipe(raw, w.context, mode)

    def write_recipe(self, raw: bytes, context: int, mode: int) -> None:
        """Make a recipe and enter it in the native table."""
        if self.recipe_count >= RECIPES_MAX or self._recipes_used + PAGE > RECIPE_BYTES:
            ctypes.memset(self.writer.recipes, 0, RECIPE_ROWS * 8)
            self._recipes_used = self.recipe_count = 0
            self._makers.clear()
        plain, swaps = mode & ~MODE_CAREFUL, context >> 32
        recipe = self.answers.recipe(
            plain, swaps, raw, lambda: self._make_recipe(raw, plain, swaps)
        )
        at = self._recipes_at + self._recipes_used
        row = RawRecipe.at(at)
        row.context = context
        ctypes.memmove(ctypes.addressof(row.raw), raw.ljust(16, b"\0"), 16)
        self._recipes_used += RawRecipe.size
        self._fill_recipe(row, recipe)
        self._recipe_insert(self.address, at)
        self.recipe_count += 1

    def _make_recipe(self, raw: bytes, mode: int, swaps: int) -> Recipe:
        """Write a recipe for an instruction in a mode and arrangement."""
        maker = self._makers.get((mode, swaps))
        if maker is None:
            scaled = self.view.tsc_ratio != TSC_RATIO_ONE
            alone = bool(self.view.alone)
            slow = bool(mode & MODE_SLOW)
            maker = Recipes(mode, slow, swaps, scaled_tsc=scaled, alone=alone)
            self._makers[mode, swaps] = maker
        i = Decoder(maker.bits, raw, ip=0).decode()
        unavailable = "" if i.is_invalid else self.forms.unavailable(i, mode)
        return maker.build(i, raw, unavailable)

    def _fill_recipe(self, row: Any, recipe: Recipe) -> None:
        """Write a recipe's fields, and its code behind it."""
        for name in ("kind", "reads", "writes", "kills", "addressing", "written", "fixed"):
            setattr(row, name, getattr(recipe, name))
        row.clobbers = recipe.clobbers
        row.effect = (
            EFFECT_EMULATE
            if recipe.effect == "emulate"
            else EFFECT_NUMBERS.get(recipe.effect, EFFECT_EMULATE)
        )
        named = (*recipe.named, NONE, NONE, NONE, NONE)[:4]
        row.named = int.from_bytes(bytes(named), "little")
        pieces = {
            "lead": recipe.lead,
            "before": recipe.before,
            "op": recipe.op,
            "after": recipe.after,
            "operands": Piece(recipe.operands),
        }
        for name, piece in pieces.items():
            setattr(row, name, self._recipes_at + self._recipes_used)
            setattr(row, f"{name}_length", len(piece.code))
            setattr(row, f"{name}_fixes", len(piece.fixes))
            self._append(piece)

    def _append(self, piece: Piece) -> None:
        """A piece's code, and its fixes at the next multiple of 8."""
        at = self._recipes_at + self._recipes_used
        ctypes.memmove(at, piece.code, len(piece.code))
        at += len(piece.code) + 7 & ~7
        for position, what, retry, write, kind in piece.fixes:
            fix = Fix.at(at)
            fix.position, fix.what, fix.retry, fix.write, fix.kind = (
                position, what, retry, write, kind,
            )  # fmt: skip
            at += Fix.size
        self._recipes_used = at + 7 - self._recipes_at & ~7

    # --- the whole -----------------------------------------------------------------------------

    def locate(self, host: int) -> tuple[int, bool, int] | None:
        """Guest RIP, whether flags are parked, and ``TraceRow.swaps``, for a code cache address."""
        w = self.writer
        # Traces are placed one behind the other, so their rows are in order.
        count = w.trace_count
        at = bisect_right(range(1, count), host, key=lambda n: self._trace(n).start)
        if not at:
            return None
        row = self._trace(at)
        position = host - row.start
        if position >= row.length:
            return None
        marks = (ctypes.c_uint32 * row.marks).from_address(w.marks + row.mark * 4)
        at = bisect_right(marks, position << 16 | 0xFFFF) - 1
        if at < 0:
            return None
        page = PageRow.at(w.pages + row.page * PageRow.size)
        rip = page.linear + (marks[at] & 0x7FFF) - page.base
        rip &= (1 << 64) - 1 if page.mode & MODE_LONG else 0xFFFFFFFF
        return rip, bool(marks[at] & 0x8000), row.swaps

    def _trace(self, number: int) -> Any:
        return TraceRow.at(self.writer.traces + number * TraceRow.size)

    def flush(self) -> None:
        """Drop all translations."""
        self.full_flushes += 1
        view, w = self.view, self.writer
        self._forget_code(self.block)
        ctypes.memset(view.variants, 0, (NUMBER_MAX + 1) * 8)
        ctypes.memset(view.trace_table, 0, view.trace_slots * pages.SLOT_BYTES)
        ctypes.memset(view.page_table, 0, view.page_rows * pages.ROW_BYTES)
        w.cache_used = w.mark_count = 0
        w.page_count = w.trace_count = 1
        self._jump_forget(self.block)
        self._flush_all(self.block)

    def statistics(self) -> dict[str, int]:
        """Plain data for ``Engine.stats``."""
        w = self.writer
        return {
            "instructions": w.instructions,
            "blocks": w.blocks,
            "host_bytes": w.bytes,
            "invalidated": w.invalidated,
            "full_flushes": self.full_flushes,
            "code_pages": w.page_count - 1,
            "forms": self.form_count,
            "recipes": self.recipe_count,
        }

    def close(self) -> None:
        """Free the cache."""
        self.cache.close()
