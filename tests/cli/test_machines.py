"""Machines in other processes: listed, talked to, stopped; and what is left of a killed one."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringfence.api import names
from ringfence.api.client import list_machines

DOUBLES = Path(__file__).parents[1] / "doubles.py"
SOURCE = Path(__file__).parents[2] / "src"


def environment() -> dict[str, str]:
    """That of this test, whose RINGFENCE_HOME is its own."""
    return {**os.environ, "PYTHONPATH": str(SOURCE)}


def call(*arguments: str, typed: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ringfence.cli", *arguments],
        input=typed,
        stdin=subprocess.DEVNULL if typed is None else None,
        env=environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )


def detach(guest: str, name: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Start a machine with a guest of Python and leave it running."""
    command = [sys.executable, str(DOUBLES), guest, "run", "--kernel", "k", "--memory", "1M"]
    return subprocess.run(
        [*command, "--detach", "--name", name, *arguments],
        env=environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )


rows = list_machines


def test_from_start_to_stop() -> None:
    started = detach("obedient", "web")
    assert (started.returncode, started.stdout, started.stderr) == (0, b"web\n", b"")
    (row,) = json.loads(call("list", "--json").stdout)
    assert (row["name"], row["state"], row["outcome"]) == ("web", "running", None)
    shown = call("list").stdout.decode().splitlines()
    assert shown[0].split() == ["NAME", "STATE", "PID", "MEMORY", "CPUS", "ENGINE", "UP", "IMAGE"]
    assert shown[1].split()[:4] == ["web", "running", str(row["pid"]), "1M"]

    again = detach("obedient", "web")
    assert again.returncode == 2
    assert b"'web' runs already" in again.stderr

    assert call("pause", "web").returncode == 0
    assert rows()[0]["state"] == "paused"
    stopped = call("stop", "web")
    assert stopped.returncode == 2
    assert b"paused" in stopped.stderr
    assert call("resume", "web").returncode == 0
    assert call("resume", "web").returncode == 2
    assert call("stop", "web").returncode == 0
    assert rows() == []
    assert list(names.runtime_folder().iterdir()) == [names.runtime_folder() / ".changes"]


def test_stop_without_the_guests_help() -> None:
    detach("hang", "deaf")
    patient = call("stop", "deaf", "--timeout", "0.2")
    assert patient.returncode == 5
    assert b"stop --force deaf" in patient.stderr
    assert call("stop", "deaf", "--force").returncode == 0
    gone = call("stop", "deaf")
    assert gone.returncode == 2
    assert gone.stderr.count(b"\n") == 1
    empty = call("list")
    assert (empty.returncode, empty.stdout) == (0, b"")


def test_console_in_a_pipe() -> None:
    detach("echo", "talk")
    talk = call("console", "talk", typed=b"some words q")
    assert (talk.returncode, talk.stdout) == (0, b"ready\nsome words q")
    assert rows() == []


def test_console_on_a_terminal() -> None:
    detach("echo", "talk")
    child, terminal = pty.fork()
    if child == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "ringfence.cli", "console", "talk"],
            environment(),
        )
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 60)[0]
            seen += os.read(terminal, 4096)

    wait_for(b"Ctrl-A d detaches")
    wait_for(b"ready\n")
    os.write(terminal, b"abc\x01h")
    wait_for(b"abc")
    wait_for(b"detach; the machine goes on")
    os.write(terminal, b"\x01d")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert status == 0
    assert rows()[0]["state"] == "running"
    assert call("console", "talk", "--history", "3", typed=b"q").stdout == b"abcq"


def test_a_detached_machine_that_fails_says_why() -> None:
    missing = call("run", "-d", "--name", "x", "--kernel", "/dev/null")
    assert missing.returncode == 3
    assert missing.stderr.startswith(b"ringfence: error: ")
    assert rows() == []


def test_a_detached_machine_that_crashes_leaves_a_log() -> None:
    detach("crash", "oops")
    deadline = time.monotonic() + 60
    while rows() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"rip=0000000000001000" in names.place_of("oops").log.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_machine_is_no_longer_listed(number: signal.Signals) -> None:
    detach("hang", "victim")
    pid = names.place_of("victim").pid
    assert pid is not None
    os.kill(pid, number)
    deadline = time.monotonic() + 60
    while rows() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rows() == []
    assert detach("hang", "victim").returncode == 0
    assert call("stop", "--force", "victim").returncode == 0


def test_a_machine_that_stands_still_is_listed_as_such() -> None:
    detach("hang", "frozen")
    pid = names.place_of("frozen").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert [row["state"] for row in rows()] == ["silent"]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert call("stop", "--force", "frozen").returncode == 0
