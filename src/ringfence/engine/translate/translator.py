"""From "no code for this address" to a trace in the cache, and back when the guest's code changes.

A *code page* is one linear page that leads to one physical page in one CPU mode; all its traces are
valid together and reach each other without checks. When the guest writes to translated bytes, the
traces that depend on those lines die: their entries are overwritten with jumps to the look-up, and
once the same address is translated again, with jumps to its new trace.
"""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ringfence.cpu.state import UD
from ringfence.engine.translate import special as _special
from ringfence.engine.translate.block import (
    MODE_CAREFUL,
    MODE_CPL,
    MODE_ENTERED,
    MODE_SLOW,
    gs,
)
from ringfence.engine.translate.builder import Builder
from ringfence.engine.translate.codecache import CodeCache
from ringfence.engine.translate.emit import gs_jump
from ringfence.engine.translate.natives import EFFECT_NUMBERS
from ringfence.engine.translate.recipe import Recipes, Swap
from ringfence.engine.translate.store import Stored, TranslationStore
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.trace import PAGE, Trace

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library

DEAD_KEPT = 3
"""Dead traces of an address that are led straight to its newest one."""
NUMBER_MAX = 60_000
"""Code pages until all translations are dropped."""
LOW_2G, TOP_2G = 0x7FFFF000, 0xFFFFFFFF80000000
"""Outside of these, addresses of code need more than a sign-extended 32-bit word."""
BUILDERS_MAX = 64
"""Modes and arrangements of registers; each keeps recipes."""
PAGE_MASK = ~0xFFF & ((1 << 64) - 1)
assert _special.KEEP  # importing the module enters its recipes in the table


@dataclass(slots=True)
class Placed:
    """A stretch of the code cache: traces of one code page, ascending by address."""

    page: CodePage
    traces: list[Trace]
    stored: Stored | None = None
    start: int = 0
    """Address of the code of ``stored``."""


@dataclass(slots=True)
class CodePage:
    """A linear page in one mode, with its traces by offset."""

    number: int
    linear: int
    index: int
    """RAM page index (offset in RAM / 4096)."""
    mode: int
    traces: dict[int, Trace] = field(default_factory=dict)
    across: list[tuple[CodePage, Trace]] = field(default_factory=list)
    """Traces of pages before this one whose instruction ends here."""
    dead: dict[int, list[Trace]] = field(default_factory=dict)
    data: bytes = b""
    """The page's content when the store was last asked about it, and its key there."""
    key: bytes = b""
    killed: bool = False
    """Whether some of ``pending``'s traces may be dead."""
    pending: list[Placed] = field(default_factory=list)
    """What came from the store and has no objects yet."""


