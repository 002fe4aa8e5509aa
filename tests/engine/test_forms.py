"""Every instruction form that the virtual CPU offers, translated and on the host's CPU.

``RINGFENCE_SWEEP`` is the number of cases per form (default 12), ``RINGFENCE_SEED`` makes others.
"""

from __future__ import annotations

import os

import pytest

from engine.forms import GPR_STYLES, MEM_STYLES, NAME, Maker, Skip, catalogue
from engine.harness import Guest, Stuck, difference, left_open, misaligned, undefined_flags
from engine.native import CODE, NO_TRAP, PAGE, Case, Oracle

PER_FORM = int(os.environ.get("RINGFENCE_SWEEP", "12"))
SEED = os.environ.get("RINGFENCE_SEED", "0")
GROUPS = 24
FLAGS = 0x8D5


def cases_of(maker: Maker, code: int, guest: Guest) -> list[Case]:
    """Cases of one form: all kinds of operands, in random company."""
    found: list[Case] = []
    memory = list(MEM_STYLES)
    maker.random.shuffle(memory)
    styles = list(GPR_STYLES)
    maker.random.shuffle(styles)
    tries = 0
    while len(found) < PER_FORM and tries < 6 * PER_FORM + 30:
        style = styles[tries % len(styles)]
        where = "" if tries % 3 == 2 else memory[tries % len(memory)]
        tries += 1
        crossing = maker.random.choice((0, 0, 0, 0, 0, 1, 2, 5))
        try:
            case = maker.case(
                code, style, where, lambda length, at=crossing: guest.place(length, crossing=at),
                high=maker.random.randrange(6) == 0,
            )  # fmt: skip
        except Skip:
            continue
        found.append(case)
    return found


@pytest.mark.parametrize("group", range(GROUPS))
def test_forms(group: int, guest: Guest, oracle: Oracle) -> None:
    """Registers, flags, vector state, memory and exceptions agree with the host's."""
    codes, _ = catalogue()
    maker = Maker(f"{SEED}/{group}")
    failures: list[str] = []
    mine = codes[group::GROUPS]
    size = max(1, 192 // PER_FORM)
    while mine:
        part, mine = mine[:size], mine[size:]
        # The cases of one round must not share addresses; each may need a page.
        if guest.next_code + (size * PER_FORM + 1) * PAGE > guest.code_end():
            guest.forget()
        cases = [case for code in part for case in cases_of(maker, code, guest)]
        for case, want in zip(cases, oracle.run(cases), strict=True):
            cpl = maker.random.choice((0, 3))
            assert want is not None, f"the oracle did not survive {case.text}"
            try:
                got = guest.run(case, cpl)
            except Stuck as stuck:
                failures.append(str(stuck))
                continue
            if misaligned(want, got) or left_open(case, want, got):
                continue
            ignore = undefined_flags(case) if want.trap == NO_TRAP else FLAGS
            wrong = difference(want, got, ignore_flags=ignore, user=cpl == 3)
            if wrong:
                failures.append(f"{case.text} at CPL {cpl}: {'; '.join(wrong)}")
    assert not failures, "\n".join(failures[:20])


def test_catalogue() -> None:
    """What is left out is left out for a written reason, and every form makes cases."""
    chosen, excluded = catalogue()
    assert len(chosen) > 6 * len(excluded)
    assert all(excluded.values())
    maker = Maker("catalogue")
    for code in chosen:
        for n in range(200):
            try:
                style, memory = GPR_STYLES[n % 7], ("", *MEM_STYLES)[n % 23]
                maker.case(code, style, memory, lambda length: CODE)
                break
            except Skip:
                continue
        else:
            pytest.fail(f"no case of {NAME[code]}")
