"""Checksums and segmentation, against sums done word by word."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.e1000.packets import ipv4, ipv6, slow_checksum
from ringfence.devices.e1000 import offload
from ringfence.devices.e1000.offload import Context
from ringfence.devices.e1000.registers import TxDescriptor
from ringfence.network.checksum import checksum

BOTH = TxDescriptor.IXSM | TxDescriptor.TXSM


@given(st.binary(max_size=200))
def test_checksum(data) -> None:
    assert checksum(data) == slow_checksum(data)


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\xff\xff", b"\xff\xff\0\0", b"\xff\xfe\0\1"])
def test_checksum_of_nothing_and_of_all(data) -> None:
    assert checksum(data) == slow_checksum(data)


@given(st.binary(max_size=80), *[st.integers(0, 0xFFFF)] * 3, st.booleans())
def test_insert_changes_two_bytes_at_most(data, start, offset, end, udp) -> None:
    frame = bytearray(data)
    offload.insert(frame, start % 100, offset % 100, end % 100, udp=udp)
    assert len(frame) == len(data)
    changed = [at for at in range(len(data)) if frame[at] != data[at]]
    assert set(changed) <= {offset % 100, offset % 100 + 1}


def test_a_udp_checksum_is_never_zero() -> None:
    frame = bytearray(b"\xff\xff\0\0")
    offload.insert(frame, 0, 2, 0, udp=True)
    assert frame[2:] == b"\xff\xff"
    frame = bytearray(b"\xff\xff\0\0")
    offload.insert(frame, 0, 2, 0)
    assert frame[2:] == b"\0\0"


def context(*, tcp: bool, four: bool, mss: int) -> Context:
    network = 20 if four else 40
    start = 14 + network
    header = start + (20 if tcp else 8)
    command = TxDescriptor.TUCMD_TCP * tcp | TxDescriptor.TUCMD_IP * four
    return Context(
        ipcss=14,
        ipcso=24,
        ipcse=33,
        tucss=start,
        tucso=start + (16 if tcp else 6),
        command=command,
        layout=mss << 16 | header << 8,
    )


def prototype(frame: bytes, *, tcp: bool, four: bool) -> bytearray:
    """A packet as software hands it over: lengths 0, only the pseudo-header summed up."""
    packet = bytearray(frame)
    start = 34 if four else 54
    protocol = 6 if tcp else 17
    if four:
        packet[16:18] = packet[24:26] = b"\0\0"
        pseudo = frame[26:34] + struct.pack(">HH", protocol, 0)
    else:
        packet[18:20] = b"\0\0"
        pseudo = frame[22:54] + struct.pack(">II", 0, protocol)
    at = start + (16 if tcp else 6)
    packet[at : at + 2] = (slow_checksum(pseudo) ^ 0xFFFF).to_bytes(2, "big")
    return packet


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 5432, 60001])
@pytest.mark.parametrize("four", [True, False])
def test_tcp_segments(four, size) -> None:
    payload = bytes(at * 7 & 0xFF for at in range(size))
    whole = (ipv4 if four else ipv6)(6, payload)
    packet = prototype(whole, tcp=True, four=four)
    how = context(tcp=True, four=four, mss=1000)
    options = BOTH if four else TxDescriptor.TXSM
    count = -(-size // 1000)
    start = 34 if four else 54
    for number in range(count):
        segment = bytes(how.segment(packet, number, options))
        part = payload[number * 1000 : number * 1000 + 1000]
        assert segment[start + 20 :] == part
        assert int.from_bytes(segment[start + 4 : start + 8], "big") == 1000 + number * 1000
        assert bool(segment[start + 13] & 0x08) == (number == count - 1), "PSH is the last one's"
        assert segment[start + 13] & 0x10
        if four:
            assert segment[18:20] == (7 + number).to_bytes(2, "big")
            assert offload.verify(segment) == (True, True)
        else:
            assert offload.verify(segment) == (None, True)


def test_udp_segments() -> None:
    payload = bytes(range(256)) * 10
    packet = prototype(ipv4(17, payload), tcp=False, four=True)
    how = context(tcp=False, four=True, mss=1024)
    for number in range(3):
        segment = bytes(how.segment(packet, number, BOTH))
        assert segment[42:] == payload[number * 1024 : number * 1024 + 1024]
        assert int.from_bytes(segment[38:40], "big") == len(segment) - 34
        assert offload.verify(segment) == (True, True)


@given(
    st.builds(
        Context,
        *[st.integers(0, 255), st.integers(0, 255), st.integers(0, 0xFFFF)] * 2,
        st.integers(0, 0xFFFF_FFFF),
        st.integers(0, 0xFFFF_FFFF),
    ),
    st.binary(max_size=400),
    st.integers(0, 50),
    st.integers(0, 255),
)
def test_no_context_makes_a_segment_longer(how, packet, number, options) -> None:
    segment = how.segment(bytearray(packet), number, options)
    assert len(segment) <= min(len(packet), how.header + how.mss)


@given(st.binary(min_size=60, max_size=120), st.sampled_from([b"\x08\0\x45", b"\x86\xdd\x60"]))
def test_any_frame_can_be_judged(data, kind) -> None:
    offload.verify(data)
    offload.verify(data[:12] + kind + data[15:])


def test_context_round_trip() -> None:
    raw = bytes(range(16))
    assert Context.unpack(raw).pack() == raw