class Translator:
    """Owns the code cache, the code pages and the recipes of one vCPU."""

    def __init__(
        self,
        memory: GuestMemory,
        view: Any,
        library: Library,
        offers: Callable[[str], bool],
        store: TranslationStore | None,
    ) -> None:
        self.memory = memory
        self.view = view
        self.block = view.self_address
        self.offers = offers
        self.cache = CodeCache()
        self._page_insert = library.function("page_insert", 4)
        self._trace_insert = library.function("trace_insert", 5)
        self._protect = library.function("tlb_protect_page", 2)
        self._relocate = library.function("relocate", 6)
        self._install_stored = library.function("install_stored", 9)
        self._kill_stored = library.function("kill_stored", 7)
        self._redirect_stored = library.function("redirect_stored", 7)
        self._succeed_stored = library.function("succeed_stored", 7)
        self._walk = library.function("walk", 3)
        self._jump_forget = library.function("jump_forget", 1)
        self._flush_all = library.function("tlb_flush_all", 1)
        self.builders: dict[tuple[int, bool, tuple[Swap, ...]], Builder] = {}
        self.pages: dict[tuple[int, int, int], CodePage] = {}
        self.by_index: dict[int, list[CodePage]] = defaultdict(list)
        self.starts: list[int] = []
        self.placed: list[Placed] = []
        self.store = store
        self.next_number = 1
        self.rows_used = 0
        """Rows of the trace table in use, at most; removed traces keep theirs until a flush."""
        self.last_entry = 0
        self.instructions = self.blocks = self.bytes = 0
        self.recalled = self.invalidated = self.full_flushes = 0

    def builder(self, mode: int, wide: bool, swaps: tuple[Swap, ...] = ()) -> Builder:
        """The trace builder for a mode and an arrangement of registers."""
        key = (mode, wide, swaps)
        made = self.builders.get(key)
        if made is None:
            if len(self.builders) >= BUILDERS_MAX:
                self.builders.clear()
            normal = self.builders.get((mode & ~MODE_CAREFUL, wide, ()))
            if mode & MODE_CAREFUL and normal is not None:
                recipes = normal.recipes
            else:
                plain = mode & ~MODE_CAREFUL
                recipes = Recipes(plain, bool(mode & MODE_SLOW), wide, self.offers, swaps)
            made = self.builders[key] = Builder(recipes, mode, EFFECT_NUMBERS)
        return made

    def page(self, linear: int, physical: int, mode: int) -> CodePage:
        """The code page of an address, made if it is new."""
        key = (linear, physical, mode)
        page = self.pages.get(key)
        if page is None:
            index = self.memory.offset(physical, PAGE) >> 12
            page = CodePage(self.next_number, linear, index, mode)
            self.next_number += 1
            self.pages[key] = page
            self.by_index[index].append(page)
            self._page_insert(self.block, linear | mode, physical, page.number)
            normal = self.pages.get((linear, physical, mode & ~MODE_ENTERED))
            if mode & MODE_ENTERED and normal is not None:
                at = self.view.variants + normal.number * 8 + (4 if mode & MODE_SLOW else 0)
                ctypes.c_uint32.from_address(at).value = page.number
        return page

    def data(self, index: int) -> bytes:
        """The bytes of a RAM page."""
        return bytes(self.memory.view[index << 12 : (index + 1) << 12])

    def translate(self, rip: int, physical: int, mode: int) -> bool:
        """Translate the code at ``rip`` and enter it in the tables.

        False where fetching its last bytes faulted: then an exception is pending.
        """
        full = self.rows_used > self.view.trace_rows * 3 // 4 or self.next_number > NUMBER_MAX - 2
        if full or not self.cache.room(2 << 20):
            self.flush()
        page = self.page(rip & PAGE_MASK, physical & PAGE_MASK, mode)
        offset = rip & (PAGE - 1)
        wide = LOW_2G <= page.linear < TOP_2G
        builder = self.builder(mode, wide)
        data = self.data(page.index)
        if self.store is not None and self.recall(page, data, wide, offset):
            return True
        items = builder.decode(data, offset)
        second = None
        if not items:
            second = self.following(page, mode)
            if second is None:
                return False
            data += self.data(second.index)
            items = builder.decode(data, offset)
        swaps = builder.arrangement(items)
        if swaps:
            builder = self.builder(mode, wide, swaps)
            items = builder.decode(data, offset)
        trace = builder.build(items, data, second.number if second else 0)
        if not self.install(page, trace):
            # A relative address needs more than 32 bits after all: again, with 64-bit constants.
            builder = self.builder(mode, True)
            trace = builder.build(
                builder.decode(data, offset), data, second.number if second else 0
            )
            self.install(page, trace)
        elif second is None and self.store is not None:
            self.store.remember(page.key, trace)
            return True
        trace.forget_code()
        if second is not None:
            second.across.append((page, trace))
            self.mark_lines(second.index, trace.next_lines)
            if mode & MODE_ENTERED:
                # Entered without a check of the second page: good for this once only.
                self._trace_insert(self.block, page.number << 12 | offset, 0, 0, 0)
        return True

    def recall(self, page: CodePage, data: bytes, wide: bool, offset: int) -> bool:
        """Place what the store knows about a page; whether that includes ``offset``."""
        if page.data == data:
            return False
        assert self.store is not None
        page.data = data
        page.key = self.store.key(data, page.mode, wide)
        stored = self.store.load(page.key)
        if stored is None or not self.cache.room(len(stored.code) + (1 << 20)):
            return False
        start = self.cache.add(stored.code)
        itlb = _ITLB_USER if page.mode & MODE_CPL == 3 else _ITLB_KERNEL
        entry = self._install_stored(
            self.block,
            page.number,
            page.linear,
            itlb,
            start,
            _address(stored.rows),
            stored.count,
            _address(stored.relocations),
            offset,
        )
        stored.placed()
        if page.dead or page.killed:
            self.succeed(page, stored, start)
        placed = Placed(page, [], stored, start)
        page.pending.append(placed)
        self.starts.append(start)
        self.placed.append(placed)
        self.mark_lines(page.index, stored.lines)
        self.recalled += stored.count
        self.rows_used += stored.count
        self.last_entry = entry
        return bool(entry)

    def succeed(self, page: CodePage, stored: Stored, start: int) -> None:
        """Lead a page's dead traces to those just placed at ``start``."""
        for placed in page.pending:
            assert placed.stored is not None
            self._succeed_stored(
                self.block,
                placed.start,
                _address(placed.stored.rows),
                placed.stored.count,
                start,
                _address(stored.rows),
                stored.count,
            )
        if page.dead:
            for trace in stored.traces():
                trace.start += start
                self.redirect(page, trace.offset, trace)

    def materialize(self, page: CodePage) -> None:
        """Make objects of a page's traces that came from the store."""
        for placed in page.pending:
            assert placed.stored is not None
            placed.traces = placed.stored.traces()
            placed.stored = None
            for trace in placed.traces:
                trace.start += placed.start
                trace.forget_code()
                if trace.lines:
                    page.traces.setdefault(trace.offset, trace)
                else:
                    page.dead.setdefault(trace.offset, []).append(trace)
        page.pending.clear()

    def redirect(self, page: CodePage, offset: int, trace: Trace) -> None:
        """Lead the dead traces of an address to its new one."""
        for dead in page.dead.get(offset, ()):
            self.aim(dead.start + dead.checked, trace.start + trace.checked)
            self.aim(dead.start + dead.local, trace.start + trace.local)
        if page.killed:
            start = trace.start
            for placed in page.pending:
                assert placed.stored is not None
                self._redirect_stored(
                    self.block,
                    placed.start,
                    _address(placed.stored.rows),
                    placed.stored.count,
                    trace.offset,
                    start + trace.checked,
                    start + trace.local,
                )

    def following(self, page: CodePage, mode: int) -> CodePage | None:
        """The code page behind one, for an instruction across the boundary; None if it faults."""
        address = (page.linear + PAGE) & ((1 << 64) - 1)
        user = 4 if mode & MODE_CPL == 3 else 0
        if self._walk(self.block, address, user | 16):
            return None
        try:
            return self.page(address, self.view.walk_pa & PAGE_MASK, mode)
        except IndexError:
            # What is not RAM reads as all ones, as where the engine fetches from there.
            self.view.exc_vector, self.view.exc_error = UD, 0
            return None

    def install(self, page: CodePage, trace: Trace) -> bool:
        """Place a trace in the cache and make it known; False where an address did not fit."""
        start = trace.start = self.cache.add(trace.code)
        words, count = trace.relocations.buffer_info()
        itlb = _ITLB_USER if page.mode & MODE_CPL == 3 else _ITLB_KERNEL
        alias = start + self.cache.alias - self.cache.base
        if self._relocate(alias, words, count // 2, page.linear, page.number, itlb):
            return False
        offset = trace.offset
        old = page.traces.get(offset)
        if old is not None:
            self.kill(page, offset, old)
        page.traces[offset] = trace
        self.starts.append(start)
        self.placed.append(Placed(page, [trace]))
        self.mark_lines(page.index, trace.lines)
        self.last_entry = start + trace.checked
        self._trace_insert(
            self.block,
            page.number << 12 | offset,
            start + trace.local,
            start + trace.checked,
            start + trace.indirect,
        )
        if page.dead or page.killed:
            self.redirect(page, offset, trace)
        self.instructions += trace.instructions
        self.blocks += 1
        self.rows_used += 1
        self.bytes += trace.length
        return True

    def mark_lines(self, index: int, lines: int) -> None:
        """Note which lines of a RAM page hold translated code; the first one protects the page."""
        at = self.view.code_lines + index * 8
        cell = ctypes.c_uint64.from_address(at)
        if not cell.value:
            self._protect(self.block, self.view.ram_host + (index << 12))
        cell.value |= lines

    def aim(self, address: int, target: int) -> None:
        """Overwrite code with a jump."""
        self.cache.patch(address, b"\xe9" + struct.pack("<i", target - address - 5))

    def kill(self, page: CodePage, offset: int, trace: Trace) -> None:
        """Make a trace unreachable; its code stays until the cache is flushed."""
        self.invalidated += 1
        if not page.mode & MODE_ENTERED:
            start = trace.start
            self.cache.patch(start + trace.indirect, _INDIRECT_MISS)
            self.aim(start + trace.checked, start + trace.reenter)
            self.aim(start + trace.local, start + trace.reenter_local)
            # An older one leads here already, so a few are enough however often code changes.
            page.dead[offset] = [*page.dead.get(offset, ())[-DEAD_KEPT:], trace]
        self._trace_insert(self.block, page.number << 12 | offset, 0, 0, 0)

    def invalidate(self, index: int, lines: int) -> None:
        """The guest wrote to ``lines`` of a RAM page: drop the traces that depend on them."""
        left = 0
        for page in self.by_index[index]:
            for placed in page.pending:
                assert placed.stored is not None
                page.killed = True
                left |= self._kill_stored(
                    self.block,
                    page.number,
                    placed.start,
                    _address(placed.stored.rows),
                    placed.stored.count,
                    lines,
                    THUNK["indirect_miss"] & 0xFFFFFFFF,
                )
            for offset, trace in list(page.traces.items()):
                if trace.lines & lines:
                    del page.traces[offset]
                    self.kill(page, offset, trace)
                else:
                    left |= trace.lines
            if page.across:
                left |= self.invalidate_across(page, lines)
        ctypes.c_uint64.from_address(self.view.code_lines + index * 8).value = left

    def invalidate_across(self, page: CodePage, lines: int) -> int:
        """The same for instructions that only end in a page; lines still depended on."""
        left = 0
        kept = []
        for first, trace in page.across:
            if not trace.next_lines & lines:
                left |= trace.next_lines
                kept.append((first, trace))
            elif first.traces.get(trace.offset) is trace:
                del first.traces[trace.offset]
                self.kill(first, trace.offset, trace)
        page.across = kept
        return left

    def locate(self, host: int) -> tuple[int, bool, int] | None:
        """Guest RIP, whether flags are parked, and ``Trace.swaps``, for a code cache address."""
        n = bisect_right(self.starts, host) - 1
        if n < 0:
            return None
        placed = self.placed[n]
        if placed.stored is not None:
            self.materialize(placed.page)
        at = bisect_right(placed.traces, host, key=lambda trace: trace.start) - 1
        trace = placed.traces[at]
        position = host - trace.start
        at = bisect_right(trace.marks, position << 16 | 0xFFFF) - 1
        if at < 0 or position >= trace.length:
            return None
        mark = trace.marks[at]
        rip = (placed.page.linear + (mark & 0x7FFF)) & ((1 << 64) - 1)
        return rip, bool(mark & 0x8000), trace.swaps

    def flush(self) -> None:
        """Drop all translations."""
        self.full_flushes += 1
        view = self.view
        for index in self.by_index:
            ctypes.c_uint64.from_address(view.code_lines + index * 8).value = 0
        ctypes.memset(view.variants, 0, (NUMBER_MAX + 1) * 8)
        ctypes.memset(view.trace_table, 0, view.trace_rows * 32)
        ctypes.memset(view.page_table, 0, view.page_rows * 32)
        self.pages.clear()
        self.by_index.clear()
        self.starts.clear()
        self.placed.clear()
        self.next_number = 1
        self.rows_used = 0
        self.cache.reset()
        self._jump_forget(self.block)
        self._flush_all(self.block)

    def statistics(self) -> dict[str, int]:
        """Plain data for ``Engine.stats``."""
        return {
            "instructions": self.instructions,
            "blocks": self.blocks,
            "recalled": self.recalled,
            "host_bytes": self.bytes,
            "invalidated": self.invalidated + self.view.killed,
            "full_flushes": self.full_flushes,
            "code_pages": len(self.pages),
            # A copy at once: the vCPU thread may be adding one.
            "recipes": sum(len(b.recipes.known) for b in list(self.builders.values())),
        }

    def close(self) -> None:
        """Keep what is new, and free the cache."""
        if self.store is not None:
            self.store.close()
        self.cache.close()


def _address(data: bytes | bytearray) -> int:
    """Host address of an object's content."""
    if isinstance(data, bytearray):
        return ctypes.addressof(ctypes.c_char.from_buffer(data)) if data else 0
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


_ITLB_USER, _ITLB_KERNEL = gs("itlb_user") & (1 << 64) - 1, gs("itlb_kernel") & (1 << 64) - 1
_INDIRECT_MISS = gs_jump(THUNK["indirect_miss"])
