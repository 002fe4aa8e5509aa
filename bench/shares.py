"""Shared folders beside QEMU's: the same guest, mount options and files, by 9p on either side.

``python -m bench.shares [WORKLOAD…] [--runs N] [--without-qemu] [--json] [--into FILE]``

QEMU TCG has the folder with ``-virtfs local,security_model=none``. Both guests stay up together
(Debian's generic kernel, one vCPU, busybox's tools), and each workload goes round them, run after
run, each time on a mount of its own. Seconds are of the host's clock, between two markers on the
console; the best run counts, as others use the host, too.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import report
from bench.cli import say, work_folder
from bench.devices.guests import APPEND
from bench.devices.root import build
from bench.sides import BOOT_TIMEOUT, SideFailed, Talk, qemu, unavailable
from ringfence.errors import RingfenceError
from ringfence.images.store import Image

TAG, WHERE = "bench", "/mnt/bench"
FOLDERS, FILES = 40, 25
LARGE = 128 << 20
TIMEOUT = 120.0
EXTRACT = "tar xf /tmp/tar tree/1 tree/2 tree/3 tree/4"


@dataclass(frozen=True)
class Workload:
    """What the guest does in the folder; ``before`` is not measured."""

    name: str
    title: str
    command: str
    cache: str = "none"
    before: str = "true"


WORKLOADS = (
    Workload("list", "`ls -lR` of 1000 files", "ls -lR tree"),
    Workload(
        "list-again", "the same once more, cache=loose", "ls -lR tree", "loose", "ls -lR tree"
    ),
    Workload("stat", "`find -newer`, 1000 files", "find tree -newer tree/0/0"),
    Workload("cat", "`cat` of 1000 files of 2 KiB", "cat tree/*/*"),
    Workload("tar", "`tar x` of 100 files of 2 KiB", EXTRACT, before="cp tar /tmp"),
    Workload("tar-loose", "the same, cache=loose", EXTRACT, "loose", "cp tar /tmp"),
    Workload("remove", "`rm -r` of 1000 files", "rm -r tree"),
    Workload("write-4k", "8000 writes of 4 KiB", "dd if=/dev/zero of=new bs=4k count=8000"),
    Workload("read-4k", "8000 reads of 4 KiB", "dd if=large of=/dev/null bs=4k count=8000"),
    Workload("write-1m", "128 MiB written, 1 MiB each", "dd if=/dev/zero of=new bs=1M count=128"),
    Workload("read-1m", "128 MiB read, 1 MiB each", "dd if=large of=/dev/null bs=1M"),
)  # fmt: skip


class Guest:
    """A guest of one side, and its folder."""

    def __init__(self, side: str, image: Image, initrd: Path, folder: Path, cpu: str) -> None:
        self.side, self.folder = side, folder
        common = ["-kernel", str(image.kernel), "-initrd", str(initrd), "-append", APPEND]
        if side == "QEMU":
            shared = f"local,path={folder},mount_tag={TAG},security_model=none,multidevs=remap"
            command = [
                *("qemu-system-x86_64", "-accel", "tcg", "-cpu", cpu, "-smp", "1", "-m", "768M"),
                *("-nodefaults", "-display", "none", "-monitor", "none", "-serial", "stdio"),
                *("-no-reboot", *common, "-virtfs", shared),
            ]
        else:
            command = [
                *(sys.executable, "-m", "ringfence.cli", "run", "--engine", "translate"),
                *("--memory", "768M", "--share", f"{folder},tag={TAG}"),
                *(f"-{word}" if word.startswith("-") else word for word in common),
            ]
        self.talk = Talk(command)
        try:
            self.talk.expect(b"<<ready>>", BOOT_TIMEOUT)
            self.run(f"sh -c 'umount -a -t 9p; mkdir -p {WHERE}'")
        except BaseException:
            self.talk.close()
            raise

    def run(self, command: str) -> tuple[float, str]:
        """Run a command: its seconds, and what it said; RuntimeError if it fails."""
        seconds, status, said = self.talk.step(command, TIMEOUT)
        if status:
            raise RuntimeError(f"{self.side}: {command!r} gave status {status}: {said[-200:]!r}")
        return seconds, said

    def measure(self, workload: Workload) -> float:
        """Seconds that a workload takes on a folder and a mount that are new."""
        renew(self.folder)
        options = f"trans=virtio,version=9p2000.L,cache={workload.cache}"
        self.run(f"mount -t 9p -o {options} {TAG} {WHERE}")
        try:
            self.run(f"sh -c 'cd {WHERE} && {workload.before} > /dev/null'")
            seconds, _ = self.run(f"sh -c 'cd {WHERE} && {workload.command} > /tmp/said'")
        finally:
            self.run(f"umount {WHERE}")
        return seconds


def fill(folder: Path) -> None:
    """Make the files that workloads read."""
    source = random.Random(9)
    for number in range(FOLDERS):
        inner = folder / "tree" / str(number)
        inner.mkdir(parents=True)
        for name in range(FILES):
            (inner / str(name)).write_bytes(source.randbytes(2048))
    shutil.make_archive(str(folder / "tar"), "tar", folder, "tree")
    (folder / "tar.tar").rename(folder / "tar")
    with (folder / "large").open("wb") as file:
        for _ in range(LARGE >> 20):
            file.write(source.randbytes(1 << 20))


def renew(folder: Path) -> None:
    """Undo what a workload has done, and have the host's page cache hold all of it."""
    (folder / "new").unlink(missing_ok=True)
    shutil.rmtree(folder / "tree", ignore_errors=True)
    shutil.unpack_archive(folder / "tar", folder, "tar", filter="data")
    (folder / "large").read_bytes()


