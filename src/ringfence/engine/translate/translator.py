"""What Python does for the native translator: memory, forms, recipes, statistics.

Traces are made, placed and dropped natively (``builder``, ``pages``). Native code leaves when it
meets an opcode or an odd instruction for the first time (`Translator.answer`), or a full table
(`flush`).
"""

from __future__ import annotations

import ctypes
import functools
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringfence.cpu.state import TSC_RATIO_ONE
from ringfence.engine.translate import pages, templates
from ringfence.engine.translate.answers import FORMS_MAX, RECIPES_MAX, Answers
from ringfence.engine.translate.block import MODE_LONG
from ringfence.engine.translate.codecache import CodeCache
from ringfence.engine.translate.decoding import no_modrm
from ringfence.engine.translate.natives import EFFECT_NUMBERS
from ringfence.engine.translate.tables import (
    FORM_ROWS,
    RAW_BYTES,
    RECIPE_BYTES,
    RECIPE_ROWS,
    TEMPLATES,
    WANT_FORM,
    Form,
    PageRow,
    Template,
    TraceRow,
    Writer,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.memory.zeroed import ZeroedPages

if TYPE_CHECKING:
    from ringfence.engine.translate.asking import Expert
    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library

NUMBER_MAX = 50_000
"""Code pages until all translations are dropped."""
TRACES_MAX = 1 << 18
MARKS_MAX = 1 << 22
RELOCATIONS_MAX = 1 << 14
"""Of one trace."""


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
        self._offers = offers
        self._form_insert = library.function("form_insert", 2)
        self._recipe_insert = library.function("recipe_insert", 2)
        self._jump_forget = library.function("jump_forget", 1)
        self._forget_code = library.function("forget_code", 1)
        self._flush_all = library.function("tlb_flush_all", 1)
        self._pages = ZeroedPages()
        self.address = self._pages.take(Writer.size)
        self.writer = Writer.at(self.address)
        self._recipes_at = self._pages.take(RECIPE_BYTES)
        self._recipes_used = 0
        self.recipe_count = self.form_count = 0
        self.full_flushes = 0
        self._prepare()
        self._recall()
        view.writer = self.address

    def _prepare(self) -> None:
        """Fill in what does not change."""
        w = self.writer
        for map_number, opcodes in enumerate(no_modrm()):
            for opcode in range(256):
                w.has_modrm[map_number << 8 | opcode] = opcode not in opcodes
        w.forms = self._pages.take(FORM_ROWS * Form.size)
        w.recipes = self._pages.take(RECIPE_ROWS * 8)
        w.templates = self._pages.take(TEMPLATES * Template.size)
        templates.fill(w.templates)
        w.effect_ud = EFFECT_NUMBERS["fx_ud"]
        w.effect_sti = EFFECT_NUMBERS["fx_sti"]
        w.effect_cli = EFFECT_NUMBERS["fx_cli"]
        w.effect_breakpoint = EFFECT_NUMBERS["fx_breakpoint"]
        w.effect_vector_low = EFFECT_NUMBERS["fx_xsave"]
        w.effect_vector_high = EFFECT_NUMBERS["fx_xrstor"]
        w.cache_start, w.cache_size = self.cache.alias, self.cache.size
        w.pages = self._pages.take(NUMBER_MAX * PageRow.size)
        w.page_limit = NUMBER_MAX
        w.page_of_index = self._pages.take((self.memory.mapped >> 12) * 4)
        w.traces = self._pages.take(TRACES_MAX * TraceRow.size)
        w.trace_limit = TRACES_MAX
        w.marks = self._pages.take(MARKS_MAX * 4)
        w.mark_limit = MARKS_MAX
        w.relocations = self._pages.take(RELOCATIONS_MAX * 8)
        w.indirect_miss = THUNK["indirect_miss"] & 0xFFFFFFFF
        w.careful = THUNK["careful"] & 0xFFFFFFFF
        w.page_count = w.trace_count = 1

    # --- questions -------------------------------------------------------------------------------

    def answer(self, mode: int) -> None:
        """Make the form or the recipe that native code asks for."""
        w = self.writer
        raw = bytes(w.want_bytes[: w.want_length])
        if w.want == WANT_FORM:
            key = w.want_key
            self._enter_form(self.answers.form(key, lambda: self._expert.form(raw, key, mode)))
        else:
            context, padded = w.context, raw.ljust(RAW_BYTES, b"\0")
            self._enter_recipe(
                self.answers.recipe(
                    context, padded, lambda: self._expert.recipe(raw, context, mode)
                )
            )

    @functools.cached_property
    def _expert(self) -> Expert:
        """Who knows what nobody has asked before."""
        from ringfence.engine.translate.asking import Expert

        scaled = self.view.tsc_ratio != TSC_RATIO_ONE
        return Expert(self._offers, scaled_tsc=scaled, alone=bool(self.view.alone))

    def _recall(self) -> None:
        """Enter all answers that are known already."""
        for row in self.answers.forms():
            self._enter_form(row)
        for row in self.answers.recipes():
            self._enter_recipe(row)

    def _enter_form(self, row: bytes) -> None:
        if self.form_count >= FORMS_MAX:
            ctypes.memset(self.writer.forms, 0, FORM_ROWS * Form.size)
            self.form_count = 0
        key = (ctypes.c_uint64 * 1).from_buffer_copy(row)
        at = self._form_insert(self.address, ctypes.addressof(key))
        ctypes.memmove(at, row, Form.size)
        self.form_count += 1

    def _enter_recipe(self, row: bytes) -> None:
        if self.recipe_count >= RECIPES_MAX or self._recipes_used + len(row) > RECIPE_BYTES:
            ctypes.memset(self.writer.recipes, 0, RECIPE_ROWS * 8)
            self._recipes_used = self.recipe_count = 0
        at = self._recipes_at + self._recipes_used
        ctypes.memmove(at, row, len(row))
        self._recipes_used += len(row)
        self._recipe_insert(self.address, at)
        self.recipe_count += 1

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
