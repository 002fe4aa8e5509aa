"""Arguments and options that several commands have."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ringfence.errors import RingfenceError


def running_machines(beginning: str) -> list[str]:
    """Names of machines that run, for the shell to complete."""
    from ringfence.api.names import running

    with suppress(RingfenceError):
        return [place.name for place in running() if place.name.startswith(beginning)]
    return []


def stored_images(beginning: str) -> list[str]:
    """Names that ``run`` knows, for the shell to complete."""
    from ringfence.images.builtin import NAME
    from ringfence.images.store import Store

    with suppress(RingfenceError):
        names = [NAME, *(image.name for image in Store().list_images())]
        return [name for name in names if name.startswith(beginning)]
    return []


CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="Folder of the engine's compiled code.")
]
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A machine's name (see list).", autocompletion=running_machines
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MachineName = Annotated[
    str | None, typer.Option("--name", help="What list, stop and so on call it.")
]
Detach = Annotated[
    bool, typer.Option("--detach", "-d", help="Print the name and leave it running.")
]
Share = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        metavar="FOLDER[,OPTION...]",
        help="A folder of the host's for the guest to mount by 9p (repeatable); options: tag=TEXT"
        " (default: its name), ro, owner=UID[:GID] (whose your files are in the guest; root)."
        " Without an image, it is debian-generic, whose kernel has 9p.",
    ),
]
TlsFiles = Annotated[
    tuple[Path, Path, Path] | None,
    typer.Option(metavar="CERTIFICATE KEY AUTHORITY", help="Files for TLS; both sides need them."),
]
