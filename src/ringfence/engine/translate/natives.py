"""The engine's native library: effects, memory management, dispatch and thunks in one object."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ringfence.cpu import library as cpu_library
from ringfence.cpu.exceptions import deliver_exception, deliver_interrupt, deliver_nmi
from ringfence.engine.translate import (
    assembling,
    block,
    builder,
    copying,
    decoding,
    dispatch,
    gather,
    groups,
    pages,
    tables,
    thunks,
    writer,
)
from ringfence.memory import mmu, strings, walk, walk_state, xstate
from ringfence.native.library import Library

EFFECTS: dict[str, Any] = {
    **cpu_library.EFFECTS,
    "fx_string": strings.fx_string,
    "fx_xsave": xstate.fx_xsave,
    "fx_xrstor": xstate.fx_xrstor,
}
EFFECT_NUMBERS = {name: number for number, name in enumerate(sorted(EFFECTS))}
"""Numbers by which translated code names effects; part of what a stored translation depends on."""

_MODULES = (
    *cpu_library.MODULES,
    mmu,
    strings,
    walk,
    walk_state,
    xstate,
    assembling,
    block,
    builder,
    copying,
    decoding,
    dispatch,
    gather,
    groups,
    pages,
    tables,
    thunks,
    writer,
)
_ROOTS = (
    gather.fx_in_gathered,
    gather.fx_out_gathered,
    dispatch.lookup,
    dispatch.lookup_slow,
    dispatch.lookup_careful,
    dispatch.link,
    dispatch.attention,
    dispatch.slow_access,
    dispatch.slow_commit,
    dispatch.tlb_miss,
    dispatch.stack_miss,
    dispatch.tlb_reset,
    dispatch.straddle,
    dispatch.deliver_and_lookup,
    dispatch.find_code,
    dispatch.jump_forget,
    decoding.form_insert,
    decoding.recipe_insert,
    pages.invalidate,
    dispatch.mode_changed,
    dispatch.interrupts_enabled,
    mmu.tlb_flush_all,
    mmu.tlb_flush_nonglobal,
    mmu.tlb_flush_page,
    mmu.tlb_protect_page,
    mmu.linear_read,
    mmu.linear_write,
    mmu.host_page,
    walk.walk,
    deliver_exception,
    deliver_interrupt,
    deliver_nmi,
)


@functools.cache
def load(cache: Path | None) -> Library:
    """Compile the library, or take its object code from the cache folder.

    Once a process: the code has no state of its own, and the signal handler in it must never go.
    """
    return Library([*_ROOTS, *EFFECTS.values()], _MODULES, cache, thunks.assembly())
