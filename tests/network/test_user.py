"""User-mode networking: what libslirp answers to frames made by hand."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import socket
import struct
import subprocess
import threading

import pytest

from devices.e1000.packets import slow_checksum
from network.support import Card, until
from ringfence.errors import HostError
from ringfence.network import slirp
from ringfence.network.backend import BATCH
from ringfence.network.forward import Forward
from ringfence.network.user import LARGE_MSS, UserNetwork

try:
    slirp.library()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

MAC = bytes.fromhex("020000000001")
BROADCAST = b"\xff" * 6
GUEST, GATEWAY = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])
HOST = bytes.fromhex("52550a000202")


@pytest.fixture
def net():
    made = UserNetwork(loopback=True)
    card = Card()
    made.attach(card)
    yield made, card
    made.close()


def arp(operation: int, target: bytes) -> bytes:
    head = BROADCAST + MAC + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, operation)
    return head + MAC + GUEST + bytes(6) + target


def packet(protocol: int, body: bytes, source=GUEST, target=GATEWAY, mac=HOST) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0)
    head += source + target
    head = head[:10] + slow_checksum(head).to_bytes(2, "big") + head[12:]
    return mac + MAC + b"\x08\x00" + head + body


def test_arp(net) -> None:
    backend, card = net
    backend.transmit(arp(1, GATEWAY))
    backend.carry()
    until(lambda: card.frames)
    assert card.frames[0][20:32] == b"\x00\x02" + HOST + GATEWAY


def test_the_gateway_answers_pings(net) -> None:
    backend, card = net
    body = struct.pack(">BBHHH", 8, 0, 0, 7, 1) + b"hello"
    body = body[:2] + slow_checksum(body).to_bytes(2, "big") + body[4:]
    backend.transmit(arp(1, GATEWAY))
    backend.carry()
    backend.transmit(packet(1, body))
    backend.carry()
    until(
        lambda: any(frame[23] == 1 and frame[34] == 0 for frame in card.frames if len(frame) > 42)
    )


def test_dhcp(net) -> None:
    backend, card = net
    options = bytes.fromhex("63825363350101ff")
    body = struct.pack(">BBBBIHH16s16s", 1, 1, 6, 0, 0x1234, 0, 0, bytes(16), MAC) + bytes(192)
    body += options
    datagram = struct.pack(">HHHH", 68, 67, 8 + len(body), 0) + body
    backend.transmit(packet(17, datagram, bytes(4), b"\xff" * 4, BROADCAST))
    backend.carry()
    until(lambda: card.frames)
    offer = card.frames[0]
    assert offer[58:62] == GUEST
    assert GATEWAY in offer[282:]


def test_a_forward_reaches_the_guest() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend, card = UserNetwork([Forward(port, 80)]), Card()
    try:
        backend.attach(card)
        backend.transmit(arp(1, GATEWAY))
        backend.carry()
        until(lambda: card.frames)
        with socket.create_connection(("127.0.0.1", port), 10):
            until(lambda: any(frame[36:38] == b"\0P" for frame in card.frames))
        syn = next(frame for frame in card.frames if frame[36:38] == b"\0P")
        assert syn[47] == 0x02, "SYN"
    finally:
        backend.close()


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(HostError, match="choose another"):
            UserNetwork([Forward(taken.getsockname()[1], 80)])


def test_the_host_s_loopback_is_closed_unless_asked_for() -> None:
    heard = []
    for loopback in (False, True):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(0.3)
            backend, card = UserNetwork(loopback=loopback), Card()
            backend.attach(card)
            backend.transmit(arp(1, GATEWAY))
            backend.carry()
            datagram = struct.pack(">HHHH", 1000, server.getsockname()[1], 12, 0) + b"ping"
            backend.transmit(packet(17, datagram))
            backend.carry()
            try:
                heard.append(server.recv(100))
            except TimeoutError:
                heard.append(None)
            backend.close()
    assert heard == [None, b"ping"]


def test_hostile_frames(net) -> None:
    """Noise, noise behind good headers, fragments that overlap: the next ARP is answered."""
    backend, card = net
    source = random.Random(1983)
    for number in range(3000):
        kind = number % 4
        noise = source.randbytes(source.randrange(0, 1500))
        if kind == 0:
            backend.transmit(noise)
            backend.carry()
        elif kind == 1:
            backend.transmit(HOST + MAC + b"\x08\x00" + b"\x45" + noise)
            backend.carry()
        elif kind == 2:
            backend.transmit(packet(source.choice([1, 6, 17, 99]), noise))
            backend.carry()
        else:
            cut = bytearray(packet(17, noise))
            cut[20:22] = source.randrange(1 << 16).to_bytes(2, "big")
            cut[24:26] = b"\0\0"
            cut[24:26] = slow_checksum(bytes(cut[14:34])).to_bytes(2, "big")
            backend.transmit(bytes(cut))
            backend.carry()
        until(lambda: len(backend._outgoing) < 500)
    card.frames.clear()
    backend.transmit(arp(1, GATEWAY))
    backend.carry()
    until(lambda: any(frame[12:14] == b"\x08\x06" for frame in card.frames))


def tcp(port: int, flags: int, sequence: int, acknowledged: int, body: bytes = b"") -> bytes:
    """A segment of the guest's; a SYN says that its segments have at most 1460 bytes."""
    options = bytes.fromhex("020405b4") if flags & 2 else b""
    head = struct.pack(">HHII", 999, port, sequence, acknowledged)
    head += struct.pack(">BBHHH", 20 + len(options) << 2, flags, 0xFFFF, 0, 0) + options + body
    pseudo = GUEST + GATEWAY + struct.pack(">HH", 6, len(head))
    return packet(6, head[:16] + slow_checksum(pseudo + head).to_bytes(2, "big") + head[18:])


