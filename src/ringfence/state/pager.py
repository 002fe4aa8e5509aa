"""A process that fills in RAM which follows a machine: ``python -m ringfence.state.pager``.

It is a process of its own because a thread of the machine's that touches a page may hold Python's
global lock while it sleeps, and nobody in that process could then bring the page. It has the
machine's userfaultfd and the socket on which the sender's connections come. The sender brings all
pages in an order of its own choice, and first those that somebody waits for.

stdin tells what to do, a line of JSON each: where RAM is, then which runs of it are missing, then
that the machine runs (which matters to a sender that asks). Its end is the machine's: we go, too.
stdout says ``ready``, ``known`` when it knows what is missing, and ``done`` when the machine needs
us no more. The sender still does: it has to hear that all is here, and answers that it has. Until
then we stay, for `PATIENCE` at most, so that it may come back and ask, even if the machine has
ended.

If the link is cut, whoever touches a missing page goes on sleeping, and the sender has `PATIENCE`
seconds to come back; we tell it what is still missing. Then the machine is lost, as half of its RAM
is of no use: it is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from ringfence.errors import RingfenceError
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.missing import Userfault
from ringfence.state.wire import (
    Kind,
    Link,
    LinkError,
    Tls,
    pack_places,
    secure,
    unpack_pages,
    unpack_places,
)

PATIENCE = 90.0
"""Seconds without a connection until the machine is given up."""
SILENCE = 5.0
"""Seconds that a message may pause until its connection is given up."""


class Pager:
    """Fills in the missing pages of one machine.

    Parameters
    ----------
    about : dict
        ``uffd``, ``listener``: descriptors; ``base``: address of RAM; ``pages``: how many;
        ``token``: what the sender calls the machine; ``patience``: instead of `PATIENCE`; ``tls``:
        None, or the files of `Tls`.

    Raises
    ------
    UsageError
        The files for TLS are no such thing.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self._uffd = Userfault(about["uffd"])
        self._listener = socket.socket(fileno=about["listener"])
        self._base, self._pages = about["base"], about["pages"]
        self._token, self._patience = about["token"], about["patience"]
        tls = about["tls"]
        self._context = Tls(*map(Path, tls)).context(server=True) if tls else None
        self._missing = bytearray(self._pages)
        self._left = 0
        self._wanted: set[int] = set()
        """Pages that somebody waits for, and that were asked for."""
        self._armed = False
        """Whether RAM tells of accesses by now: before, pages can't be filled in."""
        self._fate = "gone"
        self._link: Link | None = None
        self._alone_since = time.monotonic()
        self._orders = b""

    def run(self) -> bool:
        """Until all is there, or the machine has ended; which of both."""
        while True:
            if self._link is None and time.monotonic() > self._alone_since + self._patience:
                self._give_up()
            watched: list[Any] = [self._uffd.fd, sys.stdin.fileno()]
            watched.append(self._listener if self._link is None else self._link)
            here = self._link is not None and self._link.buffered
            ready, _, _ = select.select(watched, [], [], 0 if here else 0.5)
            if here and self._link not in ready:
                ready.append(self._link)
            for each in ready:
                if each is self._listener:
                    self._accept()
                elif each is self._link:
                    self._take()
                elif each == self._uffd.fd:
                    self._serve()
                elif not self._hear():
                    return False
            if self._finished:
                self._uffd.unregister(self._base, self._pages * PAGE)
                print("done", flush=True)
                return True

    @property
    def _finished(self) -> bool:
        return self._fate == "running" and not self._left

    def _hear(self) -> bool:
        """Orders on stdin; False at its end."""
        data = os.read(sys.stdin.fileno(), 1 << 20)
        self._orders += data
        *lines, self._orders = self._orders.split(b"\n")
        for line in lines:
            order = json.loads(line)
            for first, count in order.get("missing", ()):
                self._missing[first : first + count] = b"\x01" * count
            self._left = self._missing.count(1)
            self._fate = order.get("fate", self._fate)
            if "missing" in order:
                print("known", flush=True)
            if "armed" in order:
                self._armed = True
                if self._link is not None:
                    self._tell_missing(self._link)
                    self._ask([Run(page, 1) for page in sorted(self._wanted)])
        return bool(data)

    # ---- who needs a page

    def _serve(self) -> None:
        for address in self._uffd.faults():
            page = (address - self._base) // PAGE
            if not self._missing[page]:
                self._uffd.zero(self._base + page * PAGE, PAGE)
            elif page not in self._wanted:
                self._wanted.add(page)
                self._ask([Run(page, 1)])

    def _ask(self, runs: list[Run]) -> None:
        if self._link is not None and runs and self._armed:
            try:
                self._link.send_raw(Kind.WANT, pack_places(runs))
            except LinkError:
                self._lose()

    # ---- the sender

    def _accept(self) -> None:
        connected, _ = self._listener.accept()
        connected.settimeout(SILENCE)
        try:
            link = Link(secure(connected, self._context), SILENCE)
        except LinkError:
            return  # whoever that was, we wait for somebody we trust
        try:
            hello = link.receive(Kind.FOLLOW, Kind.QUERY)
            mine = hello.content().get("token") == self._token
            if hello.kind is Kind.QUERY:
                link.send(Kind.ANSWER, {"fate": self._fate if mine else "gone"})
            if hello.kind is Kind.QUERY or not mine:
                link.close()
                return
            self._tell_missing(link)
        except RingfenceError:
            link.close()
            return
        self._link = link
        self._ask([Run(page, 1) for page in sorted(self._wanted)])

    def _tell_missing(self, link: Link) -> None:
        link.send_raw(Kind.MISSING, pack_places(self._runs() if self._armed else []))

    def _runs(self) -> list[Run]:
        """What is missing."""
        runs, at = [], self._missing.find(1)
        while at >= 0:
            end = self._missing.find(0, at)
            end = self._pages if end < 0 else end
            runs.append(Run(at, end - at))
            at = self._missing.find(1, end)
        return runs

    def _take(self) -> None:
        assert self._link is not None
        try:
            message = self._link.receive(Kind.PAGES, Kind.ZEROES)
            if message.kind is Kind.ZEROES:
                for run in unpack_places(message.data, self._pages):
                    self._fill(run, None)
            else:
                run, data = unpack_pages(message, self._pages)
                self._fill(run, data)
        except RingfenceError:
            self._lose()

    def _fill(self, run: Run, data: bytes | memoryview | None) -> None:
        """Put contents, or zeroes, where they are missing."""
        end = run.first + run.count
        if data is not None and self._missing.count(1, run.first, end) == run.count:
            self._uffd.copy(self._base + run.offset, data)
            self._missing[run.first : end] = bytes(run.count)
            self._left -= run.count
            self._wanted.difference_update(range(run.first, end))
            return
        for page in range(run.first, run.first + run.count):
            if not self._missing[page]:
                continue
            place = self._base + page * PAGE
            if data is None:
                self._uffd.zero(place, PAGE)
            else:
                at = (page - run.first) * PAGE
                self._uffd.copy(place, data[at : at + PAGE])
            self._missing[page] = 0
            self._left -= 1
            self._wanted.discard(page)

    def _lose(self) -> None:
        assert self._link is not None
        self._link.close()
        self._link = None
        self._alone_since = time.monotonic()

    # ---- the end

    def part(self) -> None:
        """Have the sender know that all is here."""
        deadline = time.monotonic() + self._patience
        while not self._is_known() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._listener], [], [], left)[0]:
                self._accept()

    def _is_known(self) -> bool:
        """Whether the sender has answered; what it has sent in vain is read before that, too."""
        if self._link is None:
            return False
        try:
            self._link.send(Kind.DONE)
            while self._link.receive(Kind.PAGES, Kind.ZEROES, Kind.DONE).kind is not Kind.DONE:
                pass
        except RingfenceError:
            self._lose()
            return False
        return True

    def _give_up(self) -> NoReturn:
        print(
            f"ringfence: the machine is lost: {self._left * PAGE >> 10} KiB of its RAM were still"
            f" at the sender, which did not come back within {self._patience:g} s",
            file=sys.stderr,
            flush=True,
        )
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit(1)


def main() -> None:
    """Read where RAM is, and begin."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the machine's business
        signal.signal(number, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or sys.exit(0)
    try:
        pager = Pager(json.loads(line))
    except RingfenceError as error:
        sys.exit(f"ringfence: RAM can't follow a machine: {error}")
    print("ready", flush=True)
    try:
        complete = pager.run()
    except BaseException:
        # Whoever needs a page would sleep for ever, Python's lock in hand.
        os.kill(os.getppid(), signal.SIGKILL)
        raise
    if complete:
        pager.part()


if __name__ == "__main__":
    main()
