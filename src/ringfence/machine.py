"""How the parts make one computer, and what its owner can do with it.

A `Machine` is RAM, a board, an engine and a loaded kernel, put together by `assembly`; it holds
no device logic. A host thread runs each vCPU: `engine.group` starts them from the boot CPU's, and
they come back there. The owner's calls (pause, resume, stop, wait) come from any other thread and
meet the boot CPU's thread at one condition variable, `_change`; the engine is only ever *asked* to
return, and every change of state is made by the thread that sees it happen.

A reset is a new assembly: the thread drops RAM, board and engine and builds them again, so that
nothing of the old life can leak into the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ringfence import engine as engines
from ringfence.assembly import HostSide, MachineConfig, Origin, Parts, assemble
from ringfence.console import Console
from ringfence.debugger import Debugger
from ringfence.engine import Engine, EngineConfig, StopReason, VirtualCpu
from ringfence.errors import GuestTimeout, HostError, ImageError, UsageError
from ringfence.firmware import TestDevices
from ringfence.hotplug import Pluggable, Slots
from ringfence.memory.linear import read_linear, write_linear
from ringfence.network.config import NICS, parse_mac, parse_nic
from ringfence.settings import default_cache_dir, parse_memory
from ringfence.sharing.options import ShareOptions, parse_shares
from ringfence.state.movable import Movable
from ringfence.storage.options import DiskOptions, parse_disk
from ringfence.storage.seed import Seed

if TYPE_CHECKING:
    from ringfence.boot.firmware import Firmware
    from ringfence.boot.source import ImageSource
    from ringfence.engine.exits import TraceRecord
    from ringfence.network.backend import Heritable, NetworkBackend
    from ringfence.paravirt.hypercalls import Function
    from ringfence.state.keeper import Keeper

DEFAULT_APPEND = "console=ttyS0 panic=-1"
"""Kernel command line where neither the owner nor the image says another."""
STOP_PATIENCE = 10.0
"""Seconds until a vCPU thread that does not come back is called a bug."""


class State(Enum):
    """Where a machine is in its life."""

    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class Machine(Movable, Pluggable):
    """One virtual computer.

    Parameters
    ----------
    image : str, optional
        Name of a stored image (``debian``) or of the built-in guest (``builtin``).
    kernel, initrd : bytes, str or Path, optional
        A kernel (bzImage or ELF vmlinux) and initial RAM disk of the owner's, instead of an image.
    append : str, optional
        Kernel command line; behind the image's own where there is an image.
    memory : int or str
        Guest RAM, in bytes or as text such as ``"512M"``.
    cpus : int
        Number of vCPUs; `ringfence doctor` says how many an engine offers.
    engine : str
        ``auto``, ``translate``, ``kvm`` or ``trap``.
    on_reset : {"exit", "reboot"}
        Whether a reset by the guest ends the machine or starts it anew.
    cache : bool
        Whether the engine's own compiled code is kept on disk for the next run.
    cache_dir : str or Path, optional
        Where they are kept; by default below the user's cache folder.
    disks : sequence of str, Path or DiskOptions
        Disk images for /dev/vda, /dev/vdb…; text as `storage.options.parse_disk` reads it, such as
        ``"root.qcow2,snapshot"``. They are open as long as the machine is.
    ephemeral : bool
        Throw away what the guest writes on its image's own disk, which is /dev/vda before others.
    rng : bool
        Whether the guest has an entropy device, beside the CPU's RDRAND and RDSEED.
    balloon : bool
        Whether the guest has a memory balloon; see `set_balloon`.
    ports : mapping of str to callable, optional
        Named ports of bytes (/dev/virtio-ports/NAME in the guest, where udev runs): each callable
        is given what the guest writes, in a thread of the machine's, and must return soon. With
        ports the guest has a console hvc0 as well, whose output is the machine's console's.
    vsock : str or Path, optional
        Make a Unix socket there by which the host reaches the guest's sockets (AF_VSOCK, CID 3);
        see `devices.virtio.vsock_unix` for what to say to it.
    packed : bool
        Whether virtio devices offer packed rings beside split ones.
    network : str or NetworkBackend, optional
        What the network card's cable leads to: ``user``, ``user:loopback``, ``socket:PATH``,
        ``tap:NAME``, or a backend of the caller's, which is closed with the machine. None, or
        ``none``: no card.
    nic : str
        The kind of card: ``virtio`` or ``e1000``; behind a comma, options of a virtio one (see
        `network.config.parse_nic`): ``virtio,coalesce=16:50,poll=200``.
    mac : str, optional
        Its Ethernet address, ``02:00:00:00:00:01``; by default a random one.
    forwards : sequence of str
        Ports of the host's that lead to the guest's, with a ``user`` network: ``8080:80``.
    capture : str or Path, optional
        File for all frames, in pcap format.
    tsc_hz : int, optional
        Rate of the guest's time-stamp counter, the same on every host that it will run on; by
        default the host's.
    pause_clock : {"stop", "run"}
        Whether the guest's time stands still over a pause, or jumps to where it would have been.
        The guest may change it (see ``paravirt.hypercalls``).
    direct : bool
        Under translation: user code that computes for long runs directly, in processes of its own,
        where guest and host allow it.
    boot : str
        The kernel's format: ``auto``, ``linux``, ``linux32``, ``multiboot`` or ``pvh``.
    modules : sequence of str
        ``FILE`` or ``FILE ARGUMENT...``, for multiboot and PVH kernels; ``initrd`` is the first.
    test : TestDevices, optional
        Devices for test kernels; see `exit_status`.
    bios : str, Path or Firmware, optional
        Firmware to start instead of a kernel: ``seabios`` or ``ovmf``, if they have been fetched,
        or a file. UEFI firmware starts ``kernel`` if there is one.
    nvram : str or Path, optional
        The file that keeps the firmware's variables; made if it is not there. Without it changes
        are lost with the machine.
    shares : sequence of str, Path or ShareOptions
        Folders of the host's that the guest may mount (9p over virtio); text as
        `sharing.options.parse_share` reads it, such as ``"src,tag=code,ro"``.
    seed : Seed, optional
        What cloud-init in the guest is told, on one more disk; see `storage.seed.parse_seed`.

    Raises
    ------
    UsageError, ImageError, HostError
        The machine can't be built as asked; nothing is left behind.

    Examples
    --------
    >>> with Machine(image="debian") as machine:  # doctest: +SKIP
    ...     machine.start()
    ...     machine.console.wait_for("~ # ")
    ...     machine.console.send("poweroff -f\\n")
    ...     machine.wait(10)
    <StopReason.POWER_OFF: 'power-off'>
    """

    def __init__(
        self,
        *,
        image: str | None = None,
        kernel: ImageSource | None = None,
        initrd: ImageSource | None = None,
        append: str | None = None,
        memory: int | str = "512M",
        cpus: int = 1,
        engine: str = "auto",
        on_reset: Literal["exit", "reboot"] = "exit",
        cache: bool = True,
        cache_dir: str | Path | None = None,
        disks: Sequence[str | Path | DiskOptions] = (),
        ephemeral: bool = False,
        rng: bool = False,
        balloon: bool = False,
        ports: Mapping[str, Callable[[bytes], None]] | None = None,
        vsock: str | Path | None = None,
        packed: bool = False,
        network: str | NetworkBackend | None = None,
        nic: str = NICS[0],
        mac: str | None = None,
        forwards: Sequence[str] = (),
        capture: str | Path | None = None,
        tsc_hz: int | None = None,
        pause_clock: Literal["stop", "run"] = "stop",
        direct: bool = True,
        boot: str = "auto",
        modules: Sequence[str] = (),
        test: TestDevices | None = None,
        bios: str | Path | Firmware | None = None,
        nvram: str | Path | None = None,
        shares: Sequence[str | Path | ShareOptions] = (),
        seed: Seed | None = None,
    ) -> None:
        if on_reset not in ("exit", "reboot"):
            raise UsageError(f"on_reset {on_reset!r} is unknown: expected 'exit' or 'reboot'")
        if pause_clock not in ("stop", "run"):
            raise UsageError(f"pause_clock {pause_clock!r} is unknown: expected 'stop' or 'run'")
        card, nic_pacing = parse_nic(nic)
        size = parse_memory(memory)
        engine = engines.select(engine, cpus)
        folder = (Path(cache_dir) if cache_dir else default_cache_dir()) if cache else None
        firmware = _firmware(bios, nvram)
        own: tuple[DiskOptions, ...] = ()
        if firmware is not None and kernel is None and image is None:
            cmdline = append or ""
        elif kernel is None:
            kernel, initrd, cmdline, own = _from_image(image or "debian", initrd, append, ephemeral)
        elif image is not None:
            raise UsageError("both an image and a kernel were given: expected one of them")
        else:
            cmdline = DEFAULT_APPEND if append is None else append
        config = MachineConfig(
            Path(kernel) if isinstance(kernel, str) else kernel,
            Path(initrd) if isinstance(initrd, str) else initrd,
            cmdline,
            size,
            engine,
            EngineConfig(cpus, cache_dir=folder, direct=direct),
            on_reset,
            (*own, *(parse_disk(disk) for disk in disks)),
            rng,
            balloon,
            dict(ports or {}),
            Path(vsock) if vsock else None,
            packed,
            card,
            parse_mac(mac),
            tsc_hz,
            pause_clock,
            boot,
            tuple(modules),
            test or TestDevices(),
            network if isinstance(network, str) else None,
            tuple(forwards),
            Path(capture) if capture is not None else None,
            firmware,
            Path(nvram) if nvram else None,
            nic_pacing,
            shares=parse_shares(shares),
            seed=seed,
        )
        self._build(config, None if isinstance(network, str) else network)

    def _build(
        self, config: MachineConfig, network: NetworkBackend | None, origin: Origin | None = None
    ) -> None:
        """Make the machine that was asked for, or go on with one that has lived before."""
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
        machine._build(config, None, origin)
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
        return self._still().engine

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

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- seeing inside ------------------------------------------------------------------------

    def read_physical(self, address: int, length: int) -> bytes:
        """Bytes of guest RAM; IndexError outside it. The guest must stand still."""
        return self._still().memory.read(address, length)

    def write_physical(self, address: int, data: bytes) -> None:
        """Change guest RAM as a device would; IndexError outside it. The guest must stand still."""
        self._still().memory.dma_write(address, data)

    @property
    def vcpus(self) -> tuple[VirtualCpu, ...]:
        """The vCPUs by number, each with its registers. The guest must stand still."""
        return self._still().engine.vcpus

    def read_virtual(self, address: int, length: int, cpu: int = 0) -> bytes:
        """Bytes as a paused vCPU would read them; IndexError where nothing is mapped."""
        parts = self._still()
        return read_linear(
            parts.memory, lambda at: parts.engine.translate(at, cpu), address, length
        )

    def write_virtual(self, address: int, data: bytes, cpu: int = 0) -> None:
        """Change RAM at an address of a paused vCPU's, all or nothing, permitted there or not.

        Raises
        ------
        IndexError
            Nothing is mapped there, or what is no RAM.
        """
        parts = self._still()
        write_linear(parts.memory, lambda at: parts.engine.translate(at, cpu), address, data)

    def registers(self, cpu: int = 0) -> dict[str, int]:
        """Registers of a vCPU, by the manual's lower-case names. The guest must stand still."""
        return self._still().engine.registers(cpu)

    def set_registers(self, values: dict[str, int], cpu: int = 0) -> None:
        """Change some registers of a vCPU. The guest must stand still."""
        self._still().engine.set_registers(values, cpu)

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

    def set_balloon(self, size: int | str) -> None:
        """Ask the guest to give ``size`` bytes of its RAM back to the host; it does what it can.

        Raises
        ------
        UsageError
            The machine was made without a balloon.
        """
        with self._change:
            balloon = self._parts.devices.balloon
            if balloon is None:
                raise UsageError("the machine has no balloon: make it with balloon=True")
            balloon.set_target(size if isinstance(size, int) else parse_memory(size))

    def send_port(self, name: str, data: bytes) -> int:
        """Give bytes to a named port; return how many were taken (the rest: try again later).

        Raises
        ------
        UsageError
            There is no such port.
        """
        with self._change:
            console = self._parts.devices.console
            if console is None or name not in self.config.ports:
                raise UsageError(f"the machine has no port {name!r}: name it in ports=")
            return console.send(1 + list(self.config.ports).index(name), data)

    def hypercall(self, number: int) -> Callable[[Function], Function]:
        """Decorate the function that answers a hypercall of the guest's kernel.

        It is given a ``paravirt.hypercalls.Call``, in the vCPU's thread, and returns RAX (None: 0).
        What it raises as ``HypercallError`` is the guest's error, such as a bad address in one of
        the call's copies; other exceptions are -EINVAL and shown once.

        Raises
        ------
        UsageError
            The number is not one of 0x1000 to 0xffff, or taken, or the engine keeps hypercalls.

        Examples
        --------
        >>> @machine.hypercall(0x1000)  # doctest: +SKIP
        ... def checksum(call):
        ...     address, length, *_ = call.arguments
        ...     return zlib.crc32(call.read(address, length))
        """
        if not engines.capabilities(self.config.engine).hypercalls:
            raise UsageError(
                f"engine '{self.config.engine}' answers hypercalls itself: use 'translate'"
            )

        def add(function: Function) -> Function:
            self._host.hypercalls.add(number, function)
            return function

        return add

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

    def still_parts(self) -> Parts:
        """The parts of a machine that stands still, for its keeper."""
        if self._state is State.ENDED:
            raise UsageError("the machine has ended")
        return self._still()

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
            self._host.network.attach(parts.devices.card.receive)

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

    def _still(self) -> Parts:
        self._require(State.READY, State.PAUSED, State.ENDED)
        return self._parts

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait (holding ``_change``) for something that the vCPU's thread does soon."""
        if not self._change.wait_for(condition, STOP_PATIENCE):
            raise HostError(f"the vCPU did not come back within {STOP_PATIENCE:g} s: a bug of ours")


