"""The engine's native library: effects, memory management, dispatch and thunks in one object."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringfence.cpu import library as cpu_library
from ringfence.cpu.exceptions import deliver_exception, deliver_interrupt, deliver_nmi
from ringfence.cpu.stack import segment_linear
from ringfence.engine.direct import lengths, mapping, ptrace, run, scan, space, stub
from ringfence.engine.translate import (
    assembling,
    block,
    builder,
    copying,
    debugging,
    decoding,
    describing,
    dispatch,
    gather,
    groups,
    keeping,
    modes,
    operands,
    pages,
    sharing,
    spinning,
    substituting,
    tables,
    thunks,
    writer,
)
from ringfence.memory import causes, coherence, mmu, registers, strings, walk, walk_state, xstate
from ringfence.native import hostcall
from ringfence.native.library import (
    Library,
    image_path,
    prune,
    read_image,
    source_key,
    write_image,
)

EFFECTS: dict[str, Any] = {
    **cpu_library.EFFECTS,
    "fx_breakpoint": debugging.fx_breakpoint,
    "fx_string": strings.fx_string,
    "fx_pause": spinning.fx_pause,
    "fx_xsave": xstate.fx_xsave,
    "fx_xrstor": xstate.fx_xrstor,
}
EFFECT_NUMBERS = {name: number for number, name in enumerate(sorted(EFFECTS))}
"""Numbers by which translated code names effects; part of what a stored translation depends on."""

_MODULES = (
    *cpu_library.MODULES,
    causes,
    coherence,
    mmu,
    registers,
    strings,
    walk,
    walk_state,
    xstate,
    lengths,
    mapping,
    ptrace,
    run,
    scan,
    space,
    stub,
    hostcall,
    assembling,
    block,
    builder,
    copying,
    debugging,
    decoding,
    describing,
    dispatch,
    gather,
    groups,
    keeping,
    modes,
    operands,
    pages,
    sharing,
    spinning,
    substituting,
    tables,
    thunks,
    writer,
)
_ROOTS = (
    gather.fx_in_gathered,
    gather.fx_out_gathered,
    dispatch.lookup,
    dispatch.onward,
    dispatch.wanted,
    run.run_direct,
    lengths.shape,
    scan.is_harmless,
    dispatch.lookup_slow,
    dispatch.lookup_careful,
    dispatch.link_careful,
    dispatch.link,
    dispatch.attention,
    dispatch.slow_access,
    dispatch.slow_commit,
    dispatch.tlb_miss,
    dispatch.stack_miss,
    dispatch.tlb_reset,
    dispatch.straddle,
    dispatch.segment_access,
    dispatch.deliver_and_lookup,
    dispatch.find_code,
    modes.jump_forget,
    decoding.form_insert,
    describing.recipe_insert,
    pages.forget_code,
    coherence.release_split_lock,
    coherence.release_write,
    coherence.note_outside_write,
    coherence.note_outside_runs,
    dispatch.code_is_stale,
    modes.mode_changed,
    modes.interrupts_enabled,
    debugging.debug_changed,
    debugging.debug_note,
    debugging.step_masked,
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
    segment_linear,
)


_ALL = (*_ROOTS, *EFFECTS.values())

KEPT_FILES = 8
"""Versions of the library that stay in the cache folder."""


def _assembly() -> str:
    return thunks.assembly() + stub.assembly() + hostcall.ASSEMBLY


_CHILD = "from ringfence.engine.translate.natives import optimize; optimize()"


class Natives:
    """The library in its best form so far: made quickly at first, exchanged once it is optimized.

    The first start on a machine compiles without optimization, in a quarter of a second. Another
    process then makes optimized code, which is kept in the cache folder and taken over by the
    engines that run meanwhile. The code has no state of its own, so that exchanging it is storing
    other addresses; what was replaced stays, as it may be executing.

    Parameters
    ----------
    cache : Path or None
        Folder of optimized code; None keeps it in memory only.
    """

    def __init__(self, cache: Path | None) -> None:
        self.key = source_key(_MODULES)
        """Of the sources: what all that is derived from them depends on."""
        self._path = image_path(cache, self.key) if cache else None
        self._lock = threading.Lock()
        self._users: list[Callable[[Library], None]] = []
        self._replaced: list[Library] = []
        code = read_image(self._path) if self._path else None
        if code is None:
            from ringfence.native.compiler import compile_image  # only this needs LLVM

            self.library = Library(compile_image(_ALL, _assembly(), optimize=False))
            if sys.executable:
                threading.Thread(target=self._improve, name="optimizer", daemon=True).start()
        else:
            self.library = Library(code)

    def use(self, adopt: Callable[[Library], None]) -> None:
        """Call ``adopt`` with the library now, and again when a better one is there."""
        with self._lock:
            self._users.append(adopt)
            adopt(self.library)

    def release(self, adopt: Callable[[Library], None]) -> None:
        """Don't call it any more."""
        with self._lock:
            self._users.remove(adopt)

    def _improve(self) -> None:
        """Have optimized code made, and hand it to everyone; trouble leaves things as they are."""
        try:
            code = _optimized(self._path)
            better = Library(code) if code else None
        except (OSError, RuntimeError):
            return
        if better is None:
            return
        with self._lock:
            self._replaced.append(self.library)
            self.library = better
            for adopt in self._users:
                adopt(better)


def _optimized(path: Path | None) -> bytes | None:
    """Optimized code, made by another process, which keeps it at ``path`` even if we end first."""
    out = os.memfd_create("ringfence-object", os.MFD_CLOEXEC)
    try:
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", _CHILD, source_key(_MODULES), *([str(path)] if path else [])],
            {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, out, 1),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setsid=True,
        )
        _, status = os.waitpid(child, 0)
        if status:
            return None
        return read_image(path) if path else os.pread(out, os.fstat(out).st_size, 0)
    finally:
        os.close(out)


def optimize() -> None:
    """Compile with optimization: into the file named on the command line, or to stdout.

    The first argument is the key of the sources that the code is wanted of.
    """
    if sys.argv[1] != source_key(_MODULES):
        sys.exit(1)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from ringfence.native.compiler import compile_image

    code = compile_image(_ALL, _assembly())
    if len(sys.argv) > 2:
        path = Path(sys.argv[2])
        write_image(path, code)
        prune(path.parent, "native-*", KEPT_FILES)
    else:
        sys.stdout.buffer.write(code)


@functools.cache
def load(cache: Path | None) -> Natives:
    """The library, once a process: the signal handler in it must never go."""
    return Natives(cache)
