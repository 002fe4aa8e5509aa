"""Random programs under the translator, in all its ways of running, and on the host's CPU.

``RINGFENCE_SWEEP`` (default 12) times ten is the number of programs a way, ``RINGFENCE_SEED`` makes
others.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from engine.forms import Skip
from engine.harness import Guest, Stuck, difference, misaligned
from engine.native import (
    ALIAS,
    DATA,
    DIRECTION,
    NO_TRAP,
    PAGE,
    STATUS_FLAGS,
    Case,
    Oracle,
    Outcome,
)
from engine.sequences import SequenceMaker

COUNT = 10 * int(os.environ.get("RINGFENCE_SWEEP", "12"))
SEED = os.environ.get("RINGFENCE_SEED", "0")
WAYS: dict[str, dict[str, Any]] = {
    "user": {},
    "supervisor": {"cpl": 0},
    "high": {"cpl": 0, "high": True},
    "rewritten": {"rewrite": True},
    "interrupted": {"interrupts": 100},
    "stepped": {"step": True},
    "demand-paged": {"demand": True},
    "slow": {"slow": True},
}


def bad_return(want: Outcome, got: Outcome) -> bool:
    """A known difference: RET to a non-canonical address is reported at that address."""
    return want.trap == got.trap == 13 and got.rip >> 47 not in (0, 0x1FFFF)


@pytest.mark.parametrize("way", WAYS)
def test_programs(way: str, guest: Guest, oracle: Oracle) -> None:
    """State at the end, or at the exception, is what the host's CPU makes of the same bytes."""
    options = dict(WAYS[way])
    cpl = options.pop("cpl", 3)
    maker = SequenceMaker(f"{SEED}/{way}")
    pick = maker.random
    failures: list[str] = []
    left = COUNT
    while left > 0:
        if guest.next_code + 100 * PAGE > guest.code_end():
            guest.forget()
        made = []
        while len(made) < min(40, left):
            crossing = pick.choice((0, 0, 1, 3, 20, 40))
            try:
                made.append(
                    maker.sequence(
                        lambda length, at=crossing: guest.place(length, crossing=at),
                        pick.randrange(5, 40),
                    )
                )
            except Skip:
                continue
        left -= len(made)
        outcomes = oracle.run([case for case, _, _ in made])
        for (case, undefined, leaks), want in zip(made, outcomes, strict=True):
            if want is None or (leaks and way == "high"):
                continue
            try:
                got = guest.run(case, cpl, **options)
            except Stuck as stuck:
                failures.append(str(stuck))
                continue
            if misaligned(want, got) or bad_return(want, got):
                continue
            ignore = undefined if want.trap == NO_TRAP else STATUS_FLAGS
            wrong = difference(want, got, ignore_flags=ignore, user=cpl == 3)
            if wrong:
                failures.append(f"{'; '.join(wrong)}\n{case.text}\n{case.code.hex()}")
    assert not failures, f"{len(failures)} of {COUNT}:\n" + "\n".join(failures[:5])


def compare(guest: Guest, oracle: Oracle, case: Case, **options: Any) -> tuple[Outcome, Outcome]:
    """Run one case both ways; everything must agree but the flags at an exception."""
    want = oracle.run([case])[0]
    assert want is not None
    got = guest.run(case, **options)
    ignore = 0 if want.trap == NO_TRAP else STATUS_FLAGS
    assert not difference(want, got, ignore_flags=ignore), case.text
    return want, got


def registers(**values: int) -> list[int]:
    """General registers, small numbers where nothing else is said."""
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    gpr = [0x1111 * n for n in range(16)]
    gpr[4] = DATA + 2 * PAGE + 0x800
    for name, value in values.items():
        gpr[names.index(name) if name in names else int(name[1:])] = value
    return gpr


STRINGS = {
    "movsb": "a4", "movsw": "66a5", "movsd": "a5", "movsq": "48a5",
    "stosb": "aa", "stosw": "66ab", "stosd": "ab", "stosq": "48ab",
    "lodsb": "ac", "lodsq": "48ad", "scasb": "ae", "scasd": "af", "cmpsb": "a6", "cmpsq": "48a7",
    "movsb-narrow": "67a4", "stosq-narrow": "6748ab",
}  # fmt: skip


@pytest.mark.parametrize("name", STRINGS)
def test_string_faults(name: str, guest: Guest, oracle: Oracle) -> None:
    """Registers at a fault in the middle, both directions, with overlaps and across pages."""
    body = bytes.fromhex(STRINGS[name])
    same = [(0, bytes(4 * PAGE))]
    hole = DATA + 4 * PAGE
    places = [
        (DATA + 64, hole - 100), (hole - 100, DATA + 64), (DATA + 0x1001, DATA + 0x1003),
        (DATA + 0x1003, DATA + 0x1001), (DATA + PAGE - 3, DATA + 2 * PAGE - 5),
        (DATA, DATA + 5 * PAGE), (DATA + 5 * PAGE, DATA + PAGE), (DATA + 0x108, DATA + 0x100),
        (DATA + 0x100, DATA + 0x108), (DATA + 3, DATA - 3 + PAGE),
    ]  # fmt: skip
    for source, target in places:
        for count in (0, 1, 7, 300, 1030):
            for flags in (0x202, 0x202 | DIRECTION, 0x2D7):
                for prefix in (b"", b"\xf3", b"\xf2"):
                    code = prefix + body
                    gpr = registers(rcx=count, rsi=source, rdi=target, rax=0)
                    case = Case(
                        guest.place(24), code, len(code), gpr, flags,
                        patches=same if count != 300 else [],
                        text=f"{prefix.hex()} {name} {source:#x} {target:#x} {count} {flags:#x}",
                    )  # fmt: skip
                    compare(guest, oracle, case)


