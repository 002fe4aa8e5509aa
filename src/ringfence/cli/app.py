"""The ``ringfence`` command: options, help, and how every ending becomes an exit status.

Only typer is imported here; each command imports its work when it is called, so that ``--help``
stays quick. `main` is the one place where an error becomes a line on stderr.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ringfence.cli.arguments import (
    CacheDir,
    Detach,
    Json,
    MachineName,
    Name,
    Share,
    TlsFiles,
    stored_images,
)
from ringfence.cli.epilogs import FIRST_EXAMPLES, RUN_EXAMPLES, STATUSES, SYMBOLS_EXAMPLES
from ringfence.cli.groups import cache_app, device_app, pull_app
from ringfence.errors import GuestCrash, RingfenceError, UsageError

INTERNAL_ERROR = 70
"""EX_SOFTWARE of sysexits(3): a bug of ours."""

app = typer.Typer(
    name="ringfence",
    help="Run unmodified x86-64 guests, and see everything that happens inside.",
    epilog=FIRST_EXAMPLES + "\n" + STATUSES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(pull_app, name="pull")
app.add_typer(cache_app, name="cache")
app.add_typer(device_app, name="device")


class Trace(StrEnum):
    """What ``--trace`` can show."""

    EXITS = "exits"


class OnReset(StrEnum):
    """What a reset by the guest means."""

    EXIT = "exit"
    REBOOT = "reboot"


class PauseClock(StrEnum):
    """What the guest's time does over a pause."""

    STOP = "stop"
    RUN = "run"


