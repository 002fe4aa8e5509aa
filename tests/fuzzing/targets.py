"""All targets by name: a function from a seed to a hostile driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from devices.e1000.fuzz import CardFuzzer
from fuzzing.chips import CHIPS, ChipFuzzer
from fuzzing.harness import Fuzzer
from fuzzing.virtio import TYPES

TARGETS: Mapping[str, Callable[[int], Fuzzer]] = {
    **{f"{name}-split": partial(kind, packed=False) for name, kind in TYPES.items()},
    **{f"{name}-packed": partial(kind, packed=True) for name, kind in TYPES.items()},
    "e1000": CardFuzzer,
    **{name: partial(ChipFuzzer, chip=chip) for name, chip in CHIPS.items()},
}
