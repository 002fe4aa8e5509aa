"""What a hypercall costs beside an emulated device that does the same work.

``python -m bench.hypercalls [--rounds N] [--json]``

The guest is a few instructions without an operating system. It has payloads of some sizes summed up
(CRC-32) in three ways, and counts the ticks of its TSC for each:

- **hypercall**: address and length in registers; the owner's function copies the payload.
- **DMA**: a device with registers: address, length, then the sum is read. Three accesses.
- **PIO**: the payload goes through a data register, 4 bytes at a time; nobody waits for the sum.

All three are Python functions of a machine under translation and call the same ``zlib.crc32``.
Rounds alternate between all cases, and the quickest round of each counts, as others use the host,
too.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zlib
from dataclasses import dataclass

from ringfence.images.builtin import LOAD_ADDRESS, PM1A_CONTROL, SLP_TYP5, assemble, elf_kernel
from ringfence.machine import Machine
from ringfence.paravirt.hypercalls import Call

SIZES = (4, 8, 16, 64, 256, 1024, 4096, 16384, 65536, 1 << 20)
METHODS = ("hypercall", "DMA", "PIO")
NUMBER = 0x1000
PORT = 0xE00
"""The device: address, length (write) and sum (read), data, 4 bytes each."""
PAYLOAD, RESULTS = 0x800000, 0x700000
REPEATS = 20
PIO_MAX = 4096
"""Larger payloads by PIO take long and show nothing more."""


class Device:
    """Sums up what it is shown, by address or byte by byte."""

    def __init__(self, machine: Machine) -> None:
        self._memory = machine._parts.memory
        self._address = self._length = self._sum = 0

    def read(self, offset: int, size: int) -> int:
        """The sum; reading it begins a new one."""
        found, self._sum = self._sum, 0
        if self._length:
            found = zlib.crc32(self._memory.read(self._address, self._length))
            self._length = 0
        return found

    def write(self, offset: int, size: int, value: int) -> None:
        """A register."""
        if offset == 0:
            self._address = value
        elif offset == 4:
            self._length = value
        else:
            self._sum = zlib.crc32(value.to_bytes(4, "little"), self._sum)


def _work(method: str, size: int) -> str:
    """Assembly that has the payload summed up once, the sum in EAX."""
    if method == "hypercall":
        return f"mov eax, {NUMBER}\nmov ebx, {PAYLOAD}\nmov ecx, {size}\nvmmcall\n"
    if method == "DMA":
        return (
            f"mov edx, {PORT}\nmov eax, {PAYLOAD}\nout dx, eax\n"
            f"mov edx, {PORT + 4}\nmov eax, {size}\nout dx, eax\nin eax, dx\n"
        )
    return (
        f"mov edx, {PORT + 8}\nmov esi, {PAYLOAD}\nmov ecx, {size // 4}\n"
        "7: mov eax, [rsi]\nout dx, eax\nadd rsi, 4\ndec ecx\njnz 7b\n"
    )


def cases() -> list[tuple[str, int]]:
    """All pairs of method and size that are measured."""
    return [(m, size) for size in SIZES for m in METHODS if m != "PIO" or size <= PIO_MAX]


def _program(rounds: int) -> str:
    """The whole guest: per round and case, ticks and sum go to `RESULTS`."""
    lines = [".intel_syntax noprefix", ".text", f"mov r15d, {RESULTS}", f"mov r14d, {rounds}"]
    lines.append("round:")
    for number, (method, size) in enumerate(cases()):
        lines += [
            f"mov r13d, {REPEATS if size <= 65536 else 3}",
            "mov r12d, r13d\nrdtsc\nshl rdx, 32\nor rax, rdx\nmov r11, rax",
            f"case{number}:",
            _work(method, size),
            f"mov r8d, eax\ndec r13d\njnz case{number}",
            "rdtsc\nshl rdx, 32\nor rax, rdx\nsub rax, r11\nxor edx, edx\ndiv r12",
            f"mov r9, rax\nmov edx, {PORT + 4}\nin eax, dx\nmov rax, r9",
            "mov [r15], rax\nmov [r15 + 8], r8\nadd r15, 16",
        ]
    lines.append("dec r14d\njnz round")
    lines.append(f"mov dx, {PM1A_CONTROL}\nmov ax, {SLP_TYP5 << 10 | 1 << 13}\nout dx, ax")
    lines.append("stop: hlt\njmp stop\n")
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """One size: microseconds by method."""

    size: int
    microseconds: dict[str, float]


def measure(rounds: int) -> list[Row]:
    """Run the guest; RuntimeError if a sum is wrong."""
    kernel = elf_kernel(assemble(_program(rounds)), LOAD_ADDRESS)
    payload = bytes(range(256)) * (max(SIZES) // 256)
    with Machine(kernel=kernel, memory="16M", engine="translate") as machine:

        @machine.hypercall(NUMBER)
        def checksum(call: Call) -> int:
            return zlib.crc32(call.read(*call.arguments[:2]))

        machine._parts.board.ports.register(PORT, 12, Device(machine))
        machine.write_physical(PAYLOAD, payload)
        machine.start()
        machine.wait()
        hz = machine._parts.time.tsc.hz
        found = struct.iter_unpack(
            "<QQ", machine.read_physical(RESULTS, 16 * rounds * len(cases()))
        )
    best: dict[tuple[str, int], int] = {}
    for (method, size), (ticks, value) in zip(cases() * rounds, found, strict=True):
        if method != "PIO" and value != zlib.crc32(payload[:size]):
            raise RuntimeError(f"{method} summed {size} bytes up to {value:#x}")
        best[method, size] = min(ticks, best.get((method, size), ticks))
    return [
        Row(size, {m: best[m, size] * 1e6 / hz for m in METHODS if (m, size) in best})
        for size in SIZES
    ]


def main() -> int:
    """Measure and print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.hypercalls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="the quickest one counts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = measure(options.rounds)
    if options.json:
        json.dump([{"bytes": row.size, **row.microseconds} for row in rows], sys.stdout, indent=1)
        return 0
    print("| payload | " + " | ".join(METHODS) + " |\n|---:|" + "---:|" * len(METHODS))
    for row in rows:
        each = (f"{row.microseconds[m]:.1f} µs" if m in row.microseconds else "-" for m in METHODS)
        print(f"| {row.size} B | " + " | ".join(each) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
