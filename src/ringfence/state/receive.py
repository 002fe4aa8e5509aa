"""Receiving a machine that another process or host sends.

The sender is not trusted beyond what it sends: a guest. What its machine shall have on this host,
disks above all, is named by who receives; a description that asks for more is refused before
anything is opened. RAM is filled within its bounds; the state is checked as a snapshot's is.

A machine that was restored waits for GO. Without it there is no machine here: what was received is
thrown away, and the receiver can wait for the next attempt. After GO it runs, whatever becomes of
the sender; for a while its fate is told to a sender that asks because our answer was lost.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ringfence import engine as engines
from ringfence.assembly import MachineConfig, Origin
from ringfence.cpu import cpuid
from ringfence.errors import HostError, RingfenceError, UsageError
from ringfence.memory.dirty import PAGE
from ringfence.memory.ram import GuestMemory
from ringfence.settings import default_cache_dir, parse_memory
from ringfence.sharing.options import parse_shares
from ringfence.state import description, images
from ringfence.state.arrival import Arrival
from ringfence.state.mirror import Copies
from ringfence.state.moment import undisturbed
from ringfence.state.wire import (
    PROTOCOL,
    Address,
    Kind,
    Link,
    LinkError,
    Message,
    MoveFailed,
    Tls,
    secure,
    unpack_pages,
    unpack_places,
)

LINGER = 30.0
"""Seconds that questions about a machine are answered after GO, or after it was given up."""
QUERY_PATIENCE = 5.0

Build = Callable[[MachineConfig, Origin], Any]


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a machine that comes may have here.

    Attributes
    ----------
    engine : str
        As for a new machine.
    disks : sequence of str or Path
        Disk images, shared with the sender's host, that it may open; of a machine whose disks are
        mirrored the new files for them, in their order.
    network : str or None
        What its cable leads to instead of what the sender says; without it only ``user`` is taken.
    vsock : str or Path, optional
        Where its sockets are reached; without it nowhere.
    nvram : str or Path, optional
        The file that keeps its firmware's variables from now on; without it a machine that had
        such a file is not taken.
    shares : sequence of str or Path
        The folders that it finds here by its shares' tags, as `sharing.options.parse_share` reads
        them.
    cache_dir : str or Path, optional
        Folder of the engine's compiled code.
    """

    engine: str = "auto"
    disks: Sequence[str | Path] = ()
    network: str | None = None
    vsock: str | Path | None = None
    nvram: str | Path | None = None
    shares: Sequence[str | Path] = ()
    cache_dir: str | Path | None = field(default_factory=default_cache_dir)

    def accepted(self, config: MachineConfig, *, mirrored: bool = False) -> MachineConfig:
        """The machine as it will be here; ``mirrored`` disks are new ones.

        Raises
        ------
        UsageError, HostError
            It can't be had here, and why.
        """
        parse_memory(config.memory)
        known = {Path(each).resolve() for each in self.disks}
        for options in () if mirrored else config.disks:
            if options.path.resolve() not in known:
                raise UsageError(
                    f"the machine uses the disk {options.path}, which the target was not allowed to"
                    " open: name it there with --disk"
                )
            if not options.path.exists():
                raise HostError(f"the disk {options.path} is not there on the target's host")
        network = self.network if self.network is not None else config.network
        if self.network is None and config.network not in (None, "none", "user"):
            raise UsageError(
                f"the machine's network is {config.network}: say at the target with --net what it"
                " is to be there"
            )
        if config.vsock is not None and self.vsock is None:
            raise UsageError(
                "the machine has a vsock device: name a socket at the target (--vsock)"
            )
        if config.nvram is not None and self.nvram is None:
            raise UsageError(
                "the machine's firmware keeps variables in a file: name one at the target (--nvram)"
            )
        shares = {share.tag: share for share in parse_shares(self.shares)}
        for share in config.shares:
            if share.tag not in shares:
                raise UsageError(
                    f"the machine has a shared folder {share.tag!r}: say at the target which it is"
                    f" there (--share FOLDER,tag={share.tag})"
                )
        engine = engines.select(self.engine, config.engine_config.cpus)
        offered = cpuid.build_cpuid(cpuid.host_cpuid, cpus=config.engine_config.cpus)
        cpuid.require(config.engine_config.features, offered)
        return replace(
            config,
            engine=engine,
            engine_config=replace(
                config.engine_config, cache_dir=Path(self.cache_dir) if self.cache_dir else None
            ),
            network=network,
            vsock=Path(self.vsock) if config.vsock and self.vsock else None,
            nvram=Path(self.nvram) if config.nvram and self.nvram else None,
            capture=None,
            shares=tuple(shares[share.tag] for share in config.shares),
        )


