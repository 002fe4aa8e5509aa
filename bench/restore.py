"""How soon a saved guest goes on, and what a clone costs: ``python -m bench.restore``.

A guest that prints without a pause is saved. What is measured ends when its next output is there,
so that it includes the guest's first instructions and their translation:

- **command**: from the start of the process ``ringfence restore`` to a byte on its stdout.
- **process**: from the call of `Machine.restore` on, in a process that runs machines already.
- **help**: ``ringfence --help``, which is what any command costs at least.

Wall time says what a user waits for, on a host that has nothing else to do; CPU time is the better
measure on one that has. Clones are idle: another guest, at its prompt, is saved, cloned and left
alone for a while; their memory is the proportional set size of all their processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ringfence import Machine
from ringfence.images.store import Store

APPEND = "console=ttyS0 panic=-1 quiet"
PRINTING = "while :; do echo tick; done\n"
COMMAND = (sys.executable, "-m", "ringfence.cli")
SETTLED = 5.0
"""Seconds that clones are left alone before they are looked at."""


def make_snapshot(image: str, folder: Path, typed: str, memory: str) -> Path:
    """A guest of an image, saved while it does what was typed at its prompt."""
    found = Store().find(image)
    with Machine(
        kernel=found.kernel,
        initrd=found.initrd,
        append=APPEND,
        memory=memory,
        engine="translate",
    ) as machine:
        machine.start()
        machine.console.wait_for("# ", 120)
        if typed:
            machine.console.send(typed)
            machine.console.wait_for("tick\r\ntick", 60)
        time.sleep(0.5)
        machine.snapshot(folder)
    return folder


def timed(work: Callable[[], None], who: int) -> tuple[float, float]:
    """Milliseconds of wall time and of CPU time that something takes."""
    before, began = resource.getrusage(who), time.perf_counter()
    work()
    wall, after = time.perf_counter() - began, resource.getrusage(who)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1000, cpu * 1000


def by_command(snapshot: Path) -> tuple[float, float]:
    """``ringfence restore`` up to the guest's first byte; the CPU time until then."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, "restore", str(snapshot), "--engine", "translate"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    wall = time.perf_counter() - began
    used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")
    process.kill()
    process.wait()
    return wall * 1000, cpu * 1000


def in_process(snapshot: Path) -> tuple[float, float]:
    """`Machine.restore` up to the guest's first byte."""
    machines: list[Machine] = []

    def work() -> None:
        machines.append(Machine.restore(snapshot, engine="translate"))
        machines[0].start()
        machines[0].console.wait_for("t", 60)

    try:
        return timed(work, resource.RUSAGE_SELF)
    finally:
        for machine in machines:
            machine.close()


def show_help() -> tuple[float, float]:
    """``ringfence --help``."""
    return timed(
        lambda: subprocess.run(
            [*COMMAND, "--help"], stdout=subprocess.DEVNULL, check=True
        ).check_returncode(),
        resource.RUSAGE_CHILDREN,
    )


def clones(snapshot: Path, count: int) -> float:
    """Megabytes of each of ``count`` clones, all that they share divided among them."""
    with tempfile.TemporaryDirectory(prefix="bench-clones-") as home:
        (Path(home) / "code").symlink_to(_code())
        environment = {**os.environ, "RINGFENCE_HOME": home}
        said = subprocess.run(
            [*COMMAND, "clone", str(snapshot), "-n", str(count), "--no-rename", "--json",
             "--engine", "translate", "--name", "clone"],
            env=environment, stdout=subprocess.PIPE, check=True,
        ).stdout  # fmt: skip
        rows = json.loads(said)
        time.sleep(SETTLED)
        total = sum(_proportional(row["pid"]) for row in rows)
        for row in rows:
            stop = [*COMMAND, "stop", "--force", row["name"]]
            subprocess.run(stop, env=environment, check=True)
    return total / count / 1e6


def _code() -> Path:
    from ringfence.settings import default_cache_dir

    return default_cache_dir().absolute()


def _proportional(pid: int) -> int:
    """Proportional set size of a process in bytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.restore")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--clones", type=int, default=20)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-restore-") as name:
        printing = make_snapshot(options.image, Path(name) / "printing", PRINTING, "512M")
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            "help": show_help,
            "command": lambda: by_command(printing),
            "process": lambda: in_process(printing),
        }
        for side in sides.values():
            side()  # caches are warm from here on
        tries = {side: [work() for _ in range(options.repeat)] for side, work in sides.items()}
        for side, pairs in tries.items():
            walls, cpus = zip(*pairs, strict=True)
            results[side] = {
                "wall": statistics.median(walls),
                "least wall": min(walls),
                "cpu": statistics.median(cpus),
                "least cpu": min(cpus),
            }
        if options.clones:
            idle = make_snapshot(options.image, Path(name) / "idle", "", "512M")
            size = clones(idle, options.clones)
            results["clones"] = {"count": options.clones, "megabytes each": size}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| what | ms, median | least | CPU ms, median | least |")
    print("|---|---:|---:|---:|---:|")
    for side in sides:
        figures = " | ".join(f"{value:.0f}" for value in results[side].values())
        print(f"| {side} | {figures} |")
    if options.clones:
        print(f"{options.clones} idle clones: {results['clones']['megabytes each']:.1f} MB each")


if __name__ == "__main__":
    main()
