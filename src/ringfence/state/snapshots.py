"""Taking a machine's snapshot, and what is needed to go on from one.

Between the folder, which knows files, and the machine, which knows threads. A disk that the guest
could write is copied into the snapshot; a restored machine, or each of many clones, works on a
throw-away layer over that copy, so that a snapshot never changes. Disks that are read-only are used
where they are. What firmware keeps in flash memory is part of the state, and is kept in memory only
from then on.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ringfence import engine as engines
from ringfence.assembly import (
    GUEST_CID,
    HostSide,
    MachineConfig,
    Origin,
    Parts,
    new_generation,
)
from ringfence.errors import UsageError
from ringfence.network.config import parse_mac
from ringfence.state import description, folder
from ringfence.storage.options import DiskOptions

MAX_CID = 0x7FFF_FFFF
"""The largest that a clone gets: guests take larger ones for negative numbers, some of them."""


def description_of(config: MachineConfig, parts: Parts) -> MachineConfig:
    """The configuration of a machine that has run: with what was decided when it was made."""
    promised = parts.engine.vcpus[0].features
    return replace(
        config,
        engine_config=replace(parts.offered, features=promised),
        tsc_hz=parts.time.tsc.hz,
    )


class Taking:
    """One snapshot on its way: `capture` while the machine stands still, `publish` afterwards.

    Parameters
    ----------
    path : Path
        The folder to make.
    base : Path, optional
        The snapshot that it builds upon.
    """

    def __init__(self, path: Path, base: Path | None) -> None:
        self._writer = folder.Writer(path)
        self._base = None if base is None else folder.load(base)
        self._config: MachineConfig | None = None

    @property
    def base(self) -> str | None:
        """Identity of the snapshot that this one builds upon."""
        return None if self._base is None else self._base.identity

    def __enter__(self) -> Taking:
        self._writer.__enter__()
        return self

    def __exit__(self, *about: object) -> None:
        self._writer.__exit__(*about)

    def capture(self, config: MachineConfig, parts: Parts, host: HostSide) -> None:
        """Write RAM, state and disks."""
        self._config = description_of(config, parts)
        writable = {
            number: disk
            for number, disk in enumerate(host.storage.disks)
            if not config.disks[number].read_only
        }
        state = parts.save()
        dirty = []
        if self._base is not None:
            parts.engine.fetch_dirty()
            dirty = parts.memory.dirty.take()
        self._writer.write(parts.memory, state, writable, self._base, dirty)

    def publish(self) -> str:
        """Complete the snapshot; return its identity."""
        assert self._config is not None
        return self._writer.publish(description.describe(self._config))


def load(
    path: Path,
    *,
    engine: str = "auto",
    ports: Mapping[str, Callable[[bytes], None]] | None = None,
    verify: bool = False,
) -> tuple[MachineConfig, Origin]:
    """What a machine that goes on from a snapshot is made of; its generation ID is a new one.

    Raises
    ------
    ImageError
        The snapshot is damaged or of another release.
    UsageError
        ``ports`` names one that the machine doesn't have.
    """
    found = folder.load(path)
    if verify:
        found.verify()
    config = description.configured(found.machine)
    unknown = set(ports or {}) - set(config.ports)
    if unknown:
        raise UsageError(f"the saved machine has no port {', '.join(sorted(unknown))}")
    config = replace(
        config,
        nvram=None,  # as with disks: a snapshot doesn't change
        engine=engines.select(engine, config.engine_config.cpus),
        ports={**config.ports, **(ports or {})},
        disks=tuple(_disk(found, at, disk) for at, disk in enumerate(config.disks)),
        generation=new_generation(),
    )
    return config, Origin(found.memory(), found.state)


def as_clone(config: MachineConfig) -> MachineConfig:
    """The same machine with an identity of its own, among others of the same snapshot."""
    return replace(
        config,
        mac=parse_mac(None),
        cid=secrets.choice(range(GUEST_CID + 1, MAX_CID + 1)),
        generation=new_generation(),
    )


def _disk(found: folder.Snapshot, number: int, options: DiskOptions) -> DiskOptions:
    """A disk as the restored machine opens it."""
    if number not in found.disks:
        return options
    return DiskOptions(
        found.disks[number],
        "raw",
        snapshot=True,
        serial=options.serial,
        pacing=options.pacing,
        slot=options.slot,
    )
