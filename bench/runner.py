"""Runs workloads on all sides in turns, so that what disturbs the host disturbs all alike.

Boots come first: in each run every side boots once. Then one guest per side is started and stays;
each workload goes round the sides, run after run, while the other guests idle. The order of the
sides changes from run to run. A side that fails in a workload is started anew for the next.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.image import Root, Say
from bench.sides import BOOT_TIMEOUT, NATIVE, Side, SideFailed, Talk, open_talk
from bench.workloads import Kind, Workload

PROMPT = rb"# "
UNSUPPORTED = 77
"""Exit status of a program that lacks something on this side's CPU."""


@dataclass
class Settings:
    """How to run."""

    runs: int = 3
    full: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    memory: int = 512
    timeout: float = 120.0
    idle_seconds: float = 5.0


@dataclass
class Row:
    """All figures of one workload, by side."""

    workload: Workload
    size: int
    figures: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, set[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def median(self, side: str) -> float | None:
        """The median of a side; None where it has no figure."""
        found = self.figures.get(side)
        return statistics.median(found) if found else None

    def best_qemu(self) -> tuple[str, float] | None:
        """QEMU's faster CPU model and its median."""
        found = [
            (name, value)
            for name in self.figures
            if name.startswith("qemu-") and (value := self.median(name)) is not None
        ]
        return min(found, key=lambda item: item[1]) if found else None

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        return {
            "workload": self.workload.name,
            "title": self.workload.title,
            "unit": self.workload.unit,
            "size": self.size,
            "figures": self.figures,
            "medians": {side: self.median(side) for side in self.figures},
            "failures": self.failures,
            "notes": self.notes,
        }


class Runner:
    """One comparison.

    Parameters
    ----------
    sides : sequence of Side
        Who takes part.
    root : Root
        What they run.
    work : Path
        A folder for caches and statistics of this run.
    """

    def __init__(
        self, sides: Sequence[Side], root: Root, work: Path, settings: Settings, say: Say
    ) -> None:
        self.sides = list(sides)
        self.root = root
        self.work = work
        self.settings = settings
        self.say = say
        self.cache = work / "cache"
        self._talks: dict[str, Talk] = {}
        self._data: dict[str, int] = {}

    def run(self, workloads: Sequence[Workload]) -> list[Row]:
        """Measure; rows in the order of the workloads."""
        rows = [Row(w, self._size(w)) for w in workloads]
        for row in rows:
            reason = self.root.missing.get(row.workload.name)
            if reason:
                row.notes.append(reason)
        able = [row for row in rows if not row.notes]
        try:
            self._boots([row for row in able if row.workload.kind is Kind.BOOT])
            for row in able:
                if row.workload.kind is Kind.GUEST:
                    self._guest(row)
            # Memory and idleness are looked at when the guests have worked.
            for row in able:
                if row.workload.kind in (Kind.IDLE, Kind.MEMORY):
                    self._observe(row)
        finally:
            self._end()
        for row in rows:
            compare_outputs(row)
        return rows

    def _size(self, workload: Workload) -> int:
        default = workload.full if self.settings.full else workload.quick
        return self.settings.sizes.get(workload.name, default)

    def _turn(self, run: int, sides: Sequence[Side]) -> list[Side]:
        """The sides, starting with another one in each run."""
        first = run % len(sides) if sides else 0
        return [*sides[first:], *sides[:first]]

    # -- boots --------------------------------------------------------------------------------

    def _boots(self, rows: list[Row]) -> None:
        guests = [side for side in self.sides if side is not NATIVE]
        if not rows or not guests:
            return
        if any(side.kind == "ringfence" for side in guests):
            self.say("boot: filling the cache")
            for _ in range(2):
                try:
                    self._boot(next(s for s in guests if s.kind == "ringfence"), self.cache)
                except SideFailed as error:
                    self.say(f"boot: ringfence: {error}")
        for run in range(self.settings.runs):
            for row in rows:
                for side in self._turn(run, guests):
                    cache = self.work / "empty" if row.workload.cold else self.cache
                    if row.workload.cold:
                        shutil.rmtree(cache, ignore_errors=True)
                    try:
                        seconds, prompt = self._boot(side, cache)
                    except SideFailed as error:
                        self._failed(row, side, str(error))
                        continue
                    self._figure(row, side, seconds, run, f"prompt after {prompt:.2f} s")

    def _boot(self, side: Side, cache: Path) -> tuple[float, float]:
        """Boot the stock image to power-off: seconds until the process ended, until its prompt."""
        image = self.root.image
        assert image.initrd is not None
        talk = Talk(side.command(image.kernel, image.initrd, self.settings.memory, cache))
        try:
            prompt, _, _ = talk.expect(PROMPT, BOOT_TIMEOUT)
            talk.send("poweroff -f\n")
            return talk.wait(BOOT_TIMEOUT) - talk.started, prompt - talk.started
        finally:
            talk.close()

    # -- in the guest -------------------------------------------------------------------------

    def _guest(self, row: Row) -> None:
        for run in range(self.settings.runs):
            for side in self._turn(run, self.sides):
                if side.name in row.failures:
                    continue
                try:
                    self._once(row, side, run)
                except SideFailed as error:
                    self._failed(row, side, str(error))
                    self._drop(side)

    def _once(self, row: Row, side: Side, run: int) -> None:
        workload, timeout = row.workload, self.settings.timeout
        talk = self._talk(side)
        if workload.data and self._data.get(side.name) != row.size:
            talk.step(f"data {row.size}", timeout)
            self._data[side.name] = row.size
        command = workload.typed(row.size)
        seconds, status, output = talk.step(command, timeout)
        if status == UNSUPPORTED:
            self._failed(row, side, "not supported by this side's CPU")
            return
        if status:
            last = (output.strip().splitlines() or [""])[-1]
            self._failed(row, side, f"{command!r} gave status {status}: {last}")
            return
        if workload.figure is None:
            row.outputs.setdefault(side.name, set()).add(output.strip())
        else:
            try:
                seconds = workload.figure(output)
            except ValueError as error:
                self._failed(row, side, str(error))
                return
        self._figure(row, side, seconds, run)

    def _talk(self, side: Side) -> Talk:
        talk = self._talks.get(side.name)
        if talk is None:
            self.say(f"starting {side.name}")
            stats = self.work / f"{side.name}.json"
            talk = open_talk(side, self.root, self.settings.memory, self.cache, stats)
            self._talks[side.name] = talk
        return talk

    def _drop(self, side: Side) -> None:
        talk = self._talks.pop(side.name, None)
        self._data.pop(side.name, None)
        if talk is not None:
            talk.close()

    # -- from outside -------------------------------------------------------------------------

    def _observe(self, row: Row) -> None:
        for side in self.sides:
            if side is NATIVE:
                continue
            try:
                talk = self._talk(side)
                if row.workload.kind is Kind.MEMORY:
                    beside, inside = talk.memory_beyond(self.settings.memory)
                    self._figure(row, side, beside, 0, f"and {inside:.0f} MB of guest RAM")
                    continue
                for run in range(self.settings.runs):
                    time.sleep(0.5)
                    before, began = talk.cpu_seconds(), time.perf_counter()
                    time.sleep(self.settings.idle_seconds)
                    spent = talk.cpu_seconds() - before
                    self._figure(row, side, 100 * spent / (time.perf_counter() - began), run)
            except (SideFailed, OSError) as error:
                self._failed(row, side, str(error))
                self._drop(side)

    def _end(self) -> None:
        """Power the guests off; what hangs is ended."""
        for talk in self._talks.values():
            try:
                if talk.process.poll() is None:
                    talk.leave()
            except SideFailed as error:
                self.say(f"at the end: {error}")
            finally:
                talk.close()
        self._talks.clear()

    # -- notes --------------------------------------------------------------------------------

    def _figure(self, row: Row, side: Side, value: float, run: int, about: str = "") -> None:
        row.figures.setdefault(side.name, []).append(value)
        extra = f" ({about})" if about else ""
        where = f"{row.workload.name}: {side.name}: run {run + 1}"
        self.say(f"{where}: {value:.3f} {row.workload.unit}{extra}")

    def _failed(self, row: Row, side: Side, reason: str) -> None:
        row.failures[side.name] = reason
        self.say(f"{row.workload.name}: {side.name}: FAILED: {reason}")


def compare_outputs(row: Row) -> None:
    """Note where sides disagree on what a workload printed: a wrong result is no result."""
    texts = set().union(*row.outputs.values())
    if len(texts) > 1:
        shown = "; ".join(f"{side} {sorted(found)}" for side, found in row.outputs.items())
        row.notes.append(f"THE RESULTS DIFFER: {shown}")
