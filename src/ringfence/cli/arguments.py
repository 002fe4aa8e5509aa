"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="Folder of the engine's compiled code.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A machine's name (see list).")]
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
