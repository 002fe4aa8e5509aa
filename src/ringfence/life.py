"""A machine's life: it starts, pauses, goes on, starts anew at a reset, and ends.

`Living` is RAM, a board, an engine and a loaded kernel, put together by `assembly`; it holds no
device logic. A host thread runs each vCPU: `engine.group` starts them from the boot CPU's, and
they come back there. The owner's calls (pause, resume, stop, wait) come from any other thread and
meet the boot CPU's thread at one condition variable, `_change`; the engine is only ever *asked* to
return, and every change of state is made by the thread that sees it happen.

A reset is a new assembly: the thread drops RAM, board and engine and builds them again, so that
nothing of the old life can leak into the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ringfence.assembly import HostSide, MachineConfig, Origin, Parts, assemble
from ringfence.console import Console
from ringfence.debugger import Debugger
from ringfence.engine import Engine, StopReason
from ringfence.errors import GuestTimeout, HostError, UsageError
from ringfence.hotplug import Pluggable, Slots
from ringfence.inspection import Inspectable
from ringfence.state.movable import Movable

if TYPE_CHECKING:
    from ringfence.engine.exits import TraceRecord
    from ringfence.network.backend import Heritable, NetworkBackend
    from ringfence.state.keeper import Keeper

STOP_PATIENCE = 10.0
"""Seconds until a vCPU thread that does not come back is called a bug."""


class State(Enum):
    """Where a machine is in its life."""

    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class Living(Movable, Pluggable, Inspectable):
    """A machine that was made of its description, and lives from then on; see the module's text.

    Parameters
    ----------
    config : MachineConfig
        What it is made of.
    network : NetworkBackend, optional
        What the card's cable leads to, where ``config`` doesn't say it.
    origin : Origin, optional
        Where it has lived before; it goes on from there.

    Raises
    ------
    UsageError, ImageError, HostError
        The machine can't be built as asked; nothing is left behind.
    """

    def __init__(
        self, config: MachineConfig, network: NetworkBackend | None, origin: Origin | None = None
    ) -> None:
        self.config = config
        self.console = Console(
            send=lambda data: self._parts.board.receive(data),
            unread=lambda: self._parts.board.uart.pending_input(),
        )
        self.crash_report = ""
        """Register dump of a crash; empty as long as there was none."""
        self.ended = threading.Event()
        """Set when the machine has ended, for those who wait for other things, too."""
        self._change = threading.Condition()
        self._state = State.READY
        self._pause_wanted = False
        self._stop_wanted = False
        self._closed = False
        self._outcome: StopReason | None = None
        self._failure: BaseException | None = None
        self.debug = Debugger(self)
        """Breakpoints, watchpoints and steps."""
        self._watchers: list[Callable[[], None]] = []
        self._trace: Callable[[TraceRecord], None] | None = None
        self._last_stats: dict[str, Any] = {}
        self._started = 0.0
        self._seconds = 0.0
        self._resets = 0
        self._host = HostSide(config, network, awaited=origin is not None and origin.state is None)
        self._slots = Slots(self, self._host)
        try:
            self._parts = self._assemble(origin)
        except BaseException:
            self._host.close()
            raise
        self._disconnect()  # until it runs: RAM may be another machine's until then
        self._keeper: Keeper | None = None
        self._thread = threading.Thread(target=self._vcpu, name="vcpu0", daemon=True)

    @classmethod
    def resumed(cls, config: MachineConfig, origin: Origin) -> Self:
        """Make a machine that goes on from somewhere; it is not started."""
        machine = cls.__new__(cls)
        Living.__init__(machine, config, None, origin)
        return machine

    @property
    def network(self) -> Heritable | None:
        """The network that the guest can leave behind with its connections, if it has such a one.

        After a migration ``network.served()`` waits until the last of them has ended. They need
        this process, not the machine: it may be closed.
        """
        return self._host.heritable

    def take_over(self, state: dict[str, Any]) -> None:
        """Become, before the start, the machine that another process has let go of.

        Raises
        ------
        ImageError, HostError
            The state can't be this machine's, or a disk can't be had.
        """
        self._require(State.READY)
        self._host.reclaim()
        self._parts.insert_disks(self._host.storage.disks)
        self._parts.restore(state)

    # -- life ---------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the machine is in its life."""
        return self._state

    @property
    def outcome(self) -> StopReason | None:
        """Why the machine ended; None while it has not."""
        return self._outcome

    @property
    def exit_status(self) -> int | None:
        """What the guest ended with by a test device (`StopReason.GUEST_EXIT`); else None."""
        return self._parts.exit_status

    @property
    def seconds(self) -> float:
        """Host time since the start, up to the end."""
        if self._state in (State.RUNNING, State.PAUSED):
            return time.monotonic() - self._started
        return self._seconds

    def start(self) -> None:
        """Let the guest run; returns at once."""
        with self._change:
            if self._state is not State.READY or self._closed:
                raise UsageError("the machine was started before: make a new Machine")
            self._state = State.RUNNING
        self._started = time.monotonic()
        self._thread.start()

    def pause(self) -> None:
        """Stop the vCPU and the guest's clocks; returns when both stand still."""
        with self._change:
            self._require(State.RUNNING, State.PAUSED)
            self._pause_wanted = True
            self._parts.engine.request_pause()
            self._await(lambda: self._state is not State.RUNNING)
        if self._state is State.ENDED:
            raise UsageError("the machine ended before it could be paused")

    def resume(self) -> None:
        """Let a paused guest go on; its time is where it was, or jumps (``pause_clock``)."""
        with self._change:
            self._require(State.PAUSED)
            if self._keeper is not None:
                self._keeper.reclaim()
            self._pause_wanted = False
            self._state = State.RUNNING
            self._change.notify_all()

    def go(self) -> None:
        """Start the machine if it was not, else resume it."""
        if self._state is State.READY:
            self.start()
        else:
            self.resume()

    def wait_still(self, timeout: float | None = None) -> None:
        """Wait until the machine pauses or ends; GuestTimeout if it runs after ``timeout`` seconds.

        A pause that nobody asked for is a breakpoint's; see `debug`.
        """
        with self._change:
            if not self._change.wait_for(lambda: self._state is not State.RUNNING, timeout):
                raise GuestTimeout(f"the guest did not stop within {timeout:g} s")

    def still_engine(self) -> Engine:
        """The engine of a machine that stands still, for its debugger."""
        return self.inspected().engine

    def stop(self) -> None:
        """End the machine as by pulling the plug; returns when the vCPU stands still.

        Not for console listeners and watchers, which run in the machine's own threads.
        """
        with self._change:
            if self._state is State.READY:
                self._state = State.ENDED
                self._outcome = self._parts.ending or StopReason.STOPPED
                self.ended.set()
                return
            self._stop_wanted = True
            self._parts.engine.request_stop()
            self._change.notify_all()
            self._await(lambda: self._state is State.ENDED)

    def press_power_button(self) -> None:
        """Ask the guest to shut down; it may take its time, or have no ear for it.

        Raises
        ------
        UsageError
            The machine does not run.
        """
        with self._change:
            self._require(State.RUNNING, State.PAUSED)
            self._parts.board.press_power_button()

    def wait(self, timeout: float | None = None) -> StopReason:
        """Wait until the machine ends, at most ``timeout`` seconds, and say why it did.

        Raises
        ------
        GuestTimeout
            It still runs; it is left running.
        """
        with self._change:
            if self._state is State.READY:
                raise UsageError("the machine was not started: call start() first")
            if not self._change.wait_for(lambda: self._state is State.ENDED, timeout):
                raise GuestTimeout(f"the guest did not power off within {timeout:g} s")
        if self._failure is not None:
            raise self._failure
        assert self._outcome is not None
        return self._outcome

    def when_ended(self, watcher: Callable[[], None]) -> None:
        """Have ``watcher`` called once, from the vCPU's thread, when the machine ends.

        Where it has ended already, it is called at once.
        """
        with self._change:
            if self._state is not State.ENDED:
                self._watchers.append(watcher)
                return
        watcher()

    def close(self) -> None:
        """Stop the machine, free its memory. Safe to repeat."""
        if self._closed:
            return
        self.stop()
        self._closed = True
        if self._thread.is_alive():
            self._thread.join(STOP_PATIENCE)
        self._last_stats = self.stats()
        self._slots.settle()
        self._parts.close()
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what is seen of it -------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters as nested plain data, at any time; those of the last assembly after a reset.

        Beside what `Engine.stats` gives: ``machine`` with ``outcome``, ``seconds`` of host time,
        ``resets``, ``engine`` and ``memory`` in bytes; ``network`` with the backend's counters;
        ``hypercalls`` by name; ``steal_ns``, by vCPU, that the host ran something else instead.
        """
        if self._closed and self._last_stats:
            return self._last_stats
        about = {
            "outcome": self._outcome.value if self._outcome else self._state.value,
            "seconds": self.seconds,
            "resets": self._resets,
            "engine": self.config.engine,
            "memory": self.config.memory,
            "cmdline": self.config.cmdline,
        }
        network = {"network": self._host.network.stats()} if self._host.network is not None else {}
        with self._change:  # a reset exchanges the parts under it
            services = self._parts.paravirtual.stats() if self._parts.paravirtual else {}
            return {"machine": about, **self._parts.engine.stats(), **network, **services}

    def set_trace(self, callback: Callable[[TraceRecord], None] | None) -> None:
        """Call ``callback`` with every exit, from the vCPU's thread; None stops it."""
        self._trace = callback
        self._parts.engine.set_trace(callback)

    # -- its state ----------------------------------------------------------------------------

    @property
    def keeper(self) -> Keeper:
        """Who takes snapshots and sends the machine elsewhere."""
        from ringfence.state.keeper import Keeper

        if self._keeper is None:
            self._keeper = Keeper(self, self._host)
        return self._keeper

    @property
    def incomplete(self) -> bool:
        """Whether some of its RAM is still where it came from (``postcopy``)."""
        return self._parts.memory.incomplete

    @property
    def runs(self) -> bool:
        """Whether the guest runs now."""
        return self._state is State.RUNNING

    @property
    def slots(self) -> Slots:
        """Who plugs disks in, and takes them out."""
        return self._slots

    def alone(self) -> AbstractContextManager[None]:
        """Have no snapshot or migration meanwhile; UsageError where there is one."""
        return self.keeper.alone()

    @contextmanager
    def unchanging(self) -> Iterator[Parts]:
        """The parts of a machine that has begun and not ended, and doesn't start anew meanwhile."""
        with self._change:
            self._require(State.RUNNING, State.PAUSED)
            yield self._parts

    def inspected(self) -> Parts:
        """The parts of a machine that stands still, or has ended."""
        self._require(State.READY, State.PAUSED, State.ENDED)
        return self._parts

    def still_parts(self) -> Parts:
        """The parts of a machine that stands still, for its keeper."""
        if self._state is State.ENDED:
            raise UsageError("the machine has ended")
        return self.inspected()

    def depart(self) -> None:
        """End a machine that stands still, because it runs elsewhere from now on."""
        self._parts.ending = StopReason.MIGRATED
        self.stop()

    # -- the vCPU's thread --------------------------------------------------------------------

    def _vcpu(self) -> None:
        outcome = StopReason.STOPPED
        try:
            outcome = self._live()
            if outcome is StopReason.CRASH:
                self.crash_report = self._parts.engine.crash_dump()
        except BaseException as error:
            self._failure = error
        finally:
            self._seconds = time.monotonic() - self._started
            with self._change:
                self._outcome = outcome
                self._state = State.ENDED
                self.ended.set()
                watchers, self._watchers = self._watchers, []
                self._change.notify_all()
            self.console.end(f"the machine ended ({outcome.value})")
            for watcher in watchers:
                watcher()

    def _live(self) -> StopReason:
        """Run until the machine ends, through pauses and reboots."""
        while True:
            outcome = self._run_once()
            if outcome is not StopReason.RESET or self.config.on_reset == "exit":
                return outcome
            with self._change:
                if self._stop_wanted:
                    return StopReason.STOPPED
                self._slots.settle()
                self._parts.close()
                self._parts = self._assemble()
                self._resets += 1
                self._parts.engine.set_trace(self._trace)
                self.debug.attach(self._parts.engine)
                if self._pause_wanted:
                    self._parts.engine.request_pause()

    def _run_once(self) -> StopReason:
        parts = self._parts
        parts.time.resume()  # what was restored begins in a pause
        parts.board.timers.start()
        self._connect(parts)
        try:
            while True:
                reason = parts.engine.run()
                if parts.ending is not None:
                    return parts.ending
                if reason is not StopReason.PAUSED:
                    return reason
                parts.time.pause()
                self._disconnect()
                self._stand_still()
                if self._stop_wanted:  # and RAM may be another process's already
                    return parts.ending or StopReason.STOPPED
                self._connect(parts)
                parts.time.resume()
        finally:
            self._disconnect()
            parts.board.timers.stop()
            parts.board.flush()

    def _stand_still(self) -> None:
        with self._change:
            stopped = self.debug.settle(self._parts.engine)
            if not self._pause_wanted and not stopped:
                return
            self._state = State.PAUSED
            self._change.notify_all()
        self.debug.tell()
        with self._change:
            self._change.wait_for(lambda: self._state is State.RUNNING or self._stop_wanted)

    def _connect(self, parts: Parts) -> None:
        """Let frames reach the guest."""
        if self._host.network is not None and parts.devices.card is not None:
            self._host.network.attach(parts.devices.card)

    def _disconnect(self) -> None:
        """Hold frames back: the guest's memory is not to change any more."""
        if self._host.network is not None:
            self._host.network.detach()

    def _assemble(self, origin: Origin | None = None) -> Parts:
        return assemble(
            self.config,
            self._host,
            console_sink=self.console.feed,
            on_power_off=lambda: self._ending(StopReason.POWER_OFF),
            on_reset=lambda: self._ending(StopReason.RESET),
            on_exit=self._guest_exit,
            on_eject=self._slots.ejected,
            origin=origin,
        )

    def _guest_exit(self, status: int) -> None:
        """A test device says that the guest ends with an exit status; the first one counts."""
        if self._parts.ending is None:
            self._parts.exit_status = status
        self._ending(StopReason.GUEST_EXIT)

    def _ending(self, reason: StopReason) -> None:
        """The board says that the guest turned itself off or asked for a reset."""
        parts = self._parts
        if parts.ending is None:
            parts.ending = reason
        parts.engine.request_stop()

    # -- guards -------------------------------------------------------------------------------

    def _require(self, *allowed: State) -> None:
        if self._state not in allowed or self._closed:
            expected = " or ".join(state.value for state in allowed)
            now = "closed" if self._closed else self._state.value
            raise UsageError(f"the machine is {now}: expected it to be {expected}")

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait (holding ``_change``) for something that the vCPU's thread does soon."""
        if not self._change.wait_for(condition, STOP_PATIENCE):
            raise HostError(f"the vCPU did not come back within {STOP_PATIENCE:g} s: a bug of ours")
