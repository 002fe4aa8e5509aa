"""What is seen and changed of a vCPU while it runs no guest code: registers, state, dirty pages.

`Standing` is that part of the engine; `engine.TranslateEngine` is the rest. Whatever is changed,
the vCPU next looks for the code at its RIP anew, or delivers what was pending.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringfence.cpu import state
from ringfence.cpu.registers import named_registers, set_named_register
from ringfence.cpu.saved import State, restore_cpu, save_cpu
from ringfence.engine.translate.accesses import MASK64
from ringfence.engine.translate.owner import OwnerDebug

if TYPE_CHECKING:
    from ringfence.engine.debug import DebugPoints, DebugStop
    from ringfence.memory.ram import GuestMemory
    from ringfence.native.library import Library


class Standing(ABC):
    """A vCPU as its machine's owner has it."""

    board: Any
    memory: GuestMemory
    library: Library
    index: int
    view: Any
    """The vCPU's block as a ctypes structure."""
    block: int
    """Its address."""
    _owner: OwnerDebug
    # Native functions, and places in the thunks where guest code goes on.
    _walk: Callable[..., int]
    _deliver_interrupt: Callable[..., int]
    _find: int
    _deliver: int

    @abstractmethod
    def _start_anew(self) -> None:
        """The state was replaced: nothing that was derived from the old one holds."""

    def registers(self) -> dict[str, int]:
        """See ``VirtualCpu``."""
        self.view.cr8 = self.board.read_cr8(self.index)
        return named_registers(self.view)

    def set_registers(self, values: dict[str, int]) -> None:
        """See ``VirtualCpu``; general registers, ``rip`` and ``rflags``."""
        for name, value in values.items():
            set_named_register(self.view, name, value)
        if "rip" in values:
            self.view.halted = 0
            self.view.jump_target = self._find

    def arm(self, points: DebugPoints) -> None:
        """See ``VirtualCpu``."""
        self._owner.arm(points)

    def step(self, wanted: bool) -> None:
        """See ``VirtualCpu``."""
        self._owner.step(wanted)

    def debug_stop(self) -> DebugStop | None:
        """See ``VirtualCpu``."""
        return self._owner.stop

    def vector_state(self) -> bytes:
        """See ``VirtualCpu``."""
        return bytes(self.view.xsave[: state.XSAVE_BYTES])

    def set_vector_state(self, area: bytes) -> None:
        """See ``VirtualCpu``."""
        ctypes.memmove(self.view.xsave, area, min(len(area), state.XSAVE_BYTES))

    def translate(self, address: int) -> int | None:
        """See ``VirtualCpu``; as a supervisor would read, which sets accessed flags."""
        view = self.view
        saved = (view.exc_vector, view.exc_error, view.exc_address)
        status = self._walk(self.block, address & MASK64, 0)
        view.exc_vector, view.exc_error, view.exc_address = saved
        return None if status else view.walk_pa

    def save(self) -> State:
        """See ``VirtualCpu``."""
        view = self.view
        view.cr8 = self.board.read_cr8(self.index)
        cpu = save_cpu(view)
        if view.jump_target != self._deliver:
            cpu["exc_vector"] = state.NO_EXCEPTION  # left over from one that was delivered
        return {"cpu": cpu, "interrupt": -1}

    def restore(self, saved: State) -> None:
        """See ``VirtualCpu``."""
        view = self.view
        restore_cpu(view, saved["cpu"], view.xstate_mask)
        self._start_anew()
        pending = view.exc_vector != state.NO_EXCEPTION
        view.jump_target = self._deliver if pending else self._find
        view.irq_request = view.attention = 1  # who knows what came before it was saved
        if saved["interrupt"] >= 0:
            self._deliver_interrupt(self.block, saved["interrupt"])

    def log_dirty(self, enabled: bool) -> None:
        """See ``VirtualCpu``."""
        self.view.dirty_map = self.memory.dirty.address if enabled else 0
        self.fetch_dirty()

    def fetch_dirty(self) -> None:
        """See ``VirtualCpu``: a first write to a page misses the TLB from now on, and marks it."""
        self.library.function("tlb_flush_all", 1)(self.block)
