"""What an enlightened guest does: hypercalls by either instruction, and registers of services."""

from __future__ import annotations

import pytest

from conformance.support import RAM, Case, check, fault
from ringfence.cpu import state
from ringfence.paravirt.clock import MSR_SYSTEM_TIME, MSR_WALL_CLOCK
from ringfence.paravirt.hypercalls import Error, Number

M64 = (1 << 64) - 1
ENOSYS, EPERM, EFAULT = (-error & M64 for error in (Error.ENOSYS, Error.EPERM, Error.EFAULT))
CALL = "mov eax, WEIGHTS\nmov ebx, 1\nmov ecx, 2\nmov edx, 3\nmov rsi, 4\nmov rdi, 5\n"
INSTRUCTIONS = ("vmcall", "vmmcall")


def write(index: int, value: int) -> str:
    """WRMSR of a 64-bit value; an exception goes to the log."""
    return (
        f"mov ecx, {index}\nmov eax, {value & 0xFFFFFFFF}\nmov edx, {value >> 32 & 0xFFFFFFFF}\n"
        "try\nwrmsr\ncaught\n"
    )


CASES = {
    "registers are kept": Case(
        CALL + "stc\nvmcall\nsetc bpl\nmovzx ebp, bpl\nreport rax\nreport rbx\nreport rcx\n"
        "report rdx\nreport rsi\nreport rdi\nreport rbp\n", [4321, 1, 2, 3, 4, 5, 1],
        capability="hypercalls",
    ),
    "a kick ends a HLT without interrupts": Case(
        f"mov eax, {int(Number.KICK_CPU)}\nxor ebx, ebx\nxor ecx, ecx\nvmmcall\nreport rax\ncli\n"
        "hlt\nmark 7\n", [0, 7], exits={"halt": 1}, capability="hypercalls",
    ),
    "an interrupt to itself": Case(
        "gate 0x55, 5f\njmp 6f\n5: mark 0x55\nmov dword ptr [rdi + 0xb0], 0\niretq\n6:\n"
        "mov edi, 0xfee00000\nmov dword ptr [rdi + 0xf0], 0x1ff\nsti\n"
        f"mov eax, {int(Number.SEND_IPI)}\nmov ebx, 1\nxor ecx, ecx\nxor edx, edx\nmov esi, 0x55\n"
        "vmmcall\nnop\nreport rax\ncli\n", [0x55, 1], capability="hypercalls",
    ),
    "a bad address": Case(
        f"mov eax, {int(Number.CLOCK_PAIRING)}\nmov rbx, {RAM - 32}\nxor ecx, ecx\nvmcall\n"
        "report rax\n", [EFAULT], capability="hypercalls",
    ),
    "clock pages outside RAM": Case(
        "".join(
            write(index, address)
            for index in (MSR_SYSTEM_TIME, MSR_WALL_CLOCK)
            for address in (RAM - 3 | 1, 0xFEE00001, M64)
        ),
        fault(state.GP) * 6,
    ),
    "a service that isn't offered": Case(
        write(0x4B564D02, 0) + "mov ecx, 0x4b564d0f\ntry\nrdmsr\ncaught\n", fault(state.GP) * 2,
    ),
    "the TSC is set, and its adjustment follows": Case(
        "mov ecx, 0x10\nmov edx, 0x100000\nxor eax, eax\nwrmsr\nrdtsc\nreport rdx\n"
        "mov ecx, 0x3b\nrdmsr\nsub edx, 0x80000\nwrmsr\nrdtsc\nand edx, 0xfffffff0\nreport rdx\n",
        [0x100000, 0x80000],
    ),
    **{
        f"{name} in user mode": Case(
            CALL + f"user\n{name}\nkernel\nreport rax\n", [EPERM], capability="hypercalls",
        )
        for name in INSTRUCTIONS
    },
    **{
        f"{name} with unknown numbers": Case(
            f"mov rax, {number}\n{name}\nreport rax\n", [ENOSYS], capability="hypercalls",
        )
        for name in INSTRUCTIONS
        for number in (0, M64)
    },
    **{
        f"{name} with arguments": Case(
            CALL + f"{name}\nreport rax\n", [4321], capability="hypercalls"
        )
        for name in INSTRUCTIONS
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_paravirtual(engine: str, name: str) -> None:
    check(engine, name, CASES[name])
