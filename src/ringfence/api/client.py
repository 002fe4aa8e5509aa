"""The other end of the control socket: find a machine by name, ask it, get the answer.

Whoever can reach the socket can also meet a machine that is stopped in a debugger, or one of
another release; so answers are bounded in length, and commands that take no time by nature have
to be answered within `PROMPT` seconds.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

from ringfence import sockets
from ringfence.api import names, protocol
from ringfence.errors import HostError, RingfenceError, UsageError

PROMPT = 5.0
"""Seconds until a machine that says nothing is given up."""
LISTING = 1.0
"""Seconds that each machine gets where all are asked."""
ANSWER_LIMIT = 16 << 20

Progress = Callable[[str, float], None]


def _no_progress(stage: str, fraction: float) -> None:
    """Nobody watches."""


class Client:
    """A connection to one machine.

    Parameters
    ----------
    name : str
        The machine's name.
    timeout : float
        Seconds until the machine has to have taken the connection.

    Raises
    ------
    UsageError
        No machine of that name runs.
    HostError
        It runs, but it does not answer.
    """

    def __init__(self, name: str, *, timeout: float = PROMPT) -> None:
        self.place = names.place_of(name)
        try:
            self._socket = sockets.connect(self.place.control, timeout=timeout)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise UsageError(_nobody(name)) from error
        except OSError as error:
            raise self._silent() from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def call(
        self,
        command: str,
        *,
        patience: float | None = PROMPT,
        progress: Progress = _no_progress,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Ask, and return the answer.

        Parameters
        ----------
        command : str
            One of ``ringfence.api.commands``.
        patience : float or None
            Seconds between two signs of life; None waits as long as it takes.
        progress : callable
            Told how far it is.
        **arguments
            The command's.

        Raises
        ------
        RingfenceError
            What the machine answered; HostError if it went away or did not answer.
        """
        self._socket.settimeout(patience)
        try:
            self._socket.sendall(protocol.encode(protocol.request(command, arguments)))
            while True:
                message = self._read()
                if "progress" in message:
                    stage = message["progress"]
                    progress(str(stage.get("stage")), float(stage.get("fraction", 0.0)))
                elif "error" in message:
                    raise protocol.raised(message["error"])
                else:
                    return dict(message["result"])
        except TimeoutError as error:
            raise self._silent() from error
        except OSError as error:
            raise self._lost() from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HostError(f"machine {self.place.name!r} gave an answer that is none") from error

    def stream(self, command: str, **arguments: Any) -> socket.socket:
        """Ask for a stream; the socket, from which nothing of it was read yet, is the caller's."""
        self.call(command, **arguments)
        self._socket.settimeout(None)
        return self._socket

    def _read(self) -> protocol.Message:
        """Read one line, and of the socket not a byte more: a stream may follow."""
        line = bytearray()
        while not line.endswith(b"\n"):
            piece = self._socket.recv(4096, socket.MSG_PEEK)
            end = piece.find(b"\n") + 1
            piece = self._socket.recv(end or len(piece))
            line += piece
            if not piece or len(line) > ANSWER_LIMIT:
                raise self._lost()
        try:
            return protocol.decode(bytes(line))
        except UsageError as error:
            raise HostError(f"machine {self.place.name!r}: {error}") from error

    def _silent(self) -> HostError:
        pid = self.place.pid
        return HostError(
            f"machine {self.place.name!r} does not answer: is its process"
            f" {pid if pid is not None else ''} stopped?"
        )

    def _lost(self) -> HostError:
        return HostError(f"machine {self.place.name!r} went away before it answered")


def list_machines() -> list[dict[str, Any]]:
    """What each running machine says of itself; ``error`` for one that does not answer."""
    places = names.running()
    with ThreadPoolExecutor(max_workers=8) as workers:
        return [found for found in workers.map(_status, places) if found is not None]


def _status(place: names.Place) -> dict[str, Any] | None:
    try:
        with Client(place.name, timeout=LISTING) as client:
            return client.call("status", patience=LISTING)
    except UsageError:
        return None  # it ended meanwhile, or is not up yet
    except RingfenceError as error:
        return {"name": place.name, "pid": place.pid, "state": "silent", "error": str(error)}


def _nobody(name: str) -> str:
    with suppress(RingfenceError):
        known = [place.name for place in names.running()]
        close = difflib.get_close_matches(name, known, 1)
        if close:
            return f"no machine named {name!r} runs: did you mean {close[0]!r}?"
        if known:
            return f"no machine named {name!r} runs: expected one of {', '.join(known)}"
    return f"no machine named {name!r} runs: start one with 'ringfence run --name {name}'"
