"""Where Ringfence's time goes, per workload, by the machine's own statistics.

The guest runs inside this process, so that the counters can be read before and after a workload.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.image import Root, Say
from bench.runner import Settings
from bench.sides import APPEND, BOOT_TIMEOUT
from bench.workloads import Kind, Workload
from ringfence import Machine
from ringfence.errors import RingfenceError

TIMES = ("guest", "direct", "vmm", "translation", "idle")
COUNTERS = (
    ("exits", ("exits",)),
    ("interrupts", ("interrupts",)),
    ("look-ups", ("dispatch", "lookups")),
    ("slow accesses", ("dispatch", "slow_accesses")),
    ("pieces run directly", ("direct", "runs")),
    ("TLB misses", ("tlb", "misses")),
    ("TLB flushes", ("tlb", "flushes")),
)
"""Title and path of the counters shown; a path to a table stands for the sum of its counts."""


def split(
    workloads: Sequence[Workload],
    root: Root,
    scratch: Path,
    settings: Settings,
    say: Say,
) -> list[tuple[str, ...]]:
    """Run each workload once on Ringfence; times and counters, the header first."""
    lines: list[tuple[str, ...]] = [("workload", "s", *TIMES, *(title for title, _ in COUNTERS))]
    with Machine(
        kernel=root.image.kernel,
        initrd=root.initrd,
        append=APPEND,
        engine="translate",
        memory=f"{settings.memory}M",
        cache_dir=scratch / "cache",
    ) as machine:
        before, began = machine.stats(), time.perf_counter()
        machine.start()
        machine.console.wait_for("<<ready>>", BOOT_TIMEOUT)
        lines.append(_line("boot", time.perf_counter() - began, before, machine.stats()))
        numbers = itertools.count(1)
        for workload in workloads:
            if workload.kind is not Kind.GUEST or workload.name in root.missing:
                continue
            default = workload.full if settings.full else workload.quick
            size = settings.sizes.get(workload.name, default)
            say(f"split: {workload.name}")
            try:
                if workload.data:
                    _step(machine, next(numbers), f"data {size}", settings.timeout)
                before = machine.stats()
                command = workload.typed(size)
                spent = _step(machine, next(numbers), command, settings.timeout)
            except RingfenceError as error:
                say(f"split: {workload.name}: FAILED: {error}")
                if machine.outcome is not None:
                    break
                continue
            lines.append(_line(workload.name, spent, before, machine.stats()))
    return lines


def _step(machine: Machine, number: int, command: str, timeout: float) -> float:
    machine.console.send(f"step {number} {command}\n")
    machine.console.wait_for(f"<<begin {number}>>", timeout)
    began = time.perf_counter()
    machine.console.wait_for(re.compile(f"<<end {number} [0-9]+>>"), timeout)
    return time.perf_counter() - began


def _line(
    name: str, spent: float, before: dict[str, Any], after: dict[str, Any]
) -> tuple[str, ...]:
    times = {key: after["time"].get(key, 0) - before["time"].get(key, 0) for key in TIMES}
    total = sum(times.values()) or 1
    counts = (_count(after, path) - _count(before, path) for _, path in COUNTERS)
    shares = (f"{times[key] / total:.0%}" for key in TIMES)
    return (name, f"{spent:.2f}", *shares, *(f"{count:,}" for count in counts))


def _count(stats: dict[str, Any], path: tuple[str, ...]) -> int:
    found: Any = stats
    for key in path:
        found = found.get(key, {})
    if isinstance(found, dict):
        return sum(row["count"] if isinstance(row, dict) else row for row in found.values())
    return int(found)
