"""The command line: ``python -m bench.devices``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.cli import say, work_folder
from bench.devices import minimal
from bench.devices import results as tables
from bench.devices.guests import STANDARD, SWITCHES, Guest, Kind
from bench.devices.measures import MEASURES, Measure, lacking
from bench.devices.results import Results, Sample
from bench.devices.root import build
from bench.sides import SideFailed, qemu, unavailable
from ringfence.errors import RingfenceError

EXAMPLES = """\
examples:
  python -m bench.devices                              all, three runs each
  python -m bench.devices tcp-up tcp-down --runs 5     these
  python -m bench.devices --switches                   batching on and off, too
  python -m bench.devices --switches --into docs/performance.md --picture docs/devices.svg

All guests stay up together, and each measure goes round them, run after run; the tables show
medians. Results go to stdout, progress to stderr. "per CPU" compares what either side does with a
second of the host's CPU time, all of its process's threads together: it says more than the seconds
of the clock where other work keeps the host busy.
"""


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {each.name:10} {each.title} ({each.unit})" for each in MEASURES)
    parser = argparse.ArgumentParser(
        prog="python -m bench.devices",
        description="Compare network cards and disks with each other and with QEMU TCG's.",
        epilog=EXAMPLES + "\nmeasures:\n" + listing,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("measures", nargs="*", metavar="MEASURE", help="default: all")
    add("--runs", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    add("--seconds", type=int, default=2, metavar="S", help="of each run (default: 2)")
    add("--memory", type=int, default=768, metavar="MIB", help="guest RAM (default: 768)")
    add("--qemu-cpu", default="max", metavar="MODEL", help="QEMU's -cpu (default: max)")
    add("--without-qemu", action="store_true", help="Ringfence alone")
    add("--card", choices=("virtio", "e1000"), help="one card only")
    add("--switches", action="store_true", help="virtio with batching switched, too")
    add("--work", type=Path, metavar="DIR", help="where packages and images are kept")
    add("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or instead of tables")
    add("--markdown", action="store_true", help="Markdown instead of plain tables")
    add("--into", type=Path, metavar="FILE", help="put the Markdown between FILE's marks")
    add(
        "--picture",
        type=report.picture_file,
        metavar="FILE",
        help="an SVG of it (needs matplotlib)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 where all ran, 1 where something failed, 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = set(options.measures) - {each.name for each in MEASURES}
    if unknown:
        parser.error(f"no measure {', '.join(sorted(unknown))}: --help lists all")
    measures = [m for m in MEASURES if not options.measures or m.name in options.measures]
    reason = lacking()
    if reason:
        say(f"without networks: {reason}")
        measures = [measure for measure in measures if measure.disk]
    kinds = [kind for kind in STANDARD if options.card in (None, kind.card)]
    reason = unavailable(qemu(options.qemu_cpu))
    if reason or options.without_qemu:
        if reason:
            say(f"without QEMU: {reason}")
        kinds = [kind for kind in kinds if kind.side != "qemu"]
    if options.switches:
        kinds += [Kind("ringfence", "virtio", switch) for switch in SWITCHES]
    work = options.work or work_folder()
    work.mkdir(parents=True, exist_ok=True)
    try:
        image, initrd = build(work, say)
    except RingfenceError as error:
        say(f"error: {error}")
        return error.exit_status
    guests: list[Guest] = []
    with tempfile.TemporaryDirectory(prefix="devices-", dir=work) as scratch:
        try:
            for kind in kinds:
                say(f"starting {kind.name}")
                where = Path(scratch)
                guests.append(Guest(kind, image, initrd, options.memory, where, options.qemu_cpu))
            results = measure_all(guests, measures, options.runs, options.seconds)
            if any(measure.name == minimal.MEASURE for measure in measures):
                for run in range(options.runs):
                    say(f"hypercalls, run {run + 1}")
                    for kind, sample in minimal.measure().items():
                        results.add(minimal.MEASURE, kind, sample)
                kinds += minimal.KINDS
        finally:
            for guest in guests:
                guest.close()
    _show(options, results, measures, kinds)
    return int(bool(results.failures))


def measure_all(
    guests: Sequence[Guest], measures: Sequence[Measure], runs: int, seconds: int
) -> Results:
    """Have each measure go round the guests, beginning with another one each time."""
    results = Results()
    for measure in measures:
        # A disk is the same behind either card: it is measured with the first.
        able = [
            each for each in guests if not measure.disk or each.kind.card == guests[0].kind.card
        ]
        for run in range(runs):
            turn = run % len(able)
            for guest in [*able[turn:], *able[:turn]]:
                key = (measure.name, guest.kind.name)
                try:
                    sample = _sample(guest, measure, seconds)
                except (RuntimeError, SideFailed, OSError, KeyError, ValueError) as error:
                    results.failures.append(f"{measure.name}, {guest.kind.name}: {error}")
                    say(results.failures[-1])
                    continue
                results.add(measure.name, guest.kind, sample)
                say(f"{key[0]}, {key[1]}: {sample.value:,.1f} {measure.unit}")
    return results


def _sample(guest: Guest, measure: Measure, seconds: int) -> Sample:
    before, cpu, start = guest.counters(), guest.talk.cpu_seconds(), time.monotonic()
    value = measure.run(guest, seconds)
    used = (guest.talk.cpu_seconds() - cpu) / (time.monotonic() - start)
    after = guest.counters()
    if not before or not after or measure.disk:
        return Sample(value, used)
    exits = [sum(each["count"] for each in one["exits"].values()) for one in (before, after)]
    packets = [one["network"]["sent"] + one["network"]["received"] for one in (before, after)]
    return Sample(value, used, exits[1] - exits[0], packets[1] - packets[0])


def _show(
    options: argparse.Namespace,
    results: Results,
    measures: Sequence[Measure],
    kinds: Sequence[Kind],
) -> None:
    about = report.machine()
    if options.into:
        report.put_into(options.into, "devices", _text(results, measures, kinds, markdown=True))
    if options.json:
        data = {"machine": about, "results": results.plain(), "failures": results.failures}
        text = json.dumps(data, indent=1)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    if options.json != "-":
        print(_text(results, measures, kinds, markdown=options.markdown))
    if options.picture:
        from bench.devices.picture import draw

        draw(results, measures, kinds, options.picture)


def _text(
    results: Results, measures: Sequence[Measure], kinds: Sequence[Kind], *, markdown: bool
) -> str:
    parts = [f"Measured: {report.describe(report.machine())}."]
    for card in dict.fromkeys(kind.card for kind in kinds if kind.side == "ringfence"):
        shown = [m for m in measures if not m.disk or card == kinds[0].card]
        parts += [
            f"With {card}:",
            tables.render(tables.versus(results, shown, card), markdown=markdown),
        ]
    switched = [kind for kind in kinds if kind.side == "ringfence" and kind.card == "virtio"]
    if len(switched) > 1:
        lines = tables.switched(results, measures, switched)
        parts += [
            "Ringfence's virtio with its switches (in brackets: exits per packet):",
            tables.render(lines, markdown=markdown),
        ]
    for measure in measures:
        if measure.name == minimal.MEASURE:
            lines = tables.packets(results, measure, kinds)
            parts += [f"{measure.title}, all ways:", tables.render(lines, markdown=markdown)]
    parts += [f"- {failure}" for failure in results.failures]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
