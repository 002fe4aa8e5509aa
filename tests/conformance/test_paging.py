"""Paging: accessed and dirty bits, protections, large pages, reserved bits, invalidation.

The window's page tables are the program's: `WINDOW_PT` is its page table, entry 0 its first page.
"""

from __future__ import annotations

import pytest

from conformance.support import (
    CODE,
    DATA,
    MAIN,
    PAGE,
    PD,
    PDPT,
    PS,
    PT,
    WINDOW,
    WINDOW_PT,
    A,
    Case,
    D,
    P,
    U,
    W,
    check,
    fault,
)
from ringfence.cpu import state

NX = 1 << 63
PF = state.PF
FRAME = 0x100000
"""Guest-physical page that the window's first page is mapped to."""


def entry(value: int, at: int = WINDOW_PT) -> str:
    """Set a paging-structure entry."""
    return f"mov rax, {value}\nmov [{at}], rax\n"


def flags(at: int = WINDOW_PT) -> str:
    """Report an entry's accessed and dirty bits."""
    return f"mov rax, [{at}]\nand eax, {A | D}\nreport rax\n"


FLUSH = "mov rax, cr3\nmov cr3, rax\n"
READ, WRITE = f"mov bl, [{WINDOW}]\n", f"mov byte ptr [{WINDOW}], 0x5a\n"
FETCH = f"mov rax, {WINDOW}\ncall rax\n"
NO_WP = "mov rax, cr0\nand eax, ~(1 << 16)\nmov cr0, rax\n"
SMEP = (  # the program's own pages must not be the user's
    f"and byte ptr [{PT + CODE // PAGE * 8}], ~4\nand byte ptr [{PT + MAIN // PAGE * 8}], ~4\n"
    "mov rax, cr4\nor eax, 1 << 20\nmov cr4, rax\nmov rax, cr3\nmov cr3, rax\n"
)

LOOPS = (
    "jmp 9f\n"
    "sum: add rbx, [rsi]\nadd rsi, 8\nsub r9d, 1\njnz sum\nret\n"
    "clear: mov [rsi], rbx\nlea rsi, [rsi + 8]\nsub r9d, 1\njnz clear\nret\n"
    "9:\n"
)
"""Routines that add up, or write, R9 words from RSI on; they begin with the loop."""
SUM = f"mov rsi, {WINDOW}\nmov r9d, 16\nxor ebx, ebx\ncall sum\n"
CLEAR = f"mov rsi, {WINDOW}\nmov r9d, 16\nxor ebx, ebx\ncall clear\n"

