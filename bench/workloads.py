"""What is measured: one table of workloads, with the targets that they have to meet.

A workload of kind ``guest`` is a command that every side types into its shell (functions of
``guest/session.sh`` or programs of the root file system); its figure is the seconds between the
markers before and after it, or what ``figure`` reads from its output where the program itself
runs for a fixed time. The other kinds are measured by the runner in its own ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a workload is measured."""

    BOOT = "boot"
    GUEST = "guest"
    MEMORY = "memory"
    IDLE = "idle"


@dataclass(frozen=True)
class Workload:
    """One row of the results.

    Attributes
    ----------
    name : str
        What the user types.
    title : str
        What the table says.
    command : str
        What is typed in the guest; ``{size}`` stands for the size.
    quick, full : int
        Size in quick and in full mode, in the workload's own unit.
    packages : tuple of str
        Debian packages that the root file system needs for it.
    compiled : str
        The C source in ``guest/`` whose program it runs, without ".c".
    data : bool
        Whether it reads /tmp/data, a text of ``size`` megabytes.
    figure : callable or None
        Reads the figure from the output, instead of the time between the markers.
    cold : bool
        For a boot: with an empty cache folder.
    unit : str
        Of the figure; smaller is always better.
    versus_qemu, versus_native : float or None
        Targets: the largest ratio that is good enough.
    limit : float or None
        Target for the figure itself.
    """

    name: str
    title: str
    kind: Kind = Kind.GUEST
    command: str = ""
    quick: int = 1
    full: int = 1
    packages: tuple[str, ...] = ()
    compiled: str = ""
    data: bool = False
    figure: Callable[[str], float] | None = None
    cold: bool = False
    unit: str = "s"
    versus_qemu: float | None = None
    versus_native: float | None = None
    limit: float | None = None

    def typed(self, size: int) -> str:
        """The command line for a size."""
        return self.command.format(size=size)


def bulk_cipher(output: str) -> float:
    """Seconds for a gigabyte by ``openssl speed -mr`` of one cipher and one block size."""
    found = re.search(r"(?m)^\+F:\d+:[^:]+:([0-9.]+)", output)
    if found is None or not float(found[1]):
        raise ValueError("openssl speed printed no result")
    return 1e9 / float(found[1])


def rsa_signatures(output: str) -> float:
    """Seconds for 1000 RSA signatures by ``openssl speed -mr``."""
    found = re.search(r"(?m)^\+F2:\d+:\d+:([0-9.]+):([0-9.]+)", output)
    if found is None:
        raise ValueError("openssl speed printed no result")
    # OpenSSL 3 prints signatures a second here, older ones seconds a signature.
    value = float(found[1])
    return 1000 / value if value > 1 else 1000 * value


_OPENSSL = "speed {size} -bytes 16384 -evp "

WORKLOADS = (
    Workload("boot", "boot to power-off, warm cache", Kind.BOOT, versus_qemu=0.5),
    Workload("boot-cold", "boot to power-off, cold cache", Kind.BOOT, cold=True, versus_qemu=1.0),
    Workload(
        "sh",
        "busybox sh counting loop",
        command="count {size}",
        quick=300_000,
        full=3_000_000,
        versus_qemu=0.15,
        versus_native=2.0,
    ),
    Workload(
        "sha256",
        "sha256sum",
        command="sha256",
        quick=8,
        full=100,
        data=True,
        versus_qemu=0.35,
        versus_native=1.7,
    ),
    Workload(
        "gzip",
        "gzip",
        command="pack_gzip",
        quick=8,
        full=100,
        data=True,
        versus_qemu=0.35,
        versus_native=1.7,
    ),
    Workload(
        "xz",
        "xz -1",
        command="pack_xz",
        quick=8,
        full=100,
        packages=("xz-utils",),
        data=True,
        versus_qemu=0.35,
        versus_native=1.7,
    ),
    Workload(
        "python",
        "python3, CPU-bound script",
        command="python3 -S -E $B/cpu.py {size}",
        quick=10,
        full=60,
        packages=("python3",),
        versus_qemu=0.25,
        versus_native=2.5,
    ),
    Workload(
        "sse2",
        "matrix product, SSE2",
        command="$B/matrix sse2 {size}",
        quick=20,
        full=200,
        compiled="matrix",
        versus_qemu=0.1,
        versus_native=1.5,
    ),
    Workload(
        "avx2",
        "matrix product, AVX2",
        command="$B/matrix avx2 {size}",
        quick=20,
        full=200,
        compiled="matrix",
        versus_qemu=0.1,
        versus_native=1.5,
    ),
    Workload(
        "aes",
        "openssl AES-128-GCM, 1 GB",
        command=_OPENSSL + "aes-128-gcm",
        quick=1,
        full=3,
        packages=("openssl",),
        figure=bulk_cipher,
        versus_qemu=0.1,
        versus_native=1.5,
    ),
    Workload(
        "chacha",
        "openssl ChaCha20-Poly1305, 1 GB",
        command=_OPENSSL + "chacha20-poly1305",
        quick=1,
        full=3,
        packages=("openssl",),
        figure=bulk_cipher,
        versus_qemu=0.1,
        versus_native=1.5,
    ),
    Workload(
        "rsa",
        "openssl RSA-2048, 1000 signatures",
        command="speed {size} rsa2048",
        quick=1,
        full=3,
        packages=("openssl",),
        figure=rsa_signatures,
        versus_qemu=0.1,
        versus_native=1.5,
    ),
    Workload(
        "fork",
        "fork, exec, exit of busybox",
        command="spawn {size}",
        quick=100,
        full=1000,
        versus_qemu=0.6,
    ),
    Workload(
        "getpid",
        "getpid loop",
        command="$B/micro getpid {size}",
        quick=300_000,
        full=3_000_000,
        compiled="micro",
        versus_qemu=0.7,
    ),
    Workload(
        "pipe",
        "pipe ping-pong of two processes",
        command="$B/micro pipe {size}",
        quick=10_000,
        full=100_000,
        compiled="micro",
        versus_qemu=0.7,
    ),
    Workload(
        "mmap",
        "mmap, touch, munmap of 64 MiB",
        command="$B/micro mmap {size}",
        quick=3,
        full=20,
        compiled="micro",
        versus_qemu=0.7,
    ),
    Workload(
        "jit",
        "LuaJIT, machine code made at run time",
        command="luajit $B/jit.lua {size}",
        quick=10,
        full=100,
        packages=("luajit",),
        versus_qemu=0.5,
    ),
    Workload("memory", "host memory beyond guest RAM", Kind.MEMORY, unit="MB", limit=150),
    Workload("idle", "host CPU of an idle guest", Kind.IDLE, unit="%", limit=2),
)
"""In the order of the results."""

QUICK = ("boot", "sh", "sha256", "fork", "getpid")
"""What runs where nobody says what to run."""


def pick(names: Iterable[str]) -> list[Workload]:
    """Workloads by name, in the table's order; LookupError for a name that there is not."""
    known = {workload.name: workload for workload in WORKLOADS}
    wanted = list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise LookupError(f"no workload {', '.join(unknown)}: expected some of {', '.join(known)}")
    return [workload for workload in WORKLOADS if workload.name in wanted]
