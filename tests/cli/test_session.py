"""In a pipe: stdout is exactly the guest's console, and each ending has its status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringfence.cli import app

DOUBLES = Path(__file__).parents[1] / "doubles.py"
SOURCE = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}


def start(guest: str, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """The command, with a guest of Python, in pipes."""
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, str(DOUBLES), guest, "run", "--kernel", "k", "--memory", "1M", *arguments],
        env=ENVIRONMENT,
        **{**given, **options},
    )


@pytest.mark.parametrize(
    ("guest", "arguments", "status", "out", "err"),
    [
        ("hello", (), 0, b"hello\r\n\x00\xff end", b""),
        ("large", (), 0, b"".join(b"%08d" % number * 100 for number in range(2000)), b""),
        (
            "crash",
            (),
            4,
            b"oh",
            b"ringfence: error: the guest crashed; its registers:\n"
            b"rip=0000000000001000 rax=0000000000000007\ncr2=0000000000000000\n",
        ),
        (
            "reset",
            (),
            7,
            b"again ",
            b"ringfence: error: the guest asked for a reset"
            b" (use --on-reset reboot to boot it again)\n",
        ),
        (
            "hang",
            ("--timeout", "0.2"),
            5,
            b"ready\n",
            b"ringfence: error: the guest did not power off within 0.2 s\n",
        ),
        (
            "boom",
            (),
            70,
            b"",
            b"ringfence: error: internal error: RuntimeError: a bug of ours"
            b" (set RINGFENCE_DEBUG=1 for the traceback)\n",
        ),
    ],
)
def test_endings(
    guest: str, arguments: tuple[str, ...], status: int, out: bytes, err: bytes
) -> None:
    process = start(guest, *arguments)
    assert process.communicate(timeout=60) == (out, err)
    assert process.returncode == status


def test_stdin_goes_to_the_guest_and_its_end_is_no_end() -> None:
    process = start("echo")
    out, err = process.communicate(b"\x01x bytes \xff\n q", timeout=60)
    assert (out, err, process.returncode) == (b"ready\n\x01x bytes \xff\n q", b"", 0)
    process = start("echo", "--timeout", "0.5", stdin=subprocess.DEVNULL)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"ready\n", 5)


def test_stdin_from_a_file_and_closed(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"x" * 100_000 + b"q")
    with script.open("rb") as opened:
        process = start("echo", stdin=opened)
        out, err = process.communicate(timeout=60)
    assert (err, process.returncode) == (b"", 0)
    assert out == b"ready\n" + script.read_bytes()
    process = start("hello", stdin=None, preexec_fn=lambda: os.close(0))
    assert process.communicate(timeout=60) == (b"hello\r\n\x00\xff end", b"")
    assert process.returncode == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("guest", ["hang", "flood"])
def test_signals(guest: str, number: signal.Signals, status: int) -> None:
    """Also while stdout is full and nobody reads it."""
    process = start(guest)
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == status
    _, err = process.communicate()
    assert err == b""


def test_a_full_pipe_both_ways_still_obeys_signals() -> None:
    """The guest waits for a reader that never comes, and so does what is typed."""
    with start("echo") as process:
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        taken = 0
        for _ in range(100):
            try:
                taken += os.write(process.stdin.fileno(), b"x" * 65536)
            except BlockingIOError:
                time.sleep(0.01)
        assert taken < 1 << 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


def test_nobody_reads_stdout() -> None:
    with start("flood") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_a_full_disk_is_the_hosts_problem() -> None:
    with Path("/dev/full").open("wb") as full, start("hello", stdout=full) as process:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 6
        assert err == (
            b"ringfence: error: the guest's output can't be written: No space left on device\n"
        )


def test_a_trace_that_nobody_reads_does_not_hold_up_a_signal() -> None:
    with start("flood", "--trace", "exits", stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        process.stderr.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_statistics_and_trace(tmp_path: Path) -> None:
    target = tmp_path / "stats.json"
    process = start("hello", "--stats", str(target), "--trace", "exits")
    out, err = process.communicate(timeout=60)
    assert out == b"hello\r\n\x00\xff end"
    assert b"0x0000000000001000 port_out port=0x3f8 size=1 value=0x68 (0.5 us)\n" in err
    stats = json.loads(target.read_text())
    assert stats["exits"]["port_out"] == {"count": 13, "ns": 6500}
    assert stats["machine"]["outcome"] == "power-off"

    process = start("hang", "--stats", "-", "--timeout", "0.2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    for word in (b"port_out", b"interrupts", b"75.0%", b"ringfence: error: the guest did not"):
        assert word in err


def test_time_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Measured for whoever looks (pytest -s); a busy machine is no failure."""
    spent = []
    for _ in range(3):
        before = time.monotonic()
        command = [sys.executable, "-m", "ringfence.cli", "--help"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
        spent.append(time.monotonic() - before)
        assert done.returncode == 0
    with capsys.disabled():
        print(f"\nringfence --help: {min(spent):.2f} s", file=sys.stderr)


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise KeyError("inside")

    monkeypatch.setattr("ringfence.cli.doctor.show", fail)
    monkeypatch.setenv("RINGFENCE_DEBUG", "1")
    with pytest.raises(KeyError):
        app.main(["doctor"])