CASES: dict[str, Case] = {
    "a read sets A": Case(entry(FRAME | P | W) + READ + flags(), [A]),
    "a write sets A and D": Case(entry(FRAME | P | W) + WRITE + flags(), [A | D]),
    "a write after a read sets D": Case(
        entry(FRAME | P | W) + READ + flags() + WRITE + flags(), [A, A | D]
    ),
    "upper levels get A, never D": Case(
        entry(FRAME | P | W) + WRITE + flags(PD + 8) + flags(PDPT), [A, A]
    ),
    "D of a large page": Case(
        entry(0 | P | W | PS, PD + 16) + FLUSH + f"mov rbx, [0x400000 + {DATA}]\n" + flags(PD + 16)
        + f"mov byte ptr [0x400000 + {DATA}], 1\n" + flags(PD + 16),
        [A, A | D], memory={DATA: b"\1"},
    ),
    "a refused write sets no D": Case(
        entry(FRAME | P) + "try\n" + WRITE + "caught\n" + entry(FRAME | P | W) + WRITE + flags(),
        [*fault(PF, 3, WINDOW), A | D],
    ),
    "write to a read-only page, WP set": Case(
        entry(FRAME | P) + "try\n" + WRITE + "caught\n", fault(PF, 3, WINDOW)
    ),
    "write to a read-only page, WP clear": Case(
        NO_WP + entry(FRAME | P) + "try\n" + WRITE + "caught\n" + flags(), [A | D],
        memory={FRAME: b"\x5a"},
    ),
    "user write to a read-only page, WP clear": Case(
        NO_WP + entry(FRAME | P | U) + "user\n" + WRITE + "kernel\n", fault(PF, 7, WINDOW)
    ),
    "user read of a supervisor page": Case(
        entry(FRAME | P | W) + "user\n" + READ + "kernel\n", fault(PF, 5, WINDOW)
    ),
    "read-only in an upper level": Case(
        entry(FRAME | P | W | U) + entry(WINDOW_PT | P | U, PD + 8) + FLUSH + "try\n" + WRITE
        + "caught\n", fault(PF, 3, WINDOW),
    ),
    "fetch from a no-execute page": Case(
        entry(FRAME | P | W | NX) + "try\n" + FETCH + "caught\n", fault(PF, 0x11, WINDOW)
    ),
    "user fetch from a no-execute page": Case(
        entry(FRAME | P | W | U | NX) + "user\n" + FETCH + "kernel\n", fault(PF, 0x15, WINDOW)
    ),
    "no-execute in an upper level": Case(
        entry(FRAME | P | W) + entry(WINDOW_PT | P | W | NX, PD + 8) + FLUSH + "try\n" + FETCH
        + "caught\n", fault(PF, 0x11, WINDOW),
    ),
    "fetch from a page that is not there": Case(
        "try\n" + FETCH + "caught\n", fault(PF, 0x10, WINDOW)
    ),
    "no-execute is reserved without EFER.NXE": Case(
        "mov ecx, 0xc0000080\nrdmsr\nand eax, ~0x800\nwrmsr\n" + entry(FRAME | P | W | NX) + "try\n"
        + READ + "caught\n", fault(PF, 9, WINDOW),
    ),
    "reserved bit of a large page": Case(
        entry(1 << 13 | P | W | PS, PD + 24) + "try\nmov bl, [0x600000]\ncaught\n",
        fault(PF, 9, 0x600000),
    ),
    "reserved address bit": Case(
        entry(1 << 51 | P | W) + "try\n" + READ + "caught\n", fault(PF, 9, WINDOW)
    ),
    "reserved bit in a page-map level 4 entry": Case(
        entry(PDPT | P | W | PS, 0x1000 + 8) + "mov rbx, 1 << 39\ntry\nmov al, [rbx]\ncaught\n",
        fault(PF, 9, 1 << 39),
    ),
    "supervisor fetch of user code under SMEP": Case(
        entry(FRAME | P | W | U) + SMEP + "try\n" + FETCH + "caught\n",
        fault(PF, 0x11, WINDOW), needs=("SMEP",),
    ),
    "a page appears without INVLPG": Case(
        "try\n" + READ + "caught\n" + entry(FRAME | P | W)
        + f"mov byte ptr [{FRAME}], 0x77\nmovzx eax, byte ptr [{WINDOW}]\nreport rax\n",
        [*fault(PF, 0, WINDOW), 0x77],
    ),
    "INVLPG after a page moved": Case(
        f"mov byte ptr [{FRAME}], 1\nmov byte ptr [{FRAME + PAGE}], 2\n" + entry(FRAME | P | W)
        + READ + "movzx ebx, bl\nreport rbx\n" + entry(FRAME + PAGE | P | W)
        + f"invlpg [{WINDOW}]\n" + READ + "movzx ebx, bl\nreport rbx\n",
        [1, 2],
    ),
    "a load of CR3 after a page went away": Case(
        entry(FRAME | P | W) + READ + entry(0) + FLUSH + "try\n" + READ + "caught\n",
        fault(PF, 0, WINDOW),
    ),
    "an access across two pages, the second missing": Case(
        entry(FRAME | P | W) + f"try\nmov eax, [{WINDOW + PAGE - 2}]\ncaught\n",
        fault(PF, 0, WINDOW + PAGE),
    ),
    "a write across two pages, the second missing, writes nothing": Case(
        entry(FRAME | P | W) + f"mov eax, -1\ntry\nmov [{WINDOW + PAGE - 2}], eax\ncaught\n",
        fault(PF, 2, WINDOW + PAGE), memory={FRAME + PAGE - 2: bytes(2)},
    ),
    "a loop reads a page that moved": Case(
        LOOPS + f"mov byte ptr [{FRAME + 64}], 1\nmov byte ptr [{FRAME + PAGE + 64}], 2\n"
        + entry(FRAME | P | W) + SUM + "report rbx\n" + entry(FRAME + PAGE | P | W)
        + f"invlpg [{WINDOW}]\n" + SUM + "report rbx\n" + entry(FRAME | P | W) + FLUSH + SUM
        + "report rbx\n", [1, 2, 1],
    ),
    "a loop writes where it may not any more": Case(
        LOOPS + entry(FRAME | P | W) + CLEAR + entry(FRAME | P) + f"invlpg [{WINDOW}]\n" + SUM
        + "try\n" + CLEAR + "caught\nreport r9\n", [*fault(PF, 3, WINDOW), 16],
    ),
    "a loop runs into a page that is missing": Case(
        LOOPS + entry(FRAME | P | W) + f"mov rsi, {WINDOW + PAGE - 24}\nmov r9d, 16\ntry\n"
        "call clear\ncaught\nreport r9\n", [*fault(PF, 2, WINDOW + PAGE), 13],
    ),
    "a loop reads across two pages, the second missing": Case(
        LOOPS + entry(FRAME | P | W) + SUM + f"mov rsi, {WINDOW + PAGE - 28}\nmov r9d, 16\ntry\n"
        "call sum\ncaught\nreport r9\n", [*fault(PF, 0, WINDOW + PAGE), 13],
    ),
    "a loop reads as a user what it read as supervisor": Case(
        LOOPS + entry(FRAME | P | W) + SUM + "user\n" + SUM + "kernel\n", fault(PF, 5, WINDOW)
    ),
    "a loop reads what others change, byte by byte and by index": Case(
        LOOPS + entry(FRAME | P | W) + entry(FRAME + PAGE | P | W, WINDOW_PT + 8)
        + f"mov r9, {WINDOW}\nxor r10d, r10d\nxor r11d, r11d\n"
        f"7: mov byte ptr [r9 + r10 * 2 + {PAGE - 100}], 3\ninc r11d\n"
        f"add r11b, byte ptr [r9 + r10 * 2 + {PAGE - 100}]\n"
        f"inc r10d\ncmp r10d, 100\njne 7b\nreport r11\n"
        f"movzx eax, byte ptr [{FRAME + PAGE + 98}]\nreport rax\n", [400 & 0xFF, 3],
    ),
    "1 GiB page": Case(
        entry(0 | P | W | PS, PDPT + 8) + f"mov eax, 0x12345\nmov [{DATA}], eax\n"
        f"mov rbx, {1 << 30}\nmov ecx, [rbx + {DATA}]\nreport rcx\n",
        [0x12345], needs=("PDPE1GB",),
    ),
    "PCID without CPUID is #GP, with it bit 0 of CR4.PCIDE sticks": Case(
        "mov rax, cr4\nbts rax, 17\nmov cr4, rax\nmov rax, cr4\nbt rax, 17\nsetc al\n"
        "movzx eax, al\nreport rax\n", [1], needs=("PCID",),
    ),
    "reserved bits of CR4": Case(
        "mov rax, cr4\nbts rax, 31\ntry\nmov cr4, rax\ncaught\n", fault(state.GP)
    ),
    "clearing PAE in 64-bit mode": Case(
        "mov rax, cr4\nbtr rax, 5\ntry\nmov cr4, rax\ncaught\n", fault(state.GP)
    ),
    "paging without protection": Case(
        "mov rax, cr0\nbtr rax, 0\ntry\nmov cr0, rax\ncaught\n", fault(state.GP)
    ),
    "not write-through without cache disable": Case(
        "mov rax, cr0\nbts rax, 29\ntry\nmov cr0, rax\ncaught\n", fault(state.GP)
    ),
    "upper half of CR0": Case(
        "mov rax, cr0\nbts rax, 32\ntry\nmov cr0, rax\ncaught\n", fault(state.GP)
    ),
    "non-canonical FS base": Case(
        "mov ecx, 0xc0000100\nmov edx, 0x8000\nxor eax, eax\ntry\nwrmsr\ncaught\n", fault(state.GP)
    ),
    "non-canonical LSTAR": Case(
        "mov ecx, 0xc0000082\nmov edx, 0x8000\nxor eax, eax\ntry\nwrmsr\ncaught\n", fault(state.GP)
    ),
    "unknown MSR": Case("mov ecx, 0x12345\ntry\nrdmsr\ncaught\n", fault(state.GP)),
    "reserved bits of EFER": Case(
        "mov ecx, 0xc0000080\nrdmsr\nbts eax, 20\ntry\nwrmsr\ncaught\n", fault(state.GP)
    ),
    "reserved memory type": Case(
        "mov ecx, 0x277\nmov eax, 2\nxor edx, edx\ntry\nwrmsr\ncaught\n", fault(state.GP)
    ),
    "memory-type range registers": Case(
        "mov ecx, 0x201\nmov eax, 0xfffff800\nmov edx, 0x3f\nwrmsr\nxor eax, eax\nrdmsr\n"
        "report rax\nreport rdx\nmov ecx, 0xfe\nrdmsr\nreport rax\n",
        [0xFFFFF800, 0x3F, 0x508],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_paging(engine: str, name: str) -> None:
    check(engine, name, CASES[name])
