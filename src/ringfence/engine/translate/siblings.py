"""What the vCPUs of a machine have in common under translation, and how they wait for each other.

Each vCPU translates for itself and keeps its code, tables and TLB to itself: nothing that runs
between two guest instructions takes a lock, and dropping code never has to wait for anybody. Shared
are RAM, one word for each of its pages (`memory.coherence`), what Python has found out about
instructions, and the right to gather console bytes.

**Orders.** What one vCPU wants done in another's TLB is an *order*: it is put into the other's
queue and carried out by the other's own thread, before it enters guest code the next time. If the
other is in guest code now, whoever gave the order waits until it has left. A vCPU says that it goes
inside, *then* looks at its queue; who orders puts it into the queue, *then* looks whether the other
is inside. Python's global lock gives these four steps one order, so at least one side sees the
other. A vCPU that waits is itself outside and holds no lock: two may wait for each other's leaving
at the same time, and neither for long.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from ringfence.engine.translate.answers import Answers, answers_path
from ringfence.memory.coherence import VCPUS_MAX
from ringfence.memory.zeroed import ZeroedPages

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.engine.translate.engine import TranslateEngine
    from ringfence.memory.ram import GuestMemory


class Siblings:
    """All vCPUs of one machine.

    Parameters
    ----------
    memory : GuestMemory
        Their RAM.
    board : Board
        Their board; it is told whom to ask when its state changes by itself.
    count : int
        How many there will be.
    """

    def __init__(self, memory: GuestMemory, board: Any, count: int) -> None:
        self.vcpus: list[TranslateEngine] = []
        self.alone = count == 1
        self._answers: Answers | None = None
        self._pages = ZeroedPages()
        self._table = self._pages.take(VCPUS_MAX * 8)
        self._page_use = self._pages.take((memory.mapped >> 12) * 8)
        self._split_lock = self._pages.take(8)
        self._gatherer: TranslateEngine | None = None
        memory.watch_dma(self._written, self._written_runs)
        board.on_input = self._stop_gathering

    def add(self, vcpu: TranslateEngine) -> None:
        """Make a vCPU known to the others."""
        view = vcpu.view
        view.vcpu_number = vcpu.index
        view.alone = self.alone
        view.vcpus = self._table
        view.page_use = self._page_use
        view.split_lock = self._split_lock
        ctypes.c_uint64.from_address(self._table + vcpu.index * 8).value = vcpu.block
        self.vcpus.append(vcpu)

    def remove(self, vcpu: TranslateEngine) -> None:
        """A vCPU is gone."""
        self.vcpus.remove(vcpu)
        if not self.vcpus and self._answers is not None:
            self._answers.save()

    def known_answers(self, folder: Path | None, *depends: object) -> Answers:
        """What is known about instructions, by any of the vCPUs and from a cache folder.

        ``depends``: what answers depend on, the same for all vCPUs.
        """
        if self._answers is None:
            self._answers = Answers(answers_path(folder, self.alone, *depends))
        return self._answers

    def _written(self, offset: int, length: int) -> None:
        """A device, or the owner, wrote to RAM (any thread)."""
        if length and self.vcpus:
            first, last = offset >> 12, offset + length - 1 >> 12
            self.vcpus[0].note_outside_write(first, last - first + 1)

    def _written_runs(self, table: int, count: int) -> None:
        """A device wrote to many places (any thread); see ``GuestMemory.watch_dma``."""
        if self.vcpus:
            self.vcpus[0].note_outside_runs(table, count)

    # --- orders ----------------------------------------------------------------------------------

    def stop_writers(self, page: int) -> None:
        """Return when no vCPU will write to a RAM page by what its TLB says now.

        The caller has claimed the page for code (`coherence.claim_code`) and is not in guest code.
        """
        use = ctypes.c_uint64.from_address(self._page_use + page * 8).value >> VCPUS_MAX
        writers = [vcpu for vcpu in self.vcpus if use >> vcpu.index & 1]
        for vcpu in writers:
            vcpu.orders.append(page)
        for event in [vcpu.call_out() for vcpu in writers]:
            if event is not None:
                event.wait()
        for vcpu in writers:
            vcpu.release_write(page)

    # --- the console -----------------------------------------------------------------------------

    def take_console(self, vcpu: TranslateEngine) -> None:
        """Before a vCPU accesses the console's ports: what another gathered comes first."""
        other = self._gatherer
        if other is None or other is vcpu:
            return
        if other.view is not None:
            other.view.gather = 0
            event = other.call_out()
            if event is not None:
                event.wait()
        self._gatherer = None

    def may_gather(self, vcpu: TranslateEngine) -> bool:
        """Whether a vCPU may gather console bytes; one at a time (the board's lock is held)."""
        other = self._gatherer
        if other is not None and other is not vcpu and other.view.gather:
            return False
        self._gatherer = vcpu
        return True

    def _stop_gathering(self) -> None:
        """The board's state changes by itself (any thread, with the board's lock)."""
        for vcpu in self.vcpus:
            vcpu.view.gather = 0
