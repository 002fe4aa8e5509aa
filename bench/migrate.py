"""Live migration beside QEMU's: ``python -m bench.migrate``.

A guest that has filled some memory writes to it at a rate, one word a page; it moves over loopback
TCP to another process, and by descriptor passing where there is such a thing. Figures are those
that each side reports: seconds in all, milliseconds without a guest, MiB sent. ``--picture`` draws
the downtimes (it needs matplotlib), ``--into`` refreshes the table of a document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.image import compile_c
from bench.report import picture_file
from ringfence import Machine
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image, Store

SOURCE = Path(__file__).parent / "guest" / "dirty.c"
APPEND = "console=ttyS0 panic=-1 quiet"
CASES = ((256, 64, 0), (256, 64, 50), (1024, 256, 0), (1024, 256, 50), (1024, 256, 200))
"""MiB of RAM, MiB filled, MB written per second."""
SIDES = ("TCP", "descriptor", "QEMU, TCP")
BEGIN, END = "<!-- migrate: begin -->", "<!-- migrate: end -->"
PATIENCE = 180.0

TARGET = """
import sys, time
from ringfence import Machine
machine = Machine.receive(sys.argv[1], listening=lambda where: print(where, flush=True))
print("here", flush=True)
sys.stdin.read()
machine.close()
"""

Figures = tuple[float, float, float]


def ringfence(kernel: Path, initrd: Path, case: tuple[int, int, int], address: str) -> Figures:
    """One move of ours."""
    memory, filled, rate = case
    target = subprocess.Popen(
        [sys.executable, "-c", TARGET, address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert target.stdout is not None
    where = target.stdout.readline().strip()
    machine = Machine(
        kernel=kernel, initrd=initrd, append=APPEND, memory=memory << 20, engine="translate"
    )
    with machine:
        machine.start()
        machine.console.wait_for("# ", PATIENCE)
        machine.console.send(f"/bench/dirty {filled} {rate} &\n")
        machine.console.wait_for("dirty: ready", PATIENCE)
        time.sleep(1)
        report = machine.migrate(where)
    target.communicate("")
    return report.total, report.downtime * 1000, report.sent / (1 << 20)


class Qmp:
    """QEMU's control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 20
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: object) -> dict[str, object]:
        """Ask, and return the answer."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer:
                return dict(answer["return"])
            if "error" in answer:
                raise RuntimeError(answer["error"])


def qemu(kernel: Path, initrd: Path, case: tuple[int, int, int], where: str) -> Figures:
    """One move of QEMU's, with its defaults but for the downtime that we allow, too."""
    memory, filled, rate = case
    common = [
        "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", f"{memory}M", "-nographic",
        "-no-reboot", "-kernel", kernel, "-initrd", initrd, "-append", APPEND, "-nodefaults",
        "-serial", "stdio",
    ]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    one, other = Path(where) / "one", Path(where) / "other"
    source = subprocess.Popen(
        [*common, "-qmp", f"unix:{one},server=on,wait=off"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    target = subprocess.Popen(
        [*common, "-qmp", f"unix:{other},server=on,wait=off", "-incoming", f"tcp:127.0.0.1:{port}"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert source.stdin is not None and source.stdout is not None
        _read_until(source, b"# ")
        source.stdin.write(f"/bench/dirty {filled} {rate} &\n".encode())
        source.stdin.flush()
        _read_until(source, b"dirty: ready")
        time.sleep(1)
        qmp = Qmp(one)
        qmp.call("migrate-set-parameters", **{"downtime-limit": 50, "max-bandwidth": 10 << 30})
        qmp.call("migrate", uri=f"tcp:127.0.0.1:{port}")
        deadline = time.monotonic() + PATIENCE
        while True:
            found = qmp.call("query-migrate")
            if found.get("status") == "completed":
                break
            if time.monotonic() > deadline or found.get("status") == "failed":
                raise RuntimeError(f"QEMU's migration: {found}")
            time.sleep(0.05)
        ram = found["ram"]
        assert isinstance(ram, dict)
        return (
            float(str(found["total-time"])) / 1000,
            float(str(found["downtime"])),
            float(ram["transferred"]) / (1 << 20),
        )
    finally:
        for process in (source, target):
            process.kill()
            process.wait()
        for path in (one, other):
            with contextlib.suppress(OSError):
                path.unlink()


def _read_until(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdout is not None
    seen = b""
    while text not in seen:
        piece = process.stdout.read1(4096)  # type: ignore[attr-defined]
        if not piece:
            raise RuntimeError(f"the guest ended: {seen[-300:]!r}")
        seen += piece


Row = tuple[tuple[int, int, int], str, list[float]]
"""A case, who moved, and the three figures."""


def table(rows: list[Row]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| RAM | written | by | total s | downtime ms | sent MiB |",
        "|---:|---:|---|---:|---:|---:|",
    ]
    lines += [
        f"| {case[0]} MiB | {case[2]} MB/s | {side} | {total:.2f} | {down:.0f} | {sent:.0f} |"
        for case, side, (total, down, sent) in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """An SVG of the downtimes, and of the times in all: a group of bars for each case."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ringfence", "font.size": 9}
    from matplotlib import pyplot

    colours = dict(zip(SIDES, ("#2f6f9f", "#86b3d1", "#b8b8b8"), strict=True))
    cases = list(dict.fromkeys(case for case, _, _ in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, column, title in zip(axes, (1, 0), ("downtime [ms]", "total [s]"), strict=True):
        for number, side in enumerate(SIDES):
            places = [at + (number - 1) * 0.27 for at in range(len(cases))]
            found = {case: figures[column] for case, who, figures in rows if who == side}
            heights = [found.get(case, 0.0) for case in cases]
            bars = axis.bar(places, heights, 0.25, label=side, color=colours[side])
            axis.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=7)
        names = [f"{memory} MiB\n{rate} MB/s" for memory, _, rate in cases]
        axis.set_xticks(range(len(cases)), names)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.migrate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--picture", type=picture_file, metavar="FILE", help="an SVG of it")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a document with the markers")
    options = parser.parse_args()
    image: Image = Store().find(options.image)
    with tempfile.TemporaryDirectory(prefix="bench-migrate-") as name:
        folder = Path(name)
        program = compile_c(SOURCE, folder)
        if isinstance(program, str):
            parser.error(program)
        initrd = folder / "initrd"
        initrd.write_bytes(build_initramfs(image.folder / "busybox", {"/bench/dirty": program}))
        rows: list[Row] = []
        moves = (
            (ringfence, "tcp://127.0.0.1:0"),
            (ringfence, f"unix://{folder}/socket"),
            (qemu, str(folder)),
        )
        for case in CASES:
            for side, (move, where) in zip(SIDES, moves, strict=True):
                tries = [move(image.kernel, initrd, case, where) for _ in range(options.repeat)]
                middle = [statistics.median(column) for column in zip(*tries, strict=True)]
                rows.append((case, side, middle))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    if options.into:
        _refresh(options.into, table(rows))
    if options.picture:
        draw(rows, options.picture)


def _refresh(document: Path, text: str) -> None:
    """Put a table between the markers of a document."""
    old = document.read_text()
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"{document} has no markers {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
