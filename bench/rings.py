"""How fast virtio's rings are: chains per second, by layout.

``python -m bench.rings [--rounds N] [--json]``

A full ring of 256 descriptors is taken out, chain by chain, given back and published, again and
again. There is no guest: what it would write lies ready, and is copied into the ring between two
turns. Two kinds of work are done with a chain:

- **nothing**: it becomes a `Chain`, as a device written in Python sees it, and is given back.
- **read**: it asks for 4 KiB of a file in the host's page cache, and native code does all of it.

Rounds alternate between the cases, and the quickest of each counts.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO

from ringfence.devices.natives import UNKEPT
from ringfence.devices.virtio import transfer
from ringfence.devices.virtio.packed import AVAIL, USED
from ringfence.devices.virtio.ring import PackedRing, Ring, SplitRing
from ringfence.devices.virtio.rules import NEXT, WRITE
from ringfence.devices.virtio.transfer import BlockQueue
from ringfence.memory.ram import GuestMemory

SIZE = 256
AREA, RING = 0x100000, 0x4000
"""Bytes that each case has for itself, and of each of the ring's areas at their beginning."""
BUFFERS = 3 * RING
DATA = 4096
REPEATS = 40
"""Rings per round."""

Segment = tuple[int, int, int]
"""Offset from `BUFFERS`, length and flags of a descriptor."""
ONE: list[Segment] = [(0, DATA, WRITE)]
FOUR: list[Segment] = [
    (0, transfer.HEADER, NEXT),
    (0x1000, DATA // 2, NEXT | WRITE),
    (0x3000, DATA // 2, NEXT | WRITE),
    (0x100, 1, WRITE),
]
"""A request to read (struct virtio_blk_req)."""


class Guest:
    """A driver that fills its ring with the same chains each time; they take all of it.

    Parameters
    ----------
    memory : GuestMemory
        RAM.
    base : int
        Where it has `AREA` bytes.
    packed : bool
        The ring's layout.
    chain : list[Segment]
        The descriptors of a chain.
    """

    def __init__(self, memory: GuestMemory, base: int, packed: bool, chain: list[Segment]) -> None:
        self.chains = SIZE // len(chain)
        kind: type[Ring] = PackedRing if packed else SplitRing
        areas = (base, base + RING, base + 2 * RING)
        self.ring = kind(memory, SIZE, *areas, 0, UNKEPT, BlockQueue)
        self._memory, self._base, self._packed = memory, base, packed
        self._filled = 0
        memory.write(base + BUFFERS, struct.pack("<IIQ", transfer.T_IN, 0, 0))
        parts = [(base + BUFFERS + at, length, flags) for at, length, flags in chain]
        heads = range(self.chains)
        if packed:
            self._images = [
                b"".join(
                    struct.pack("<QIHH", address, length, head, flags | ours)
                    for head in heads
                    for address, length, flags in parts
                )
                for ours in (AVAIL, USED)
            ]
        else:
            rows = (
                struct.pack("<QIHH", *part, head * len(parts) + n + 1)
                for head in heads
                for n, part in enumerate(parts)
            )
            memory.write(base, b"".join(rows))
            slots = (slot % self.chains * len(parts) for slot in range(SIZE))
            memory.write(base + RING + 4, struct.pack(f"<{SIZE}H", *slots))

    def fill(self) -> None:
        """Make a ring full of chains available."""
        turn = self._filled
        self._filled += 1
        if self._packed:
            self._memory.write(self._base, self._images[turn % 2])
        else:
            index = struct.pack("<H", self._filled * self.chains & 0xFFFF)
            self._memory.write(self._base + RING + 2, index)


def pass_through(guest: Guest) -> int:
    """Have each chain as an object, and give it back; how many there were."""
    found = 0
    while (chain := guest.ring.pop()) is not None:
        guest.ring.push(chain, 0)
        found += 1
    guest.ring.flush()
    return found


def reader(file: IO[bytes]) -> Callable[[Guest], int]:
    """Have native code do what the chains ask for."""

    def work(guest: Guest) -> int:
        queue = guest.ring.queue
        queue.fd, queue.disk_size = file.fileno(), DATA
        queue.budget, queue.bytes_left, queue.found = SIZE + 1, transfer.TURN, 0
        if UNKEPT("serve")(guest.ring.at) != transfer.NOTHING:
            raise RuntimeError("the host's temporary files can't be read without waiting")
        guest.ring.settle()
        guest.ring.flush()
        return int(queue.found)

    return work


@dataclass
class Row:
    """A case: what is done, the layout, descriptors in a chain, and chains per second."""

    work: str
    layout: str
    descriptors: int
    rate: float = 0


def measure(rounds: int) -> list[Row]:
    """All cases, in turns; RuntimeError where a ring does not come through."""
    memory = GuestMemory(8 * AREA)
    with tempfile.TemporaryFile() as file:
        file.write(bytes(DATA))
        file.flush()
        cases: list[tuple[Row, Guest, Callable[[Guest], int]]] = []
        for name, chain, work in (
            ("nothing", ONE, pass_through),
            ("nothing", FOUR, pass_through),
            ("read", FOUR, reader(file)),
        ):
            for packed in (False, True):
                row = Row(name, "packed" if packed else "split", len(chain))
                cases.append((row, Guest(memory, len(cases) * AREA, packed, chain), work))
        for _ in range(rounds):
            for row, guest, work in cases:
                spent = 0.0
                for _ in range(REPEATS):
                    guest.fill()
                    start = time.perf_counter()
                    found = work(guest)
                    spent += time.perf_counter() - start
                    if found != guest.chains:
                        raise RuntimeError(f"{row.layout}: {found} of {guest.chains} chains came")
                row.rate = max(row.rate, REPEATS * guest.chains / spent)
    memory.close()
    return [row for row, _, _ in cases]


def main() -> int:
    """Measure and print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.rings", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="the quickest one counts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = measure(options.rounds)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
        return 0
    print("| what is done | ring | descriptors per chain | chains/s | descriptors/s |")
    print("|---|---|---:|---:|---:|")
    for row in rows:
        rates = f"{row.rate:,.0f} | {row.rate * row.descriptors:,.0f}"
        print(f"| {row.work} | {row.layout} | {row.descriptors} | {rates} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
