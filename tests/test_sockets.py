"""Listeners of a process that is out of descriptors."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ringfence import sockets


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Have the process open no more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def is_ready(listener: socket.socket) -> bool:
    return bool(select.select([listener], [], [], 0)[0])


def test_who_cannot_be_accepted_is_turned_away(tmp_path: Path) -> None:
    with sockets.listen(tmp_path / "door", 8) as listener:
        listener.setblocking(False)
        waiting = [sockets.connect(tmp_path / "door", timeout=20) for _ in range(3)]
        for guest in waiting[:2]:
            with no_descriptors(), pytest.raises(OSError) as caught:
                sockets.accept(listener)
            assert caught.value.errno == errno.EMFILE
            assert guest.recv(1) == b"", "hung up"
        with sockets.accept(listener) as taken:
            waiting[2].sendall(b"hello")
            assert taken.recv(5) == b"hello"
        assert not is_ready(listener)
        with pytest.raises(BlockingIOError):
            sockets.accept(listener)
        for guest in waiting:
            guest.close()
