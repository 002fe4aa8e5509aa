"""What a BIOS leaves in low memory, for kernels that none has started but that look for it.

A kernel that is loaded by its boot protocol needs no BIOS. Some go there all the same: Xen learns
from the *data area* where conventional memory ends, puts the code below that by which its other
CPUs start, and then goes back to real mode to ask some things of *interrupt* 15h. So there is a
data area, and each of the real-mode vectors leads to a routine that returns: those of services say,
as a BIOS does of what it doesn't have, that the function is not supported, and the rest do nothing.
Real services are firmware's (``--bios``).

Sources: IBM PC AT Technical Reference, "ROM BIOS data areas" and the interrupts' descriptions;
F000:FF53 has been the routine that only returns since then.
"""

from __future__ import annotations

import struct

from ringfence.boot.layout import EBDA_BASE, EBDA_END
from ringfence.memory.ram import GuestMemory

COM1 = 0x400
"""Four words: the ports of the serial lines; zero for what isn't there."""
EBDA_SEGMENT = 0x40E
EQUIPMENT = 0x410
"""Word; bit 1: there is an FPU, bits 9 to 11: the number of serial lines."""
MEMORY_SIZE = 0x413
"""Word: KiB of conventional memory."""
_FPU, _SERIAL_LINE = 1 << 1, 1 << 9

ROM_SEGMENT = 0xF000
RETURN = 0xFF53
"""Offset of the routines. The first is for exceptions, and hardware's interrupts."""
_RETURN = bytes.fromhex("cf")  # iret
_UNSUPPORTED = bytes.fromhex(
    "55"  # push bp
    "89e5"  # mov bp, sp
    "804e0641"  # or byte [bp+6], 0x41: CF is an error, ZF that no key was pressed
    "b486"  # mov ah, 0x86: function not supported
    "5d"  # pop bp
    "cf"  # iret
)
VECTORS = 256
EQUIPMENT_SERVICE, MEMORY_SERVICE = 0x11, 0x12
SERVICES = range(0x10, 0x1D)


def store_bios_remains(memory: GuestMemory, serial_port: int) -> None:
    """Put data area, vectors and routines into memory, for a machine with one serial line."""
    equipment, size = _FPU | _SERIAL_LINE, EBDA_BASE >> 10
    for address, value in (
        (COM1, serial_port),
        (EBDA_SEGMENT, EBDA_BASE >> 4),
        (EQUIPMENT, equipment),
        (MEMORY_SIZE, size),
        (EBDA_BASE, EBDA_END - EBDA_BASE >> 10),  # its own first word is its size in KiB
    ):
        memory.write(address, struct.pack("<H", value))
    routines, offsets = bytearray(), []
    for routine in (_RETURN, _UNSUPPORTED, _answer(equipment), _answer(size)):
        offsets.append(RETURN + len(routines))
        routines += routine
    memory.write((ROM_SEGMENT << 4) + RETURN, bytes(routines))
    nothing, unsupported, *answers = offsets
    targets = [unsupported if vector in SERVICES else nothing for vector in range(VECTORS)]
    targets[EQUIPMENT_SERVICE], targets[MEMORY_SERVICE] = answers
    memory.write(0, b"".join(struct.pack("<HH", target, ROM_SEGMENT) for target in targets))


def _answer(value: int) -> bytes:
    """A routine that returns a number in AX."""
    return struct.pack("<BHB", 0xB8, value, 0xCF)  # mov ax, value; iret
