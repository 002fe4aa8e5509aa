"""RAM that is still here when its machine runs elsewhere: the sender's side of the `pager`.

A thread sends all of it over a connection of its own, from the lowest page on; pages that somebody
waits for there go first. A connection that is cut is made anew, for `PATIENCE` seconds: the other
side says each time what it still lacks, and at last, until we have answered, that it lacks nothing.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ringfence.errors import RingfenceError
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.ram import GuestMemory
from ringfence.state import pages
from ringfence.state.wire import (
    PLACE,
    Address,
    Kind,
    Link,
    LinkError,
    pack_places,
    secure,
    unpack_places,
)

PATIENCE = 60.0
"""Seconds for which a connection that was cut is tried anew."""
PIECE = 32
"""Pages that are sent before somebody who waits has a turn."""


class Remainder:
    """Sends what is left of a machine's RAM.

    Parameters
    ----------
    address : Address
        Where the target listens.
    context : ssl.SSLContext or None
        For TLS.
    token : str
        What we call the machine.
    memory : GuestMemory
        Its RAM, which nobody changes any more.
    """

    def __init__(
        self, address: Address, context: ssl.SSLContext | None, token: str, memory: GuestMemory
    ) -> None:
        self._address = address
        self._context = context
        self._token = token
        self._memory = memory
        self._stop = False
        self._heard = False
        """Whether the target has answered on the present connection; others may take it, too."""
        self._over = threading.Event()
        self.failure: str | None = None
        """Why it has failed, if it has."""
        self.sent = 0
        """Bytes."""
        self.left = 0
        """Bytes that the target lacks, as far as we know."""
        self._thread = threading.Thread(target=self._run, name="ringfence-follow", daemon=True)
        self._thread.start()

    def wait(self, told: Callable[[], None]) -> None:
        """Until all is there or has failed; ``told`` is called now and then."""
        while not self._over.wait(0.5):
            told()

    def stop(self) -> None:
        """The machine stays here."""
        self._stop = True
        self._thread.join()

    def _run(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._stop:
            try:
                link = Link(secure(self._address.connect(5.0), self._context))
            except OSError as error:
                why = error.strerror or str(error)
            except LinkError as error:
                why = str(error)
            else:
                self._heard = False
                try:
                    if self._serve(link):
                        break
                except (RingfenceError, ValueError) as error:
                    why = str(error)
                    if self._heard:
                        deadline = time.monotonic() + PATIENCE
                finally:
                    link.close()
            if time.monotonic() > deadline:
                self.failure = why
                break
            time.sleep(0.2)
        self._over.set()

    def _serve(self, link: Link) -> bool:
        """Send over one connection; whether all is done."""
        link.send(Kind.FOLLOW, {"token": self._token})
        count = self._memory.size // PAGE
        todo = deque(unpack_places(link.receive(Kind.MISSING).data, count))
        self._heard = True
        self.left = sum(run.length for run in todo)
        while not self._stop:
            if link.heard(0 if todo else 0.5):
                message = link.receive(Kind.WANT, Kind.MISSING, Kind.DONE)
                if message.kind is Kind.DONE:
                    with suppress(LinkError):  # the other side need not hear it
                        link.send(Kind.DONE)
                    return True
                runs = unpack_places(message.data, count)
                if message.kind is Kind.MISSING:
                    todo.extend(runs)
                    self.left += sum(run.length for run in runs)
                    continue
                for run in runs:
                    self._send(link, run)
            elif todo:
                run = todo.popleft()
                if run.count > PIECE:
                    todo.appendleft(Run(run.first + PIECE, run.count - PIECE))
                    run = Run(run.first, PIECE)
                self._send(link, run)
                self.left -= run.length
        return False

    def _send(self, link: Link, wanted: Run) -> None:
        view = self._memory.view
        for run, filled in pages.split(view, [wanted]):
            if filled:
                data = view[run.offset : run.offset + run.length]
                link.send_raw(Kind.PAGES, PLACE.pack(run.first, run.count) + bytes(data))
            else:
                link.send_raw(Kind.ZEROES, pack_places([run]))
            self.sent += run.length
