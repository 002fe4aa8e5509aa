"""Operands at the ends of their ranges: the translator's sums must not overflow with them."""

from __future__ import annotations

import os
import random
import struct

import pytest

from engine.harness import HIGH, P, U, W
from hostile.support import PAGE, HostileGuest
from ringfence.cpu import state

ROUNDS = int(os.environ.get("RINGFENCE_TEST_ROUNDS", "1"))
AT = 0x4000_0000
ENDS = (0x7FFFFFFF, 0x80000000, 0x7FFFFFF8, 0x80000008, 0xFFFFFFFF, 0x7FFFF000, 0x7FFFEFF9)
PLACES = (AT, 0x7FFF_D000, 0x7FFF_E000, 0x7FFF_F000, 0x8000_0000, 0x7FFF_FFFF_E000,
          0xFFFF_8000_0000_0000, 0xFFFF_FFFF_7FFF_F000, HIGH, (1 << 64) - PAGE)  # fmt: skip


def try_all(guest: HostileGuest, snippets: list[bytes], places: tuple[int, ...] = PLACES) -> None:
    """Run snippets at many addresses and page offsets: each ends with some exception."""
    for place in places:
        high = place >> 63 and place >= HIGH and place < HIGH + (16 << 20)
        guest.reset()
        page = guest.page()
        at = 0
        if high:
            place = HIGH + page
        else:
            guest.map(place, page, P | W)
        for snippet in snippets:
            data = snippet + b"\x0f\x0b"
            if at + len(data) > PAGE:
                guest.forget()
                at = 0
            guest.put(page + at, data)
            end = guest.go(place + at)
            assert end.trap >= 0 or end.reason, (hex(place), snippet.hex())
            at += len(data)
        # The same with as much of the page in front of it as there is.
        for snippet in snippets[:: max(1, len(snippets) // 8)]:
            guest.forget()
            guest.put(page + PAGE - len(snippet), snippet)
            guest.go(place + PAGE - len(snippet))


def test_rip_relative_operands(guest: HostileGuest) -> None:
    """[rip + disp32] and [eip + disp32]."""
    heads = [b"\x8b\x05", b"\x48\x89\x05", b"\x0f\x10\x05", b"\xff\x35", b"\x8f\x05", b"\xff\x25",
             b"\xff\x15", b"\x48\x8d\x05", b"\x0f\xc7\x0d"]  # fmt: skip
    ends = [struct.pack("<I", end) for end in ENDS]
    snippets = [prefix + h + e for prefix in (b"", b"\x67") for h in heads for e in ends]
    try_all(guest, snippets)


def test_branches(guest: HostileGuest) -> None:
    """rel32 of jumps, calls and conditional jumps, taken and not."""
    ends = [struct.pack("<I", end) for end in ENDS]
    heads = (b"\xe9", b"\xe8", b"\x31\xc0\x0f\x84", b"\x31\xc0\x0f\x85")
    snippets = [head + end for head in heads for end in ends]
    snippets += [b"\xe3\x7f", b"\xe2\x80", b"\xeb\x80", b"\xeb\x7f"]
    try_all(guest, snippets)


def test_displacements_from_registers(guest: HostileGuest) -> None:
    """[base + disp32], alone and twice with the base moved in between (shared look-ups)."""
    snippets = []
    for end in ENDS:
        disp = struct.pack("<I", end)
        for base in (3, 4, 5, 1):
            sib = b"\x24" if base == 4 else b""
            access = b"\x48\x8b" + bytes((0x80 | base,)) + sib + disp
            for step in (8, 0xF8, 0x7F, 0x80):
                move = b"\x48\x83" + bytes((0xC0 | base, step))
                snippets += [access + move + access, access * 2 + move + access + move + access]
            for step in ENDS:
                move = b"\x48\x81" + bytes((0xC0 | base,)) + struct.pack("<I", step)
                snippets.append(access + move + access)
            snippets.append(access + b"\x50" * 9 + access + b"\x58" * 20 + access)
        # push and pop of and to memory off RSP, ENTER, moffs.
        snippets += [b"\x8f\x84\x24" + disp, b"\xff\xb4\x24" + disp, b"\x67\x8f\x84\x24" + disp]
        snippets += [b"\x48\xa1" + disp + disp, b"\x48\xa3" + disp * 2, b"\xc8\xff\xff\x1f"]
        snippets += [b"\x0f\xab\x83" + disp, b"\x48\x0f\xbb\x84\xc3" + disp]
        snippets += [b"\x8b\x04\x25" + disp, b"\x67\x8b\x04\x25" + disp, b"\x65\x8b\x04\x25" + disp]
    try_all(guest, snippets, PLACES[:2] + PLACES[-2:])


def test_immediates(guest: HostileGuest) -> None:
    """RET, PUSH, INT, IN and OUT with the largest immediates; far pointers."""
    snippets = [b"\xc2\xff\xff", b"\xca\xff\xff", b"\x68\xff\xff\xff\x7f", b"\x68\0\0\0\x80",
                b"\x66\x68\xff\x7f", b"\xcd\xff", b"\xe4\xff", b"\xe6\xff", b"\x6a\x80",
                b"\x48\xc7\xc0\0\0\0\x80", b"\x48\xb8" + b"\xff" * 8, b"\xff\x28", b"\xff\x18",
                b"\xff\xea", b"\xff\xd8", b"\x66\xe9\xff\x7f", b"\x66\x0f\x84\0\x80",
                b"\x66\xeb\x80", b"\xf0" * 14 + b"\x90", b"\xea" + b"\xff" * 6]  # fmt: skip
    try_all(guest, snippets)


def forms() -> list[bytes]:
    """Every opcode of the one-, two- and three-byte maps and VEX, with register and memory."""
    found = []
    for opcode in (*([b] for b in range(256)), *([0x0F, b] for b in range(256)),
                   *([0x0F, 0x38, b] for b in range(256)), *([0x0F, 0x3A, b] for b in range(256)),
                   *([0xC4, 0xE2, 0x7D, b] for b in range(256)),
                   *([0xC4, 0xE1, 0x79, b] for b in range(256)),
                   *([0xC4, 0xE3, 0x7D, b] for b in range(256)),
                   *([0x62, 0xF1, 0x7C, 0x48, b] for b in range(256))):  # fmt: skip
        found.append(bytes(opcode))
    return found


@pytest.mark.parametrize("prefix", [b"", b"\x66", b"\xf2", b"\xf3", b"\x48", b"\x67", b"\x4f"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_every_opcode(guest: HostileGuest, prefix: bytes, cpl: int) -> None:
    """All opcodes with random operands and registers: an exception or the end, nothing else."""
    source = random.Random(prefix + bytes((cpl,)))
    page = guest.page(2)
    guest.map(AT, page, P | U | W)
    guest.map(AT + PAGE, page + PAGE, P | U | W)
    for opcode in forms():
        for _ in range(ROUNDS):
            operand = source.choice([0x00, 0x05, 0x44, 0x84, 0xC0]) | source.randrange(8) << 3
            data = prefix + opcode + bytes((operand | source.randrange(8),)) + source.randbytes(9)
            guest.forget()
            guest.put(page, data + b"\x0f\x0b" * 9)
            registers = {name: source.getrandbits(64) for name in state.GPR_NAMES}
            if source.random() < 0.7:
                registers = {name: AT + source.randrange(0x800, 0x1800) for name in registers}
            registers["rsp"] = AT + PAGE + 0x800
            guest.begin(AT, cpl, **registers)
            guest.limited(0.02)
