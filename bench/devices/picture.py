"""The comparison as a picture: bars of our figures divided by QEMU's, and the switches' effect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.devices.guests import Kind
from bench.devices.measures import Measure
from bench.devices.results import Results

COLOURS = {"qemu": "#b8b8b8", "ringfence": "#2f6f9f", "hypercall": "#8fb7d3"}


def draw(results: Results, measures: Sequence[Measure], kinds: Sequence[Kind], path: Path) -> None:
    """Write an SVG: per measure, each kind of guest against QEMU's virtio device."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ringfence", "font.size": 9}
    from matplotlib import pyplot

    columns = 2
    rows = -(-len(measures) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(10, 0.5 + 0.32 * rows * (len(kinds) + 1.5)), squeeze=False
    )
    for axis in axes.flat[len(measures) :]:
        axis.set_visible(False)
    for measure, axis in zip(measures, axes.flat, strict=False):
        shown = [
            (kind, value)
            for kind in reversed(kinds)
            if (value := results.median(measure, kind)) is not None
        ]
        labels = [kind.name for kind, _ in shown]
        values = [value for _, value in shown]
        colours = [COLOURS[kind.side] for kind, _ in shown]
        bars = axis.barh(labels, values, color=colours)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
        axis.margins(x=0.18)
        axis.set_title(f"{measure.title} [{measure.unit}]", fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
