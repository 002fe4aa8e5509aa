"""``ringfence pull`` and ``ringfence images``: get guests, and show the ones there are.

Progress goes to stderr, so that stdout stays what the user asked for: a table, JSON, or the
guest's console when ``run`` pulls by itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.errors import UsageError

if TYPE_CHECKING:
    from ringfence.images.store import Image

DEFAULT_IMAGE = "debian"
DEFAULT_FLAVOUR = "cloud"
FLAVOUR_WITH_9P = "generic"
"""Of the kernels that may be fetched, the one that can mount shared folders."""


def ensure_image(name: str | None, *, flavour: str = DEFAULT_FLAVOUR) -> str:
    """The name of an image that can be started, fetched first where that is possible.

    Without a name it is Debian with a kernel of ``flavour``, or where the host has no apt, the
    built-in guest.
    """
    from ringfence.images.builtin import NAME as BUILTIN
    from ringfence.images.store import Store

    wanted = name or image_of(flavour)
    if wanted == BUILTIN or Store().get(wanted) is not None:
        return wanted
    from ringfence.images.debian import METAPACKAGES

    fetched = {image_of(each): each for each in METAPACKAGES}
    if wanted not in fetched:
        return wanted
    if shutil.which("apt-get") is not None:
        pull(fetched[wanted])
        return wanted
    if name is None:
        print(
            "ringfence: this host has no apt to fetch Debian's kernel with;"
            f" booting the built-in guest '{BUILTIN}'",
            file=sys.stderr,
        )
        return BUILTIN
    return wanted


def image_of(flavour: str) -> str:
    """What the image with one of Debian's kernels is called."""
    return DEFAULT_IMAGE if flavour == DEFAULT_FLAVOUR else f"{DEFAULT_IMAGE}-{flavour}"


def pull(flavour: str, *, refresh: bool = False) -> None:
    """Fetch Debian's kernel and busybox, showing how far it is."""
    from ringfence.images.debian import pull_debian
    from ringfence.images.store import Store

    name = image_of(flavour)
    with _progress(name) as progress:
        image = pull_debian(Store(), flavour=flavour, progress=progress, refresh=refresh, name=name)
    print(f"ringfence: {_line(image)}", file=sys.stderr)


def ensure_firmware(name: str) -> None:
    """Fetch firmware that is known by this name; a file needs nothing."""
    from ringfence.images.firmware import PACKAGES, find_firmware
    from ringfence.images.store import Store

    if name in PACKAGES and find_firmware(name, Store()) is None:
        pull_firmware(name)


def pull_firmware(name: str) -> None:
    """Fetch one of Debian's packages of firmware, showing how far it is."""
    from ringfence.images.firmware import fetch_firmware

    with _progress(name) as progress:
        files = fetch_firmware(name, progress=progress)
    print(f"ringfence: {name}: {files.code}", file=sys.stderr)


def pull_disk(
    flavour: str,
    *,
    name: str | None,
    size: str,
    include: tuple[str, ...],
    ssh_key: Path | None,
    user_data: Path | None,
    refresh: bool,
) -> None:
    """Install Debian on a disk, showing how far it is."""
    from ringfence.cli.files import read_user_file
    from ringfence.images.store import Store
    from ringfence.installer.debian import NAME, SMALLEST, access_by_ssh, install_debian, seed
    from ringfence.settings import parse_size

    room = parse_size(size)
    if room < SMALLEST:
        raise UsageError(f"--size {size} is too small: expected at least {SMALLEST >> 20}M")
    packages, files = list(include), dict[str, bytes]()
    for option, extra in ((ssh_key, access_by_ssh), (user_data, seed)):
        if option is not None:
            more, contents = extra(read_user_file(option))
            packages += more
            files |= contents
    with _progress(name or NAME) as progress:
        image = install_debian(
            Store(),
            name=name or NAME,
            flavour=flavour,
            size=room,
            packages=packages,
            files=files,
            progress=progress,
            refresh=refresh,
        )
    print(f"ringfence: {_line(image)}", file=sys.stderr)


def show_images(*, as_json: bool) -> None:
    """Print the stored images and the built-in one."""
    from ringfence.images.builtin import NAME as BUILTIN
    from ringfence.images.store import Store

    images = [image for image in Store().list_images() if image.name != BUILTIN]
    if as_json:
        rows = [
            {
                "name": image.name,
                "kernel_version": image.kernel_version,
                "kernel": str(image.kernel),
                "initrd": str(image.initrd) if image.initrd else None,
                "disk": str(image.disk) if image.disk else None,
                "cmdline": image.cmdline,
                "packages": {package.name: package.version for package in image.packages},
                "builtin": False,
            }
            for image in images
        ]
        rows.append({"name": BUILTIN, "builtin": True})
        print(json.dumps(rows, indent=2))
        return
    for image in images:
        print(_line(image))
    print(f"{BUILTIN}: built in, assembled when it is started")


def _line(image: Image) -> str:
    size = image.kernel_size + image.initrd_size
    disk = ""
    if image.disk is not None:
        status = image.disk.stat()
        used = status.st_blocks * 512 / (1 << 20)
        disk = f", disk of {status.st_size >> 20} MiB ({used:.0f} MiB used)"
    return f"{image.name}: Linux {image.kernel_version}, {size / (1 << 20):.1f} MiB{disk}"


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, a line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not sys.stderr.isatty():
        seen: set[str] = set()

        def report(stage: str, fraction: float) -> None:
            if stage not in seen:
                seen.add(stage)
                print(f"ringfence: {title}: {stage}", file=sys.stderr, flush=True)

        yield report
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda stage, fraction: bar.update(
            task, description=f"{title}: {stage}", completed=fraction
        )
