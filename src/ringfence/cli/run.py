"""``ringfence run``: from options to a machine, from its ending to an exit status."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ringfence.api import names
from ringfence.api.server import published
from ringfence.cli.session import Ending, Session
from ringfence.devices.testing import CONSOLE_PORT, EXIT_PORT
from ringfence.engine import StopReason
from ringfence.errors import GuestCrash, GuestReset, GuestTimeout, HostError, UsageError
from ringfence.firmware import TestDevices
from ringfence.machine import Machine

if TYPE_CHECKING:
    from ringfence.gdb.server import GdbServer
    from ringfence.storage.seed import Seed


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of ``ringfence run``, as they were given."""

    image: str | None
    kernel: Path | None
    initrd: Path | None
    append: str | None
    memory: str
    cpus: int
    engine: str
    net: str
    nic: str
    forwards: tuple[str, ...]
    capture: Path | None
    timeout: float | None
    stats: str | None
    trace: bool
    on_reset: Literal["exit", "reboot"]
    cache: bool
    cache_dir: Path | None
    disks: tuple[str, ...] = ()
    rng: bool = False
    vsock: Path | None = None
    tsc_hz: int | None = None
    pause_clock: Literal["stop", "run"] = "stop"
    direct: bool = True
    boot: str = "auto"
    modules: tuple[str, ...] = ()
    test_devices: bool = False
    debug_exit: str | None = None
    debug_console: str | None = None
    ephemeral: bool = False
    agent: bool | None = None
    name: str | None = None
    detach: bool = False
    bios: str | None = None
    nvram: Path | None = None
    gdb: str | None = None
    gdb_wait: bool = False
    shares: tuple[str, ...] = ()
    user_data: Path | None = None
    ssh_keys: tuple[Path, ...] = ()
    hostname: str | None = None


def run_guest(options: RunOptions) -> int:
    """Boot what the options say and return the exit status; RingfenceError for a bad ending."""
    _check(options)
    image = options.image
    if options.bios is not None:
        from ringfence.cli.pull import ensure_firmware

        ensure_firmware(options.bios)
    elif options.kernel is None:
        from ringfence.cli.pull import DEFAULT_FLAVOUR, FLAVOUR_WITH_9P, ensure_image

        image = ensure_image(image, flavour=FLAVOUR_WITH_9P if options.shares else DEFAULT_FLAVOUR)
    hosting = Hosting(
        stem=image or "machine",
        image=image,
        name=options.name,
        detach=options.detach,
        timeout=options.timeout,
        stats=options.stats,
        trace=options.trace,
        gdb=options.gdb,
        gdb_wait=options.gdb_wait,
    )

    def make(opened: ExitStack, place: names.Place | None) -> Machine:
        if place is not None and options.vsock is None and _wants_agent(options):
            return _make(replace(options, vsock=place.vsock), image, opened)
        return _make(options, image, opened)

    return host(make, hosting)


@dataclass(frozen=True, slots=True)
class Hosting:
    """How a process has a machine: its name (or what a free one is made of), and for how long.

    ``started`` is told, in the machine's process, when it runs; ``detached``, in the one that was
    left, when a machine runs in a process of its own.
    """

    stem: str
    image: str | None = None
    name: str | None = None
    detach: bool = False
    timeout: float | None = None
    stats: str | None = None
    trace: bool = False
    gdb: str | None = None
    gdb_wait: bool = False
    started: Callable[[Machine], None] = lambda machine: None
    detached: Callable[[names.Place], None] = lambda place: print(place.name)


Maker = Callable[[ExitStack, "names.Place | None"], Machine]
"""Makes a machine, given what is closed behind it and where its sockets go, if it has a name."""


def host(make: Maker, hosting: Hosting) -> int:
    """Have the machine that ``make`` makes, here or in a process of its own; the exit status."""
    claim = _claim(hosting)
    if claim is None or not hosting.detach:
        return _host_here(make, hosting, claim)
    from ringfence.cli.detach import daemonize

    ready = daemonize(claim.place.log)
    if isinstance(ready, int):
        if ready == 0:
            hosting.detached(claim.place)
        return ready
    claim.adopt()
    status = _host_here(make, hosting, claim, ready)
    if not claim.place.log.stat().st_size:
        claim.place.log.unlink()
    return status


