"""Live migration beside QEMU's: ``python -m bench.migrate``.

A guest that has filled some memory writes to it at a rate, one word a page; it moves over loopback
TCP to another process, and by descriptor passing where there is such a thing. Figures are those
that each side reports: seconds in all, milliseconds without a guest, MiB sent.
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
from ringfence import Machine
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image, Store

SOURCE = Path(__file__).parent / "guest" / "dirty.c"
APPEND = "console=ttyS0 panic=-1 quiet"
CASES = ((256, 64, 0), (256, 64, 50), (1024, 256, 0), (1024, 256, 50), (1024, 256, 200))
"""MiB of RAM, MiB filled, MB written per second."""
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


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.migrate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--image", default="debian")
    options = parser.parse_args()
    image: Image = Store().find(options.image)
    with tempfile.TemporaryDirectory(prefix="bench-migrate-") as name:
        folder = Path(name)
        program = compile_c(SOURCE, folder)
        if isinstance(program, str):
            parser.error(program)
        initrd = folder / "initrd"
        initrd.write_bytes(build_initramfs(image.folder / "busybox", {"/bench/dirty": program}))
        print("| RAM | written | by | total s | downtime ms | sent MiB |")
        print("|---:|---:|---|---:|---:|---:|")
        for case in CASES:
            for side, (move, where) in {
                "TCP": (ringfence, "tcp://127.0.0.1:0"),
                "descriptor": (ringfence, f"unix://{folder}/socket"),
                "QEMU, TCP": (qemu, str(folder)),
            }.items():
                tries = [move(image.kernel, initrd, case, where) for _ in range(options.repeat)]
                middle = [statistics.median(column) for column in zip(*tries, strict=True)]
                print(
                    f"| {case[0]} MiB | {case[2]} MB/s | {side} | {middle[0]:.2f} |"
                    f" {middle[1]:.0f} | {middle[2]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
