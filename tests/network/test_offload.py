"""Checksums by machine code, segments, fragments and the option MSS, against sums word by word."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.e1000.packets import ipv4, ipv6, slow_checksum
from ringfence.network import offload
from ringfence.network.checksum import add, checksum
from ringfence.network.offload import Malformed

SYN = 0x02


@given(st.binary(max_size=100), st.integers(0, 100), st.integers(0, 100), st.booleans())
def test_sums_of_ranges(data, start, stop, mutable) -> None:
    given_data = bytearray(data) if mutable else data
    if start <= stop <= len(data):
        assert checksum(given_data, start, stop) == slow_checksum(data[start:stop])
        assert add(given_data, start, stop) == 0xFFFF - slow_checksum(data[start:stop])
    else:
        with pytest.raises(IndexError):
            add(given_data, start, stop)


@pytest.mark.parametrize("data", [b"", bytes(16), b"\xff" * 16, b"\xff" * 9, b"\0" * 8 + b"\1"])
def test_sums_at_the_edges(data) -> None:
    assert checksum(data) == slow_checksum(data)


def test_sums_of_much() -> None:
    data = random.Random(1).randbytes(100_001)
    assert checksum(data) == slow_checksum(data)
    assert checksum(data, 0, 50_000, add(data, 50_000)) == slow_checksum(data)


def tcp_good(frame: bytes) -> bool:
    pseudo = frame[26:34] + struct.pack(">II", len(frame) - 34, 6)
    return slow_checksum(frame[14:34]) == 0 and slow_checksum(pseudo + frame[34:]) == 0


def with_options(options: bytes, flags: int = SYN) -> bytes:
    """A TCP frame that has them, with a right checksum."""
    frame = bytearray(ipv4(6, options))
    frame[46], frame[47] = (20 + len(options)) // 4 << 4, flags
    frame[50:52] = bytes(2)
    pseudo = bytes(frame[26:34]) + struct.pack(">II", len(frame) - 34, 6)
    frame[50:52] = slow_checksum(pseudo + bytes(frame[34:])).to_bytes(2, "big")
    return bytes(frame)


@pytest.mark.parametrize("options", ["020405b4", "01020405b4010100", "0402020405b40000"])
@pytest.mark.parametrize("mss", [0, 1, 1459, 1460, 16060, 65535])
def test_another_mss(options: str, mss: int) -> None:
    frame = with_options(bytes.fromhex(options))
    assert tcp_good(frame)
    out = offload.with_mss(frame, mss)
    assert tcp_good(out)
    assert out[54:].hex() == options.replace("05b4", f"{mss:04x}")


@pytest.mark.parametrize(
    "frame",
    [
        with_options(bytes.fromhex("020405b4"), flags=0x10),
        with_options(bytes.fromhex("00020405b4000000")),
        with_options(bytes.fromhex("0300020405b40000")),
        with_options(bytes.fromhex("02ff05b4")),
        with_options(bytes.fromhex("010101010101020405b4")[:8]),
        ipv4(6, b"", fragment=0x2000),
        ipv4(17, bytes(20)),
        ipv6(6, bytes(20)),
        b"",
        bytes(60),
        with_options(bytes.fromhex("020405b4"))[:55],
    ],
)
def test_frames_without_that_option_pass(frame: bytes) -> None:
    found = offload.with_mss(frame, 9000)
    assert found == frame or (frame[54:58] == bytes.fromhex("03000204") and tcp_good(found))


@given(st.binary(max_size=120), st.integers(0, 5))
def test_noise_passes(noise, kind) -> None:
    frame = (b"", bytes(12) + b"\x08\0", bytes(12) + b"\x08\0\x45")[kind % 3] + noise
    out = offload.with_mss(frame, 1234)
    assert len(out) == len(frame)
    for each in offload.fragments(frame):
        assert len(each) <= max(len(frame), 1514)


def test_fragments_join_to_what_they_were() -> None:
    payload = random.Random(2).randbytes(5001)
    frame = ipv4(99, payload)
    pieces = list(offload.fragments(frame))
    assert all(len(piece) <= 1514 and slow_checksum(piece[14:34]) == 0 for piece in pieces)
    places = [struct.unpack_from(">H", piece, 20)[0] for piece in pieces]
    assert places == [0x2000, 0x2000 | 185, 0x2000 | 370, 555]
    assert b"".join(piece[34:] for piece in pieces) == payload
    # A fragment that is cut once more: places go on from its own, and more follow behind all.
    (again, last) = offload.fragments(ipv4(99, payload[:1488], fragment=0x2000 | 7))
    assert struct.unpack_from(">H", again, 20) == (0x2000 | 7,)
    assert struct.unpack_from(">H", last, 20) == (0x2000 | 7 + 185,)


@pytest.mark.parametrize("sequence", [0, 0xFFFF, 0x10000, 0x12345678, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 1459, 1460, 4001])
def test_segments_are_right(sequence: int, length: int) -> None:
    payload = random.Random(sequence).randbytes(length)
    frame = bytearray(ipv4(6, payload))
    struct.pack_into(">I", frame, 38, sequence)
    pieces = list(offload.segments(bytes(frame), 34, 1460, version=4))
    assert all(map(tcp_good, pieces))
    assert b"".join(piece[54:] for piece in pieces) == payload
    starts = [struct.unpack_from(">I", piece, 38)[0] for piece in pieces]
    assert starts == [sequence + 1460 * n & 0xFFFFFFFF for n in range(len(pieces))]


def test_a_frame_is_left_uncut() -> None:
    payload = random.Random(3).randbytes(60_001)
    frame = bytearray(ipv4(6, payload))
    frame[16:18] = frame[24:26] = frame[50:52] = b"??"
    out = offload.uncut(bytes(frame), 34, version=4)
    assert out == ipv4(6, payload)
    with pytest.raises(Malformed):
        offload.uncut(bytes(frame), 33, version=4)
