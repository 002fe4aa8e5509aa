"""The sides of a comparison: how each is started, and the talk with its shell.

All sides look the same from here: a process whose stdin and stdout are a shell's (of the host in
a chroot, or of a guest by its serial console) that runs ``guest/session.sh``.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.image import Root

APPEND = "console=ttyS0 panic=-1"
BOOT_TIMEOUT = 120.0
LEAVE_TIMEOUT = 15.0


class SideFailed(Exception):
    """A side ended, or did not answer in time; the text says how."""


@dataclass(frozen=True)
class Side:
    """One column of the comparison.

    Attributes
    ----------
    name : str
        "native", "qemu-max", "qemu-qemu64", "ringfence".
    kind : str
        "native", "qemu" or "ringfence".
    cpu : str
        QEMU's ``-cpu``.
    """

    name: str
    kind: str
    cpu: str = ""

    def command(
        self,
        kernel: Path,
        initrd: Path,
        memory: int,
        cache: Path,
        stats: Path | None = None,
    ) -> list[str]:
        """How to start a guest on this side; ``memory`` in MiB."""
        if self.kind == "qemu":
            return [
                "qemu-system-x86_64",
                *("-accel", "tcg", "-cpu", self.cpu, "-smp", "1", "-m", f"{memory}M"),
                *("-kernel", str(kernel), "-initrd", str(initrd), "-append", APPEND),
                *("-serial", "stdio", "-display", "none", "-monitor", "none"),
                *("-no-reboot", "-nodefaults"),
            ]
        # An installed package has its bytecode, even where nobody writes it beside the sources.
        return [
            *("env", "-u", "PYTHONDONTWRITEBYTECODE"),
            f"PYTHONPYCACHEPREFIX={cache.parent / 'bytecode'}",
            *(sys.executable, "-m", "ringfence.cli", "run", "--engine", "translate"),
            *("--kernel", str(kernel), "--initrd", str(initrd), "--append", APPEND),
            *("--memory", f"{memory}M", "--cache-dir", str(cache)),
            *(("--stats", str(stats)) if stats else ()),
        ]


NATIVE = Side("native", "native")
RINGFENCE = Side("ringfence", "ringfence")


def qemu(cpu: str) -> Side:
    """QEMU's translator with a CPU model."""
    return Side(f"qemu-{cpu}", "qemu", cpu)