def _version(wanted: bool) -> None:
    if wanted:
        import ringfence

        print(f"ringfence {ringfence.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Run unmodified x86-64 guests, and see everything that happens inside."""


@app.command(epilog=RUN_EXAMPLES + "\n" + STATUSES)
def run(
    image: Annotated[
        str | None,
        typer.Argument(
            help="Stored image, or 'builtin' (default: debian).", autocompletion=stored_images
        ),
    ] = None,
    kernel: Annotated[
        Path | None,
        typer.Option(help="bzImage, vmlinux, multiboot or PVH kernel to boot instead of an image."),
    ] = None,
    initrd: Annotated[Path | None, typer.Option(help="Initial RAM disk.")] = None,
    append: Annotated[
        str | None, typer.Option(help="Kernel command line (added to that of an image).")
    ] = None,
    memory: Annotated[str, typer.Option(help="Guest RAM, such as 512M or 1G.")] = "512M",
    cpus: Annotated[int, typer.Option(help="Number of vCPUs.")] = 1,
    engine: Annotated[str, typer.Option(help="auto, translate or kvm (see doctor).")] = "auto",
    net: Annotated[
        str, typer.Option(help="none, user, user:loopback, socket:PATH or tap:NAME.")
    ] = "none",
    nic: Annotated[
        str,
        typer.Option(
            metavar="KIND[,OPTION...]",
            help="The network card: virtio or e1000. Options of virtio: event-idx=on|off,"
            " gather=off|MICROSECONDS, coalesce=PACKETS:MICROSECONDS, poll=MICROSECONDS.",
        ),
    ] = "virtio",
    forward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:GUEST",
            help="Ports that lead in, with --net user (repeatable): 8080:80,"
            " 0.0.0.0:2222:22, udp:53:53.",
        ),
    ] = None,
    capture: Annotated[
        Path | None, typer.Option(help="Write all frames to this file, for Wireshark or tcpdump.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until the guest is stopped (status 5).")
    ] = None,
    stats: Annotated[
        str | None,
        typer.Option(help="Statistics at the end: JSON to this file, or '-': tables on stderr."),
    ] = None,
    trace: Annotated[Trace | None, typer.Option(help="Print each exit on stderr.")] = None,
    on_reset: Annotated[
        OnReset, typer.Option(help="When the guest resets: leave with status 7, or boot again.")
    ] = OnReset.EXIT,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[,OPTION...]",
            help="Disk image for /dev/vda and so on (repeatable); options: format=raw|qcow2,"
            " readonly, snapshot (throw changes away), direct, serial=TEXT, backing,"
            " and those of a virtio --nic.",
        ),
    ] = None,
    share: Share = None,
    user_data: Annotated[
        Path | None,
        typer.Option(help="What cloud-init in the guest is to do (a cloud-config, a script)."),
    ] = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(help="Public key of who may log in by SSH, by cloud-init (repeatable)."),
    ] = None,
    hostname: Annotated[
        str | None, typer.Option(help="The guest's name, given to it by cloud-init.")
    ] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Throw away what is written on the image's disk.")
    ] = False,
    rng: Annotated[
        bool, typer.Option("--rng/--no-rng", help="Give the guest an entropy device.")
    ] = False,
    vsock: Annotated[
        Path | None,
        typer.Option(help="Unix socket to make, by which the guest's vsock ports are reached."),
    ] = None,
    tsc_hz: Annotated[
        int | None,
        typer.Option(
            "--tsc-hz",
            metavar="HZ",
            help="Rate of the guest's TSC (default: the host's).",
        ),
    ] = None,
    pause_clock: Annotated[
        PauseClock,
        typer.Option(help="Over a pause, the guest's time stands still, or runs on (it jumps)."),
    ] = PauseClock.STOP,
    direct: Annotated[
        bool,
        typer.Option(help="Run long computing user code directly where possible (translate)."),
    ] = True,
    boot: Annotated[
        str,
        typer.Option(help="The kernel's format: auto, linux, linux32, multiboot or pvh."),
    ] = "auto",
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'FILE[ ARGUMENT...]'",
            help="Module for a multiboot or PVH kernel (repeatable); --initrd is the first.",
        ),
    ] = None,
    test_devices: Annotated[
        bool,
        typer.Option(
            "--test-devices",
            help="What test kernels expect: exit port 0xf4 (the status is (v<<1)|1), debug"
            " console 0xe9 on stderr, fw_cfg, pc-testdev's ports.",
        ),
    ] = False,
    debug_exit: Annotated[
        str | None,
        typer.Option(metavar="PORT", help="Only the exit port, by its number: 0xf4."),
    ] = None,
    debugcon: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[,port=PORT]",
            help="Only the debug console, to a file ('-' is stderr); its port is 0xe9.",
        ),
    ] = None,
    bios: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Start firmware instead of a kernel: seabios or ovmf (fetched if need be), or a"
            " file.",
        ),
    ] = None,
    nvram: Annotated[
        Path | None,
        typer.Option(help="File that keeps UEFI's variables; made if it is not there."),
    ] = None,
    agent: Annotated[
        bool | None,
        typer.Option(
            "--agent/--no-agent",
            help="Give the guest a vsock device for exec and cp (default: with --name, --detach).",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What list, stop and so on call it (default: the image's name)."),
    ] = None,
    gdb: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST]:PORT",
            help="Let GDB connect here (unix:PATH for a Unix socket); 127.0.0.1 by default.",
        ),
    ] = None,
    gdb_wait: Annotated[bool, typer.Option("--gdb-wait", help="Let GDB start the guest.")] = False,
    detach: Detach = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the engine's compiled code on disk.")
    ] = True,
    cache_dir: CacheDir = None,
) -> int:
    """Boot a guest; its serial console is your terminal, or your pipe."""
    from ringfence.cli.run import RunOptions, run_guest

    return run_guest(
        RunOptions(
            image=image,
            kernel=kernel,
            initrd=initrd,
            append=append,
            memory=memory,
            cpus=cpus,
            engine=engine,
            net=net,
            nic=nic,
            forwards=tuple(forward or ()),
            capture=capture,
            timeout=timeout,
            stats=stats,
            trace=trace is not None,
            on_reset="exit" if on_reset is OnReset.EXIT else "reboot",
            cache=cache,
            cache_dir=cache_dir,
            disks=tuple(disk or ()),
            rng=rng,
            vsock=vsock,
            tsc_hz=tsc_hz,
            pause_clock="run" if pause_clock is PauseClock.RUN else "stop",
            direct=direct,
            boot=boot,
            modules=tuple(module or ()),
            test_devices=test_devices,
            debug_exit=debug_exit,
            debug_console=debugcon,
            ephemeral=ephemeral,
            agent=agent,
            name=name,
            detach=detach,
            bios=bios,
            nvram=nvram,
            gdb=gdb,
            gdb_wait=gdb_wait,
            shares=tuple(share or ()),
            user_data=user_data,
            ssh_keys=tuple(ssh_key or ()),
            hostname=hostname,
        )
    )


