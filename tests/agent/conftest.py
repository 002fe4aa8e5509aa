"""Agents in guests, as far as the host can tell."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence import sockets


@pytest.fixture
def answering(tmp_path: Path) -> Callable[[bytes], Path]:
    """Make a vsock socket whose guest answers any request with these bytes."""

    def make(answer: bytes) -> Path:
        path = tmp_path / "vsock"
        path.unlink(missing_ok=True)
        listener = sockets.listen(path, 1)

        def serve() -> None:
            with listener, listener.accept()[0] as connection:
                connection.recv(32)
                connection.sendall(b"OK 1\n")
                try:
                    connection.recv(100)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        return path

    return make