class Peer(Card):
    """A guest that acknowledges all that it gets at once."""

    def __init__(self, backend: UserNetwork, port: int) -> None:
        super().__init__()
        self.backend, self.port = backend, port
        self.next = 0
        self.sizes: list[int] = []
        self.data = b""

    def take(self, frame: bytes) -> bool:
        if frame[23:24] == b"\x06":
            (sequence,) = struct.unpack_from(">I", frame, 38)
            if frame[47] & 2:
                assert frame[54:58] == bytes.fromhex("020405b4"), "MSS as on any wire"
                self.next = sequence + 1
            elif len(frame) > 54 and sequence == self.next:
                self.data += frame[54:]
                self.sizes.append(len(frame))
                self.next += len(frame) - 54
                self.backend.transmit(tcp(self.port, 0x10, 51_001, self.next))
                self.backend.carry()
        return super().take(frame)


@pytest.mark.parametrize("large", [False, True])
def test_segments_are_large_for_a_card_that_takes_them(large: bool) -> None:
    data = random.Random(4).randbytes(200_000)
    backend = UserNetwork(loopback=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = Peer(backend, server.getsockname()[1])
        backend.attach(peer)
        backend.bring_large(large)
        backend.transmit(arp(1, GATEWAY))
        backend.carry()
        backend.transmit(tcp(peer.port, 0x02, 1000, 0))
        backend.carry()
        connection, _ = server.accept()
        with connection:
            until(lambda: peer.next)
            backend.transmit(tcp(peer.port, 0x10, 1001, peer.next, data[:50_000]))
            backend.carry()
            received = b""
            while len(received) < 50_000:
                received += connection.recv(1 << 16)
            connection.sendall(data)
            until(lambda: len(peer.data) == len(data))
    backend.close()
    assert received == data[:50_000]
    assert peer.data == data
    assert max(peer.sizes) == (LARGE_MSS if large else 1460) + 54


def test_large_datagrams_come_in_fragments(net) -> None:
    backend, card = net
    data = random.Random(5).randbytes(9000)
    backend.transmit(arp(1, GATEWAY))
    backend.carry()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        datagram = struct.pack(">HHHH", 1000, server.getsockname()[1], 12, 0) + b"ping"
        backend.transmit(packet(17, datagram))
        backend.carry()
        _, sender = server.recvfrom(100)
        server.sendto(data, sender)

        def pieces() -> list[bytes]:
            return [frame for frame in card.frames if frame[23:24] == b"\x11"]

        until(lambda: pieces() and not pieces()[-1][20] & 0x20)
    assert max(map(len, pieces())) <= 1514
    assert b"".join(frame[34:] for frame in pieces())[8:] == data


def test_a_flood_waits_in_the_host_s_buffers(net) -> None:
    """While the card has no room, what comes is not dropped by us."""
    backend, card = net
    backend.transmit(arp(1, GATEWAY))
    backend.carry()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        datagram = struct.pack(">HHHH", 1000, server.getsockname()[1], 12, 0) + b"ping"
        backend.transmit(packet(17, datagram))
        backend.carry()
        _, sender = server.recvfrom(100)
        until(lambda: card.frames)
        card.room = len(card.frames)
        for number in range(3000):
            server.sendto(b"%d" % number, sender)
        until(lambda: card.refused)
        assert len(backend._held) <= BATCH
        card.room = 1 << 30
        backend.resume()
        until(lambda: len(card.frames) > 20)
    assert backend.stats()["dropped_receiving"] == 0


def test_two_at_once_and_many_in_a_row() -> None:
    def live() -> None:
        for _ in range(10):
            backend, card = UserNetwork(), Card()
            backend.attach(card)
            backend.transmit(arp(1, GATEWAY))
            backend.carry()
            until(lambda card=card: card.frames)
            backend.close()

    threads = [threading.Thread(target=live) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


LAYOUT = """
#include <stddef.h>
#include <stdio.h>
#include <slirp/libslirp.h>
int main(void) {
#define C(f) printf("Config " #f " %zu\\n", offsetof(SlirpConfig, f));
#define B(f) printf("Callbacks " #f " %zu\\n", offsetof(SlirpCb, f));
"""


def test_structures_are_laid_out_as_in_the_header(tmp_path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler is missing")
    lines = [f"C({name})" for name, *_ in slirp.Config._fields_]
    lines += [f"B({name})" for name, *_ in slirp.Callbacks._fields_]
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT + "\n".join(lines) + "\nreturn 0; }\n")
    built = subprocess.run(
        [compiler, "-o", tmp_path / "layout", source], capture_output=True, check=False
    )
    if built.returncode:
        if os.environ.get("CI"):
            pytest.fail("libslirp's header is missing, and in CI every test has to run")
        pytest.skip("libslirp's header is missing")
    told = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        kind, name, offset = line.split()
        structure: type[ctypes.Structure] = getattr(slirp, kind)
        assert getattr(structure, name).offset == int(offset), name
