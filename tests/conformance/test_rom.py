"""ROM below 4 GiB: read, executed, and left alone by whoever writes to it."""

from __future__ import annotations

import functools
import struct

from conformance.support import DATA, START, fault, run
from ringfence.engine import StopReason
from ringfence.images.builtin import assemble
from ringfence.memory.ram import PAGE

ROM_BASE = (4 << 30) - 2 * PAGE
WORD = 0x1122_3344_5566_7788


@functools.cache
def rom() -> bytes:
    """A function in the first page that runs into the second, and a word at the end."""
    code = assemble(
        ".intel_syntax noprefix\n.text\nmov eax, 5\njmp 1f\n"
        f".org {PAGE - 2}\n1: add eax, 1000000\nret"
    )
    return code.ljust(2 * PAGE - 8, b"\xcc") + struct.pack("<Q", WORD)


def test_read_executed_and_not_written(engine: str) -> None:
    got = run(
        engine,
        START
        + f"mov ebx, {ROM_BASE}\nmov ecx, 2\n"
        + f"1: mov rax, [rbx + {2 * PAGE - 8}]\nreport rax\n"
        + "call rbx\nreport rax\n"
        + f"mov qword ptr [rbx], 0\nmov byte ptr [rbx + {2 * PAGE - 8}], 0\n"  # nobody hears it
        + "loop 1b\n"
        + f"mov rsi, rbx\nmov edi, {DATA}\nmov ecx, 16\nrep movsb\n"
        + "mov rdi, rbx\nmov ecx, 16\nrep stosb\n"
        + "mov al, [rbx]\nmovzx eax, al\nreport rax",
        rom=rom(),
    )
    assert got.ending is StopReason.POWER_OFF
    assert got.log == [WORD, 1_000_005] * 2 + [rom()[0]]
    assert got.memory[DATA : DATA + 16] == rom()[:16]


def test_page_tables_in_rom_are_none(engine: str) -> None:
    """A walk sets accessed bits, so paging structures have to be in RAM."""
    got = run(
        engine,
        START
        + f"mov eax, {ROM_BASE + 3}\nmov [0x2000 + 8], rax\nmov rax, cr3\nmov cr3, rax\n"
        + "try\nmov rax, [0x200000]\ncaught",
        rom=bytes(2 * PAGE),
    )
    assert got.log in (fault(14, 0, 0x200000), fault(14, 9, 0x200000))
