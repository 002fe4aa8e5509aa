"""What the owner of a machine does with its state: snapshots, and sending it elsewhere.

One at a time: both need the log of dirty pages, and a guest that stands still now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ringfence.assembly import HostSide, MachineConfig, Parts
from ringfence.errors import UsageError
from ringfence.network.backend import Heritable
from ringfence.state.send import Report, Sender, Watcher
from ringfence.state.snapshots import Taking
from ringfence.state.wire import Tls, parse_address
from ringfence.storage.disk import Disk


class Kept(Protocol):
    """What the keeper needs of a machine."""

    config: MachineConfig

    @property
    def runs(self) -> bool:
        """Whether the guest runs now."""

    @property
    def incomplete(self) -> bool:
        """Whether some of its RAM is still elsewhere."""

    def pause(self) -> None:
        """Stop the vCPUs and the guest's time."""

    def resume(self) -> None:
        """Let it go on."""

    def still_parts(self) -> Parts:
        """The parts of a machine that stands still; UsageError if it runs or has ended."""

    def depart(self) -> None:
        """End a paused machine that runs elsewhere from now on."""


class Keeper:
    """Takes snapshots of one machine, and sends it to other places.

    Parameters
    ----------
    machine : Kept
        The machine.
    host : HostSide
        Its disks and the like.
    """

    def __init__(self, machine: Kept, host: HostSide) -> None:
        self._machine = machine
        self.host = host
        self._busy = threading.Lock()
        self._standing = threading.RLock()
        """Held while the guest stands still for a moment, for the sender or to hold it back."""
        self._last: tuple[str, Parts] | None = None
        """The snapshot since which all writes to RAM are noted, and what it was taken of."""
        self._ran = self._lent = False
        self.away = False
        """Whether the machine runs elsewhere while some of its RAM is still here."""

    @property
    def config(self) -> MachineConfig:
        """The machine's."""
        return self._machine.config

    @property
    def network(self) -> Heritable | None:
        """Where the guest's connections stay when it moves."""
        return self.host.heritable

    @property
    def disks(self) -> Sequence[Disk]:
        """The machine's disks, open."""
        return self.host.storage.disks

    # ---- what the owner asks for

    def snapshot(self, path: Path, base: Path | None, incremental: bool) -> None:
        """See `Machine.snapshot`."""
        with self.alone(), Taking(path, base) as taking:
            with self.standing() as parts:
                if taking.base is not None and self._last != (taking.base, parts):
                    raise UsageError(
                        f"{base} is not this machine's last snapshot, or was taken without"
                        " incremental=True: take a full one"
                    )
                self._last = None
                taking.capture(self.config, parts, self.host)
                parts.log_dirty(incremental)
            identity = taking.publish()
            self._last = (identity, parts) if incremental else None

    def migrate(
        self,
        address: str,
        tls: Tls | None,
        downtime: float,
        compress: bool,
        follow: bool,
        mirror: bool,
        watcher: Watcher,
    ) -> Report:
        """See `Machine.migrate`."""
        with self.alone():
            self._last = None
            place = parse_address(address)
            sender = Sender(
                self,
                place,
                tls=tls,
                downtime=downtime,
                compress=compress,
                follow=follow,
                mirror=mirror,
                watcher=watcher,
            )
            return sender.run()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have no other snapshot or migration meanwhile; UsageError where there is one."""
        if not self._busy.acquire(blocking=False):
            raise UsageError("a snapshot or migration of this machine is under way: wait for it")
        try:
            if self._machine.incomplete:
                raise UsageError("the machine's RAM is still on its way here: wait for it")
            yield
        finally:
            self._busy.release()

    # ---- what sending needs (see `send.Owner`)

    @contextmanager
    def standing(self) -> Iterator[Parts]:
        """Have the guest stand still; one that ran goes on afterwards."""
        with self._standing:
            ran = self._machine.runs
            if ran:
                self._machine.pause()
            try:
                yield self._machine.still_parts()
            finally:
                if ran:
                    self._machine.resume()

    def halt(self) -> Parts:
        """Have the guest stand still until `go_on`."""
        self._ran = self._machine.runs
        if self._ran:
            self._machine.pause()
        return self._machine.still_parts()

    def lend(self) -> None:
        """Let another process have what only one can have, until `reclaim`."""
        self._lent = True
        self.host.lend()

    def reclaim(self) -> None:
        """Have it for ourselves again; HostError if another process has some of it."""
        if self.away:
            raise UsageError("the machine runs elsewhere already, and its RAM follows: wait for it")
        if self._lent:
            self.host.reclaim()
            self._lent = False

    def go_on(self) -> None:
        """Let it run again, if it ran before `halt`."""
        self.reclaim()
        if self._ran:
            self._ran = False
            self._machine.resume()

    def depart(self) -> None:
        """The machine runs elsewhere."""
        self._machine.depart()