def measure(guests: Sequence[Guest], workloads: Sequence[Workload], runs: int) -> list[Row]:
    """Each workload on all guests, in turns."""
    rows = []
    for workload in workloads:
        row = Row(workload.name, workload.title, {})
        for _ in range(runs):
            for guest in guests:
                seconds = guest.measure(workload)
                row.seconds[guest.side] = min(seconds, row.seconds.get(guest.side, seconds))
                say(f"{workload.name}, {guest.side}: {seconds:.3f} s")
        rows.append(row)
    return rows


@dataclass
class Row:
    """A workload's best seconds by side."""

    name: str
    title: str
    seconds: dict[str, float]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [("in the guest", "QEMU", "Ringfence", "÷ QEMU")]
    for row in rows:
        ours, theirs = (row.seconds.get(side) for side in ("Ringfence", "QEMU"))
        cells = (f"{each:.2f} s" if each else report.NONE for each in (theirs, ours))
        ratio = f"{ours / theirs:.2f}" if ours and theirs else report.NONE
        lines.append((row.title, *cells, ratio))
    return report.grid_markdown(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 where all ran, 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.shares", description=__doc__)
    add = parser.add_argument
    names = [each.name for each in WORKLOADS]
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(names)}; default: all")
    add("--runs", type=int, default=3, metavar="N", help="runs of each; the best one counts")
    add("--without-qemu", action="store_true", help="Ringfence alone")
    add("--qemu-cpu", default="max", metavar="MODEL", help="QEMU's -cpu (default: max)")
    add("--work", type=Path, metavar="DIR", help="where packages and images are kept")
    add("--json", action="store_true", help="print JSON")
    add("--into", type=Path, metavar="FILE", help="put the table between FILE's marks")
    options = parser.parse_args(arguments)
    unknown = set(options.workloads) - set(names)
    if unknown:
        parser.error(f"no workload {', '.join(sorted(unknown))}: --help lists all")
    sides = ["Ringfence"]
    reason = "not wanted" if options.without_qemu else unavailable(qemu(options.qemu_cpu))
    if reason:
        say(f"without QEMU: {reason}")
    else:
        sides.insert(0, "QEMU")
    work = options.work or work_folder()
    work.mkdir(parents=True, exist_ok=True)
    guests: list[Guest] = []
    with tempfile.TemporaryDirectory(prefix="shares-", dir=work) as scratch:
        try:
            image, initrd = build(work, say)
            for side in sides:
                folder = Path(scratch) / side
                folder.mkdir()
                fill(folder)
                guests.append(Guest(side, image, initrd, folder, options.qemu_cpu))
            chosen = [w for w in WORKLOADS if w.name in options.workloads or not options.workloads]
            rows = measure(guests, chosen, options.runs)
        except (RingfenceError, RuntimeError, SideFailed) as error:
            say(f"error: {error}")
            return 1
        finally:
            for guest in guests:
                guest.talk.close()
    about = report.machine()
    if options.into:
        text = f"Measured: {report.describe(about)}.\n\n{table(rows)}"
        report.put_into(options.into, "shares", text)
    if options.json:
        json.dump({"machine": about, "rows": [asdict(row) for row in rows]}, sys.stdout, indent=1)
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
