"""Frames on the wire, written to a file that Wireshark and tcpdump read.

The format is the classic one of pcap-savefile(5), with nanoseconds: a file header of 24 bytes, then
each frame behind 16 bytes of time and lengths. `Capture` stands between a card and its backend and
is a backend itself. A frame from the host is recorded when the card takes it.
"""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path

from ringfence.errors import HostError
from ringfence.network.backend import MAXIMUM_FRAME, NetworkBackend, Receive

MAGIC_NANOSECONDS = 0xA1B23C4D
VERSION = (2, 4)
LINKTYPE_ETHERNET = 1
FLUSH_SECONDS = 1.0
"""How long a frame may be in a buffer of ours when others follow."""


class Capture:
    """A backend that notes what goes through it.

    Parameters
    ----------
    backend : NetworkBackend
        Where frames really go; closed with this one.
    path : str or Path
        The file; one that exists is replaced.

    Raises
    ------
    HostError
        The file can't be written.
    """

    def __init__(self, backend: NetworkBackend, path: str | Path) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._lost = 0
        self._flushed = time.monotonic()
        try:
            self._file = Path(path).open("wb")  # noqa: SIM115 - closed by close()
            self._file.write(
                struct.pack(
                    "<IHHiIII", MAGIC_NANOSECONDS, *VERSION, 0, 0, MAXIMUM_FRAME, LINKTYPE_ETHERNET
                )
            )
            self._file.flush()
        except OSError as error:
            raise HostError(f"capture {path} can't be written: {error.strerror}") from error

    def attach(self, receive: Receive) -> None:
        """See `NetworkBackend.attach`."""

        def recorded(frame: bytes) -> bool:
            taken = receive(frame)
            if taken:
                self._record(frame)
            return taken

        self._backend.attach(recorded)

    def detach(self) -> None:
        """See `NetworkBackend.detach`."""
        self._backend.detach()

    def resume(self) -> None:
        """See `NetworkBackend.resume`."""
        self._backend.resume()

    def transmit(self, frame: bytes) -> None:
        """See `NetworkBackend.transmit`."""
        self._record(frame)
        self._backend.transmit(frame)

    def stats(self) -> dict[str, int]:
        """See `NetworkBackend.stats`."""
        return {**self._backend.stats(), "not_captured": self._lost}

    def close(self) -> None:
        """See `NetworkBackend.close`."""
        self._backend.close()
        with self._lock:
            try:
                self._file.close()
            except OSError:
                self._lost += 1

    def _record(self, frame: bytes) -> None:
        """Write a frame; a full disk costs frames, not the run."""
        stamp = time.time_ns()
        length = min(len(frame), MAXIMUM_FRAME)
        header = struct.pack("<IIII", *divmod(stamp, 1_000_000_000), length, len(frame))
        with self._lock:
            try:
                self._file.write(header + frame[:length])
                if time.monotonic() - self._flushed > FLUSH_SECONDS:
                    self._flushed = time.monotonic()
                    self._file.flush()
            except (OSError, ValueError):  # ValueError: closed
                self._lost += 1
