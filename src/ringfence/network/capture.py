"""Frames on the wire, written to a file that Wireshark and tcpdump read.

The format is the classic one of pcap-savefile(5), with nanoseconds: a file header of 24 bytes, then
each frame behind 16 bytes of time and lengths. `Capture` stands between a card and its backend and
is a backend itself. A frame from the host is recorded when the card takes it. Each record is
written at once, so that the file can be watched while it grows; one that doesn't fit on the disk is
taken back, so that the file stays readable.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ringfence.errors import HostError
from ringfence.network.backend import MAXIMUM_FRAME, NetworkBackend, NetworkCard

MAGIC_NANOSECONDS = 0xA1B23C4D
VERSION = (2, 4)
LINKTYPE_ETHERNET = 1


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
        self._end = 0
        """Where the last whole record ends."""
        try:
            self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise HostError(f"capture {path} can't be written: {error.strerror}") from error
        header = struct.pack(
            "<IHHiIII", MAGIC_NANOSECONDS, *VERSION, 0, 0, MAXIMUM_FRAME, LINKTYPE_ETHERNET
        )
        self._write(header)
        if self._lost:
            self._file.close()
            raise HostError(f"capture {path} can't be written: there is no room for its header")

    @property
    def backend(self) -> NetworkBackend:
        """Where frames really go."""
        return self._backend

    def attach(self, card: NetworkCard) -> None:
        """See `NetworkBackend.attach`."""
        self._backend.attach(_Recorded(card, self._record))

    def detach(self) -> None:
        """See `NetworkBackend.detach`."""
        self._backend.detach()

    def resume(self) -> None:
        """See `NetworkBackend.resume`."""
        self._backend.resume()

    @property
    def takes_large(self) -> bool:
        """See `NetworkBackend.takes_large`; such frames are recorded as they are."""
        return self._backend.takes_large

    def bring_large(self, wanted: bool) -> None:
        """See `NetworkBackend.bring_large`."""
        self._backend.bring_large(wanted)

    def room(self) -> int:
        """See `NetworkBackend.room`."""
        return self._backend.room()

    def transmit(self, frame: bytes) -> None:
        """See `NetworkBackend.transmit`."""
        self._record(frame)
        self._backend.transmit(frame)

    def carry(self) -> None:
        """See `NetworkBackend.carry`."""
        self._backend.carry()

    def stats(self) -> dict[str, int]:
        """See `NetworkBackend.stats`."""
        return {**self._backend.stats(), "not_captured": self._lost}

    def close(self) -> None:
        """See `NetworkBackend.close`."""
        self._backend.close()
        with self._lock:
            self._file.close()

    def _record(self, frame: bytes) -> None:
        """Write a frame; a full disk costs frames, not the run."""
        stamp = time.time_ns()
        length = min(len(frame), MAXIMUM_FRAME)
        header = struct.pack("<IIII", *divmod(stamp, 1_000_000_000), length, len(frame))
        self._write(header + frame[:length])

    def _write(self, record: bytes) -> None:
        """Append a record as a whole or not at all."""
        with self._lock:
            if self._file.closed:
                self._lost += 1
                return
            try:
                if self._file.write(record) == len(record):
                    self._end += len(record)
                    return
            except OSError:
                pass
            self._lost += 1
            with suppress(OSError):  # a pipe or a device: there is nothing to take back
                self._file.truncate(self._end)
                self._file.seek(self._end)


class _Recorded:
    """The card, as the backend sees it: what it takes is recorded."""

    def __init__(self, card: NetworkCard, record: Callable[[bytes], None]) -> None:
        self._card = card
        self._record = record

    def receive(self, frames: Sequence[bytes]) -> int:
        """See `NetworkCard.receive`."""
        taken = self._card.receive(frames)
        for frame in frames[:taken]:
            self._record(frame)
        return taken

    def more(self) -> None:
        """See `NetworkCard.more`."""
        self._card.more()
