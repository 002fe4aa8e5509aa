"""The owner's end of the guest's serial console: read it, wait for it, type into it.

Output arrives in small pieces from the machine's own threads, with the board locked, so
`Console.feed` does as little as it can: append, tell the listeners, set an event. Whoever waits
for a text wakes up, scans, and rests a few milliseconds before the next scan; a flood of output
costs the guest nothing more.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

from ringfence.errors import GuestTimeout, RingfenceError

KEEP = 8 << 20
"""Bytes of output that are kept; the oldest are dropped beyond that."""
_REST = 0.003

Listener = Callable[[bytes], None]


class Console:
    """Output of the guest so far, and a way to type.

    Parameters
    ----------
    send : callable
        Takes the bytes that the guest shall receive.
    unread : callable
        Tells how many of them the guest has not read yet.
    """

    def __init__(self, send: Callable[[bytes], None], unread: Callable[[], int]) -> None:
        self._send = send
        self._unread = unread
        self._lock = threading.Lock()
        self._kept = bytearray()
        self._dropped = 0
        self._cursor = 0
        self._news = threading.Event()
        self._ended = ""
        self._listeners: tuple[Listener, ...] = ()

    @property
    def raw(self) -> bytes:
        """What the guest has written, exactly (the last `KEEP` bytes of it)."""
        with self._lock:
            return bytes(self._kept)

    @property
    def output(self) -> str:
        """What the guest has written, as text; bytes that are not UTF-8 are shown as U+FFFD."""
        return self.raw.decode("utf-8", "replace")

    def send(self, text: str | bytes) -> None:
        """Type ``text``; a line ends with ``\\n`` or, as on a keyboard, ``\\r``."""
        self._send(text.encode() if isinstance(text, str) else text)

    @property
    def unread(self) -> int:
        """How many of the bytes sent the guest has not read yet."""
        return self._unread()

    @property
    def ended(self) -> bool:
        """Whether no more output will come."""
        return bool(self._ended)

    def listen(self, listener: Listener, *, history: int = 0) -> bytes:
        """Have ``listener`` called with all further output, and with b"" when there won't be more.

        It runs in one of the machine's threads: while it takes its time, the guest stands still,
        and so does whoever calls `send`. The last ``history`` bytes of what was written before are
        returned.
        """
        with self._lock:
            self._listeners = (*self._listeners, listener)
            return bytes(self._kept[-history:]) if history else b""

    def unlisten(self, listener: Listener) -> None:
        """Call ``listener`` no more; one call may still be under way."""
        with self._lock:
            self._listeners = tuple(each for each in self._listeners if each != listener)

    def wait_for(
        self, pattern: str | re.Pattern[str] | re.Pattern[bytes], timeout: float | None = 60.0
    ) -> str:
        """Wait until the guest has written ``pattern``; the output up to its end is returned.

        Each call goes on where the last one found its match, as in a dialogue.

        Parameters
        ----------
        pattern : str or compiled regular expression
            A str is taken literally.
        timeout : float or None
            Seconds of host time; None waits for ever.

        Raises
        ------
        GuestTimeout
            The time is over.
        RingfenceError
            The machine ended without writing it.
        """
        search = _compile(pattern)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._news.clear()
            ended = self._ended
            found = self._take(search)
            if found is not None:
                return found
            shown = pattern if isinstance(pattern, str) else pattern.pattern
            if ended:
                raise RingfenceError(f"the guest never wrote {shown!r}: {ended}")
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise GuestTimeout(
                    f"the guest did not write {shown!r} within {timeout:g} s"
                    f"; its last words: {self._tail()!r}"
                )
            if self._news.wait(remaining):
                time.sleep(_REST)

    def feed(self, data: bytes) -> None:
        """Take output of the guest (called by the machine)."""
        with self._lock:
            self._kept += data
            excess = len(self._kept) - KEEP
            if excess > KEEP // 4:
                del self._kept[:excess]
                self._dropped += excess
            listeners = self._listeners
        if not self._news.is_set():
            self._news.set()
        for listener in listeners:
            listener(data)

    def end(self, why: str) -> None:
        """Say that no more output will come (called by the machine)."""
        self._ended = why
        self._news.set()
        for listener in self._listeners:
            listener(b"")

    def _take(self, search: re.Pattern[bytes]) -> str | None:
        with self._lock:
            start = max(0, self._cursor - self._dropped)
            match = search.search(self._kept, start)
            if match is None:
                return None
            end = match.end()
            self._cursor = end + self._dropped
            return self._kept[start:end].decode("utf-8", "replace")

    def _tail(self) -> str:
        with self._lock:
            return self._kept[-120:].decode("utf-8", "replace")


def _compile(pattern: str | re.Pattern[str] | re.Pattern[bytes]) -> re.Pattern[bytes]:
    if isinstance(pattern, str):
        return re.compile(re.escape(pattern.encode()))
    source = pattern.pattern
    if isinstance(source, str):
        return re.compile(source.encode(), pattern.flags & ~re.UNICODE)
    return re.compile(source, pattern.flags)
