"""One program that goes through all modes: gates, rings, tasks, virtual-8086 mode, paging."""

from __future__ import annotations

import re
from pathlib import Path

from ringfence.assembly import TestDevices
from ringfence.engine import StopReason
from ringfence.images.builtin import assemble
from ringfence.machine import Machine

PROGRAMS = Path(__file__).with_name("programs")
BASE = 0x100000
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)
PASSED = 31
"""What the program writes to the exit port at its end."""


def stub(vector: int) -> str:
    """Entry of an exception: 16 bytes."""
    code = ".byte 0x90,0x90" if vector in WITH_ERROR_CODE else ".byte 0x6a,0"
    return f".balign 16\n{code}\n.byte 0x68\n.long {vector}\n.byte 0xe9\n.long common-.-4\n"


def program() -> bytes:
    """The image, with Multiboot's header for flat binaries."""
    lines = (line.split("#")[0] for line in (PROGRAMS / "modes.s").read_text().splitlines())
    source = "\n".join(lines).replace("STUBS_", "".join(stub(n) for n in range(256)))
    return assemble(re.sub(r"@(\w+)", rf"(\1-start+{BASE:#x})", source) + "\n")


def test_every_mode() -> None:
    """The log is the one of QEMU's emulation but where that is known not to follow the manual.

    TCG checks no segment limits and types on data accesses (lines 32-50 of ``modes.log``), sets
    no RF in frames (masked here), and changes flags in a DIV that faults (line 57).
    """
    said = bytearray()
    test = TestDevices(exit_port=0xF4, console=said.extend)
    with Machine(
        kernel=program(), boot="multiboot", memory="64M", engine="translate", test=test
    ) as machine:
        machine.start()
        assert machine.wait(60) is StopReason.GUEST_EXIT, machine.crash_report
        assert machine.exit_status == PASSED << 1 | 1
    wanted = (PROGRAMS / "modes.log").read_text().split()
    found = said.decode().split()
    for number, (want, got) in enumerate(zip(wanted, found, strict=False), 1):
        assert got == want, f"line {number} of modes.log"
    assert len(found) == len(wanted)
