"""The control socket: commands, streams, and clients that don't behave."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import doubles
from ringfence import sockets
from ringfence.api import commands, names, protocol
from ringfence.api.client import Client, list_machines
from ringfence.api.consoles import BEHIND
from ringfence.api.server import CONNECTIONS, published
from ringfence.errors import HostError, ImageError, RingfenceError, UsageError
from ringfence.life import State
from ringfence.machine import Machine


@pytest.fixture
def served() -> Iterator[Machine]:
    """A running machine that echoes, named "m"."""
    machine = doubles.scripted(doubles.echo)
    with machine, names.claim("m") as place, published(machine, place, image="an image"):
        machine.start()
        yield machine


def raw() -> socket.socket:
    """A connection without a client's manners."""
    return sockets.connect(names.place_of("m").control, timeout=20)


def answer(connection: socket.socket) -> protocol.Message:
    """The next line."""
    with connection.makefile("rb") as lines:
        return protocol.decode(lines.readline())


def test_status_pause_resume_stop(served: Machine) -> None:
    with Client("m") as client:
        status = client.call("status")
        assert status["name"] == "m"
        assert status["image"] == "an image"
        assert status["state"] == "running"
        assert {"pause", "console", "stats"} <= set(status["commands"])
        client.call("pause")
        assert served.state is State.PAUSED
        assert [row["state"] for row in list_machines()] == ["paused"]
        client.call("resume")
        assert served.state is State.RUNNING
        with pytest.raises(UsageError, match="expected it to be paused"):
            client.call("resume")
        assert client.call("stats")["machine"]["outcome"] == "running"
        assert client.call("wait", timeout=0.01) == {"outcome": None}
        client.call("stop")
        assert client.call("wait") == {"outcome": "stopped"}


def test_the_console_has_several_readers(served: Machine) -> None:
    served.console.wait_for("ready\n")
    with Client("m") as one, Client("m") as other:
        first, second = one.stream("console"), other.stream("console", history=3)
        assert first.recv(6, socket.MSG_WAITALL) == b"ready\n"
        assert second.recv(3, socket.MSG_WAITALL) == b"dy\n"
        first.sendall(b"abc")
        assert first.recv(3, socket.MSG_WAITALL) == b"abc"
        assert second.recv(3, socket.MSG_WAITALL) == b"abc"
        one.close()
        second.sendall(b"q")
        assert second.recv(100) == b"q"
        assert second.recv(100) == b"", "the machine ended"


def test_a_reader_that_sleeps_loses_bytes_and_is_told() -> None:
    machine = doubles.scripted(doubles.flood)
    written = 0
    enough = threading.Event()

    def count(data: bytes) -> None:
        nonlocal written
        written += len(data)
        if written > 3 * BEHIND:
            enough.set()

    machine.console.listen(count)
    with machine, names.claim("m") as place, published(machine, place), Client("m") as client:
        stream = client.stream("console")
        machine.start()
        enough.wait()
        stream.settimeout(60)
        seen = b""
        while b"were too many" not in seen:
            seen = seen[-100:] + stream.recv(65536)
        machine.stop()


def test_commands_that_cannot_be(served: Machine) -> None:
    with Client("m") as client:
        for name, arguments, message in (
            ("frob", {}, "command 'frob' is unknown"),
            ("pause", {"now": True}, "argument 'now' is unknown: expected none"),
            ("wait", {"timeout": "soon"}, "expected a float"),
            ("wait", {"timeout": True}, "expected a float"),
            ("console", {"history": -1}, "history"),
        ):
            with pytest.raises(UsageError, match=message):
                client.call(name, **arguments)
        assert client.call("wait", timeout=0) == {"outcome": None}


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"\xff\xfe\n",
        b"[" * 60000 + b"\n",
        b'{"ringfence":1}\n',
        b'{"ringfence":2,"command":"status"}\n',
        b'{"ringfence":1,"command":["status"]}\n',
        b'{"ringfence":1,"command":"status","arguments":7}\n',
        b"x" * (protocol.LINE_LIMIT + 1),
    ],
)
def test_lines_that_are_no_requests(served: Machine, line: bytes) -> None:
    with raw() as connection:
        connection.sendall(line)
        found = answer(connection)
        assert found["error"]["status"] == 2
    with Client("m") as client:
        assert client.call("status")["state"] == "running"


def test_clients_that_only_connect_make_room_for_others(served: Machine) -> None:
    with ExitStack() as opened:
        for _ in range(3 * CONNECTIONS):
            opened.enter_context(raw()).sendall(b'{"half a line')
        with Client("m") as client:
            assert client.call("status")["state"] == "running"


def test_more_clients_at_work_than_there_is_room_for(served: Machine) -> None:
    wait = protocol.encode(protocol.request("wait", {}))
    with ExitStack() as opened:
        busy = [opened.enter_context(raw()) for _ in range(CONNECTIONS)]
        for connection in busy:
            connection.sendall(wait)
        with Client("m") as client:
            for _ in range(200):  # until the last of them has begun to wait
                try:
                    client.call("status")
                except RingfenceError:
                    break
                client.close()
                client.__init__("m")  # type: ignore[misc]
            else:
                pytest.fail("nobody was ever refused")
        served.stop()
        assert answer(busy[0]) == {"result": {"outcome": "stopped"}}


def test_bugs_and_errors_cross_the_socket(served: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: commands.Call) -> dict[str, object]:
        call.progress("failing", 0.5)
        raise KeyError("inside")

    def refuse(call: commands.Call) -> dict[str, object]:
        raise ImageError("no good")

    known = dict(commands.all_commands())
    known |= {"fail": commands.Command(fail, {}), "refuse": commands.Command(refuse, {})}
    monkeypatch.setattr("ringfence.api.server.all_commands", lambda: known)
    heard: list[tuple[str, float]] = []
    with Client("m") as client:
        with pytest.raises(RingfenceError, match="internal error: KeyError"):
            client.call("fail", progress=lambda *what: heard.append(what))
        assert heard == [("failing", 0.5)]
        with pytest.raises(ImageError, match="no good"):
            client.call("refuse")
        assert client.call("status")["state"] == "running"


def test_nobody_and_somebody_silent() -> None:
    with pytest.raises(UsageError, match="no machine named 'm' runs: start one"):
        Client("m")
    claim = names.claim("m")
    with sockets.listen(claim.place.control, 1) as listener:
        with pytest.raises(UsageError, match="did you mean 'm'"):
            Client("mm")
        with pytest.raises(HostError, match="does not answer"), Client("m") as client:
            client.call("status", patience=0.05)

        def babble() -> None:
            for words in (b"x" * 10 + b"\n", b'{"result":7}\n', b""):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(words)

        listener.settimeout(20)
        listener.accept()[0].close()
        thread = threading.Thread(target=babble)
        thread.start()
        for message in ("no JSON", "an answer that is none", "went away"):
            with pytest.raises(HostError, match=message), Client("m") as client:
                client.call("status")
        thread.join()
    claim.release()


def test_the_name_is_free_after_the_machine() -> None:
    machine = doubles.scripted(doubles.hello)
    with machine:
        with names.claim("m") as place, published(machine, place):
            assert len(list_machines()) == 1
            assert json.dumps(list_machines())
        assert list_machines() == []
        names.claim("m").release()