def _firmware(bios: str | Path | Firmware | None, nvram: str | Path | None) -> Firmware | None:
    """Firmware by its name, from a file, or as it was given."""
    if bios is None:
        if nvram is not None:
            raise UsageError("variables were given without firmware: expected bios, too")
        return None
    from ringfence.boot.firmware import Firmware, read_firmware
    from ringfence.images import firmware
    from ringfence.images.store import Store

    if isinstance(bios, Firmware):
        return bios
    if bios not in firmware.PACKAGES:
        # A file of its own may come with variables of its own, without a template.
        given = Path(nvram) if nvram else None
        return read_firmware(bios, given if given and given.exists() else None)
    found = firmware.find_firmware(str(bios), Store())
    if found is None:
        raise ImageError(f"firmware {bios} is not there: fetch it by 'ringfence pull {bios}'")
    return read_firmware(found.code, found.variables)


def _from_image(
    name: str, initrd: ImageSource | None, append: str | None, ephemeral: bool
) -> tuple[ImageSource, ImageSource | None, str, tuple[DiskOptions, ...]]:
    """Kernel, initrd, command line and disk (if any) of a stored or built-in image."""
    from ringfence.images import builtin
    from ringfence.images.store import Store

    kernel: ImageSource
    disks: tuple[DiskOptions, ...] = ()
    if name == builtin.NAME:
        kernel, cmdline = builtin.builtin_kernel(), DEFAULT_APPEND
    else:
        image = Store().find(name)
        kernel, initrd = image.kernel, initrd or image.initrd
        cmdline = " ".join(dict.fromkeys(f"{DEFAULT_APPEND} {image.cmdline}".split()))
        if image.disk is not None:
            disks = (DiskOptions(image.disk, "raw", snapshot=ephemeral),)
    return kernel, initrd, f"{cmdline} {append}" if append else cmdline, disks
