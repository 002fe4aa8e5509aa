"""All targets by name: a function from a seed to a hostile driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from devices.e1000.fuzz import CardFuzzer
from fuzzing.chips import CHIPS, ChipFuzzer
from fuzzing.harness import Fuzzer
from fuzzing.ninep import NinepFuzzer
from fuzzing.virtio import TYPES, FileBlkFuzzer
from ringfence.devices.virtio.pci import DEFAULT_PACING
from ringfence.pacing import Pacing

SWITCHES = {
    "": DEFAULT_PACING,
    "-paced": Pacing(True, 8, 50, 100),
    "-kicked": Pacing(event_idx=False, gather=0),
}
"""EVENT_IDX and gathering; coalesced interrupts and polling; nothing of the kind."""
TARGETS: Mapping[str, Callable[[int], Fuzzer]] = {
    **{
        f"{name}-{layout}{switches}": partial(kind, packed=layout == "packed", pacing=pacing)
        for name, kind in (*TYPES.items(), ("ninep", NinepFuzzer))
        for layout in ("split", "packed")
        for switches, pacing in SWITCHES.items()
    },
    **{
        f"blkfile-{layout}{switches}": partial(
            FileBlkFuzzer, packed=layout == "packed", pacing=pacing
        )
        for layout in ("split", "packed")
        for switches, pacing in SWITCHES.items()
    },
    "e1000": CardFuzzer,
    "e1000-native": lambda seed: CardFuzzer(seed | 1),
    **{name: partial(ChipFuzzer, chip=chip) for name, chip in CHIPS.items()},
}
