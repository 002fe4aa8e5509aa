"""All vCPUs of a machine as one: they start, pause and end together.

Each vCPU has a host thread while the machine runs: the boot CPU the one that calls `Engine.run`,
the others threads that live as long as that call. The first vCPU that ends for a reason of its own
(a crash, the owner's stop) takes the others along, and what it ended for is what `run` returns.
A pause begins when the last vCPU has come back.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from ringfence.engine.protocol import StopReason, VirtualCpu
from ringfence.errors import ImageError

if TYPE_CHECKING:
    from ringfence.cpu.reset import EntryState
    from ringfence.engine.debug import DebugPoints, DebugStop
    from ringfence.engine.exits import TraceRecord

SWITCH_INTERVAL = 0.0005
"""Seconds for which a vCPU outside guest code may keep others waiting for Python's global lock."""
VERSION = 1
"""Of what `Engine.save` returns."""


class Engine:
    """The vCPUs of one machine.

    Parameters
    ----------
    vcpus : sequence of VirtualCpu
        In order of their numbers.
    board : Board
        It is told where messages for CPUs go.

    Attributes
    ----------
    vcpus : tuple of VirtualCpu
        For whoever wants something of a single one.
    """

    def __init__(self, vcpus: Sequence[VirtualCpu], board: Any) -> None:
        self.vcpus = tuple(vcpus)
        board.on_signal = self._signal
        self._lock = threading.Lock()
        self._pause = False
        self._ended: tuple[VirtualCpu, StopReason] | None = None
        self._failure: BaseException | None = None
        self._held: frozenset[int] = frozenset()

    def set_boot_state(self, boot: EntryState | None) -> None:
        """See `VirtualCpu.set_boot_state`: of the boot CPU; the others wait to be started."""
        self.vcpus[0].set_boot_state(boot)

    def run(self) -> StopReason:
        """Run all vCPUs, the boot CPU in the calling thread, until something in `StopReason`."""
        # Translating keeps what it makes, so frequent collections only cost time.
        thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
        gc.set_threshold(200_000, 20, 100)
        if len(self.vcpus) > 1:
            sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            self._run_all()
        finally:
            gc.set_threshold(*thresholds)
            sys.setswitchinterval(interval)
        if self._failure is not None:
            raise self._failure
        return self._ended[1] if self._ended is not None else StopReason.PAUSED

    def _run_all(self) -> None:
        """Run all vCPUs until each has come back."""
        threads = [
            threading.Thread(target=self._run, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            for vcpu in self.vcpus[1:]
            if vcpu.index not in self._held
        ]
        for thread in threads:
            thread.start()
        if 0 not in self._held:
            self._run(self.vcpus[0])
        for thread in threads:
            thread.join()
        with self._lock:
            self._pause = False
            for vcpu in self.vcpus:
                vcpu.forget_pause()

    def _run(self, vcpu: VirtualCpu) -> None:
        """Run one vCPU, and see to it that the others come back, too."""
        try:
            reason = vcpu.run()
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            reason = StopReason.CRASH
        if reason is StopReason.PAUSED:
            self.request_pause()
            return
        with self._lock:
            self._ended = self._ended or (vcpu, reason)
        self.request_stop()

    def _signal(self, cpu: int, kind: int, vector: int) -> None:
        """The board has a message for a CPU (any thread, the board's lock held)."""
        self.vcpus[cpu].signal(kind, vector)

    def request_stop(self) -> None:
        """Make `run` return STOPPED soon (any thread; remembered if `run` is not active)."""
        for vcpu in self.vcpus:
            vcpu.request_stop()

    def request_pause(self) -> None:
        """Make `run` return PAUSED soon (any thread); a later `run` goes on from there."""
        with self._lock:
            if self._pause:
                return
            self._pause = True
            for vcpu in self.vcpus:
                vcpu.request_pause()

    def registers(self, cpu: int = 0) -> dict[str, int]:
        """See `VirtualCpu.registers`."""
        return self.vcpus[cpu].registers()

    def set_registers(self, values: dict[str, int], cpu: int = 0) -> None:
        """See `VirtualCpu.set_registers`."""
        self.vcpus[cpu].set_registers(values)

    def arm(self, points: DebugPoints) -> None:
        """See `VirtualCpu.arm`: for all vCPUs."""
        for vcpu in self.vcpus:
            vcpu.arm(points)

    def plan(self, *, step: Collection[int] = (), hold: Collection[int] = ()) -> None:
        """Say which vCPUs stop behind the next instruction, and which don't run at all.

        It holds until the next call; at least one vCPU has to run.
        """
        self._held = frozenset(hold)
        assert len(self._held) < len(self.vcpus)
        for vcpu in self.vcpus:
            vcpu.step(vcpu.index in step)

    def debug_stops(self) -> list[DebugStop]:
        """Why `run` returned PAUSED, if it was not the owner who asked for it."""
        stops = (vcpu.debug_stop() for vcpu in self.vcpus if vcpu.index not in self._held)
        return [stop for stop in stops if stop is not None]

    def translate(self, address: int, cpu: int = 0) -> int | None:
        """See `VirtualCpu.translate`."""
        return self.vcpus[cpu].translate(address)

    def save(self) -> dict[str, Any]:
        """State of all vCPUs, which stand still, as plain data.

        ``version``, and ``vcpus``, see `VirtualCpu.save`.
        """
        return {"version": VERSION, "vcpus": [vcpu.save() for vcpu in self.vcpus]}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned; see `VirtualCpu.restore`."""
        for vcpu, state in zip(self.vcpus, self._checked(saved), strict=True):
            vcpu.restore(state)

    def _checked(self, saved: dict[str, Any]) -> list[dict[str, Any]]:
        vcpus = saved.get("vcpus")
        if (
            saved.get("version") != VERSION
            or not isinstance(vcpus, list)
            or len(vcpus) != len(self.vcpus)
            or not all(
                isinstance(vcpu, dict)
                and isinstance(vcpu.get("cpu"), dict)
                and vcpu.get("interrupt") in range(-1, 256)
                for vcpu in vcpus
            )
        ):
            raise ImageError(
                f"saved vCPUs are not of version {VERSION} or not {len(self.vcpus)}:"
                " restore them into a machine alike"
            )
        return vcpus

    def log_dirty(self, enabled: bool) -> None:
        """See `VirtualCpu.log_dirty`."""
        for vcpu in self.vcpus:
            vcpu.log_dirty(enabled)

    def fetch_dirty(self) -> None:
        """See `VirtualCpu.fetch_dirty`."""
        for vcpu in self.vcpus:
            vcpu.fetch_dirty()

    def stats(self) -> dict[str, Any]:
        """The vCPUs' counters added up (any thread); see `VirtualCpu.stats`.

        With several vCPUs, ``vcpus`` has what each spent its time with.
        """
        each = [vcpu.stats() for vcpu in self.vcpus]
        total = each[0]
        for one in each[1:]:
            total = _sum(total, one)
        if len(each) > 1:
            total["vcpus"] = {str(n): dict(one["time"]) for n, one in enumerate(each)}
        return total

    def set_trace(self, callback: Callable[[TraceRecord], None] | None) -> None:
        """See `VirtualCpu.set_trace`; with several vCPUs the calls come from several threads."""
        for vcpu in self.vcpus:
            vcpu.set_trace(callback)

    def crash_dump(self) -> str:
        """See `VirtualCpu.crash_dump`: of the vCPU that ended the machine."""
        vcpu = self._ended[0] if self._ended is not None else self.vcpus[0]
        where = f"vCPU {vcpu.index} of {len(self.vcpus)}\n" if len(self.vcpus) > 1 else ""
        return where + vcpu.crash_dump()

    def close(self) -> None:
        """See `VirtualCpu.close`."""
        for vcpu in self.vcpus:
            vcpu.close()


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two nested dictionaries, numbers added; of words, what the first one has to say."""
    total = dict(one)
    for name, value in other.items():
        if isinstance(value, dict):
            total[name] = _sum(one.get(name, {}), value)
        elif isinstance(value, str):
            total[name] = one.get(name) or value
        else:
            total[name] = one.get(name, 0) + value
    return total
