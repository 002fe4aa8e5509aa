"""What the stub answers, and that nothing that it is sent harms the machine."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gdb.support import AGAIN, COUNTER, LOADED, SPIN, START, Client, kernel
from ringfence import Machine, sockets
from ringfence.errors import HostError, UsageError
from ringfence.gdb.packets import PACKET_MAX, frame
from ringfence.gdb.server import GdbServer, parse_place
from ringfence.life import State


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(kernel=kernel(), memory="16M", engine="translate", cache=False) as made:
        yield made


@pytest.fixture
def server(machine: Machine, tmp_path: Path) -> Iterator[GdbServer]:
    with GdbServer(machine, f"unix:{tmp_path / 'gdb'}") as made:
        yield made


Connect = Callable[..., Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes connections, which are closed in the end."""
    made: list[Client] = []

    def client(server: GdbServer, *, plain: bool = True) -> Client:
        made.append(Client(sockets.connect(Path(server.address), timeout=30)))
        if plain:
            made[-1].without_acknowledgements()
        return made[-1]

    yield client
    for each in made:
        each.close()


@pytest.fixture
def client(server: GdbServer, connect: Connect) -> Client:
    return connect(server)


def register(client: Client, number: int) -> int:
    return int.from_bytes(bytes.fromhex(client.ask(b"p%x" % number).decode()), "little")


RAX, RBX, RCX, RIP = 0, 1, 2, 16


def test_a_session(machine: Machine, client: Client) -> None:
    assert b"qXfer:features:read+" in client.ask(b"qSupported:swbreak+")
    assert client.ask(b"?") == b"T02thread:1;"
    assert machine.state is State.READY and register(client, RIP) == START
    assert client.ask(b"Z0,%x,1" % AGAIN) == b"OK"
    assert client.ask(b"vCont;c") == b"T05thread:1;swbreak:;"
    assert (register(client, RIP), register(client, RCX)) == (AGAIN, 3)
    assert client.ask(b"z0,%x,1" % AGAIN) == b"OK"
    assert client.ask(b"vCont;s:1") == b"T05thread:1;"
    assert register(client, RIP) == LOADED
    assert client.ask(b"m%x,8" % COUNTER) == struct.pack("<Q", 3).hex().encode()
    assert client.ask(b"Z2,%x,8" % COUNTER) == b"OK"
    assert client.ask(b"c") == b"T05thread:1;watch:%x;" % COUNTER
    assert client.ask(b"z2,%x,8" % COUNTER) == b"OK"
    assert client.ask(b"Z1,%x,1" % SPIN) == b"OK"
    assert client.ask(b"c") == b"T05thread:1;hwbreak:;"
    assert client.ask(b"P1=" + struct.pack("<Q", 1234).hex().encode()) == b"OK"
    assert register(client, RBX) == 1234
    assert client.ask(b"z1,%x,1" % SPIN) == b"OK"
    client.socket.sendall(frame(b"vCont;c"))
    client.socket.sendall(b"\x03")
    assert client.reply() == b"T02thread:1;"
    assert register(client, RBX) >= 1234
    assert client.ask(b"D") == b"OK"
    machine.pause()


def test_memory(machine: Machine, client: Client) -> None:
    assert client.ask(b"M%x,2:ebfe" % SPIN) == b"OK"
    assert client.ask(b"X%x,3:}\x03}]\x01" % COUNTER) == b"OK"
    assert client.ask(b"m%x,3" % COUNTER) == b"237d01"
    assert client.ask(b"X%x,0:" % COUNTER) == b"OK"
    # Reading stops where memory does; what is not there is an error.
    assert client.ask(b"mfffff0,20") == b"00" * 16
    assert client.ask(b"m1000000,4") == b"E0e"
    assert client.ask(b"M1000000,1:00") == b"E0e"
    assert client.ask(b"mffff800000000000,4") == b"E0e"
    assert client.ask(b"mffffffffffffffff,ffffffffffffffff") == b"E0e"
    data = client.ask(b"m%x,ffffffff" % COUNTER)
    assert 0 < len(data) <= PACKET_MAX


