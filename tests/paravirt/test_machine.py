"""Hypercalls of a whole machine's guest, answered by its owner's functions."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from ringfence import Machine, StopReason, UsageError
from ringfence.images.builtin import LOAD_ADDRESS, PM1A_CONTROL, SLP_TYP5, assemble, elf_kernel
from ringfence.paravirt.hypercalls import Call

OFF = f"mov dx, {PM1A_CONTROL}\nmov ax, {SLP_TYP5 << 10 | 1 << 13}\nout dx, ax\n1: hlt\njmp 1b\n"
TEXT = b"what the guest says"
PROGRAM = f"""
    .intel_syntax noprefix
    .text
    mov eax, 0x1234
    lea rbx, [rip + text]
    mov ecx, {len(TEXT)}
    vmcall
    lea rdi, [rip + sum]
    mov [rdi], rax
    mov rbx, rdi
    mov eax, 0x1235
    vmmcall
    {OFF}
    sum: .quad 0
    text: .ascii "{TEXT.decode()}"
"""


def test_functions_of_the_owner(tmp_path: Path) -> None:
    kernel = elf_kernel(assemble(PROGRAM), LOAD_ADDRESS)
    with Machine(kernel=kernel, engine="translate", memory="16M", cache_dir=tmp_path) as machine:
        sums: list[int] = []

        @machine.hypercall(0x1234)
        def checksum(call: Call) -> int:
            assert call.vcpu == 0
            return zlib.crc32(call.read(*call.arguments[:2]))

        @machine.hypercall(0x1235)
        def report(call: Call) -> None:
            ((value,),) = call.handle(call.arguments[0], "<Q")
            sums.append(value)

        with pytest.raises(UsageError, match="already"):
            machine.hypercall(0x1234)(checksum)
        machine.start()
        assert machine.wait(60) is StopReason.POWER_OFF
        assert sums == [zlib.crc32(TEXT)]
        assert machine.stats()["hypercalls"] == {"0x1234": 1, "0x1235": 1}


@pytest.mark.parametrize("hz", [999_999, 1 << 41])
def test_a_counter_that_no_cpu_has(hz: int) -> None:
    with pytest.raises(UsageError, match="TSC"):
        Machine(image="builtin", engine="translate", memory="16M", tsc_hz=hz)


def test_numbers_that_are_not_the_owner_s() -> None:
    with Machine(image="builtin", engine="translate", memory="16M") as machine:
        for number in (5, 0xFFF, 0x10000):
            with pytest.raises(UsageError, match="hypercall"):
                machine.hypercall(number)(lambda call: None)