def _claim(hosting: Hosting) -> names.Claim | None:
    """Take the machine's name. Where none was asked for, it may do without."""
    if hosting.name:
        return names.claim(hosting.name)
    try:
        return names.claim_free(hosting.stem)
    except HostError as error:
        if hosting.detach:
            raise
        print(f"ringfence: note: 'list' will not show this machine: {error}", file=sys.stderr)
        return None


def _host_here(
    make: Maker,
    hosting: Hosting,
    claim: names.Claim | None,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Run the guest in this process; ``ready`` is told when it runs."""
    with ExitStack() as opened:
        place = opened.enter_context(claim) if claim is not None else None
        machine = make(opened, place)
        opened.callback(machine.close)
        if place is not None:
            opened.enter_context(published(machine, place, image=hosting.image))

        def started() -> None:
            hosting.started(machine)
            ready()

        session = Session(
            machine,
            timeout=hosting.timeout,
            trace=hosting.trace,
            started=started,
            gdb=_gdb(hosting, machine),
            wait=hosting.gdb_wait,
        )
        try:
            ending = session.run()
        except GuestTimeout:
            _report(machine.stats(), hosting.stats)
            raise
    _report(machine.stats(), hosting.stats)
    return _status(machine, ending)


def _wants_agent(options: RunOptions) -> bool:
    """Whether to have a way in for commands: unless told, where the machine is meant to be met."""
    if options.agent is None:
        return options.name is not None or options.detach
    return options.agent


def _make(options: RunOptions, image: str | None, opened: ExitStack) -> Machine:
    return Machine(
        image=image,
        kernel=options.kernel,
        initrd=options.initrd,
        append=options.append,
        memory=options.memory,
        cpus=options.cpus,
        engine=options.engine,
        network=options.net,
        nic=options.nic,
        forwards=options.forwards,
        capture=options.capture,
        on_reset=options.on_reset,
        cache=options.cache,
        cache_dir=options.cache_dir,
        disks=options.disks,
        ephemeral=options.ephemeral,
        rng=options.rng,
        vsock=options.vsock,
        tsc_hz=options.tsc_hz,
        pause_clock=options.pause_clock,
        direct=options.direct,
        boot=options.boot,
        modules=options.modules,
        test=_test_devices(options, opened),
        bios=options.bios,
        nvram=options.nvram,
        shares=options.shares,
        seed=_seed(options),
    )


def _seed(options: RunOptions) -> Seed | None:
    """What cloud-init is to be told."""
    from ringfence.cli.files import read_text_file, read_user_file
    from ringfence.storage.seed import parse_seed

    user_data = None if options.user_data is None else read_user_file(options.user_data)
    keys = [read_text_file(path) for path in options.ssh_keys]
    return parse_seed(user_data, keys, options.hostname)


def _gdb(hosting: Hosting, machine: Machine) -> GdbServer | None:
    """The server that GDB is to find, if one is wanted."""
    if hosting.gdb is None:
        return None
    from ringfence.gdb.server import GdbServer

    server = GdbServer(machine, hosting.gdb)
    waits = ", which the guest waits for" if hosting.gdb_wait else ""
    print(f"ringfence: gdb: target remote {server.address}{waits}", file=sys.stderr, flush=True)
    return server


def _test_devices(options: RunOptions, opened: ExitStack) -> TestDevices:
    """What the options ask for; the debug console's file is open as long as ``opened`` is."""
    console, _, at = (options.debug_console or "").partition(",port=")
    console = console or ("-" if options.test_devices else "")
    sink: Callable[[bytes], None] | None = None
    if console == "-":
        sink = _to_stderr
    elif console:
        try:
            file = FileIO(console, "w")
        except OSError as error:
            raise UsageError(f"--debugcon {console}: {error.strerror}") from error
        opened.callback(file.close)
        sink = _writer(file)
    port = options.debug_exit or (f"{EXIT_PORT:#x}" if options.test_devices else None)
    return TestDevices(
        exit_port=None if port is None else parse_port(port),
        console=sink,
        console_port=parse_port(at) if at else CONSOLE_PORT,
        ports=options.test_devices,
    )


def _to_stderr(data: bytes) -> None:
    with suppress(OSError):
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


def _writer(file: FileIO) -> Callable[[bytes], None]:
    """What writes to a file until that fails, which is said once."""
    failed = False

    def write(data: bytes) -> None:
        nonlocal failed
        if failed:
            return
        try:
            file.write(data)
        except OSError as error:
            failed = True
            print(f"ringfence: warning: --debugcon: {error.strerror}", file=sys.stderr)

    return write


def parse_port(text: str) -> int:
    """The first of four ports, as ``0xf4`` or ``244``.

    Raises
    ------
    UsageError
        It is no such number, or out of range.
    """
    try:
        port = int(text, 0)
    except ValueError:
        port = -1
    if not 0 <= port <= 0xFFFC:
        raise UsageError(f"port {text!r}: expected a number from 0 to 0xfffc")
    return port


def _check(options: RunOptions) -> None:
    """Refuse what makes no sense before anything is fetched or built."""
    from ringfence import engine as engines
    from ringfence.boot.loader import FORMATS
    from ringfence.boot.modules import parse_module
    from ringfence.network.config import parse_network, parse_nic
    from ringfence.settings import parse_memory
    from ringfence.sharing.options import parse_shares
    from ringfence.storage.options import parse_disk

    parse_memory(options.memory)
    engines.select(options.engine, options.cpus)
    if options.gdb is not None:
        from ringfence.gdb.server import parse_place

        parse_place(options.gdb)
    elif options.gdb_wait:
        raise UsageError("--gdb-wait makes no sense without --gdb")
    parse_network(options.net, options.forwards, options.capture)
    parse_nic(options.nic)
    for disk in options.disks:
        parse_disk(disk)
    parse_shares(options.shares)
    _seed(options)
    if options.boot not in FORMATS:
        raise UsageError(f"--boot {options.boot} is unknown: expected one of {', '.join(FORMATS)}")
    for module in options.modules:
        parse_module(module)
    if options.debug_exit is not None:
        parse_port(options.debug_exit)
    if options.kernel is not None and options.image is not None:
        raise UsageError("both an image and --kernel were given: expected one of them")
    if options.name is not None:
        names.place_of(options.name)
    if options.timeout is not None and not (options.timeout > 0 and math.isfinite(options.timeout)):
        raise UsageError(f"--timeout {options.timeout:g}: expected seconds above 0")
    if options.stats not in (None, "-"):
        assert options.stats is not None
        target = Path(options.stats)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise UsageError(f"--stats {target}: expected a file in a folder that exists, or '-'")


def _report(stats: dict[str, Any], where: str | None) -> None:
    if where is None:
        return
    from ringfence.cli import report

    if where == "-":
        width = shutil.get_terminal_size((78, 24)).columns
        sys.stderr.write("\n" + report.stats_text(stats, width))
    else:
        report.write_json(stats, Path(where))


def _serve_out(machine: Machine) -> None:
    """Stay as long as connections of a guest that has moved need it."""
    network = machine.network
    if network is None or network.served(0):
        return
    print(
        "ringfence: note: connections that it has go on through here, until they end or this does",
        file=sys.stderr,
        flush=True,
    )
    network.served()


def _status(machine: Machine, ending: Ending | signal.Signals) -> int:
    if isinstance(ending, signal.Signals):
        return 128 + ending
    if ending is Ending.PIPE:
        return 128 + signal.SIGPIPE
    if ending is Ending.QUIT:
        return 0
    outcome = machine.wait()
    if outcome is StopReason.GUEST_EXIT:
        return machine.exit_status or 0
    if outcome is StopReason.MIGRATED:
        print("ringfence: note: the machine runs elsewhere now", file=sys.stderr)
        _serve_out(machine)
    if outcome is StopReason.CRASH:
        raise GuestCrash("the guest crashed; its registers:", machine.crash_report)
    if outcome is StopReason.RESET:
        raise GuestReset("the guest asked for a reset (use --on-reset reboot to boot it again)")
    return 0
