"""Snapshots and migration over the control socket."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfence.api.commands import Call, command
from ringfence.errors import UsageError

if TYPE_CHECKING:
    from ringfence.state.send import Progress


@command("snapshot", path=str, base=str, incremental=bool)
def snapshot(call: Call) -> dict[str, Any]:
    """Write the machine to the folder ``path``; see `Machine.snapshot`."""
    path, base = _path(call, "path"), call.arguments.get("base")
    incremental = call.arguments.get("incremental", False)
    call.machine.snapshot(path, base=base, incremental=incremental)
    return {"path": str(path)}


@command(
    "migrate",
    address=str,
    downtime=float,
    compress=bool,
    postcopy=bool,
    mirror=bool,
    certificate=str,
    key=str,
    authority=str,
)
def migrate(call: Call) -> dict[str, Any]:
    """Move the machine to ``address``; see `Machine.migrate`."""
    from ringfence.state.wire import Tls

    given = call.arguments
    if "address" not in given:
        raise UsageError("argument 'address' is missing")
    names = ("certificate", "key", "authority")
    files = [Path(given[name]) for name in names if name in given]
    if len(files) not in (0, len(names)):
        raise UsageError(f"TLS needs {', '.join(names)}, all of them")

    def tell(progress: Progress) -> None:
        whole = call.machine.config.memory
        call.progress(_text(progress), max(0.0, 1.0 - progress.left / whole))

    report = call.machine.migrate(
        given["address"],
        tls=Tls(*files) if files else None,
        downtime=given.get("downtime", 0.05),
        compress=given.get("compress", False),
        postcopy=given.get("postcopy", False),
        mirror=given.get("mirror", False),
        progress=tell,
    )
    return dataclasses.asdict(report)


def _text(progress: Progress) -> str:
    """One line for people."""
    if progress.stage != "memory" or not progress.rate:
        return progress.stage
    held = f", guest held back {progress.held:.0%}" if progress.held else ""
    return (
        f"memory, round {progress.round}: {progress.sent >> 20} MiB sent,"
        f" {progress.left >> 20} MiB left, {progress.rate / 1e6:.0f} MB/s, guest writes"
        f" {progress.dirty_rate / 1e6:.0f} MB/s, expected downtime"
        f" {progress.downtime * 1000:.0f} ms{held}"
    )


def _path(call: Call, name: str) -> Path:
    value = call.arguments.get(name)
    if not value or not Path(value).is_absolute():
        raise UsageError(f"argument {name!r} is {value!r}: expected an absolute path")
    return Path(value)
