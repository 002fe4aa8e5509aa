"""Which address spaces run directly: those whose user code computes for long between two stops.

A stop of a process costs about as much as translated code needs for tens of thousands of
instructions, so most programs are better off translated, and all begin so. At interrupts that find
user code, one looks how often user code was entered since the last one. An address space that is
found computing `PATIENCE` times in a row gets a process. From then on native code keeps the books
(`run.charge`): time spent in the process is credit, a stop costs; whose credit is used up is
translated again, and not tried again for a time that doubles with each failure.

A process and its tracer run in turn, never at once, so both are bound to the CPU that the thread is
on: handing over to another CPU would take ten times as long. Now and then the bond is released for
a while, so that the scheduler can put the pair elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ringfence.cpu.components import AVX512_STATE
from ringfence.cpu.state import CR4_FSGSBASE, CR4_UMIP, CS, SS
from ringfence.engine.direct import host
from ringfence.engine.direct.process import Process
from ringfence.engine.direct.run import (
    BUDGET_MAX,
    DIRECT_SPACES,
    EVENT_COST,
    NOWHERE,
    USER_CS,
    USER_SS,
)
from ringfence.engine.translate.block import MODE_AVX, MODE_AVX512, MODE_CPL, MODE_LONG, MODE_SSE
from ringfence.errors import HostError
from ringfence.memory.walk import PTE_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library

PATIENCE = 2
ENTRIES_PER_SECOND = 5000
"""Entries of user code below which it counts as computing."""
SHORTEST = 0.001
"""Seconds between two looks."""
START_BUDGET = EVENT_COST * 200
FIRST_PENALTY, LAST_PENALTY = 0.1, 5.0
REMEMBERED = 4096
"""Address spaces whose failures are known."""
LOOSE_EVERY = 64
"""Looks from one release of the bond to the next."""

_libc = ctypes.CDLL(None)


class DirectExecution:
    """A virtual CPU's processes; all but `kick` is for its thread.

    Parameters
    ----------
    view : ctypes view of Vcpu
        Its block.
    library : callable
        Gives the engine's native code.
    memory : GuestMemory
        Guest RAM.
    wanted : bool
        False: everything is translated.
    """

    def __init__(
        self, view: Any, library: Callable[[], Library], memory: GuestMemory, wanted: bool
    ) -> None:
        self._view = view
        self._library = library
        self._memory = memory
        self._processes: dict[int, Process] = {}
        self._running: dict[int, Process] = {}
        self._penalty: dict[int, tuple[float, float]] = {}
        self._looked = 0.0
        self._entries = 0
        self._root = NOWHERE
        self._score = 0
        self._bound = self._looks = 0
        self._all_cpus: set[int] = set()
        self._ran = self._runs = self._faults = self._made = 0
        mask = view.xstate_mask
        self.on_process: Callable[[int], None] = lambda number: None
        """Told the number of each new process."""
        self.refusal = ""
        """Why nothing runs directly, ever."""
        self._unsuited = ""
        """Why the last address space that deserved it does not."""
        if not wanted:
            self.refusal = "switched off"
        elif memory.fd < 0:
            self.refusal = "guest RAM is private to this process"
        else:
            self.refusal = host.lacking(host.enabled_components(), mask, host.features())
        for n in range(DIRECT_SPACES):
            view.direct_roots[n] = NOWHERE
        view.direct_mode = MODE_CPL | MODE_LONG | MODE_SSE | MODE_AVX
        if mask & AVX512_STATE:
            view.direct_mode |= MODE_AVX512

    def look(self) -> None:
        """An interrupt has come: see who is interrupted."""
        view = self._view
        if self.refusal or view.cpl != 3:
            return
        if self._memory.incomplete:
            return  # a process would find zeroes where pages are still to come
        root = view.cr3 & PTE_ADDRESS
        if root in view.direct_roots:
            self._loosen()
            return
        now = time.monotonic()
        passed = now - self._looked
        if passed < SHORTEST:
            return
        entries = view.user_entries - self._entries
        self._looked, self._entries = now, view.user_entries
        if root != self._root or entries > ENTRIES_PER_SECOND * passed:
            self._root, self._score = root, 0
            return
        self._score += 1
        if self._score >= PATIENCE and not self._waits(root, now):
            self._score = 0
            self._unsuited = unsuited(view)
            if not self._unsuited:
                self._begin(root)

    def _waits(self, root: int, now: float) -> bool:
        """Whether an address space that stopped too often is not to be tried again yet."""
        process = self._process_of(root)
        if process is not None and process.space.failed:
            process.space.failed = 0
            _, penalty = self._penalty.get(root, (0.0, FIRST_PENALTY))
            if len(self._penalty) >= REMEMBERED:
                self._penalty.clear()
            self._penalty[root] = (now + penalty, min(2 * penalty, LAST_PENALTY))
        return root in self._penalty and self._penalty[root][0] > now

    def _process_of(self, root: int) -> Process | None:
        found = (each for each in self._processes.values() if each.space.root == root)
        return next(found, None)

    def _begin(self, root: int) -> None:
        """Give an address space a process, at the cost of another if there are many."""
        view = self._view
        old = self._process_of(root)
        if old is not None:
            slot = list(view.direct_spaces).index(old.address)
        else:
            free = [n for n in range(DIRECT_SPACES) if view.direct_roots[n] == NOWHERE]
            slot = (free or [self._made % DIRECT_SPACES])[0]
        self._end(slot)
        try:
            process = Process(self._library(), self._memory, view.xstate_mask)
        except HostError as error:
            self.refusal = str(error)
            return
        process.space.root = root
        process.space.budget = START_BUDGET
        self.on_process(process.pid)
        self._processes[process.address] = process
        self._running[process.pid] = process
        view.direct_spaces[slot] = process.address
        view.direct_roots[slot] = root
        self._made += 1
        self._bind()

    def _end(self, slot: int) -> None:
        view = self._view
        process = self._processes.pop(view.direct_spaces[slot], None)
        view.direct_roots[slot] = NOWHERE
        view.direct_spaces[slot] = 0
        if process is not None:
            self._ran += process.space.ran
            self._runs += process.space.runs
            self._faults += process.space.faults
            del self._running[process.pid]
            process.close()

    def lost(self) -> None:
        """A process does not do what it must: go on without it.

        Raises
        ------
        HostError
            It was killed with the guest's registers.
        """
        view = self._view
        for slot in range(DIRECT_SPACES):
            if view.direct_spaces[slot] == view.exit_data[0]:
                self._end(slot)
        if view.exit_data[1]:
            raise HostError(
                "a process that ran guest code was killed, the guest's registers with it"
            )

    def kick(self) -> None:
        """Have guest code left, if it runs directly now; ``attention`` is set (any thread)."""
        process = self._running.get(self._view.direct_running)
        if process is not None:
            process.kick()

    # --- the host's CPUs -------------------------------------------------------------------------

    def _bind(self) -> None:
        if not self._all_cpus:
            self._all_cpus = os.sched_getaffinity(0)
        if len(self._all_cpus) == 1:
            return
        self._move({_libc.sched_getcpu()})
        self._bound = 1

    def release(self) -> None:
        """Let the thread run where it likes: it sleeps, or translates for long."""
        if self._bound:
            self._move(self._all_cpus)
            self._bound = 0

    def _move(self, cpus: set[int]) -> None:
        with suppress(OSError):  # CPUs may have been taken from us, and processes killed
            os.sched_setaffinity(0, cpus)
            for pid in self._running:
                os.sched_setaffinity(pid, cpus)

    def _loosen(self) -> None:
        self._looks += 1
        if self._looks % LOOSE_EVERY == 0:
            self.release()
        elif not self._bound:
            self._bind()

    # --- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End all processes; another thread may begin anew."""
        self.release()
        for slot in range(DIRECT_SPACES):
            self._end(slot)

    def statistics(self) -> dict[str, Any]:
        """Processes made, pieces of user code run in them, page faults of theirs, CPU time.

        And why there are none: ``refusal``, empty as long as user code runs directly or none has
        computed for long.
        """
        spaces = [process.space for process in self._processes.values()]
        return {
            "spaces": self._made,
            "runs": self._runs + sum(space.runs for space in spaces),
            "faults": self._faults + sum(space.faults for space in spaces),
            "ns": self._ran + sum(space.ran for space in spaces),
            "refusal": self.refusal or ("" if self._made else self._unsuited),
        }


def unsuited(view: Any) -> str:
    """Why the user code of a vCPU, interrupted now, can't run directly; empty if it can.

    The rest of what `run.eligible` asks changes from one moment to the next.
    """
    if (view.mode ^ view.direct_mode) & MODE_LONG:
        return "the guest's user code is not 64-bit code"
    if ~view.cr4 & (CR4_FSGSBASE | CR4_UMIP):
        return "the guest's kernel has not enabled UMIP and FSGSBASE"
    if view.xcr0 != view.xstate_mask:
        return "the guest's kernel has not enabled all of the vector state"
    if (view.seg_selector[CS], view.seg_selector[SS]) != (USER_CS, USER_SS):
        return "the guest's user selectors are not Linux's"
    return ""


assert BUDGET_MAX > START_BUDGET
