"""The engine's native library: effects, memory management, dispatch and thunks in one object."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from ringfence.cpu import library as cpu_library
from ringfence.cpu.exceptions import deliver_exception, deliver_interrupt, deliver_nmi
from ringfence.engine.translate import block, dispatch, gather, stored, thunks
from ringfence.memory import mmu, strings, walk, walk_state, xstate
from ringfence.native.library import Library, source_key

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
    block,
    dispatch,
    gather,
    stored,
    thunks,
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
    dispatch.page_insert,
    dispatch.trace_insert,
    dispatch.jump_forget,
    stored.relocate,
    stored.install_stored,
    stored.kill_stored,
    stored.redirect_stored,
    stored.succeed_stored,
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


def version(model: bytes) -> str:
    """What stored translations depend on besides guest code; ``model`` is the CPUID table."""
    from ringfence.engine.translate import (
        builder,
        emit,
        groups,
        recipe,
        special,
        store,
        trace,
        writer,
        x86,
    )

    own = (builder, emit, groups, recipe, special, store, trace, writer, x86)
    sources = source_key((*_MODULES, *own))
    parts = (sources, x86.library_identity(), EFFECT_NUMBERS)
    return hashlib.blake2b(repr(parts).encode() + model, digest_size=16).hexdigest()


@functools.cache
def load(cache: Path | None) -> Library:
    """Compile the library, or take its object code from the cache folder.

    Once a process: the code has no state of its own, and the signal handler in it must never go.
    """
    return Library([*_ROOTS, *EFFECTS.values()], _MODULES, cache, thunks.assembly())