@pytest.mark.parametrize("where", ["own", "next", "other", "crossing"])
def test_self_modifying(where: str, guest: Guest, oracle: Oracle) -> None:
    """A store into the trace that runs, the next instruction, another page: seen at once."""
    for gap in (0, 1, 13, 40, 60, 64, 200):
        crossing = {"crossing": 10, "other": 16}.get(where, 0)
        address = guest.place(0x2000 if where == "other" else 0x300, crossing=crossing)
        if where == "other":
            gap += 0x1000
        # mov byte [rip + x], 7 rewrites the immediate of: mov eax, 1
        code = b"\xc6\x05" + (gap + 1).to_bytes(4, "little") + b"\x07"
        if where == "own":
            # A loop whose first instruction's immediate grows: inc byte [mov's immediate]
            code = b"\xb9\x05\0\0\0"  # mov ecx, 5
            top = len(code)
            code += b"\xb8\x01\0\0\0\x01\xc3" + b"\x90" * gap  # mov eax, 1; add ebx, eax
            here = len(code) + 6
            code += b"\xfe\x05" + (top + 1 - here).to_bytes(4, "little", signed=True)
            code += b"\xff\xc9"  # dec ecx
            code += b"\x0f\x85" + (top - len(code) - 6).to_bytes(4, "little", signed=True)
        elif where == "other":
            jump = b"\xe9" + (gap - 5).to_bytes(4, "little")
            code += jump + b"\x90" * (gap - 5) + b"\xb8\x01\0\0\0"
        else:
            code += b"\x90" * gap + b"\xb8\x01\0\0\0"
        case = Case(address, code, len(code), registers(rbx=0), text=f"{where} {gap}")
        for _ in range(2):
            _, got = compare(guest, oracle, case, rewrite=True)
        assert got.gpr[0] == 7 or where == "own"


def test_repeated_rewriting(guest: Guest, oracle: Oracle) -> None:
    """One place holds one program after the other."""
    address = guest.place(64)
    for n in range(100):
        code = b"\x05" + n.to_bytes(4, "little") + b"\x48\x01\xc3" * (n % 9)
        case = Case(address, code, len(code), registers(), text=str(n))
        compare(guest, oracle, case, rewrite=True)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_across_pages(size: int, guest: Guest, oracle: Oracle) -> None:
    """Loads, stores and read-modify-writes over the boundary of two pages, one perhaps absent."""
    forms = {
        1: ["8a01", "8801", "fe01"], 2: ["668b01", "668901", "66ff01"],
        4: ["8b01", "8901", "ff01", "f00fc101"], 8: ["488b01", "488901", "48ff01", "f0480fc101"],
        16: ["f30f6f01", "f30f7f01"], 32: ["c5fe6f01", "c5fe7f01"],
    }[size]  # fmt: skip
    for edge in (PAGE, 2 * PAGE, 4 * PAGE, 5 * PAGE, 6 * PAGE, 8 * PAGE, 0):
        for before in range(size + 1):
            for base in (DATA, ALIAS):
                for form in forms:
                    code = bytes.fromhex(form)
                    gpr = registers(rcx=base + edge - before)
                    case = Case(guest.place(24), code, len(code), gpr, text=f"{form} {gpr[1]:#x}")
                    compare(guest, oracle, case)


def test_stack_across_pages(guest: Guest, oracle: Oracle) -> None:
    """Pushes, calls and returns at the edges of pages."""
    bodies = ["50", "6650", "ff33", "68ffffff7f", "e800000000", "58", "8f03", "c9", "55c9"]
    for edge in (0, PAGE, 4 * PAGE, 5 * PAGE, 6 * PAGE):
        for offset in (-12, -8, -7, -4, -2, -1, 0, 1, 3, 4, 7, 8, 12):
            for body in bodies:
                code = bytes.fromhex(body)
                top = DATA + edge + offset
                gpr = registers(rsp=top, rbp=top, rbx=DATA + PAGE + 64)
                case = Case(guest.place(32), code, len(code), gpr, text=f"{body} rsp={top:#x}")
                compare(guest, oracle, case)


def test_empty_compare(guest: Guest, oracle: Oracle) -> None:
    """REPE CMPSB of nothing leaves the flags: compilers rely on it (cmp rcx, rcx; repe cmpsb)."""
    # cmp eax, eax; mov rbx, [rsi]; jmp to repe cmpsb; sete dl
    code = bytes.fromhex("39c0 488b1e eb00 f3a6 0f94c2".replace(" ", ""))
    gpr = registers(rcx=0, rsi=DATA, rdi=DATA + 64)
    case = Case(guest.place(40), code, len(code), gpr, text="empty compare")
    compare(guest, oracle, case)
