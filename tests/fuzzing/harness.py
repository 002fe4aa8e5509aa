"""What all hostile drivers share: seeds, values that hurt, and runs that end with a check.

A `Fuzzer` plays a driver that means harm, with one device. An *input* is one step of it: an access
of a register, a descriptor, a chain, something from the host's side, or time that passes. Steps
and values are drawn from a seeded source, so a number is all there is to keep of a find. A run is
`INPUTS` steps, then `check`: what holds whatever was done, and that the device works after a reset.

As a program: ``python -m fuzzing.harness NAME SEED INPUTS`` (from the tests' folder) tries at least
that many inputs on one target and prints how many they were; see `targets.TARGETS` for names.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

INPUTS = 400
"""Per run."""
EDGES = (0, 1, 7, 8, 15, 16, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x10000, 0xFFFFF)
FAR = (
    *(0xA0000, 0xC0000000, 0xFEC00000, 0xFEE00000, 0xFFFFFFFF, 1 << 32, 1 << 63),
    *((1 << 64) - 1, (1 << 64) - 16),
)
"""Addresses that are no RAM, or where arithmetic wraps round."""

T = TypeVar("T")


class Fuzzer:
    """One hostile driver with one device.

    Attributes
    ----------
    source : random.Random
        Where everything is drawn from.
    inputs : int
        Steps so far.
    steps : sequence of callables
        What is drawn from, each as often as it is in there.
    """

    steps: Sequence[Callable[[], object]]

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.inputs = 0

    def run(self) -> None:
        """Some inputs, then the check."""
        self.begin()
        for _ in range(INPUTS):
            self.source.choice(self.steps)()
            self.inputs += 1
            self.after()
        self.check()

    def begin(self) -> None:
        """Bring the device to where a run starts."""

    def after(self) -> None:
        """What is to be done after each input."""

    def check(self) -> None:
        """What holds whatever was done, and that the device works after a reset."""

    def close(self) -> None:
        """Give back what the target holds."""

    # ---- values

    def pick(self, *values: T) -> T:
        """One of them."""
        return self.source.choice(values)

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self.source.random() < probability

    def value(self, bits: int = 32) -> int:
        """A number that may hurt."""
        kind = self.source.random()
        if kind < 0.4:
            found = self.source.choice(EDGES)
        elif kind < 0.7:
            found = 1 << self.source.randrange(bits)
        elif kind < 0.8:
            found = self.source.choice(FAR)
        else:
            found = self.source.getrandbits(bits)
        return found & (1 << bits) - 1


def fuzz(make: Callable[[int], Fuzzer], seed: int, runs: int) -> int:
    """Run that often; return how many inputs there were."""
    fuzzer = make(seed)
    try:
        for number in range(runs):
            try:
                fuzzer.run()
            except Exception as error:
                error.add_note(f"seed {seed}, run {number}, input {fuzzer.inputs}")
                raise
        return fuzzer.inputs
    finally:
        fuzzer.close()


if __name__ == "__main__":
    from fuzzing.targets import TARGETS

    name, seed, inputs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(name, fuzz(TARGETS[name], seed, -(-inputs // INPUTS)), "inputs from seed", seed)
