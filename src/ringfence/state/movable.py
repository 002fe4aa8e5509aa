"""What a machine's owner can do with its state: keep it, go on from it, move it.

`Machine` inherits this; it provides its `keeper`, and `resumed`, which makes one that has lived
before. Nothing of it is imported before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ringfence.settings import default_cache_dir

if TYPE_CHECKING:
    from ringfence.assembly import MachineConfig, Origin
    from ringfence.sharing.options import ShareOptions
    from ringfence.state.keeper import Keeper
    from ringfence.state.receive import Allowed
    from ringfence.state.send import Progress, Report
    from ringfence.state.wire import Tls


class Movable(ABC):
    """A machine whose state can be kept and moved."""

    @staticmethod
    def warm_up(config: MachineConfig) -> None:
        """Load the code that a machine of this kind needs, before it is wanted at once."""
        from ringfence.assembly import warm_up

        warm_up(config)

    @property
    @abstractmethod
    def keeper(self) -> Keeper:
        """Who takes snapshots and sends the machine elsewhere."""

    @classmethod
    @abstractmethod
    def resumed(cls, config: MachineConfig, origin: Origin) -> Self:
        """Make a machine that goes on from somewhere; it is not started."""

    @classmethod
    def restore(
        cls,
        path: str | Path,
        *,
        engine: str = "auto",
        ports: Mapping[str, Callable[[bytes], None]] | None = None,
        cache_dir: str | Path | None = None,
        verify: bool = False,
        vsock: str | Path | None = None,
        as_clone: bool = False,
        shares: Sequence[str | Path | ShareOptions] = (),
    ) -> Self:
        """Make a machine that goes on where a snapshot was taken; `start` it like any other.

        RAM is read from the snapshot when the guest gets there, and what it changes is this
        machine's alone. The same holds for disks: what is written is thrown away with the machine,
        unless another snapshot keeps it.

        Parameters
        ----------
        path : str or Path
            The snapshot.
        engine : str
            As for a new machine; it need not be the one that the snapshot was taken under.
        ports : mapping of str to callable, optional
            Who listens at the named ports that the machine has.
        cache_dir : str or Path, optional
            As for a new machine.
        verify : bool
            Read all of the memory first and compare checksums.
        vsock : str or Path, optional
            Where the socket of a machine that has a vsock device goes, instead of where it was.
        as_clone : bool
            Give it a card's address and a CID of its own, as it is one of several; the guest takes
            the address over when ``agent.renewal.rename`` tells it. The VM generation ID is new in
            any case.
        shares : sequence of str, Path or ShareOptions
            Where shared folders are now, by their tags; the others are where they were.

        Raises
        ------
        ImageError
            The snapshot is damaged, of another release, or not complete.
        HostError
            This host lacks something, such as CPU features that the guest may use.
        """
        from ringfence.sharing.options import relocated
        from ringfence.state import snapshots

        folder = Path(cache_dir) if cache_dir else default_cache_dir()
        config, origin = snapshots.load(Path(path), engine=engine, ports=ports, verify=verify)
        config = replace(config, engine_config=replace(config.engine_config, cache_dir=folder))
        if as_clone:
            config = snapshots.as_clone(config)
        if vsock is not None and config.vsock is not None:
            config = replace(config, vsock=Path(vsock))
        try:
            config = replace(config, shares=relocated(config.shares, shares))
            return cls.resumed(config, origin)
        except BaseException:
            origin.memory.close()
            raise

    def snapshot(
        self, path: str | Path, *, base: str | Path | None = None, incremental: bool = False
    ) -> None:
        """Write the machine to a folder; a running guest stands still meanwhile, and goes on.

        Parameters
        ----------
        path : str or Path
            The folder, which must not exist; it is there when the snapshot is complete, or never.
        base : str or Path, optional
            The last snapshot of this machine, taken with ``incremental``: only what was written
            since is kept, and the base has to stay where it is.
        incremental : bool
            Note from now on which pages are written, so that the next snapshot can build upon this
            one. It costs the guest a little.

        Raises
        ------
        UsageError
            The folder exists, another snapshot is under way, or ``base`` isn't the last one.
        HostError
            The host refuses, for lack of space for example; the machine goes on as before.
        """
        self.keeper.snapshot(Path(path), Path(base) if base else None, incremental)

    def migrate(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        downtime: float = 0.05,
        compress: bool = False,
        postcopy: bool = False,
        mirror: bool = False,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Report:
        """Move the machine to who waits with `receive` at ``tcp://HOST:PORT`` or ``unix://PATH``.

        The guest goes on meanwhile, and stands still for about ``downtime`` seconds at the end;
        then this machine has ended (`StopReason.MIGRATED`). On one host, over a Unix socket, RAM is
        handed over as it is. Connections through a user-mode network go on by way of this
        process, until they end (see ``network.served``).

        Parameters
        ----------
        tls : Tls, optional
            Certificates, for both sides to know each other.
        compress : bool
            Compress pages, for links slower than some 300 MB/s.
        postcopy : bool
            A guest that writes faster than the link carries isn't held back: it moves, and the
            pages that it keeps writing follow when they are needed. Until they are there both
            hosts and the link are needed; this returns then.
        mirror : bool
            Copy the disks along, to the new files that are named at the target, instead of sharing
            them. What the guest writes meanwhile goes along.
        progress : callable
            Told how far it is, from this thread.

        Raises
        ------
        MoveFailed, UsageError
            It did not move, for the reason that the error tells, and goes on here.
        """
        return self.keeper.migrate(address, tls, downtime, compress, postcopy, mirror, progress)

    @classmethod
    def receive(
        cls,
        address: str,
        allowed: Allowed | None = None,
        *,
        tls: Tls | None = None,
        listening: Callable[[str], None] = lambda address: None,
        progress: Callable[[str, int], None] = lambda stage, come: None,
    ) -> Self:
        """Wait for a machine that `migrate` sends; it runs when this returns.

        Parameters
        ----------
        allowed : Allowed, optional
            What it may have on this host, such as disks; by default nothing that has a name.
        listening : callable
            Told the address when it can be reached, with the real port where 0 was asked for.

        Raises
        ------
        MoveFailed
            An attempt failed.
        """
        from ringfence.state.receive import Allowed, Receiver
        from ringfence.state.wire import parse_address

        allowed = allowed or Allowed()
        receiver = Receiver(parse_address(address), allowed, cls.resumed, tls)
        try:
            listening(str(receiver.address))
            machine = receiver.receive(progress)
        except BaseException:
            receiver.close()
            raise
        assert isinstance(machine, cls)
        return machine
