"""Real guests for tests: what they need from the host, how they are started, a talk with a shell.

Where a tool is missing, a test is skipped; but in CI (``CI`` is set) a test that can't run is a
failure. ``RINGFENCE_TEST_LONG=1`` runs what takes minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import ringfence
from ringfence import Machine

PROGRAMS = Path(__file__).parent / "programs"
APPEND = "console=ttyS0 panic=-1"
LONG = os.environ.get("RINGFENCE_TEST_LONG") == "1"
BOOT = 90.0
"""Seconds that a boot may take on a busy host, with nothing in the cache."""


def require(tool: str | None, what: str) -> str:
    """A tool's path; without it the test is skipped, or fails in CI."""
    if tool is None:
        if os.environ.get("CI"):
            pytest.fail(f"{what} is missing, and in CI every test has to run")
        pytest.skip(f"{what} is missing")
    return tool


def compile_c(source: Path, target: Path) -> Path:
    """A static program of a C file."""
    compiler = require(shutil.which("gcc") or shutil.which("cc"), "a C compiler")
    command = [compiler, "-O2", "-static", "-pthread", "-o", str(target), str(source), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@dataclass(frozen=True)
class Ended:
    """What a run of the command line gave."""

    status: int
    out: bytes
    errors: str
    seconds: float

    @property
    def text(self) -> str:
        """The console as text with plain line ends."""
        return self.out.decode("utf-8", "replace").replace("\r", "")


def command(*arguments: str | Path) -> list[str]:
    """The ``ringfence`` command with this interpreter."""
    return [sys.executable, "-m", "ringfence.cli", *map(str, arguments)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for it: the package under test is found from any folder."""
    where = str(Path(ringfence.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": where, **(extra or {})}


def run(*arguments: str | Path, typed: bytes = b"", timeout: float = BOOT) -> Ended:
    """Run ``ringfence`` to its end; stdin stays open until then only if nothing is typed."""
    began = time.monotonic()
    done = subprocess.run(
        command(*arguments),
        input=typed,
        capture_output=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )
    seconds = time.monotonic() - began
    return Ended(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"), seconds)


def boot_arguments(kernel: Path, initrd: Path, cache: Path) -> Sequence[str | Path]:
    """Arguments that boot a kernel with an initramfs, as the documentation has them."""
    return (
        *("run", "--kernel", kernel, "--initrd", initrd, "--append", APPEND),
        *("--engine", "translate", "--memory", "512M", "--cache-dir", cache),
    )


class Commands:
    """``ringfence`` with a home of its own, whose compiled code is there already."""

    def __init__(self, home: Path, cache: Path) -> None:
        home.mkdir(exist_ok=True)
        (home / "code").symlink_to(cache)
        self.environment = environment({"RINGFENCE_HOME": str(home)})

    def __call__(self, *arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done

    def running(self) -> list[str]:
        """Names of the machines that run."""
        return [row["name"] for row in json.loads(self("list", "--json").stdout)]

    def stop(self) -> None:
        """Pull all their plugs."""
        for name in self.running():
            self("stop", "--force", name)


class Shell:
    """A shell without a prompt on a machine's console: `run` gives what a command printed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._numbers = itertools.count(1)

    def take_over(self) -> None:
        """Turn the interactive shell at its prompt into one that only reads commands."""
        console = self.machine.console
        console.wait_for("~ # ", BOOT)
        loop = r'while read -r l; do eval "$l"; done'
        console.send(f"stty -echo; echo 1 > /proc/sys/kernel/printk; exec sh -c '{loop}'\n")
        assert self.run("echo here") == "here\n"

    def run(self, line: str, timeout: float = 60.0, status: int = 0) -> str:
        """What a command line wrote, with its errors; it has to end with ``status``."""
        number = next(self._numbers)
        console = self.machine.console
        console.send(f"{{ {line}; }} > /tmp/.said 2>&1 < /dev/null")
        console.send(f'; s=$?; echo "[""[{number}"; cat /tmp/.said; echo "[""$s]$s {number}]"\n')
        console.wait_for(f"[[{number}\r\n", timeout)
        said = console.wait_for(re.compile(rf"\[\d+\]\d+ {number}\]"), timeout)
        text, _, tail = said.replace("\r", "").rpartition("[")
        found = int(tail.split("]")[0])
        assert found == status, f"{line!r} gave status {found}, expected {status}:\n{text}"
        return text


class Session:
    """``ringfence`` in a process, with a talk over its stdin and stdout."""

    def __init__(self, *arguments: str | Path, program: Sequence[str] | None = None) -> None:
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [*program, *map(str, arguments)] if program else command(*arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        self.out = bytearray()
        self._seen = 0

    def type(self, data: bytes) -> None:
        """Type bytes at the guest."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def wait_for(self, text: bytes, timeout: float) -> bytes:
        """Wait until the guest has written ``text``; what came up to its end."""
        deadline = time.monotonic() + timeout
        while (at := self.out.find(text, self._seen)) < 0:
            if not self._read(deadline):
                errors = self.end(5.0).errors
                pytest.fail(f"{text!r} never came; last words: {self.out[-300:]!r}; {errors}")
        start, self._seen = self._seen, at + len(text)
        return bytes(self.out[start : self._seen])

    def end(self, timeout: float) -> Ended:
        """Wait for the end of the process."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        status = self.process.wait(max(1.0, deadline - time.monotonic()))
        assert self.process.stderr is not None
        errors = self.process.stderr.read().decode("utf-8", "replace")
        return Ended(status, bytes(self.out), errors, time.monotonic() - self._began)

    def close(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _read(self, deadline: float) -> bool:
        """Read some more; False at the end."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            pytest.fail(f"the guest was too slow; last words: {self.out[-300:]!r}")
        data = os.read(descriptor, 1 << 16)
        self.out += data
        return bool(data)


MakeInitrd = Callable[[str], Path]
"""Makes an initramfs whose /init is a script."""


def cpu_seconds(pid: int) -> float:
    """Host CPU time that a process has used, all its threads together."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
