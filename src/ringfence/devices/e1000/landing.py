"""A frame's way into the receive ring, in native code: cut, summed up, stored, written back.

`Landing` is a job for `land`: a frame, how it is to be cut, and the ring. The receiver has checked
that the ring has descriptors enough; everything else that the guest may have written there is met
here: an address outside RAM ends the job (a master abort), an address of 0 takes the bytes without
keeping them. TCP segments over IPv4 are cut as `network.offload.segments` does it.

Sums are made of words as they lie in memory: the checksum of words with swapped bytes is the
checksum with swapped bytes (RFC 1071, 2).
"""

from __future__ import annotations

import ctypes
from typing import Annotated

from ringfence.devices.e1000.registers import RxDescriptor
from ringfence.memory.reach import Reach, reached
from ringfence.native.dialect import (
    address_of,
    load8,
    load16,
    load32,
    load64,
    native,
    native_inline,
    rep_movsb,
    store8,
    store16,
    store32,
    store64,
)
from ringfence.native.layout import Array, u8, u64

RUNS = 512
"""Changes that a job notes at most: 64 KiB into the smallest buffers, and a few."""
HEADER = 256
"""Bytes that a segment's headers have room in: Ethernet, and twice the longest of 60."""
_POLYNOMIAL = 0xEDB88320
"""CRC-32 of IEEE 802.3 (3.2.9), bits reversed."""
_SLICES = 8

IPV4 = 14
LENGTH_AT, NAME_AT, SUM_AT, ADDRESSES_AT = 16, 18, 24, 26
"""In a frame: the IPv4 header's total length, identification, checksum and addresses."""
SEQUENCE_AT, FLAGS_AT, TCP_SUM_AT = 4, 13, 16
"""In a TCP header."""
FIN_PSH, CWR = 0x09, 0x80
TCP_IN_MEMORY = 6 << 8
"""The pseudo header's zero and protocol."""


class Landing(Reach):
    """A frame, and where it goes."""

    frame: Annotated[int, u64]
    """Host address of its first byte."""
    length: Annotated[int, u64]
    header: Annotated[int, u64]
    """Bytes that each segment begins with; 0: the frame is stored as it is."""
    tcp: Annotated[int, u64]
    """Where in it the TCP header is."""
    mss: Annotated[int, u64]
    """Bytes of payload per segment."""
    crc_table: Annotated[int, u64]
    """Host address of `crc_table`'s values, 0: the frame check sequence is not stored."""
    judgement: Annotated[int, u64]
    """Status, errors and special as a descriptor has them, from status on."""
    ring: Annotated[int, u64]
    """The ring's guest-physical address; descriptors; the first one that is free."""
    count: Annotated[int, u64]
    head: Annotated[int, u64]
    buffer: Annotated[int, u64]
    """Bytes that a descriptor's buffer holds."""
    stored: Annotated[int, u64]
    """Frames that are in the ring."""
    runs_used: Annotated[int, u64]
    written: Annotated[int, u64]
    """Host address of the first descriptor in a row that was written back; bytes of them."""
    written_length: Annotated[int, u64]
    # The frame that is being stored.
    left: Annotated[int, u64]
    """Bytes of it that are still to come."""
    descriptor: Annotated[int, u64]
    """Host address of the descriptor that is being filled, 0 for none."""
    place: Annotated[int, u64]
    """Host address of the next byte in its buffer, 0 where there is no buffer."""
    room: Annotated[int, u64]
    """Bytes that are to come into it."""
    held: Annotated[int, u64]
    """Bytes that it will hold."""
    crc: Annotated[int, u64]
    runs: Annotated[Array, u64, 2 * RUNS]
    """What was changed: offsets into RAM, and lengths."""
    headers: Annotated[Array, u8, HEADER, 8]


def crc_table() -> ctypes.Array[ctypes.c_uint32]:
    """The CRC of each byte, and of each byte with so many zeroes behind it."""
    table = [0] * (256 * _SLICES)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table[byte] = value
    for at in range(256, 256 * _SLICES):
        table[at] = table[at - 256] >> 8 ^ table[table[at - 256] & 0xFF]
    return (ctypes.c_uint32 * len(table))(*table)


@native_inline
def crc_slice(table: int, number: int, byte: int) -> int:
    """The CRC of a byte with ``number`` zeroes behind it."""
    return load32(table + number * 1024 + (byte & 0xFF) * 4)


@native
def crc_of(table: int, crc: int, at: int, length: int) -> int:
    """Go on with a CRC over bytes at a host address, eight at a time."""
    while length >= 8:
        low = load32(at) ^ crc
        high = load32(at + 4)
        crc = (
            crc_slice(table, 7, low)
            ^ crc_slice(table, 6, low >> 8)
            ^ crc_slice(table, 5, low >> 16)
            ^ crc_slice(table, 4, low >> 24)
        )
        crc = crc ^ (
            crc_slice(table, 3, high)
            ^ crc_slice(table, 2, high >> 8)
            ^ crc_slice(table, 1, high >> 16)
            ^ crc_slice(table, 0, high >> 24)
        )
        at += 8
        length -= 8
    while length:
        crc = crc >> 8 ^ crc_slice(table, 0, crc ^ load8(at))
        at += 1
        length -= 1
    return crc


@native_inline
def add_carry(total: int, word: int) -> int:
    """Add, and the carry at the low end."""
    total += word
    return total + 1 if total < word else total