@app.command("list", epilog="[bold]Example[/bold]\nringfence list --json")
def list_(json: Json = False) -> int:
    """List the machines that run."""
    from ringfence.cli.machines import show_machines

    show_machines(as_json=json)
    return 0


@app.command(epilog="[bold]Examples[/bold]\nringfence stop web\nringfence stop --force web")
def stop(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Pull the plug.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds that the guest may take (status 5).")
    ] = 60.0,
) -> int:
    """Press a machine's power button, and wait until it has shut down."""
    from ringfence.cli import machines

    machines.stop(name, force=force, timeout=timeout)
    return 0


@app.command(epilog="[bold]Example[/bold]\nringfence pause web; ringfence resume web")
def pause(name: Name) -> int:
    """Stop a machine's vCPUs and its time; 'resume' lets it go on."""
    from ringfence.cli.machines import order

    order(name, "pause")
    return 0


@app.command(epilog="[bold]Example[/bold]\nringfence pause web; ringfence resume web")
def resume(name: Name) -> int:
    """Let a paused machine go on."""
    from ringfence.cli.machines import order

    order(name, "resume")
    return 0


@app.command(
    "exec",
    context_settings={"allow_interspersed_args": False},
    epilog="[bold]Examples[/bold]\nringfence exec web -- uname -a\n"
    "ringfence exec -t web -- top\ntar -c src | ringfence exec -i web -- tar -x -C /root\n\n"
    "The status is the command's, 128+N if signal N ended it.",
)
def exec_(
    name: Name,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
    tty: Annotated[bool, typer.Option("-t", "--tty", help="Run it on a terminal.")] = False,
    interactive: Annotated[
        bool, typer.Option("-i", "--interactive", help="Pass stdin on to it.")
    ] = False,
) -> int:
    """Run a command in a machine's guest, as root."""
    from ringfence.cli.remote import run_command

    words = command[1:] if command[0] == "--" else command
    if not words:
        raise UsageError("exec was given no command: expected NAME -- COMMAND...")
    return run_command(name, words, tty=tty, stdin=interactive)


@app.command(
    epilog="[bold]Examples[/bold]\nringfence cp notes.txt web:/root\nringfence cp web:/var/log ."
)
def cp(
    source: Annotated[str, typer.Argument(help="A path of the host's, or NAME:PATH.")],
    target: Annotated[str, typer.Argument(help="The same, and the other of the two.")],
) -> int:
    """Copy a file or folder into a machine's guest, or out of it."""
    from ringfence.cli.remote import copy

    return copy(source, target)


@app.command(
    epilog="[bold]Examples[/bold]\nringfence console web\n"
    "ringfence console web --history 0 < /dev/null"
)
def console(
    name: Name,
    history: Annotated[
        int, typer.Option(min=0, help="Bytes to show of what was written before.")
    ] = 16384,
) -> int:
    """Join a machine's console, beside others; Ctrl-A d detaches."""
    from ringfence.cli.machines import attach

    return attach(name, history=history)


