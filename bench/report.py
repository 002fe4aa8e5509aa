"""Results for people (a table, Markdown) and for programs (JSON)."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.runner import Row, Settings
from bench.workloads import Kind

NONE = "-"
"""What stands in an empty cell."""
HEADER = (
    "workload",
    "size",
    "native",
    "QEMU",
    "Ringfence",
    "÷ QEMU",
    "target",
    "÷ native",
    "target",
)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    virtual = "hypervisor" in info
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": model[1].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": virtual,
        "kernel": platform.release(),
        "qemu": _qemu_version(),
    }


def describe(about: dict[str, Any]) -> str:
    """One line about the machine."""
    kind = "cores of a virtual machine" if about["virtual"] else "cores"
    qemu = f", QEMU {about['qemu']}" if about["qemu"] else ""
    return f"{about['date']}, {about['cores']} {kind} ({about['cpu']}){qemu}"


def as_json(rows: Sequence[Row], settings: Settings, about: dict[str, Any]) -> str:
    """Everything that was measured."""
    plain = [{**row.plain(), "ratios": ratios(row)} for row in rows]
    data = {"machine": about, "runs": settings.runs, "memory": settings.memory, "rows": plain}
    return json.dumps(data, indent=2)


def ratios(row: Row) -> dict[str, float]:
    """Ringfence against the faster QEMU and against native, as far as there are figures."""
    found: dict[str, float] = {}
    ours = row.median("ringfence")
    theirs, native = row.best_qemu(), row.median("native")
    if ours is not None and row.workload.kind not in (Kind.MEMORY, Kind.IDLE):
        if theirs and theirs[1]:
            found["qemu"] = ours / theirs[1]
        if native:
            found["native"] = ours / native
    return found


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, as texts."""
    workload, found = row.workload, ratios(row)
    best = row.best_qemu()
    theirs = f"{_number(best[1])} ({best[0].removeprefix('qemu-')})" if best else _lack(row, "qemu")
    return (
        workload.title,
        _size(row),
        _side(row, "native"),
        theirs,
        _side(row, "ringfence"),
        _ratio(found.get("qemu")),
        _target(
            row.median("ringfence") if workload.limit else found.get("qemu"),
            workload.limit or workload.versus_qemu,
        ),
        _ratio(found.get("native")),
        _target(found.get("native"), workload.versus_native),
    )


def table(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Aligned columns for a terminal."""
    text = [describe(about), "", grid([HEADER, *map(cells, rows)]), ""]
    return "\n".join([*text, *remarks(rows)]).rstrip()


def grid(lines: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns, all but the first to the right; the header comes first."""
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def grid_markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """The same as a table in Markdown."""
    rule = "|---" + "|---:" * (len(lines[0]) - 1) + "|"
    header, *shown = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, rule, *shown])


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table for docs/performance.md."""
    text = [f"Measured: {describe(about)}.", "", grid_markdown([HEADER, *map(cells, rows)])]
    notes = [f"- {note}" for note in remarks(rows)]
    return "\n".join([*text, *(["", *notes] if notes else [])])


def put_into(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    document = path.read_text()
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{path} lacks {first} and {last}: expected both, in this order")
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


def picture_file(text: str) -> Path:
    """Where to draw, as an option's value; refused at once where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed")
    return Path(text)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What went wrong or was left out."""
    found = []
    for row in rows:
        found += [f"{row.workload.name}: {note}" for note in row.notes]
        found += [f"{row.workload.name}: {side}: {why}" for side, why in row.failures.items()]
    return found


def _size(row: Row) -> str:
    workload = row.workload
    if workload.kind is not Kind.GUEST or workload.figure is not None:
        return ""
    return f"{row.size:,} MB" if workload.data else f"{row.size:,}"


def _side(row: Row, side: str) -> str:
    value = row.median(side)
    return _lack(row, side) if value is None else f"{_number(value)} {row.workload.unit}"


def _lack(row: Row, side: str) -> str:
    failed = any(name.startswith(side) for name in row.failures)
    return "failed" if failed else NONE


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _target(value: float | None, limit: float | None) -> str:
    """The limit, with a mark whether it is met."""
    if limit is None:
        return NONE
    mark = "" if value is None else " ✓" if value <= limit else " ✗"
    return f"≤ {limit:g}{mark}"


def _qemu_version() -> str:
    try:
        done = subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    found = re.search(r"version (\S+)", done.stdout)
    return found[1] if found else ""
