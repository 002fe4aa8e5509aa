"""Packets by hypercall: what sending costs where there is neither a device nor a driver.

The guest is a few instructions without an operating system. One hypercall hands over a number of
datagrams of 64 bytes, ready-made frames one behind the other; the owner's function cuts them apart
and gives them to the same user-mode network that the cards use. What the network had no room for is
not counted.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from bench.devices.guests import Kind
from bench.devices.measures import SMALL
from bench.devices.results import Sample
from ringfence.images.builtin import LOAD_ADDRESS, PM1A_CONTROL, SLP_TYP5, assemble, elf_kernel
from ringfence.machine import Machine
from ringfence.network.checksum import checksum
from ringfence.network.user import GATEWAY, GUEST, UserNetwork
from ringfence.paravirt.hypercalls import Call

BATCHES = (1, 16, 256)
"""Packets per hypercall."""
KINDS = tuple(Kind("hypercall", f"of {batch}") for batch in BATCHES)
MEASURE = "udp-up"
"""What the figures stand beside."""
PACKETS = 1 << 15
NUMBER = 0x1000
FRAMES, RESULTS = 0x800000, 0x700000
MAC, HOST = bytes.fromhex("020000000001"), bytes.fromhex("52550a000202")


class Sink:
    """A card that takes what comes."""

    def receive(self, frames: Sequence[bytes]) -> int:
        """See `NetworkCard.receive`."""
        return len(frames)

    def more(self) -> None:
        """See `NetworkCard.more`: it doesn't ask for room."""


def datagram(port: int) -> bytes:
    """A frame with `SMALL` bytes for a UDP port of the host's; no UDP checksum."""
    udp = struct.pack(">HHHH", 1000, port, 8 + SMALL, 0) + bytes(SMALL)
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(GATEWAY)
    ip = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + addresses)
    struct.pack_into(">H", ip, 10, checksum(ip))
    return HOST + MAC + b"\x08\x00" + ip + udp


def _program(length: int) -> str:
    """The whole guest: per batch size, the ticks that it took go to `RESULTS`."""
    lines = [".intel_syntax noprefix", ".text", f"mov r15d, {RESULTS}"]
    for batch in BATCHES:
        lines += [
            f"mov r12d, {PACKETS // batch}",
            "rdtsc\nshl rdx, 32\nor rax, rdx\nmov r11, rax",
            f"batch{batch}:",
            f"mov eax, {NUMBER}\nmov ebx, {FRAMES}\nmov ecx, {length}\nmov edx, {batch}\nvmmcall",
            f"dec r12d\njnz batch{batch}",
            "rdtsc\nshl rdx, 32\nor rax, rdx\nsub rax, r11\nmov [r15], rax\nadd r15, 8",
        ]
    lines.append(f"mov dx, {PM1A_CONTROL}\nmov ax, {SLP_TYP5 << 10 | 1 << 13}\nout dx, ax")
    lines.append("stop: hlt\njmp stop\n")
    return "\n".join(lines)


def measure() -> dict[Kind, Sample]:
    """Run the guest once; packets per second by batch size."""
    taken: dict[int, int] = dict.fromkeys(BATCHES, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 0))
        frame = datagram(ear.getsockname()[1])
        network = UserNetwork(loopback=True)
        network.attach(Sink())
        kernel = elf_kernel(assemble(_program(len(frame))), LOAD_ADDRESS)
        with Machine(kernel=kernel, memory="16M", engine="translate") as machine:

            @machine.hypercall(NUMBER)
            def send(call: Call) -> int:
                address, length, count = call.arguments[:3]
                data = call.read(address, length * count)
                before = network.stats()["sent"]
                for at in range(0, len(data), length):
                    network.transmit(data[at : at + length])
                network.carry()
                taken[count] += network.stats()["sent"] - before
                return 0

            machine.write_physical(FRAMES, frame * max(BATCHES))
            machine.start()
            machine.wait()
            hz = machine._parts.time.tsc.hz
            ticks = struct.unpack(
                f"<{len(BATCHES)}Q", machine.read_physical(RESULTS, 8 * len(BATCHES))
            )
        network.close()
    return {
        kind: Sample(taken[batch] / (each / hz), 0, PACKETS // batch, PACKETS)
        for kind, batch, each in zip(KINDS, BATCHES, ticks, strict=True)
    }