@app.command(
    epilog="[bold]Examples[/bold]\nringfence snapshot web /srv/snapshots/web\n"
    "ringfence snapshot web one --incremental; ringfence snapshot web two --base one"
)
def snapshot(
    name: Name,
    path: Annotated[Path, typer.Argument(help="The folder to make.")],
    base: Annotated[
        Path | None,
        typer.Option(help="The last snapshot, taken with --incremental: keep only changes."),
    ] = None,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Let the next snapshot build upon this one.")
    ] = False,
) -> int:
    """Write a running machine to a folder; it goes on."""
    from ringfence.cli import moving

    moving.snapshot(name, path, base=base, incremental=incremental)
    return 0


@app.command(epilog="[bold]Example[/bold]\nringfence restore /srv/snapshots/web --detach")
def restore(
    path: Annotated[Path, typer.Argument(help="A snapshot.")],
    name: MachineName = None,
    detach: Detach = False,
    engine: Annotated[str, typer.Option(help="auto, translate or kvm.")] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it first and compare checksums.")
    ] = False,
    share: Share = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until the guest is stopped (status 5).")
    ] = None,
) -> int:
    """Go on from a snapshot. The snapshot stays as it is; changes to disks are thrown away."""
    from ringfence.cli import moving
    from ringfence.cli.run import Hosting

    hosting = Hosting(stem=path.name, name=name, detach=detach, timeout=timeout)
    return moving.restore(path, hosting, engine=engine, verify=verify, shares=share or ())


@app.command(
    epilog="[bold]Examples[/bold]\nringfence clone /srv/snapshots/web -n 20\n"
    "ringfence clone /srv/snapshots/web -n 3 --name test --json"
)
def clone(
    path: Annotated[Path, typer.Argument(help="A snapshot.")],
    count: Annotated[int, typer.Option("--count", "-n", help="How many.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="What their names are made of: NAME, NAME-2, NAME-3…")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, translate or kvm.")] = "auto",
    rename: Annotated[
        bool,
        typer.Option(
            help="Have the guests' agents take over new names, card addresses and machine ids."
        ),
    ] = True,
    json: Json = False,
) -> int:
    """Start machines from a snapshot in the background; they share memory until they change it.

    Each has a name, a card's address, a socket address and a VM generation ID of its own.
    """
    from ringfence.cli import cloning

    return cloning.clone(path, count, name, engine=engine, rename=rename, as_json=json)


@app.command(
    epilog="[bold]Examples[/bold]\nringfence migrate web tcp://other:4444\n"
    "ringfence migrate web unix:///tmp/new.sock\n"
    "ringfence migrate web tcp://other:4444 --mirror   # there: receive --disk new.img\n"
    "ringfence migrate web tcp://other:4444 --postcopy --json"
)
def migrate(
    name: Name,
    address: Annotated[str, typer.Argument(help="tcp://HOST:PORT or unix://PATH.")],
    downtime: Annotated[
        float, typer.Option(min=0.0, help="Seconds that the guest may stand still.")
    ] = 0.05,
    compress: Annotated[
        bool, typer.Option("--compress", help="Compress pages, for slow links.")
    ] = False,
    postcopy: Annotated[
        bool,
        typer.Option("--postcopy", help="If it writes too fast, let its RAM follow the guest."),
    ] = False,
    mirror: Annotated[
        bool,
        typer.Option("--mirror", help="Copy its disks to the new files that --disk names there."),
    ] = False,
    tls: TlsFiles = None,
    json: Json = False,
) -> int:
    """Move a running machine to where 'receive' waits. If that fails, it goes on where it is."""
    from ringfence.cli import moving

    moving.migrate(
        name,
        address,
        downtime=downtime,
        compress=compress,
        postcopy=postcopy,
        mirror=mirror,
        tls=tls or (),
        as_json=json,
    )
    return 0


