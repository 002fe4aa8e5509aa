"""What happened inside, for people and for programs: the statistics as tables and as JSON.

Shape: one nested dictionary comes in (`Machine.stats`), each known section is laid out by a
small function, and a section that is not known is listed as it is: an engine can add counters
without a change here.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfence.errors import HostError

if TYPE_CHECKING:
    from rich.table import Table


def write_json(stats: dict[str, Any], path: Path) -> None:
    """Store the statistics as JSON; HostError where the file can't be written."""
    try:
        path.write_text(json.dumps(stats, indent=2, default=str) + "\n")
    except OSError as error:
        raise HostError(f"statistics can't be written to {path}: {error.strerror}") from error


def stats_text(stats: dict[str, Any], width: int = 78) -> str:
    """The statistics as tables, plain text."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    for table in _tables(stats):
        console.print(table)
    return out.getvalue()


def _tables(stats: dict[str, Any]) -> list[Table]:
    tables = []
    for section, content in stats.items():
        if not isinstance(content, dict) or not content:
            continue
        if section == "exits":
            tables.append(_exits(content))
        elif section == "time":
            tables.append(_time(content))
        else:
            tables.append(_plain(section, content))
    return tables


def _new(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _exits(content: dict[str, Any]) -> Table:
    table = _new("exits", "reason", "count", "inside", "total ms", "mean us")
    rows = sorted(content.items(), key=lambda row: -int(row[1]["ns"]))
    for reason, row in rows:
        count, spent = int(row["count"]), int(row["ns"])
        inside = int(row.get("native", 0))  # handled by native code, in the guest's time
        mean = spent / (count - inside) / 1e3 if count > inside else 0.0
        table.add_row(reason, f"{count:,}", f"{inside:,}", f"{spent / 1e6:,.2f}", f"{mean:,.2f}")
    return table


def _time(content: dict[str, Any]) -> Table:
    table = _new("time", "spent in", "ms", "share")
    total = sum(float(value) for value in content.values()) or 1.0
    for name, value in content.items():
        table.add_row(name, f"{float(value) / 1e6:,.1f}", f"{float(value) / total:.1%}")
    return table


def _plain(section: str, content: dict[str, Any]) -> Table:
    table = _new(section, "what", "value")
    for name, value in content.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                table.add_row(f"{name} {inner}", _shown(number))
        elif value != "":
            table.add_row(str(name), _shown(value))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
