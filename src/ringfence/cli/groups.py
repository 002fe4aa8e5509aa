"""Commands that come in groups: ``ringfence pull``, ``cache`` and ``device``.

As in `app`, each imports its work when it is called.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ringfence.cli.arguments import CacheDir, Json, Name
from ringfence.errors import UsageError

PULL_EXAMPLES = """\
[bold]Examples[/bold]
ringfence pull debian
ringfence pull debian --disk --include curl --ssh-key ~/.ssh/id_ed25519.pub
ringfence pull debian --disk --user-data cloud.yaml --name web --refresh
"""
FIRMWARE_EXAMPLES = """\
[bold]Examples[/bold]
ringfence pull seabios; ringfence run --bios seabios --disk disk.img
ringfence pull ovmf; ringfence run --bios ovmf --nvram vars.fd --disk disk.img
"""
CACHE_EXAMPLES = """\
[bold]Examples[/bold]
ringfence cache info --json
ringfence cache clear
"""
DEVICE_EXAMPLES = """\
[bold]Examples[/bold]
ringfence device add web data.qcow2,serial=DATA    (prints the slot: 24)
ringfence device list web
ringfence device remove web 24
"""

pull_app = typer.Typer(help="Fetch a guest to run.", epilog=PULL_EXAMPLES, no_args_is_help=True)
cache_app = typer.Typer(
    help="Look at or clear the engine's compiled code.",
    epilog=CACHE_EXAMPLES,
    no_args_is_help=True,
)
device_app = typer.Typer(
    help="Add disks to a running machine, and remove them.",
    epilog=DEVICE_EXAMPLES,
    no_args_is_help=True,
)


class Flavour(StrEnum):
    """Which of Debian's kernels."""

    CLOUD = "cloud"
    GENERIC = "generic"
    I386 = "i386"


@pull_app.command("debian", epilog=PULL_EXAMPLES)
def pull_debian(
    flavour: Annotated[
        Flavour,
        typer.Option(help="Small cloud kernel, the one with all drivers, or a 32-bit system."),
    ] = Flavour.CLOUD,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Fetch again although the image is there.")
    ] = False,
    disk: Annotated[
        bool, typer.Option("--disk", help="Install a whole system, with systemd and apt.")
    ] = False,
    size: Annotated[
        str, typer.Option(help="With --disk: its size; what is free costs nothing.")
    ] = "4G",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="With --disk: install this, too (repeatable)."),
    ] = None,
    ssh_key: Annotated[
        Path | None, typer.Option(help="With --disk: public keys that may log in as root by SSH.")
    ] = None,
    user_data: Annotated[
        Path | None, typer.Option(help="With --disk: what cloud-init is to do at the first boot.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="With --disk: the image's name (default: debian-disk).")
    ] = None,
) -> int:
    """Fetch Debian with apt (no root needed) and build an image.

    Without --disk it is the kernel with busybox, called 'debian', or 'debian-generic' and
    'debian-i386' with another kernel. With --disk, a guest installs a system on a disk of its own,
    in a minute or two; root has no password on its serial console.
    """
    from ringfence.cli.pull import pull, pull_disk

    if disk:
        pull_disk(
            flavour.value,
            name=name,
            size=size,
            include=tuple(include or ()),
            ssh_key=ssh_key,
            user_data=user_data,
            refresh=refresh,
        )
        return 0
    if include or ssh_key or user_data or name:
        raise UsageError("--include, --ssh-key, --user-data and --name need --disk")
    pull(flavour.value, refresh=refresh)
    return 0


@pull_app.command("seabios", epilog=FIRMWARE_EXAMPLES)
def pull_seabios() -> int:
    """Fetch Debian's SeaBIOS, for 'run --bios seabios'."""
    from ringfence.cli.pull import pull_firmware

    pull_firmware("seabios")
    return 0


@pull_app.command("ovmf", epilog=FIRMWARE_EXAMPLES)
def pull_ovmf() -> int:
    """Fetch Debian's UEFI firmware, for 'run --bios ovmf'."""
    from ringfence.cli.pull import pull_firmware

    pull_firmware("ovmf")
    return 0


@device_app.command("add", epilog=DEVICE_EXAMPLES)
def device_add(
    name: Name,
    disk: Annotated[
        str, typer.Argument(metavar="FILE[,OPTION...]", help="A disk image, as for run --disk.")
    ],
    json: Json = False,
) -> int:
    """Plug a disk into a running machine, and print its slot."""
    from ringfence.cli import devices

    devices.add(name, disk, as_json=json)
    return 0


@device_app.command("remove", epilog=DEVICE_EXAMPLES)
def device_remove(
    name: Name,
    slot: Annotated[int, typer.Argument(help="What 'device add' printed.")],
    timeout: Annotated[float, typer.Option(help="Seconds that the guest gets (status 5).")] = 30.0,
) -> int:
    """Have the guest let go of a disk that was added."""
    from ringfence.cli import devices

    devices.remove(name, slot, timeout=timeout)
    return 0


@device_app.command("list", epilog=DEVICE_EXAMPLES)
def device_list(name: Name, json: Json = False) -> int:
    """List a machine's disks; those with a slot were added."""
    from ringfence.cli import devices

    devices.show(name, as_json=json)
    return 0


@cache_app.command("info", epilog=CACHE_EXAMPLES)
def cache_info(cache_dir: CacheDir = None, json: Json = False) -> int:
    """Where the engine's compiled code is and what it takes."""
    from ringfence.cli.cache import info

    info(cache_dir, as_json=json)
    return 0


@cache_app.command("clear", epilog=CACHE_EXAMPLES)
def cache_clear(cache_dir: CacheDir = None) -> int:
    """Remove the engine's compiled code; it is made again when needed."""
    from ringfence.cli.cache import clear

    clear(cache_dir)
    return 0
