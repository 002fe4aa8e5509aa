"""The host's TAP interfaces, where making them is permitted."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

import pytest

from network.support import Card, frame, until
from ringfence.errors import HostError, UsageError
from ringfence.network.tap import TapNetwork

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
NAME = "rftest0"


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", " "])
def test_bad_interface_names(name) -> None:
    with pytest.raises(UsageError, match="interface"):
        TapNetwork(name)


@pytest.fixture
def tap():
    try:
        made = TapNetwork(NAME)
    except HostError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_an_interface_that_is_down(tap) -> None:
    assert Path(f"/sys/class/net/{NAME}").exists()
    tap.attach(Card())
    tap.transmit(frame(1))
    tap.carry()
    until(lambda: tap.stats()["dropped_sending"] == 1)
    tap.close()
    assert not Path(f"/sys/class/net/{NAME}").exists()


def test_both_ways(tap) -> None:
    card = Card(room=1000)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as host:
        request = struct.pack("16sh22x", NAME.encode(), 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(host, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(host, SIOCSIFFLAGS, struct.pack("16sh22x", NAME.encode(), flags | IFF_UP))
        host.bind((NAME, 0x88B5))
        host.settimeout(20)
        tap.attach(card)
        tap.transmit(frame(1, 1514))
        tap.carry()
        assert host.recv(2000) == frame(1, 1514)
        for number in range(200):
            host.send(frame(number))
        until(lambda: sum(each[12:14] == b"\x88\xb5" for each in card.frames) == 200)
        assert [each for each in card.frames if each[12:14] == b"\x88\xb5"][7] == frame(7)


def test_one_that_another_has() -> None:
    try:
        first = TapNetwork(NAME)
    except HostError as error:
        pytest.skip(str(error))
    try:
        with pytest.raises(HostError, match="not possible"):
            TapNetwork(NAME)
    finally:
        first.close()
