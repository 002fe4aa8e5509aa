"""XSAVE's family, translated and on the host: images written and taken, and what is refused."""

from __future__ import annotations

import random
import struct

import pytest

from engine.forms import random_value, random_vector
from engine.harness import Guest, difference
from engine.native import COMPONENTS, DATA, PAGE, WIDE, Case, Oracle
from ringfence.cpu.components import EXTENDED, HEADER, MXCSR, MXCSR_MASK
from ringfence.cpu.cpuid import host_cpuid
from ringfence.cpu.state import GP, XSAVE_BYTES

SAVES = {"xsave": b"\x48\x0f\xae\x24\x25", "xsaveopt": b"\x48\x0f\xae\x34\x25"}
if WIDE:
    SAVES["xsavec"] = b"\x48\x0f\xc7\x24\x25"
XRSTOR = b"\x48\x0f\xae\x2c\x25"
LAST_GOOD, HOLE = 4 * PAGE - 2432 & ~63, 4 * PAGE
"""Offsets in the data buffer: of an area that just fits before a missing page, and of that page."""
COMPACTED = 1 << 63

pytestmark = pytest.mark.skipif(
    any(COMPONENTS >> c.number & 1 and host_cpuid(0xD, c.number)[1] != c.offset for c in EXTENDED),
    reason="the host lays XSAVE areas out otherwise",
)


def case(source: random.Random, guest: Guest, code: bytes, offset: int, mask: int) -> Case:
    """``code`` with an area at an offset of the data buffer, and EDX:EAX = ``mask``."""
    body = b"\xb8" + struct.pack("<I", mask) + b"\x31\xd2" + code + struct.pack("<I", DATA + offset)
    made = Case(guest.place(64), body, len(body), [random_value(source) for _ in range(16)])
    made.gpr[4] = DATA + 2 * PAGE + 0x400
    vector = bytearray(random_vector(source, x87=True))
    struct.pack_into("<Q", vector, HEADER, source.choice((COMPONENTS, source.getrandbits(8))) & 0xE7
                     & COMPONENTS)  # fmt: skip
    # Whether MXCSR has a bit for misaligned operands (AMD APM vol. 2, 11.5.10).
    misaligned = host_cpuid(0x80000001)[2] >> 7 & 1
    struct.pack_into("<I", vector, MXCSR_MASK, 0xFFFF | misaligned << 17)
    made.vector = bytes(vector)
    made.text = f"{code.hex()} +{offset:#x} {mask:#x} of {vector[HEADER]:#x}"
    return made


def compare(cases: list[Case], guest: Guest, oracle: Oracle) -> list[int]:
    """The exceptions raised, the same on either side."""
    failures = []
    traps = []
    for each, want in zip(cases, oracle.run(cases), strict=True):
        assert want is not None
        got = guest.run(each, 3)
        failures += [f"{each.text}: {line}" for line in difference(want, got)]
        traps.append(want.trap)
    assert not failures, "\n".join(failures[:20])
    return traps


@pytest.mark.parametrize("name", SAVES)
def test_saves(name: str, guest: Guest, oracle: Oracle) -> None:
    source = random.Random(name)
    guest.forget()
    cases = []
    for n in range(80):
        offset = source.choice((0x40, PAGE - 64 * source.randrange(1, 38), LAST_GOOD))
        offset = {1: HOLE - 64 * source.randrange(1, 38), 2: 0x48, 3: HOLE + PAGE}.get(
            n % 10, offset
        )
        mask = source.choice((COMPONENTS, 3, 7, 1, 2, 4, source.getrandbits(8) & COMPONENTS, 0))
        cases.append(case(source, guest, SAVES[name], offset, mask))
    traps = compare(cases, guest, oracle)
    assert {-1, GP, 14} <= set(traps)


def image(source: random.Random, damage: int) -> bytes:
    """What an area might hold; ``damage`` picks what is wrong with it."""
    data = bytearray(random_vector(source, x87=True)[:XSAVE_BYTES])
    present = source.getrandbits(8) & COMPONENTS
    room = 0
    if WIDE and source.randrange(2):
        room = COMPACTED | present | source.getrandbits(8) & COMPONENTS
    struct.pack_into("<Q", data, HEADER, present)
    struct.pack_into("<Q", data, HEADER + 8, room)
    if damage == 1:
        data[HEADER + 8 + source.randrange(56)] |= 1 << source.randrange(8)
    elif damage == 2:
        data[HEADER + source.randrange(1, 8)] |= 0x10
    elif damage == 3:
        data[MXCSR + 2] |= 1
    elif damage == 4 and room:
        struct.pack_into("<Q", data, HEADER + 8, COMPACTED | present & present - 1)
    return bytes(data)


def test_restores(guest: Guest, oracle: Oracle) -> None:
    source = random.Random("xrstor")
    guest.forget()
    cases = []
    for n in range(160):
        offset = source.choice((0x40, PAGE - 64 * source.randrange(1, 38), LAST_GOOD))
        data = image(source, n % 20)
        if n % 20 == 5:
            offset = HOLE - 64 * source.randrange(1, 38)
            data = data[: HOLE - offset]
        mask = source.choice((COMPONENTS, 3, 7, 1, 2, 4, source.getrandbits(8) & COMPONENTS, 0))
        made = case(source, guest, XRSTOR, offset, mask)
        made.text += f" {data[HEADER : HEADER + 16].hex()}"
        made.patches.append((offset, data))
        cases.append(made)
    traps = compare(cases, guest, oracle)
    assert {-1, GP, 14} <= set(traps)