def test_all_registers(client: Client) -> None:
    data = client.ask(b"g")
    assert client.ask(b"G" + data) == b"OK"
    changed = b"11" * 8 + data[16:]
    assert client.ask(b"G" + changed) == b"OK"
    assert client.ask(b"g") == changed
    assert client.ask(b"G1234") == b"E16"


def test_the_description_in_pieces(client: Client) -> None:
    text, at = b"", 0
    while True:
        piece = client.ask(b"qXfer:features:read:target.xml:%x,200" % at)
        text += piece[1:]
        at += len(piece[1:])
        if piece[:1] == b"l":
            break
    assert text.endswith(b"</target>") and b"org.gnu.gdb.i386.core" in text
    assert client.ask(b"qXfer:features:read:other.xml:0,10") == b"E00"
    assert client.ask(b"qXfer:auxv:read::0,10") == b""


def monitor(client: Client, line: str) -> str:
    return bytes.fromhex(client.ask(b"qRcmd," + line.encode().hex().encode()).decode()).decode()


def test_monitor(machine: Machine, client: Client) -> None:
    assert monitor(client, f"translate {COUNTER:#x}") == f"{COUNTER:#x}\n"
    assert monitor(client, "translate 0x7fffffffffff") == "not mapped\n"
    assert client.ask(b"qRcmd," + f"write {COUNTER} aabb".encode().hex().encode()) == b"OK"
    assert "aa bb 00" in monitor(client, f"read {COUNTER} 16")
    assert "physical" in monitor(client, "physical on")
    assert client.ask(b"m%x,2" % COUNTER) == b"aabb"
    assert "RAX=" in monitor(client, "registers")
    for line in ("", "nonsense", "read", "read x y", "read 0 99999999", "write 0 xyz", "\0" * 99):
        assert monitor(client, line)
    assert monitor(client, f"read {1 << 70} 4") and monitor(client, "read -5 4")


def test_threads(client: Client) -> None:
    assert client.ask(b"qfThreadInfo") == b"m1" and client.ask(b"qsThreadInfo") == b"l"
    assert client.ask(b"Hg1") == b"OK" and client.ask(b"Hg2") == b"E16"
    assert client.ask(b"T1") == b"OK" and client.ask(b"T9") == b"E16"
    assert client.ask(b"qC") == b"QC1"
    assert bytes.fromhex(client.ask(b"qThreadExtraInfo,1").decode()) == b"vCPU 0, CPL 0"


MALFORMED = (
    b"", b"!", b"g" * 500, b"p", b"pffff", b"p-1", b"P", b"P0", b"P0=", b"P0=zz", b"P0=00", b"m",
    b"m1", b"m,", b"m1,2,3", b"mzz,1", b"m1_0,1", b"m" + b"f" * 99 + b",1", b"M0,1", b"M0,2:00",
    b"M0,1:0", b"X0,5:abc", b"H", b"Hg", b"Hgzz", b"T", b"T-2", b"c-5", b"szz", b"Z", b"Z0",
    b"Z9,0,1",
    b"Z0,zz,1", b"Z2,0,0", b"Z2,ffffffffffffffff,ffff", b"z2,5,5", b"z0,5,1", b"vCont", b"vCont;",
    b"vCont;x", b"vCont;s:77", b"vCont;s:zz", b"vFile:open:2f,0,0", b"vMustReplyEmpty", b"qRcmd,zz",
    b"qXfer:features:read:target.xml:zz", b"qXfer:::::", b"qThreadExtraInfo,99", b"QNonStop:1",
    b"R00",
    b"\xff\xfe", b"b", b"F",
)  # fmt: skip