class Receiver:
    """Listens for a machine; a context manager.

    Parameters
    ----------
    address : Address
        Where to listen; port 0 for any.
    allowed : Allowed
        What the machine may have.
    build : callable
        Makes a machine of a configuration and an origin: not started yet.
    tls : Tls, optional
        For TCP.

    Attributes
    ----------
    address : Address
        Where it listens really.
    """

    def __init__(
        self, address: Address, allowed: Allowed, build: Build, tls: Tls | None = None
    ) -> None:
        self._allowed = allowed
        self._build = build
        self._tls = tls
        self._context = tls.context(server=True) if tls else None
        self._listener = address.listen()
        self.address = address
        if not address.local:
            self.address = Address(address.family, self._listener.getsockname())
        self._fates: dict[str, str] = {}

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening. Safe to repeat."""
        if self._listener.fileno() >= 0:
            self._stop_listening()

    def receive(self, progress: Callable[[str, int], None] = lambda stage, bytes_: None) -> Any:
        """Wait for a machine; it runs when this returns, and belongs to the caller.

        ``progress`` is told a stage and how many bytes of RAM have come.

        Raises
        ------
        MoveFailed
            An attempt failed: the machine is at the sender, or was lost with it. Call again to wait
            for the next one.
        """
        while True:
            link = self._accept()
            if link is None:
                continue
            try:
                hello = link.receive(Kind.HELLO, Kind.QUERY)
                if hello.kind is Kind.QUERY:
                    self._answer(link, hello.content())
                    continue
                machine = self._attempt(link, hello.content(), progress)
            except RingfenceError as error:
                self._say_failed(link, error)
                raise MoveFailed(f"no machine was received: {error}") from error
            finally:
                link.close()
            if not machine.incomplete:  # else the pager answers until it is not
                self._begin_lingering()
            return machine

    def _accept(self) -> Link | None:
        try:
            connected, _ = self._listener.accept()
        except OSError as error:
            raise HostError(f"{self.address} does not listen any more ({error})") from error
        connected.settimeout(QUERY_PATIENCE)
        try:
            return Link(secure(connected, self._context))
        except LinkError:
            return None  # whoever that was, we wait for somebody we trust

    # ---- one attempt

    def _attempt(
        self, link: Link, hello: dict[str, Any], progress: Callable[[str, int], None]
    ) -> Any:
        if hello.get("protocol") != PROTOCOL:
            raise UsageError(
                f"the sender speaks protocol {hello.get('protocol')!r}, expected {PROTOCOL}: use"
                " the same release on both sides"
            )
        mirrored = hello.get("disks") is not None
        described = description.configured(hello.get("machine"))
        config = self._allowed.accepted(described, mirrored=mirrored)
        wanted = images.announced(hello.get("images"), config.memory)
        copies = None
        if mirrored:
            paths = [Path(each).absolute() for each in self._allowed.disks]
            copies = Copies(paths, hello["disks"])
        try:
            return self._have(link, hello, config, wanted, copies, progress)
        except BaseException:
            if copies is not None:
                copies.discard()
            raise

    def _have(
        self,
        link: Link,
        hello: dict[str, Any],
        config: MachineConfig,
        wanted: Sequence[tuple[str, int, str]],
        copies: Copies | None,
        progress: Callable[[str, int], None],
    ) -> Any:
        """Make the machine, take what it holds, and start it when it is ours."""
        token = str(hello.get("token"))
        if copies is not None:
            config = copies.placed(config)
        fd = link.receive_descriptor() if hello.get("handover") is True else None
        try:
            link.send(Kind.ACCEPT)
            config = images.with_images(config, _images(link, wanted))
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        memory = GuestMemory(config.memory, config.firmware.code if config.firmware else b"", fd=fd)
        try:
            machine = self._build(config, Origin(memory, None))
        except BaseException:
            memory.close()
            raise
        arrival = None
        try:
            if hello.get("follow") is True:
                arrival = self._arrival(machine, memory, token)
            network = machine.network
            ready = {"wire": network is not None, "follow": arrival is not None}
            link.send(Kind.READY, ready)
            state = self._fill(link, memory, progress, arrival, copies)
            with undisturbed():
                machine.take_over(state.content())
                link.send(Kind.RESTORED)
                self._fates[token] = "gone"
                wired = link.receive(Kind.GO).content().get("wire") is True
        except BaseException:
            machine.close()
            if arrival is not None:
                arrival.close()
            raise
        self._fates[token] = "running"
        if arrival is not None:
            arrival.follow(self._begin_lingering)
        if network is not None and not wired:
            network.follow(None)
        machine.start()
        with suppress(LinkError):  # the sender will ask, or is dead
            link.send(Kind.RUNNING)
        if network is not None and wired:
            network.follow(link.give_away())
        progress("running", 0)
        return machine

    def _arrival(self, machine: Any, memory: GuestMemory, token: str) -> Arrival | None:
        """Be prepared for RAM that follows, if this host offers that."""
        if memory.fd < 0:
            return None
        try:
            arrival = Arrival(memory, self._listener.fileno(), token, self._tls)
        except HostError:
            return None
        if arrival.user_only and machine.config.engine == "kvm":
            arrival.close()  # KVM reaches RAM as the kernel does
            return None
        return arrival

    def _fill(
        self,
        link: Link,
        memory: GuestMemory,
        progress: Callable[[str, int], None],
        arrival: Arrival | None,
        copies: Copies | None,
    ) -> Message:
        """Take RAM, as often as it comes, until the state follows."""
        count = memory.size // PAGE
        come, told = 0, 0.0
        while True:
            message = link.receive(Kind.PAGES, Kind.ZEROES, Kind.MISSING, Kind.DISK, Kind.STATE)
            if message.kind is Kind.STATE:
                if copies is not None:
                    copies.finish()
                return message
            if message.kind is Kind.DISK:
                if copies is None:
                    raise LinkError("the other side sent disks, which was not agreed on")
                copies.take(message)
                continue
            if message.kind is Kind.MISSING:
                if arrival is None:
                    raise LinkError("the other side keeps RAM, which was not agreed on")
                arrival.expect(unpack_places(message.data, count))
                continue
            if message.kind is Kind.ZEROES:
                for run in unpack_places(message.data, count):
                    memory.view[run.offset : run.offset + run.length] = bytes(run.length)
                continue
            run, data = unpack_pages(message, count)
            memory.view[run.offset : run.offset + run.length] = data
            come += run.length
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                progress("memory", come)

    @staticmethod
    def _say_failed(link: Link, error: RingfenceError) -> None:
        if not isinstance(error, MoveFailed):
            with suppress(LinkError):
                link.fail(str(error))

    # ---- what became of it

    def _answer(self, link: Link, question: dict[str, Any]) -> None:
        fate = self._fates.get(str(question.get("token")), "gone")
        link.send(Kind.ANSWER, {"fate": fate})

    def _begin_lingering(self) -> None:
        threading.Thread(target=self._linger, name="ringfence-fate", daemon=True).start()

    def _linger(self) -> None:
        """Answer questions for a while."""
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                link = self._accept()
            except HostError:
                break
            if link is None:
                continue
            with suppress(RingfenceError):
                self._answer(link, link.receive(Kind.QUERY).content())
            link.close()
        self._stop_listening()

    def _stop_listening(self) -> None:
        self._listener.close()
        if self.address.local:
            with suppress(OSError):
                Path(self.address.place).unlink()


def _images(link: Link, wanted: Sequence[tuple[str, int, str]]) -> list[images.Carried]:
    """The images that were announced, as they come."""
    found = []
    for name, size, text in wanted:
        data = bytearray()
        while len(data) < size:
            piece = link.receive(Kind.IMAGE).data
            if not piece:
                raise LinkError("the other side sent noise (a piece of nothing)")
            data += piece
        if len(data) != size:
            raise LinkError(f"the other side sent {len(data)} bytes of {name}, not {size}")
        found.append(images.Carried(name, bytes(data), text))
    return found
