"""What people may write about networks."""

from __future__ import annotations

import pytest

from ringfence.errors import HostError, UsageError
from ringfence.network.capture import Capture
from ringfence.network.config import NetworkConfig, connect, parse_network
from ringfence.network.forward import Forward, parse_forward
from ringfence.network.stream import SocketNetwork


@pytest.mark.parametrize(("text", "expected"), [
    (None, None),
    ("none", None),
    ("user", NetworkConfig("user")),
    ("user:loopback", NetworkConfig("user", loopback=True)),
    ("socket:/run/a:b", NetworkConfig("socket", "/run/a:b")),
    ("tap:tap0", NetworkConfig("tap", "tap0")),
])  # fmt: skip
def test_networks(text, expected) -> None:
    assert parse_network(text) == expected


@pytest.mark.parametrize(
    "text", ["", "usr", "user:", "user:x", "socket", "socket:", "tap:", "none:"]
)
def test_no_networks(text) -> None:
    if text:
        with pytest.raises(UsageError, match="expected"):
            parse_network(text)
    else:
        assert parse_network(text) is None


@pytest.mark.parametrize(("text", "expected"), [
    ("8080:80", Forward(8080, 80)),
    ("tcp:8080:80", Forward(8080, 80)),
    ("udp:53:53", Forward(53, 53, udp=True)),
    ("0.0.0.0:2222:22", Forward(2222, 22, "0.0.0.0")),
    ("udp:127.0.0.1:1:65535", Forward(1, 65535, "127.0.0.1", udp=True)),
])  # fmt: skip
def test_forwards(text, expected) -> None:
    assert parse_forward(text) == expected
    assert parse_forward(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "80", "80:", ":80", "0:80", "80:65536", "-1:80", "a:b", "1:2:3", "host:1:2", "1:2:3:4:5",
     "udp:1", "icmp:1:2", "\u0664:80", "999.0.0.1:1:2"],
)  # fmt: skip
def test_no_forwards(text) -> None:
    with pytest.raises(UsageError, match="forward"):
        parse_forward(text)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="--net user"):
        parse_network("tap:tap0", ["8080:80"])
    with pytest.raises(UsageError, match="--net user"):
        parse_network(None, ["8080:80"])
    with pytest.raises(UsageError, match="capture"):
        parse_network(None, (), "x.pcap")


def test_connect_a_socket_with_capture(tmp_path) -> None:
    target = tmp_path / "wire"
    backend = connect(NetworkConfig("socket", str(target), capture=tmp_path / "f.pcap"))
    assert isinstance(backend, Capture)
    backend.close()
    assert not target.exists()
    backend = connect(NetworkConfig("socket", str(target)))
    assert isinstance(backend, SocketNetwork)
    backend.close()


def test_a_capture_that_can_t_be_written_leaves_nothing_behind(tmp_path) -> None:
    target = tmp_path / "wire"
    with pytest.raises(HostError, match="capture"):
        connect(NetworkConfig("socket", str(target), capture=tmp_path / "absent" / "f.pcap"))
    assert not target.exists()
