"""``ringfence snapshot``, ``restore``, ``migrate``, ``receive``."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringfence import engine as engines
from ringfence.api.client import Client
from ringfence.api.names import Place
from ringfence.cli.run import Hosting, host
from ringfence.errors import HostError
from ringfence.machine import Machine

TLS_FILES = ("certificate", "key", "authority")


def snapshot(name: str, path: Path, *, base: Path | None, incremental: bool) -> None:
    """Have a running machine write a snapshot."""
    arguments: dict[str, Any] = {"path": str(path.absolute()), "incremental": incremental}
    if base is not None:
        arguments["base"] = str(base.absolute())
    with Client(name) as client:
        client.call("snapshot", patience=None, **arguments)


def restore(
    path: Path, hosting: Hosting, *, engine: str, verify: bool, shares: Sequence[str]
) -> int:
    """Go on from a snapshot, in this process."""

    def make(opened: ExitStack, place: Place | None) -> Machine:
        vsock = place.vsock if place else None
        return Machine.restore(path, engine=engine, verify=verify, vsock=vsock, shares=shares)

    return host(make, replace(hosting, started=_stir))


def _stir(machine: Machine) -> None:
    """Have the guest's agent, if there is one, reseed its random number generator, meanwhile."""
    vsock = machine.config.vsock
    if vsock is None:
        return
    from ringfence.agent import renewal

    def ask() -> None:
        with suppress(HostError):  # no agent: the VM generation ID has to do
            renewal.stir(vsock)

    threading.Thread(target=ask, name="ringfence-stir", daemon=True).start()


def migrate(
    name: str,
    address: str,
    *,
    downtime: float,
    compress: bool,
    postcopy: bool,
    mirror: bool,
    tls: Sequence[Path],
    as_json: bool,
) -> None:
    """Move a running machine."""
    from ringfence.state.wire import parse_address

    parse_address(address)
    arguments: dict[str, Any] = {
        "address": address,
        "downtime": downtime,
        "compress": compress,
        "postcopy": postcopy,
        "mirror": mirror,
        **{name: str(file.absolute()) for name, file in zip(TLS_FILES, tls, strict=False)},
    }
    began = time.monotonic()
    with Client(name) as client:
        report = client.call("migrate", patience=None, progress=_Shown(began), **arguments)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f"ringfence: {name} runs at {address}: {report['total']:.2f} s, of which it stood still"
            f" {report['downtime'] * 1000:.0f} ms; {report['sent'] >> 20} MiB in"
            f" {report['rounds']} rounds",
            file=sys.stderr,
        )


class _Shown:
    """Progress on stderr, once a second, if it takes that long."""

    def __init__(self, began: float) -> None:
        self._next = began + 1.0

    def __call__(self, stage: str, fraction: float) -> None:
        del fraction
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1.0
            print(f"ringfence: {stage}", file=sys.stderr)


def receive(
    address: str,
    hosting: Hosting,
    *,
    engine: str,
    disks: Sequence[Path],
    net: str | None,
    vsock: Path | None,
    nvram: Path | None,
    shares: Sequence[str],
    tls: Sequence[Path],
) -> int:
    """Wait for a machine, and have it here."""
    from ringfence.state.receive import Allowed
    from ringfence.state.wire import Tls

    engines.resolve(engine)

    def listening(where: str) -> None:
        print(f"ringfence: waiting at {where}", file=sys.stderr, flush=True)

    def make(opened: ExitStack, place: Place | None) -> Machine:
        own = place.vsock if place else None
        allowed = Allowed(engine, tuple(disks), net, vsock or own, nvram, tuple(shares))
        return Machine.receive(
            address, allowed, tls=Tls(*tls) if tls else None, listening=listening
        )

    return host(make, hosting)
