"""All figures of a comparison: medians, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.devices.guests import Kind
from bench.devices.measures import Measure
from bench.report import NONE, grid, grid_markdown


@dataclass
class Sample:
    """One run of a measure: its figure, host CPU seconds per second, exits and frames meanwhile."""

    value: float
    cpu: float
    exits: int = 0
    packets: int = 0


@dataclass
class Results:
    """Samples by measure and kind, and what failed."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, measure: str, kind: Kind, sample: Sample) -> None:
        """Take down a sample."""
        self.samples.setdefault((measure, kind.name), []).append(sample)

    def median(self, measure: Measure, kind: Kind) -> float | None:
        """The median figure; None where there is none."""
        found = self.samples.get((measure.name, kind.name))
        return statistics.median(each.value for each in found) if found else None

    def ratio(self, measure: Measure, card: str) -> float | None:
        """How many times as good as QEMU's ours is, with the same card."""
        ours = self.median(measure, Kind("ringfence", card))
        theirs = self.median(measure, Kind("qemu", card))
        if not ours or not theirs:
            return None
        return theirs / ours if measure.lower else ours / theirs

    def thrift(self, measure: Measure, card: str) -> float | None:
        """How many times as much we do with a host CPU second as QEMU does."""
        rates = []
        for side in ("ringfence", "qemu"):
            found = self.samples.get((measure.name, Kind(side, card).name))
            if not found or measure.lower or not all(each.cpu for each in found):
                return None
            rates.append(statistics.median(each.value / each.cpu for each in found))
        return rates[0] / rates[1]

    def exits_per_packet(self, measure: Measure, kind: Kind) -> float | None:
        """Exits of all sorts for each frame either way; None where nobody counts them."""
        found = [each for each in self.samples.get((measure.name, kind.name), ()) if each.packets]
        return statistics.median(each.exits / each.packets for each in found) if found else None

    def plain(self) -> list[dict[str, Any]]:
        """As data for JSON."""
        return [
            {"measure": measure, "guest": kind, "samples": [vars(each) for each in samples]}
            for (measure, kind), samples in self.samples.items()
        ]


def versus(results: Results, measures: Sequence[Measure], card: str) -> list[tuple[str, ...]]:
    """A table of ours beside QEMU's, for one card (a disk's measures are made with either)."""
    ours, theirs = Kind("ringfence", card), Kind("qemu", card)
    lines = [("", "", "QEMU", "Ringfence", "÷ QEMU", "target", "per CPU", "exits per packet")]
    for measure in measures:
        ratio = results.ratio(measure, card)
        target = measure.target if card == "virtio" or measure.disk else 1.0
        lines.append(
            (
                measure.title,
                measure.unit,
                _number(results.median(measure, theirs)),
                _number(results.median(measure, ours)),
                _share(ratio),
                _target(ratio, target),
                _share(results.thrift(measure, card)),
                _share(results.exits_per_packet(measure, ours)),
            )
        )
    return lines


def switched(
    results: Results, measures: Sequence[Measure], kinds: Sequence[Kind]
) -> list[tuple[str, ...]]:
    """A table of our own kinds beside each other."""
    lines = [("", "", *(kind.switches or kind.card for kind in kinds))]
    for measure in measures:
        cells = []
        for kind in kinds:
            cell = _number(results.median(measure, kind))
            exits = results.exits_per_packet(measure, kind)
            cells.append(cell if exits is None else f"{cell} ({exits:.2f})")
        lines.append((measure.title, measure.unit, *cells))
    return lines


def packets(results: Results, measure: Measure, kinds: Sequence[Kind]) -> list[tuple[str, ...]]:
    """A table of the ways to send a small packet."""
    lines = [("", measure.unit, "exits per packet")]
    for kind in kinds:
        value = results.median(measure, kind)
        if value is not None:
            lines.append(
                (kind.name, _number(value), _share(results.exits_per_packet(measure, kind)))
            )
    return lines


def render(lines: Sequence[tuple[str, ...]], *, markdown: bool) -> str:
    """A table as text."""
    return grid_markdown(lines) if markdown else grid(lines)


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _target(ratio: float | None, target: float | None) -> str:
    if target is None:
        return NONE
    mark = "" if ratio is None else " ✓" if ratio >= target else " ✗"
    return f"≥ {target:g}{mark}"
