"""Cards of a few lines to put at a backend's end, and waiting for what other threads do."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence

PATIENCE = 20.0


def until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it never came")
        time.sleep(0.002)


class Card:
    """Takes frames while it has room."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.frames: list[bytes] = []
        self.refused = 0
        self.batches: list[int] = []
        """How many frames came together."""
        self.thread = ""
        self.told = 0

    def receive(self, frames: Sequence[bytes]) -> int:
        self.thread = threading.current_thread().name
        self.batches.append(len(frames))
        for taken, frame in enumerate(frames):
            if not self.take(frame):
                self.refused += 1
                return taken
        return len(frames)

    def more(self) -> None:
        self.told += 1

    def take(self, frame: bytes) -> bool:
        if len(self.frames) >= self.room:
            return False
        self.frames.append(frame)
        return True


def frame(number: int, length: int = 60) -> bytes:
    """A broadcast frame with a number in it."""
    return (b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + struct.pack(">I", number)).ljust(
        length, b"."
    )