@native
def sum_of(total: int, at: int, length: int) -> int:
    """Go on with a sum over bytes at a host address; an odd one is the first of its word."""
    while length >= 8:
        total = add_carry(total, load64(at))
        at += 8
        length -= 8
    last = 0
    for number in range(length):
        last = last | load8(at + number) << number * 8
    return add_carry(total, last)


@native_inline
def folded(total: int) -> int:
    """A sum's 16 bits, the carries added in."""
    total = (total & 0xFFFFFFFF) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@native_inline
def swap16(value: int) -> int:
    """A word in the other order of bytes."""
    return (value & 0xFF) << 8 | (value >> 8 & 0xFF)


@native_inline
def swap32(value: int) -> int:
    """Two words in the other order of bytes."""
    return swap16(value) << 16 | swap16(value >> 16)


@native
def begin_segment(job: Landing, number: int, at: int, part: int) -> int:
    """Make the headers of the segment with ``part`` bytes of payload from ``at`` on."""
    headers = address_of(job.headers[0])
    rep_movsb(headers, job.frame, job.header)
    store16(headers + LENGTH_AT, swap16(job.header - IPV4 + part))
    store16(headers + NAME_AT, swap16(swap16(load16(headers + NAME_AT)) + number))
    store16(headers + SUM_AT, 0)
    store16(headers + SUM_AT, ~folded(sum_of(0, headers + IPV4, job.tcp - IPV4)))
    tcp = headers + job.tcp
    store32(tcp + SEQUENCE_AT, swap32(swap32(load32(tcp + SEQUENCE_AT)) + at))
    flags = load8(tcp + FLAGS_AT)
    if job.header + at + part < job.length:
        flags = flags & ~FIN_PSH
    if number:
        flags = flags & ~CWR
    store8(tcp + FLAGS_AT, flags)
    store16(tcp + TCP_SUM_AT, 0)
    total = TCP_IN_MEMORY + swap16(job.header - job.tcp + part)
    total = sum_of(total, headers + ADDRESSES_AT, 8)
    total = sum_of(total, tcp, job.header - job.tcp)
    total = sum_of(total, job.frame + job.header + at, part)
    store16(tcp + TCP_SUM_AT, ~folded(total))
    return headers


@native
def note_run(job: Landing, host: int, length: int) -> int:
    """Note a change of RAM; one that continues the last makes that longer."""
    offset = host - job.ram_host
    used = job.runs_used
    if used and job.runs[2 * used - 2] + job.runs[2 * used - 1] == offset:
        job.runs[2 * used - 1] = job.runs[2 * used - 1] + length
    elif used < RUNS:
        job.runs[2 * used] = offset
        job.runs[2 * used + 1] = length
        job.runs_used = used + 1
    return 0


@native
def next_buffer(job: Landing) -> int:
    """Begin with the descriptor at the head; 0 for a master abort."""
    host = reached(job, job.ring + job.head * RxDescriptor.SIZE, RxDescriptor.SIZE)
    if host == 0:
        return 0
    size = job.left if job.left < job.buffer else job.buffer
    address = load64(host)
    job.place = 0
    if address:
        job.place = reached(job, address, size)
        if job.place == 0:
            return 0
        note_run(job, job.place, size)
    job.descriptor = host
    job.held = size
    job.room = size
    return 1


@native
def write_back(job: Landing) -> int:
    """Give the descriptor to the driver: its buffer is full, or the frame ends in it."""
    flags = RxDescriptor.DD if job.left else RxDescriptor.DD | RxDescriptor.EOP
    store64(job.descriptor + 8, job.held | (job.judgement | flags) << 32)
    if job.written_length and job.written + job.written_length == job.descriptor:
        job.written_length += RxDescriptor.SIZE
    else:
        if job.written_length:
            note_run(job, job.written, job.written_length)
        job.written = job.descriptor
        job.written_length = RxDescriptor.SIZE
    job.descriptor = 0
    job.head += 1
    if job.head >= job.count:
        job.head = 0
    return 0


@native
def lay(job: Landing, source: int, length: int) -> int:
    """Store a part of the frame; 0 for a master abort."""
    while length:
        if job.descriptor == 0 and next_buffer(job) == 0:
            return 0
        part = length if length < job.room else job.room
        if job.place:
            rep_movsb(job.place, source, part)
            job.place += part
        source += part
        length -= part
        job.room -= part
        job.left -= part
        if job.room == 0:
            write_back(job)
    return 1


@native
def land_segments(job: Landing) -> int:
    """Store all segments, or what comes before a master abort; 1 if it is all of them."""
    at = 0
    payload = job.length - job.header
    number = 0
    while 1:
        part = payload - at
        if job.header and part > job.mss:
            part = job.mss
        job.left = job.header + part + (4 if job.crc_table else 0)
        job.descriptor = 0
        source = job.frame + job.header + at
        if job.header and lay(job, begin_segment(job, number, at, part), job.header) == 0:
            return 0
        if lay(job, source, part) == 0:
            return 0
        if job.crc_table:
            crc = crc_of(job.crc_table, 0xFFFFFFFF, address_of(job.headers[0]), job.header)
            job.crc = ~crc_of(job.crc_table, crc, source, part)
            if lay(job, address_of(job.crc), 4) == 0:
                return 0
        number += 1
        job.stored = number
        at += part
        if at >= payload:
            return 1
    return 0


@native
def land(job: Landing) -> int:
    """Do a job: 1 if all of it is stored, 0 for a master abort; ``head`` and ``runs`` tell more."""
    job.stored = 0
    job.runs_used = 0
    job.written_length = 0
    done = land_segments(job)
    if job.written_length:
        note_run(job, job.written, job.written_length)
    return done