def unavailable(side: Side) -> str:
    """Why a side can't run on this host; empty where it can."""
    if side.kind == "qemu" and shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed (Debian: qemu-system-x86)"
    if side.kind == "native":
        try:
            subprocess.run([*_unshare(), "true"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "the native side needs namespaces (unshare), which this host does not allow"
    return ""


def native_command(folder: Path) -> list[str]:
    """A shell of the host inside the root file system, in namespaces of its own."""
    enter = (
        'mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" &&'
        ' mount -t tmpfs tmpfs "$1/tmp" && exec chroot "$1" /usr/bin/busybox sh /bench/session.sh'
    )
    return [*_unshare(), "sh", "-c", enter, "sh", str(folder)]


def _unshare() -> list[str]:
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", "--pid", "--fork", *mapped]


class Talk:
    """A process that runs a shell for us; times are taken when its output arrives here."""

    def __init__(self, command: list[str]) -> None:
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()
        self._buffer = bytearray()
        self._numbers = itertools.count(1)

    def send(self, text: str) -> None:
        """Type a text."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._epitaph()) from None

    def expect(self, pattern: bytes, timeout: float) -> tuple[float, bytes, bytes]:
        """Wait for a pattern: when it came, what matched, and the output in front of it."""
        search = re.compile(pattern)
        deadline = time.perf_counter() + timeout
        now = time.perf_counter()
        while True:
            match = search.search(self._buffer)
            if match:
                before, found = bytes(self._buffer[: match.start()]), match[0]
                del self._buffer[: match.end()]
                return now, bytes(found), before
            left = deadline - time.perf_counter()
            if left <= 0 or not select.select([self._out], [], [], left)[0]:
                raise SideFailed(f"no answer within {timeout:g} s; last words: {self._tail()}")
            data = os.read(self._out, 1 << 16)
            now = time.perf_counter()
            if not data:
                raise SideFailed(self._epitaph())
            self._buffer += data

    def step(self, command: str, timeout: float) -> tuple[float, int, str]:
        """Run a command of the shell: seconds between its markers, its status, its output."""
        number = next(self._numbers)
        self.send(f"step {number} {command}\n")
        began, _, _ = self.expect(b"<<begin %d>>\r?\n" % number, timeout)
        ended, found, output = self.expect(rb"<<end %d \d+>>" % number, timeout)
        status = int(found.strip(b"<>").split()[-1])
        return ended - began, status, output.decode("utf-8", "replace").replace("\r", "")

    def leave(self) -> None:
        """End the shell: a guest powers off after it, the host's is just over."""
        self.send("exit_session\n")
        self.wait(LEAVE_TIMEOUT)

    def wait(self, timeout: float) -> float:
        """Wait for the process to end by itself; when it did."""
        deadline = time.perf_counter() + timeout
        while True:
            left = deadline - time.perf_counter()
            if left <= 0 or not select.select([self._out], [], [], left)[0]:
                raise SideFailed(f"did not end within {timeout:g} s; {self._tail()}")
            data = os.read(self._out, 1 << 16)
            if not data:
                break
            self._buffer += data
        status = self.process.wait(max(1.0, deadline - time.perf_counter()))
        ended = time.perf_counter()
        if status:
            raise SideFailed(self._epitaph())
        return ended

    def close(self) -> None:
        """End the process if it still runs."""
        process = self.process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def cpu_seconds(self) -> float:
        """Host CPU time that the process has used, all its threads together."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except OSError:
                continue
        return total / 1e9

    def memory_beyond(self, ram: int) -> tuple[float, float]:
        """Megabytes of host memory beside the guest's RAM of ``ram`` MiB, and those in it."""
        return memory_beyond(self.process.pid, ram)

    def _tail(self) -> str:
        return repr(bytes(self._buffer[-200:]).decode("utf-8", "replace"))

    def _epitaph(self) -> str:
        """How the process ended, with the last it said."""
        try:
            status: int | None = self.process.wait(5)
        except subprocess.TimeoutExpired:
            status = None
        assert self.process.stderr is not None
        errors = self.process.stderr.read() if status is not None else b""
        text = " | ".join(errors.decode("utf-8", "replace").strip().splitlines()[:6])
        return f"ended with status {status}; {text}; last words: {self._tail()}"


def open_talk(side: Side, root: Root, memory: int, cache: Path, stats: Path | None) -> Talk:
    """Start a side and wait until its shell is ready."""
    if side.kind == "native":
        talk = Talk(native_command(root.folder))
    else:
        talk = Talk(side.command(root.image.kernel, root.initrd, memory, cache, stats))
    try:
        talk.expect(b"<<ready>>", BOOT_TIMEOUT)
    except BaseException:
        talk.close()
        raise
    return talk


def memory_beyond(pid: int, ram: int) -> tuple[float, float]:
    """Megabytes (10^6) of a process's memory that lie beside guest RAM, and those in it.

    Guest RAM is the mapping named so, or the anonymous one of just that size. A file in memory
    that is mapped twice (a code cache) counts once.
    """
    beside = inside = 0
    name, size, values = "", 0, {"Rss": 0, "Pss": 0}

    def account() -> None:
        nonlocal beside, inside
        shared = values["Pss"] if "memfd" in name else values["Rss"]
        if "ringfence-ram" in name or (size == ram << 20 and not name.startswith("/")):
            inside += values["Rss"]
        else:
            beside += shared

    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line)
        if match:
            account()
            name, size = match[3], int(match[2], 16) - int(match[1], 16)
            values = {"Rss": 0, "Pss": 0}
        elif line.startswith(("Rss:", "Pss:")):
            key, value = line.split()[:2]
            values[key[:-1]] = int(value)
    account()
    return beside * 1024 / 1e6, inside * 1024 / 1e6
