"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.image import build
from bench.runner import Runner, Settings
from bench.sides import NATIVE, RINGFENCE, Side, qemu, unavailable
from bench.workloads import QUICK, WORKLOADS, Kind, pick
from ringfence.errors import RingfenceError

EXAMPLES = """\
examples:
  python -m bench                                  a few workloads, small
  python -m bench boot sh sha256 --runs 5          these, five runs each
  python -m bench --all --full --runs 5 --json results.json
  python -m bench --all --full --into docs/performance.md
  python -m bench gzip --size gzip=32 --sides native,ringfence
  python -m bench --split sh fork python           where Ringfence's time goes
  python -m bench --split --all --into docs/performance.md

The results go to stdout, progress to stderr. QEMU runs with both CPU models of --qemu-cpu and
the faster one is quoted. Seconds are of the host's clock, between markers on the console.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare native, QEMU TCG and Ringfence, side by side.",
        epilog=EXAMPLES + "\nworkloads:\n" + _listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"default: {' '.join(QUICK)}")
    add("--all", action="store_true", help="all workloads")
    add("--full", action="store_true", help="full sizes (100 MB, …) instead of quick ones")
    add("--runs", type=_positive, default=3, metavar="N", help="runs of each (default: 3)")
    add("--size", action="append", default=[], metavar="NAME=N", help="size of one workload")
    add("--sides", default="native,qemu,ringfence", help="default: native,qemu,ringfence")
    add("--qemu-cpu", default="max,qemu64", metavar="MODELS", help="default: max,qemu64")
    add("--kernel", default="cloud", choices=("cloud", "generic"), help="Debian's (default: cloud)")
    add("--memory", type=_positive, default=512, metavar="MIB", help="guest RAM (default: 512)")
    add("--timeout", type=_positive, metavar="S", help="of one run (default: 120, full: 600)")
    add("--work", type=Path, metavar="DIR", help="where packages and images are kept")
    add("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or instead of a table")
    add("--markdown", action="store_true", help="a Markdown table instead of a plain one")
    add("--into", type=Path, metavar="FILE", help="put the Markdown between FILE's marks")
    add("--split", action="store_true", help="where Ringfence's time goes, by its own statistics")
    return parser


def _listing() -> str:
    lines = []
    for workload in WORKLOADS:
        sizes = f" ({workload.quick:,}; full {workload.full:,})"
        sized = workload.kind is Kind.GUEST
        lines.append(f"  {workload.name:10} {workload.title}{sizes if sized else ''}")
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 0 where all ran, 1 where something failed, 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [w.name for w in WORKLOADS] if options.all else options.workloads or QUICK
    try:
        workloads = pick(names)
        sizes = _sizes(options.size)
        sides = _sides(options.sides, options.qemu_cpu)
    except (LookupError, ValueError) as error:
        parser.error(str(error.args[0]))
    settings = Settings(
        runs=options.runs,
        full=options.full,
        sizes=sizes,
        memory=options.memory,
        timeout=options.timeout or (600 if options.full else 120),
    )
    work = options.work or work_folder()
    work.mkdir(parents=True, exist_ok=True)
    able = []
    for side in sides:
        reason = unavailable(side)
        if reason:
            say(f"without {side.name}: {reason}")
        else:
            able.append(side)
    try:
        root = build(workloads, work, options.kernel, say)
    except RingfenceError as error:
        say(f"error: {error}")
        return error.exit_status
    with tempfile.TemporaryDirectory(prefix="run-", dir=work) as scratch:
        if options.split:
            from bench.split import split

            shares = split(workloads, root, Path(scratch), settings, say)
            if options.into:
                text = f"Measured: {report.describe(report.machine())}.\n\n"
                report.put_into(options.into, "split", text + report.grid_markdown(shares))
            show_grid = report.grid_markdown if options.markdown else report.grid
            print(show_grid(shares))
            return 0
        rows = Runner(able, root, Path(scratch), settings, say).run(workloads)
    about = report.machine()
    if options.into:
        report.put_into(options.into, "bench", report.markdown(rows, about))
    if options.json == "-":
        print(report.as_json(rows, settings, about))
    else:
        if options.json:
            Path(options.json).write_text(report.as_json(rows, settings, about) + "\n")
        show = report.markdown if options.markdown else report.table
        print(show(rows, about))
    bad = any("ringfence" in row.failures or "DIFFER" in "".join(row.notes) for row in rows)
    return int(bad)


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f}] {text}", file=sys.stderr, flush=True)


_STARTED = time.monotonic()


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        pick([name])
        if not number.isdigit() or not int(number):
            raise ValueError(f"--size {text}: expected NAME=NUMBER")
        sizes[name] = int(number)
    return sizes


def _sides(text: str, models: str) -> list[Side]:
    sides: list[Side] = []
    for name in text.split(","):
        match name:
            case "native":
                sides.append(NATIVE)
            case "qemu":
                sides += [qemu(model) for model in models.split(",") if model]
            case "ringfence":
                sides.append(RINGFENCE)
            case _:
                raise ValueError(f"--sides {name}: expected native, qemu, ringfence")
    return sides


def work_folder() -> Path:
    """Where packages and images are kept unless the user says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "ringfence-bench"
