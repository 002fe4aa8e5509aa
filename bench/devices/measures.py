"""What is measured: a command in the guest, sometimes a server on the host, and how it is read.

Networks are measured against an iperf3 server on the host, which the guest reaches through its
user-mode network as 10.0.2.2; pings are answered by the network itself. Disks are read and written
by fio, past the guest's page cache; the host's is made to have all of the file, so that what counts
is the way to it. Rates are the guest's own figures.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.devices.guests import DISK_SIZE, Guest

GATEWAY = "10.0.2.2"
SMALL = 64
"""Bytes of a small UDP datagram."""
PINGS = 500
PATIENCE = 60.0


@dataclass(frozen=True)
class Measure:
    """A row of the comparison.

    Attributes
    ----------
    name, title, unit : str
        "tcp-up"; what it is; of what its figure is.
    disk : bool
        Whether it is about the disk, and not about the card.
    lower : bool
        Whether less is better.
    target : float or None
        Our figure divided by QEMU's should be at least this.
    run : Callable[[Guest, int], float]
        Measures for so many seconds.
    """

    name: str
    title: str
    unit: str
    run: Callable[[Guest, int], float]
    disk: bool = False
    lower: bool = False
    target: float | None = None


@contextlib.contextmanager
def _server() -> Iterator[int]:
    """An iperf3 server on the host; its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = ["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


def _iperf(guest: Guest, seconds: int, options: str) -> Mapping[str, Any]:
    """Run iperf3 in the guest; the part of its report that sums up."""
    with _server() as port:
        command = f"iperf3 -c {GATEWAY} -p {port} -t {seconds} -i 0 -J {options}"
        report = json.loads(guest.run(command, seconds + PATIENCE))
    if "error" in report:
        raise RuntimeError(f"iperf3: {report['error']}")
    return dict(report["end"])


def _tcp(options: str) -> Callable[[Guest, int], float]:
    """Megabits per second that arrive by TCP."""

    def run(guest: Guest, seconds: int) -> float:
        end = _iperf(guest, seconds, options)
        return float(end["sum_received"]["bits_per_second"]) / 1e6

    return run


def _udp(options: str) -> Callable[[Guest, int], float]:
    """Small datagrams per second that arrive."""

    def run(guest: Guest, seconds: int) -> float:
        end = _iperf(guest, seconds, f"-u -b 0 -l {SMALL} {options}")
        total = end["sum_received"]
        return float((total["packets"] - total["lost_packets"]) / total["seconds"])

    return run


def _ping(guest: Guest, seconds: int) -> float:
    """Microseconds for a ping and its answer, one after the other without a pause."""
    del seconds
    output = guest.run(f"/usr/bin/ping -q -f -c {PINGS} {GATEWAY}", PATIENCE)
    found = re.search(r"= [\d.]+/([\d.]+)/", output)
    if found is None:
        raise RuntimeError(f"ping said {output!r}")
    return float(found[1]) * 1000


def _fio(kind: str, size: str, depth: int, figure: str) -> Callable[[Guest, int], float]:
    """Requests, or megabytes, per second."""

    def run(guest: Guest, seconds: int) -> float:
        guest.disk.read_bytes()
        engine = "libaio" if depth > 1 else "psync"
        report = json.loads(
            guest.run(
                f"fio --name=x --filename=/dev/vda --size={DISK_SIZE} --direct=1 --thread"
                f" --ioengine={engine} --iodepth={depth} --rw={kind} --bs={size} --randrepeat=0"
                f" --time_based --runtime={seconds} --output-format=json",
                seconds + PATIENCE,
            )
        )
        job = report["jobs"][0]["read" if "read" in kind else "write"]
        return float(job["iops"]) if figure == "iops" else float(job["bw_bytes"]) / 1e6

    return run


MEASURES = (
    Measure("tcp-up", "TCP, guest to host", "Mbit/s", _tcp(""), target=2),
    Measure("tcp-down", "TCP, host to guest", "Mbit/s", _tcp("-R"), target=2),
    Measure("udp-up", f"UDP of {SMALL} bytes, guest to host", "packets/s", _udp("")),
    Measure("udp-down", f"UDP of {SMALL} bytes, host to guest", "packets/s", _udp("-R")),
    Measure("ping", "ping and answer", "µs", _ping, lower=True),
    Measure(
        "read-1", "random reads of 4 KiB, one at a time", "/s", _fio("randread", "4k", 1, "iops"),
        disk=True, target=1.5,
    ),
    Measure(
        "read-16", "random reads of 4 KiB, 16 at once", "/s", _fio("randread", "4k", 16, "iops"),
        disk=True, target=1.5,
    ),
    Measure(
        "write-1", "random writes of 4 KiB, one at a time", "/s",
        _fio("randwrite", "4k", 1, "iops"), disk=True,
    ),
    Measure(
        "seq-read", "sequential reads of 256 KiB, 4 at once", "MB/s",
        _fio("read", "256k", 4, "bytes"), disk=True, target=1.5,
    ),
    Measure(
        "seq-write", "sequential writes of 256 KiB, 4 at once", "MB/s",
        _fio("write", "256k", 4, "bytes"), disk=True, target=1.5,
    ),
)  # fmt: skip


def lacking() -> str:
    """Why networks can't be measured on this host; empty where they can."""
    if shutil.which("iperf3") is None:
        return "iperf3 is not installed on this host"
    return ""
