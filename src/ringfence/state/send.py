"""Sending a running machine to another process or host.

**Pre-copy.** All of RAM is sent while the guest goes on; then, round by round, the pages that it
wrote meanwhile. A round that is short ends it: when the pages left can be sent within the downtime
that the owner allows, the guest stands still, and the rest follows with the state. If rounds don't
get shorter, the guest writes faster than the link carries; it is then held back, more with each
round, by making it pause for a share of the time.

**Handing over.** Over a Unix socket RAM itself changes hands, as a descriptor of its memfd; nothing
is copied, and there are no rounds.

**Exactly one.** Until GO is sent, whatever happens leaves the machine here, running again. Then it
never runs here by itself. If the answer to GO is lost, the target is asked once more on a new
connection: if it has the machine, all is well; if it has given up, we go on; if nobody can be
reached (which proves nothing: there may be a tunnel in between), the machine stays paused here, for
its owner to decide. It can't be resumed while another process has one of its disks.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import lz4.block

from ringfence.assembly import MachineConfig, Parts
from ringfence.errors import HostError, RingfenceError, UsageError
from ringfence.memory.dirty import PAGE, Run
from ringfence.network.backend import Heritable
from ringfence.state import description, images, pages
from ringfence.state.mirror import Mirror
from ringfence.state.moment import undisturbed
from ringfence.state.remainder import Remainder
from ringfence.state.snapshots import description_of
from ringfence.state.wire import (
    MAX_PAGES,
    MAX_PIECE,
    PLACE,
    PROTOCOL,
    Address,
    Encoding,
    Kind,
    Link,
    LinkError,
    MoveFailed,
    Tls,
    pack_places,
    secure,
)
from ringfence.storage.disk import Disk
from ringfence.storage.options import DiskOptions

ROUNDS = 30
"""Rounds until the guest is stopped whatever is left."""
SHRINKING = 0.7
"""A round is shorter than the last if it has less than this share of its pages."""
HOLDS = (0.3, 0.6, 0.8, 0.9, 0.96)
"""Shares of its time that a guest is held back: the next one after each round not shorter."""
HOPELESS = 3
"""Rounds that don't get shorter although it is held back as much as can be: then it is stopped."""
HOLD_PERIOD = 0.05
"""Seconds from one pause of a guest that is held back to the next."""
OVERHEAD = 0.015
"""Seconds that the end takes besides sending pages, as far as one knows before."""
ASK_AGAIN = 5.0
"""Seconds that the target is sought for when the answer to GO was lost."""
ZEROES_AT_ONCE = 2048
POOR = 0.85
"""Pages that don't become smaller than this share are sent as they are."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration is.

    Attributes
    ----------
    stage : str
        ``connect``, ``disks``, ``memory``, ``stop``, ``handover``, ``follow``.
    round : int
        Counts from 1.
    sent, left : int
        Bytes sent altogether, bytes of RAM known to be left.
    rate, dirty_rate : float
        Bytes per second that the link carried and that the guest wrote in the last round.
    downtime : float
        Seconds that the guest will stand still, as far as can be told.
    held : float
        The share of its time that the guest is held back.
    """

    stage: str
    round: int = 0
    sent: int = 0
    left: int = 0
    rate: float = 0.0
    dirty_rate: float = 0.0
    downtime: float = 0.0
    held: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What a migration took.

    Attributes
    ----------
    total, downtime : float
        Seconds in all, and seconds without the guest.
    sent, rounds : int
        Bytes, and how often RAM was gone through.
    steps : dict of str to float
        What the seconds without the guest went into, in order: ``pause`` it, ``save`` its state,
        send the last ``pages``, send the ``state``, ``restore`` it there, ``start`` it there.
    """

    total: float
    downtime: float
    sent: int
    rounds: int
    steps: dict[str, float]
    followed: int = 0
    """Bytes of RAM that came after the guest."""


Watcher = Callable[[Progress], None]


class Owner(Protocol):
    """What sending needs of the machine."""

    @property
    def config(self) -> MachineConfig:
        """What it is made of."""

    @property
    def network(self) -> Heritable | None:
        """Where connections stay that the guest has, if there is such a network."""

    @property
    def disks(self) -> Sequence[Disk]:
        """Its disks, open."""

    away: bool
    """Whether it runs elsewhere while some of its RAM is still here."""

    def standing(self) -> AbstractContextManager[Parts]:
        """Have the guest stand still for a moment."""

    def halt(self) -> Parts:
        """Have the guest stand still until `go_on`."""

    def lend(self) -> None:
        """Let the target have what only one can have, disks above all."""

    def go_on(self) -> None:
        """Have it back, and let the guest run again, if it ran."""

    def depart(self) -> None:
        """End the machine here: it runs elsewhere."""


class Sender:
    """One migration.

    Parameters
    ----------
    owner : Owner
        The machine.
    address : Address
        Where the target listens.
    tls : Tls, optional
        For TCP.
    downtime : float
        Seconds that the guest may stand still.
    compress : bool
        Compress pages, for slow links.
    follow : bool
        Rather than hold a guest back, let the pages that it keeps writing follow it.
    mirror : bool
        Copy the disks to new files at the target.
    watcher : callable
        Is told how far it is.
    """

    def __init__(
        self,
        owner: Owner,
        address: Address,
        *,
        tls: Tls | None,
        downtime: float,
        compress: bool,
        follow: bool,
        mirror: bool,
        watcher: Watcher,
    ) -> None:
        self._owner = owner
        self._address = address
        self._context: ssl.SSLContext | None = tls.context(server=False) if tls else None
        self._limit = downtime
        self._compress = compress
        self._follow = follow
        self._mirrors = mirror
        self._mirror: Mirror | None = None
        self._disks_sent: Sequence[DiskOptions] = ()
        self._watcher = watcher
        self._token = os.urandom(16).hex()
        self._progress = Progress("connect")
        self._link: Link
        self._follows = False
        """Whether the guest moves before all of its RAM."""
        self._remainder: Remainder | None = None

    def run(self) -> Report:
        """Move the machine.

        Raises
        ------
        MoveFailed, UsageError
            It did not move; the error says why, and where it is.
        """
        began = time.monotonic()
        carried = images.gather(self._owner.config)
        with self._owner.standing() as parts:
            hello = self._hello(parts, carried)
            self._disks_sent = self._owner.config.disks
        self._link = self._connect()
        try:
            try:
                self._tell(stage="connect")
                self._link.send(Kind.HELLO, hello)
                if hello["handover"]:
                    self._link.send_descriptor(parts.memory.fd)
                self._link.receive(Kind.ACCEPT)
                self._send_images(carried)
                ready = self._link.receive(Kind.READY).content()
                network = self._owner.network if ready.get("wire") is True else None
                if hello["follow"] and ready.get("follow") is not True:
                    raise UsageError(
                        "RAM can't follow a machine there: userfaultfd is not permitted on that"
                        " host (see 'ringfence doctor' there); leave out --postcopy"
                    )
                if self._mirrors:
                    self._copy_disks(parts)
                rounds = 0 if hello["handover"] else self._copy(parts)
            except (RingfenceError, ValueError) as error:  # RAM is gone after a reset
                self._give_up(error, parts)
            with undisturbed():
                steps = self._finish(parts, network, copied=not hello["handover"])
            sent = self._link.sent
            if self._remainder is not None:
                self._bring(self._remainder)
            self._owner.depart()
            total = time.monotonic() - began
            followed = self._remainder.sent if self._remainder is not None else 0
            return Report(total, sum(steps.values()), sent + followed, rounds, steps, followed)
        finally:
            self._link.close()

    # ---- before the guest stops

    def _connect(self) -> Link:
        try:
            return Link(secure(self._address.connect(ASK_AGAIN), self._context))
        except LinkError as error:
            raise MoveFailed(f"{error}; the machine goes on here") from error
        except OSError as error:
            raise MoveFailed(
                f"nobody is at {self._address} ({error.strerror or error}): start 'ringfence"
                " receive' there first; the machine goes on here"
            ) from error

    def _hello(self, parts: Parts, carried: Sequence[images.Carried]) -> dict[str, Any]:
        config = description_of(self._owner.config, parts)
        for options in config.disks:
            if options.snapshot and not self._mirrors:
                raise UsageError(
                    f"{options.path} has changes that no other process can see (snapshot): copy it"
                    " along with --mirror"
                )
        handover = self._address.local and self._context is None and parts.memory.fd >= 0
        return {
            "protocol": PROTOCOL,
            "token": self._token,
            "machine": description.describe(images.without(config)),
            "images": images.announce(carried),
            "handover": handover,
            "follow": self._follow and not handover,
            "disks": [disk.size for disk in self._owner.disks] if self._mirrors else None,
        }

    def _send_images(self, carried: Iterable[images.Carried]) -> None:
        for image in carried:
            for at in range(0, len(image.data), MAX_PIECE):
                self._link.send_raw(Kind.IMAGE, image.data[at : at + MAX_PIECE])

    def _copy_disks(self, parts: Parts) -> None:
        with self._owner.standing() as now:
            if now is not parts:
                raise UsageError("the guest was reset meanwhile")
            self._mirror = Mirror(parts, self._owner.disks)
        told = time.monotonic()

        def tell(left: int) -> None:
            nonlocal told
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                self._tell(stage="disks", left=left)

        self._tell(stage="disks")
        self._mirror.copy(self._link, tell)

    def _copy(self, parts: Parts) -> int:
        """Send RAM until what is left is little; the number of rounds."""
        with self._owner.standing():
            parts.log_dirty(True)
            runs = pages.ram_pages(parts.memory)
        held = _Held(self._owner)
        before = stuck = 0
        try:
            for number in range(1, ROUNDS + 1):
                began, sent = time.monotonic(), self._link.sent
                self._tell(stage="memory", round=number, left=_bytes(runs))
                self._send_pages(parts, runs, known_zero=number == 1)
                if self._mirror is not None:
                    self._mirror.sync(self._link)
                seconds = max(time.monotonic() - began, 1e-6)
                rate = (self._link.sent - sent) / seconds
                with self._owner.standing():
                    parts.engine.fetch_dirty()
                    left = parts.memory.dirty.count() * PAGE
                    downtime = left / max(rate, 1.0) + OVERHEAD
                    self._tell(left=left, rate=rate, dirty_rate=left / seconds, downtime=downtime)
                    if downtime <= self._limit or number == ROUNDS or stuck == HOPELESS:
                        return number
                    runs = parts.memory.dirty.take()
                if number > 1 and left > SHRINKING * before:
                    if self._follow:
                        parts.memory.dirty.mark_runs(runs)
                        self._follows = True
                        return number
                    stuck += held.share == HOLDS[-1]
                    held.tighten()
                    self._tell(held=held.share)
                before = left
        finally:
            held.release()
        return ROUNDS

    def _send_pages(self, parts: Parts, runs: Iterable[Run], *, known_zero: bool) -> None:
        """Send runs; pages of zeroes as such, or not at all where the target has none else."""
        view = parts.memory.view
        zeroes: list[Run] = []
        told = time.monotonic()
        for run, filled in pages.split(view, runs):
            if not filled:
                if not known_zero:
                    zeroes.append(run)
                continue
            assert run.count <= MAX_PAGES
            place = PLACE.pack(run.first, run.count)
            # A copy: the guest may write there while it is sent.
            data = bytes(view[run.offset : run.offset + run.length])
            encoding = Encoding.PLAIN
            if self._compress:
                packed = lz4.block.compress(data, store_size=False)
                if len(packed) < POOR * len(data):
                    data, encoding = packed, Encoding.LZ4
            self._link.look()
            self._link.send_raw(Kind.PAGES, place + data, encoding)
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                self._tell()
        for at in range(0, len(zeroes), ZEROES_AT_ONCE):
            part = zeroes[at : at + ZEROES_AT_ONCE]
            self._link.send_raw(
                Kind.ZEROES, b"".join(PLACE.pack(each.first, each.count) for each in part)
            )

    # ---- the guest stands still

    def _finish(self, parts: Parts, network: Heritable | None, *, copied: bool) -> dict[str, float]:
        """Stop the guest, send the rest, give the machine away; what each step took."""
        watch = _Stopwatch()
        try:
            self._tell(stage="stop")
            if self._owner.halt() is not parts:
                raise UsageError("the guest was reset meanwhile")
            if self._owner.config.disks != self._disks_sent:
                raise UsageError("the guest let go of a disk meanwhile: try again")
            watch.lap("pause")
            state = parts.save()  # first: devices finish what they write to RAM
            watch.lap("save")
            if self._mirror is not None:
                self._mirror.sync(self._link)
                watch.lap("disks")
            if copied:
                parts.engine.fetch_dirty()
                left = parts.memory.dirty.take()
                if self._follows:
                    self._remainder = Remainder(
                        self._address, self._context, self._token, parts.memory
                    )
                    self._link.send_raw(Kind.MISSING, pack_places(left))
                else:
                    self._send_pages(parts, left, known_zero=False)
            watch.lap("pages")
            self._owner.lend()
            self._link.send(Kind.STATE, state)
            watch.lap("state")
            self._link.receive(Kind.RESTORED)
            watch.lap("restore")
            self._tell(stage="handover")
        except RingfenceError as error:
            self._give_up(error, parts)
        try:
            self._link.send(Kind.GO, {"wire": network is not None})
            self._link.receive(Kind.RUNNING)
            if network is not None:
                network.serve(self._link.give_away())
        except RingfenceError as error:
            self._settle(error, parts)
        watch.lap("start")
        return watch.laps

    def _bring(self, remainder: Remainder) -> None:
        """See to it that all of RAM gets there."""
        self._owner.away = True
        remainder.wait(lambda: self._tell(stage="follow", left=remainder.left))
        self._owner.away = False
        if remainder.failure is not None:
            raise MoveFailed(
                f"the machine runs at {self._address}, but {remainder.left >> 10} KiB of its RAM"
                f" are still here and can't get there ({remainder.failure}); there it will be given"
                " up. It stays paused here as it was when it moved: let it go on with 'ringfence"
                " resume' only when the other has ended"
            )

    def _give_up(self, error: RingfenceError | ValueError, parts: Parts) -> NoReturn:
        """Go on here, and say why."""
        if self._remainder is not None:
            self._remainder.stop()
        if not isinstance(error, LinkError):
            self._say_failed(error)
        self._link.close()
        self._go_on(error)
        with suppress(UsageError), self._owner.standing() as now:  # it may have ended
            if now is parts:
                parts.log_dirty(False)
                if self._mirror is not None:
                    self._mirror.stop()
        raise MoveFailed(
            f"the machine did not move to {self._address}: {error}; it goes on here"
        ) from error

    def _go_on(self, why: Exception) -> None:
        """Go on here as soon as the target has noticed that it won't, and has let go of disks."""
        deadline = time.monotonic() + ASK_AGAIN
        while True:
            try:
                return self._owner.go_on()
            except HostError as error:
                if time.monotonic() > deadline:
                    raise MoveFailed(
                        f"the machine did not move to {self._address}: {why}; it stays paused here,"
                        f" as {error}: let it go on with 'ringfence resume' when that is over"
                    ) from error
            time.sleep(0.05)

    def _say_failed(self, error: Exception) -> None:
        with suppress(LinkError):
            self._link.send(Kind.FAILED, {"reason": str(error)})

    def _settle(self, error: RingfenceError, parts: Parts) -> None:
        """GO may or may not have arrived: find out. Returns if the target has the machine."""
        self._link.close()
        fate = self._ask()
        if fate == "running":
            return
        if fate == "gone":
            self._give_up(error, parts)
        raise MoveFailed(
            f"the machine was handed over to {self._address}, but whether it runs there is unknown"
            f" ({error}); it stays paused here: let it go on with 'ringfence resume' only if it"
            " does not run there"
        ) from error

    def _ask(self) -> str:
        """``running`` at the target, ``gone`` from there, or ``unknown``."""
        deadline = time.monotonic() + ASK_AGAIN
        while time.monotonic() < deadline:
            try:
                link = Link(secure(self._address.connect(ASK_AGAIN), self._context))
            except (OSError, LinkError):
                time.sleep(0.2)
                continue
            try:
                link.send(Kind.QUERY, {"token": self._token})
                fate = link.receive(Kind.ANSWER).content().get("fate")
                if fate in ("running", "gone"):
                    return str(fate)
            except RingfenceError:
                pass
            finally:
                link.close()
            time.sleep(0.2)
        return "unknown"

    def _tell(self, **changes: Any) -> None:
        self._progress = replace(
            self._progress, sent=self._link.sent if hasattr(self, "_link") else 0, **changes
        )
        self._watcher(self._progress)


class _Stopwatch:
    """Seconds of each lap."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """The lap ``name`` is over."""
        now = time.monotonic()
        self.laps[name], self._since = now - self._since, now


def _bytes(runs: Iterable[Run]) -> int:
    return sum(run.length for run in runs)


class _Held:
    """Holds a guest back: it stands still for a share of the time."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.share = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def tighten(self) -> None:
        """Hold it back more."""
        self.share = next((share for share in HOLDS if share > self.share), HOLDS[-1])
        if self._thread is None:
            self._thread = threading.Thread(target=self._hold, name="ringfence-hold", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Let it run freely."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _hold(self) -> None:
        while not self._over.wait((1 - self.share) * HOLD_PERIOD):
            try:
                with self._owner.standing():
                    self._over.wait(self.share * HOLD_PERIOD)
            except RingfenceError:
                return  # the machine has ended