def test_malformed_packets(machine: Machine, client: Client) -> None:
    for packet in MALFORMED:
        reply = client.ask(packet)
        assert reply in (b"", b"OK") or reply[:1] in b"E" or packet.startswith(b"g"), (
            packet,
            reply,
        )
        assert machine.state is State.READY, packet
    assert client.ask(b"qC") == b"QC1"


def test_random_packets(machine: Machine, server: GdbServer, connect: Connect) -> None:
    chance = random.Random(2026)
    letters = b"?gGpPmMXHTzZvqQ,;:=0123456789abcdefCont\x00\xff"
    client = connect(server)
    for _ in range(400):
        text = bytes(chance.choice(letters) for _ in range(chance.randrange(1, 30)))
        if text.startswith((b"c", b"s", b"vCont", b"D", b"k", b"vKill")):
            continue
        client.ask(text)
    client.socket.sendall(bytes(chance.randrange(256) for _ in range(5000)))
    client.close()
    assert connect(server).ask(b"qC") == b"QC1"


def test_a_packet_without_an_end(server: GdbServer, connect: Connect) -> None:
    client = connect(server)
    with pytest.raises((EOFError, OSError)):
        client.socket.sendall(b"$" + b"a" * 10 * PACKET_MAX)
        client.reply()
    assert connect(server).ask(b"qC") == b"QC1"


def test_who_hangs_up_leaves_a_guest_that_runs(
    machine: Machine, server: GdbServer, connect: Connect
) -> None:
    client = connect(server)
    client.ask(b"Z0,%x,1" % SPIN)
    assert client.ask(b"c") == b"T05thread:1;swbreak:;"
    client.close()
    second = connect(server)
    assert second.ask(b"?") == b"T02thread:1;"
    assert not machine.debug.points.breakpoints
    before = register(second, RBX)
    second.socket.sendall(frame(b"c") + b"\x03")
    assert second.reply() == b"T02thread:1;"
    assert register(second, RBX) >= before


def test_one_at_a_time(server: GdbServer, client: Client, connect: Connect) -> None:
    with pytest.raises((EOFError, OSError)):
        connect(server)
    assert client.ask(b"qC") == b"QC1"


def test_acknowledgements(server: GdbServer, connect: Connect) -> None:
    client = connect(server, plain=False)
    client.socket.sendall(b"$qC#00")
    assert client.socket.recv(1) == b"-"
    client.socket.sendall(frame(b"qC"))
    assert client.socket.recv(1) == b"+"
    assert client.reply() == b"QC1"


def test_the_end_of_the_machine(machine: Machine, server: GdbServer, connect: Connect) -> None:
    client = connect(server)
    client.ask(b"M%x,2:0f0b" % START)  # #UD without an IDT
    assert client.ask(b"c") == b"W04"
    with pytest.raises((EOFError, OSError)):
        client.ask(b"g")


def test_kill(machine: Machine, server: GdbServer, connect: Connect) -> None:
    client = connect(server)
    assert client.ask(b"vKill;1") == b"OK"
    assert machine.state is State.ENDED


def test_the_server_closes_first(machine: Machine, tmp_path: Path, connect: Connect) -> None:
    server = GdbServer(machine, f"unix:{tmp_path / 'other'}")
    client = connect(server)
    client.socket.sendall(frame(b"c"))
    server.close()
    server.close()
    with pytest.raises((EOFError, OSError)):
        client.reply()
    assert not (tmp_path / "other").exists()


def test_tcp(machine: Machine) -> None:
    with GdbServer(machine, ":0") as server:
        assert server.address.startswith(":")
        port = int(server.address[1:])
        client = Client(socket.create_connection(("127.0.0.1", port), timeout=30))
        assert client.ask(b"qC") == b"QC1"
        with pytest.raises(HostError, match="another port"):
            GdbServer(machine, f"127.0.0.1:{port}")
        client.close()


@pytest.mark.parametrize("text", ["", "1234x", "host", ":70000", ":", ":-1", ":\u0663"])
def test_places(text: str) -> None:
    with pytest.raises(UsageError, match="PORT"):
        parse_place(text)