@app.command(
    epilog="[bold]Examples[/bold]\nringfence receive tcp://0.0.0.0:4444 --detach --name web\n"
    "ringfence receive unix:///tmp/new.sock --disk root.qcow2"
)
def receive(
    address: Annotated[str, typer.Argument(help="tcp://HOST:PORT or unix://PATH.")],
    name: MachineName = None,
    detach: Detach = False,
    disk: Annotated[
        list[Path] | None,
        typer.Option(help="A disk that it may open here, or with 'migrate --mirror' a new file."),
    ] = None,
    net: Annotated[
        str | None, typer.Option(help="Its network, if not the one that it comes with.")
    ] = None,
    vsock: Annotated[
        Path | None, typer.Option(help="Unix socket to make for its vsock ports.")
    ] = None,
    nvram: Annotated[
        Path | None, typer.Option(help="File that keeps its firmware's variables here.")
    ] = None,
    share: Share = None,
    engine: Annotated[str, typer.Option(help="auto, translate or kvm.")] = "auto",
    tls: TlsFiles = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until the guest is stopped (status 5).")
    ] = None,
) -> int:
    """Wait for a machine that 'migrate' sends, and run it here."""
    from ringfence.cli import moving
    from ringfence.cli.run import Hosting

    hosting = Hosting(stem="received", name=name, detach=detach, timeout=timeout)
    return moving.receive(
        address,
        hosting,
        engine=engine,
        disks=disk or (),
        net=net,
        vsock=vsock,
        nvram=nvram,
        shares=share or (),
        tls=tls or (),
    )


@app.command(epilog="[bold]Examples[/bold]\nringfence images\nringfence images --json")
def images(json: Json = False) -> int:
    """List the images that 'run' knows."""
    from ringfence.cli.pull import show_images

    show_images(as_json=json)
    return 0


@app.command(epilog=SYMBOLS_EXAMPLES)
def symbols(
    image: Annotated[
        str | None,
        typer.Argument(help="Stored image (default: debian).", autocompletion=stored_images),
    ] = None,
    kernel: Annotated[
        Path | None, typer.Option(help="bzImage or ELF vmlinux instead of an image.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file (default: IMAGE.symbols).")
    ] = None,
    json: Json = False,
) -> int:
    """Make a symbol file for GDB from what a stripped Linux kernel knows of itself."""
    from ringfence.cli.symbols import make

    make(image, kernel, output, as_json=json)
    return 0


@app.command(epilog="[bold]Examples[/bold]\nringfence doctor\nringfence doctor --json")
def doctor(json: Json = False) -> int:
    """Tell what this host offers and what is missing; status 6 if guests can't run."""
    from ringfence.cli.doctor import show

    return show(as_json=json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command and exit with its status."""
    signal.signal(signal.SIGTERM, _terminated)
    status = _status(arguments)
    try:
        sys.stdout.flush()
    except OSError:
        # The reader is gone; keep the interpreter from trying once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if arguments is None:
        # All is closed and flushed; taking the interpreter's objects apart would only cost time.
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status(arguments: Sequence[str] | None) -> int:
    try:
        result = app(args=arguments, prog_name="ringfence", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except RingfenceError as error:
        _complain(str(error))
        if isinstance(error, GuestCrash) and error.registers:
            print(error.registers.rstrip("\n"), file=sys.stderr)
        return error.exit_status
    except typer.TyperException as error:
        message = error.format_message()
        if message:
            _complain(f"{message} (try --help)")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("RINGFENCE_DEBUG") == "1":
            raise
        _complain(
            f"internal error: {type(error).__name__}: {error}"
            " (set RINGFENCE_DEBUG=1 for the traceback)"
        )
        return INTERNAL_ERROR


def _terminated(number: int, frame: object) -> NoReturn:
    """Leave through every ``finally``: half-made images and child processes are cleaned up."""
    sys.exit(128 + number)


def _complain(message: str) -> None:
    """One line on stderr, whatever is in the message."""
    line = " ".join(message.split())
    try:
        print(f"ringfence: error: {line}", file=sys.stderr, flush=True)
    except OSError:
        return
