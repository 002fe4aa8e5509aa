"""32- and 16-bit code, form by form, in compatibility mode: translated and on the host's CPU."""

from __future__ import annotations

import os

import pytest
from iced_x86 import Decoder, Mnemonic, RflagsBits

from engine.forms import Skip
from engine.harness import HARDWARE_BITS, Guest, Stuck, difference, left_open, misaligned
from engine.narrow import START, NarrowMaker, narrow_catalogue
from engine.native import CODE, NO_TRAP, PAGE, Case, Oracle

PER_FORM = int(os.environ.get("RINGFENCE_SWEEP", "8"))
SEED = os.environ.get("RINGFENCE_SEED", "0")
GROUPS = 8
FLAGS = 0x8D5
AUXILIARY = 1 << 4
"""Undefined behind AND."""


def cases_of(maker: NarrowMaker, code: int, guest: Guest) -> list[Case]:
    """Cases of one form."""
    found: list[Case] = []
    tries = 0
    while len(found) < PER_FORM and tries < 6 * PER_FORM + 30:
        tries += 1
        try:
            found.append(maker.narrow_case(code, bool(tries % 3), guest.place))
        except Skip:
            continue
    return found


def undefined(case: Case, bits: int) -> int:
    """Status flags that the instruction leaves undefined."""
    i = Decoder(bits, case.code[START:], ip=case.address + START).decode()
    flags = i.rflags_undefined
    if i.mnemonic in (Mnemonic.RCL, Mnemonic.RCR) and i.op_count == 2:
        flags |= RflagsBits.OF
    return sum(bit for name, bit in HARDWARE_BITS.items() if flags & name)


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("group", range(GROUPS))
def test_forms(group: int, bits: int, guest: Guest, oracle: Oracle) -> None:
    """Registers, flags, vector state, memory and exceptions agree with the host's."""
    maker = NarrowMaker(f"{SEED}/{group}", bits)
    failures: list[str] = []
    mine = narrow_catalogue(bits)[group::GROUPS]
    size = 24
    room = (size * PER_FORM + 1) * (PAGE if bits == 32 else 192)
    end = guest.code_end() if bits == 32 else CODE + 0x10000
    while mine:
        part, mine = mine[:size], mine[size:]
        if guest.next_code + room > end:
            guest.forget()
        cases = [case for code in part for case in cases_of(maker, code, guest)]
        for case, want in zip(cases, oracle.run(cases), strict=True):
            assert want is not None, f"the oracle did not survive {case.text}"
            try:
                got = guest.run(case, 3)
            except Stuck as stuck:
                failures.append(str(stuck))
                continue
            if misaligned(want, got) or left_open(case, want, got):
                continue
            if bits == 16:
                # Where an interrupt of the host's has hit the 16-bit stack, its kernel shows.
                want.gpr = (*want.gpr[:4], want.gpr[4] & 0xFFFFFFFF, *want.gpr[5:])
            ignore = undefined(case, bits) if want.trap == NO_TRAP else FLAGS
            wrong = difference(want, got, ignore_flags=ignore)
            if wrong:
                failures.append(f"{case.text}: {'; '.join(wrong)}")
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:30])


@pytest.mark.parametrize("bits", [32, 16])
def test_flags_outlive_accesses(bits: int, guest: Guest, oracle: Oracle) -> None:
    """Flags live across look-ups, through segments with a base and without."""
    maker = NarrowMaker(f"{SEED}/flags", bits)
    guest.forget()
    cases = [maker.flags_program(maker.random.randrange(3, 12), guest.place) for _ in range(60)]
    for case, want in zip(cases, oracle.run(cases), strict=True):
        assert want is not None
        wrong = difference(want, guest.run(case, 3), ignore_flags=AUXILIARY)
        assert not wrong, f"{case.text}: {wrong}"


def test_catalogue_has_what_64_bit_mode_lacks() -> None:
    """The forms that only older modes have are among those compared."""
    assert len(narrow_catalogue(16)) > 1000
