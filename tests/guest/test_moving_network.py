"""A guest's connections through the user network go on while it moves, and their network ends."""

from __future__ import annotations

import hashlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.errors import HostError
from ringfence.images.store import Image
from ringfence.network import slirp
from ringfence.state.receive import Allowed
from state.moving import Target

try:
    slirp.library()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.boot

PIECES, PIECE = 60, 50_000
ADDRESSES = ("tcp://127.0.0.1:0", "unix://{}/socket", "tcp://127.0.0.1:0")


class Slow(threading.Thread):
    """Serves one client some data, piece by piece, as it is told to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.data = random.Random(7).randbytes(PIECES * PIECE)
        self.more = threading.Semaphore(0)

    def run(self) -> None:
        with self.listener:
            connection, _ = self.listener.accept()
        with connection:
            for at in range(0, len(self.data), PIECE):
                self.more.acquire()
                connection.sendall(self.data[at : at + PIECE])

    def serve(self, pieces: int) -> None:
        for _ in range(pieces):
            self.more.release()


@pytest.fixture
def networked(cloud: Image, cache: Path) -> Iterator[tuple[Machine, Shell, int]]:
    """A guest on a user network that listens at a port, and which of the host's leads there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        forward = probe.getsockname()[1]
    with Machine(
        kernel=cloud.kernel,
        initrd=cloud.initrd,
        append=APPEND,
        engine="translate",
        network="user:loopback",
        forwards=[f"{forward}:80"],
        memory="192M",
        cache_dir=cache,
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        yield machine, shell, forward


def ask(connection: socket.socket, text: bytes) -> bytes:
    """What the guest's echo server answers."""
    connection.settimeout(60)
    connection.sendall(text)
    answer = b""
    while len(answer) < len(text):
        answer += connection.recv(100) or pytest.fail("the connection has ended")
    return answer


def test_connections_go_on(
    networked: tuple[Machine, Shell, int],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ringfence.network.user.LAST_ANSWERS", 0.5)
    machine, shell, forward = networked
    server = Slow()
    server.start()
    allowed = Allowed(engine="translate", cache_dir=cache, network="user:loopback")
    left = []
    with ExitStack() as opened:
        shell.run("nc -ll -p 80 -e /bin/cat & ping -i 0.2 10.0.2.2 > /tmp/pinged & true")
        shell.run("until grep -q :0050 /proc/net/tcp /proc/net/tcp6; do sleep .05; done")
        echo = opened.enter_context(socket.create_connection(("127.0.0.1", forward), 60))
        assert ask(echo, b"before") == b"before"
        shell.run(f"(nc 10.0.2.2 {server.port} < /dev/null | sha256sum > /tmp/sum) & true")
        for number, address in enumerate(ADDRESSES):
            server.serve(PIECES // len(ADDRESSES) // 2)
            target = Target(address.format(tmp_path), allowed)
            opened.callback(target.close)
            machine.migrate(target.address)
            server.serve(PIECES // len(ADDRESSES) - PIECES // len(ADDRESSES) // 2)
            left.append(machine)
            machine.close()  # its network stays
            machine = target.take()
            shell = Shell(machine)
            text = b"after move %d" % number
            assert ask(echo, text) == text
            with socket.create_connection(("127.0.0.1", forward), 60) as another:
                assert ask(another, b"anew") == b"anew"
        shell.run("until [ -s /tmp/sum ]; do sleep .05; done")
        digest = hashlib.sha256(server.data).hexdigest()
        assert shell.run("cat /tmp/sum").split()[0] == digest
        said = shell.run("killall -INT ping; sleep 1; cat /tmp/pinged")
        sent, received = re.search(r"(\d+) packets transmitted, (\d+) packets rec", said).groups()  # type: ignore[union-attr]
        assert int(sent) - int(received) <= len(ADDRESSES)  # those under way
        assert left[0].network is not None
        assert not left[0].network.served(0)
        echo.close()
        deadline = time.monotonic() + 90
        for each in left:
            assert each.network is not None
            assert each.network.served(max(0.0, deadline - time.monotonic()))


def test_without_the_old_network_connections_end(
    networked: tuple[Machine, Shell, int], cache: Path
) -> None:
    """As when its process is killed: the guest is told, and goes on."""
    machine, shell, _ = networked
    allowed = Allowed(engine="translate", cache_dir=cache, network="user:loopback")
    target = Target("tcp://127.0.0.1:0", allowed)
    server = Slow()
    server.start()
    try:
        shell.run(f"(nc 10.0.2.2 {server.port} < /dev/null; echo ended > /tmp/over) & true")
        shell.run(f"until grep -q :{server.port:04X} /proc/net/tcp; do sleep .05; done")
        machine.migrate(target.address)
        backend = machine.network
        peer = backend._successor  # type: ignore[union-attr]
        peer.connection.shutdown(socket.SHUT_RDWR)
        shell = Shell(target.take())
        server.serve(PIECES)
        shell.run("ping -c 1 10.0.2.2")
        assert backend is not None
        assert backend.served(60)
    finally:
        target.close()
