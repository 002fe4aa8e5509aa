"""``ringfence clone``: many machines from one snapshot, each in a process of its own.

The snapshot is read and all code is loaded before the processes part, so that they share both, as
they share the snapshot's memory, until one of them writes. Who each one is, is decided before: its
name, the address of its card, its socket address, its VM generation ID. When all run, the guests'
agents are told, a few at a time.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringfence.api.names import Place
from ringfence.assembly import MachineConfig, Origin
from ringfence.cli.run import Hosting, host
from ringfence.errors import HostError, UsageError
from ringfence.machine import Machine
from ringfence.memory.zeroed import use_small_pages
from ringfence.settings import default_cache_dir
from ringfence.state import snapshots

MAX_CLONES = 1000
TOLD_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Clone:
    """One that runs: where it is found, and what it is made of."""

    place: Place
    config: MachineConfig

    def described(self, told: bool | None) -> dict[str, Any]:
        """What makes it different from the others, for programs."""
        return {
            "name": self.place.name,
            "pid": self.place.pid,
            "mac": self.config.mac.hex(":"),
            "cid": self.config.cid,
            "generation": self.config.generation.hex(),
            "vsock": str(self.place.vsock) if self.config.vsock else None,
            "told": told,
        }


def clone(
    path: Path, count: int, stem: str | None, *, engine: str, rename: bool, as_json: bool
) -> int:
    """Start the clones, print their names, have their guests take them over."""
    if not 1 <= count <= MAX_CLONES:
        raise UsageError(f"{count} clones: expected 1 to {MAX_CLONES}")
    config, origin = snapshots.load(path, engine=engine)
    folder = default_cache_dir()
    config = replace(config, engine_config=replace(config.engine_config, cache_dir=folder))
    Machine.warm_up(config)
    gc.collect()
    gc.freeze()
    parent = os.getpid()
    running: list[Clone] = []
    status = 0
    for _ in range(count):
        own = snapshots.as_clone(config)

        def started(place: Place, own: MachineConfig = own) -> None:
            running.append(Clone(place, own))
            if not as_json:
                print(place.name, flush=True)

        def make(_: object, place: Place | None, own: MachineConfig = own) -> Machine:
            return _made(own, origin, place)

        hosting = Hosting(stem=stem or path.name, detach=True, detached=started)
        status = host(make, hosting)
        if os.getpid() != parent:
            return status
        if status:
            break
    origin.memory.close()
    _tell(running, config, rename, as_json)
    return status


def _made(own: MachineConfig, origin: Origin, place: Place | None) -> Machine:
    """A machine from a snapshot with an identity of its own, in its own process."""
    use_small_pages()
    if place and own.vsock:
        own = replace(own, vsock=place.vsock)
    return Machine.resumed(own, origin)


def _tell(running: list[Clone], old: MachineConfig, rename: bool, as_json: bool) -> None:
    """Have the guests know who they are; say which don't."""

    def tell(one: Clone) -> bool | None:
        if one.config.vsock is None:
            return None
        try:
            _introduce(one, old, rename)
        except HostError as error:
            print(f"ringfence: {one.place.name}: {error}", file=sys.stderr)
            return False
        return True

    with ThreadPoolExecutor(TOLD_AT_ONCE) as workers:
        told = list(workers.map(tell, running))
    if as_json:
        rows = [one.described(known) for one, known in zip(running, told, strict=True)]
        print(json.dumps(rows, indent=2))


def _introduce(one: Clone, old: MachineConfig, rename: bool) -> None:
    from ringfence.agent import renewal
    from ringfence.cli.remote import ENVIRONMENT

    failed: renewal.NotStirred | None = None
    try:
        renewal.stir(one.place.vsock)
    except renewal.NotStirred as error:
        failed = error
    if rename:
        macs = (old.mac, one.config.mac)
        renewal.rename(one.place.vsock, one.place.name, macs, ENVIRONMENT)
    if failed is not None:
        raise failed
