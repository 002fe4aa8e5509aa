"""Guest code and the registers of a device: answered inside, counted as exits, gone when moved."""

from __future__ import annotations

import struct
from typing import Any

from ringfence.engine.exits import MmioRead, MmioWrite
from ringfence.images.builtin import LOAD_ADDRESS, PM1A_CONTROL, SLP_TYP5, assemble, elf_kernel
from ringfence.machine import Machine

RESULTS = 0x700000
FIRST, SECOND = 0xC0000000, 0xD0000000
STATUS, ICR, ICS, IMS, IMC, ITR, RDT = 0x08, 0xC0, 0xC8, 0xD0, 0xD8, 0xC4, 0x2818
E1000 = 0x100E8086
PRELUDE = f"""
.intel_syntax noprefix
.macro configure register, value
lea eax, [ebx + \\register]
mov dx, 0xcf8
out dx, eax
mov dx, 0xcfc
mov eax, \\value
out dx, eax
.endm
.macro result value
mov eax, \\value
mov [r15], eax
add r15, 4
.endm
.text
mov r15d, {RESULTS}
mov ebx, 0x80000000
look:
mov eax, ebx
mov dx, 0xcf8
out dx, eax
mov dx, 0xcfc
in eax, dx
cmp eax, {E1000}
je found
add ebx, 0x800
jmp look
found:
configure 0x10, {FIRST}
configure 4, 7
mov esi, {FIRST}
mov edi, {SECOND}
"""
END = f"""
mov dx, {PM1A_CONTROL}
mov ax, {SLP_TYP5 << 10 | 1 << 13}
out dx, ax
stop: hlt
jmp stop
"""


def run(program: str, results: int, trace: list[Any] | None = None) -> tuple[list[int], dict]:
    """Run a guest with an e1000 at FIRST (RSI); its results, and its exits."""
    kernel = elf_kernel(assemble(PRELUDE + program + END), LOAD_ADDRESS)
    with Machine(
        kernel=kernel, memory="16M", engine="translate", network="user", nic="e1000"
    ) as machine:
        if trace is not None:
            machine.set_trace(lambda record: trace.append(record.event))
        machine.start()
        machine.wait()
        data = machine.read_physical(RESULTS, 4 * results)
        return list(struct.unpack(f"<{results}I", data)), machine.stats()["exits"]


DRIVING = f"""
mov ecx, 100
again:
mov eax, [rsi + {STATUS}]
mov dword ptr [rsi + {ITR}], ecx
dec ecx
jnz again
result [rsi + {STATUS}]
result [rsi + {ITR}]
mov dword ptr [rsi + {IMS}], 0x84
result [rsi + {IMS}]
mov dword ptr [rsi + {IMC}], 0x80
result [rsi + {IMS}]
mov dword ptr [rsi + {ICS}], 0x81
result [rsi + {ICR}]
result [rsi + {ICR}]
add dword ptr [rsi + {ITR}], 0x10005
result [rsi + {ITR}]
movzx eax, byte ptr [rsi + {STATUS + 1}]
result eax
mov word ptr [rsi + {ITR}], 9
result [rsi + {ITR}]
mov dword ptr [rsi + {RDT}], 0x12345
result [rsi + {RDT}]
"""
DRIVEN = [0x283, 1, 0x84, 4, 0x81, 0, 6, 2, 6, 0x2345]


def test_registers_are_answered_inside_and_counted() -> None:
    results, exits = run(DRIVING, len(DRIVEN))
    assert results == DRIVEN
    assert exits["mmio_read"]["count"] == 111
    assert exits["mmio_read"]["native"] == 108, "not IMS, and no part of a register"
    assert exits["mmio_write"]["count"] == 106
    assert exits["mmio_write"]["native"] == 104, "not ICS, and no part of a register"


def test_whoever_traces_sees_all_of_them() -> None:
    seen: list[Any] = []
    results, exits = run(DRIVING, len(DRIVEN), seen)
    assert results == DRIVEN
    assert sum(isinstance(event, MmioRead) for event in seen) == 111
    assert sum(isinstance(event, MmioWrite) for event in seen) == 106
    assert "native" not in exits["mmio_read"]


def test_a_window_that_moves() -> None:
    results, _ = run(
        f"""
        result [rsi + {STATUS}]
        configure 0x10, {SECOND}
        result [rsi + {STATUS}]
        result [rdi + {STATUS}]
        mov dword ptr [rsi + {ITR}], 7
        result [rdi + {ITR}]
        configure 4, 0
        result [rdi + {STATUS}]
        configure 4, 7
        result [rdi + {STATUS}]
        configure 0x10, 0x100000
        mov eax, [0x100000 + {STATUS}]
        mov dword ptr [0x100000 + {STATUS}], 0x55
        result [0x100000 + {STATUS}]
        """,
        7,
    )
    ones = 0xFFFFFFFF
    assert results == [0x283, ones, 0x283, 0, ones, 0x283, 0x55]
