"""A booted guest that moves from process to process without noticing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import support
from guest.support import PROGRAMS, Shell, environment
from ringfence import Machine
from ringfence.api.client import Client
from ringfence.engine import StopReason
from ringfence.errors import HostError
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image
from ringfence.memory.missing import Userfault
from ringfence.state import send
from ringfence.state.receive import Allowed
from ringfence.state.send import Progress
from ringfence.state.wire import MoveFailed, Tls
from state.certificates import make_authority, make_tls, needs_openssl
from state.moving import Line, Target, cut_at, nothing

pytestmark = pytest.mark.boot

MOVES = 20


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled watcher."""
    return support.compile_c(PROGRAMS / "steady.c", tmp_path_factory.mktemp("steady") / "steady")


@pytest.fixture
def watched(
    request: pytest.FixtureRequest, cloud: Image, steady: Path, cache: Path, tmp_path: Path
) -> Iterator[Machine]:
    """A guest that watches its clocks, its memory and its arithmetic; parameter: its TSC's rate."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(build_initramfs(cloud.folder / "busybox", {"/test/steady": steady}))
    machine = Machine(
        kernel=cloud.kernel,
        initrd=initrd,
        append="console=ttyS0 panic=-1",
        engine="translate",
        memory="192M",
        cache_dir=cache,
        tsc_hz=getattr(request, "param", None),
    )
    try:
        machine.start()
        Shell(machine).take_over()
        machine.console.send("/test/steady 16 &\n")
        machine.console.wait_for("steady", 90)
        yield machine
    finally:
        machine.close()


def moved(machine: Machine, address: str, cache: Path) -> tuple[Machine, float]:
    """The machine behind a move within this process, and its downtime."""
    listening, arrived = threading.Event(), threading.Event()
    box: list[object] = []

    def wait() -> None:
        def tell(where: str) -> None:
            box.append(where)
            listening.set()

        allowed = Allowed(engine="translate", cache_dir=cache)
        box.append(Machine.receive(address, allowed, listening=tell))
        arrived.set()

    threading.Thread(target=wait, daemon=True).start()
    assert listening.wait(90)
    report = machine.migrate(str(box[0]))
    assert arrived.wait(90)
    machine.close()
    arrival = box[1]
    assert isinstance(arrival, Machine)
    return arrival, report.downtime


def test_twenty_moves_there_and_back(watched: Machine, cache: Path, tmp_path: Path) -> None:
    machine = watched
    try:
        for number in range(MOVES):
            address = f"unix://{tmp_path}/{number}" if number % 2 else "tcp://127.0.0.1:0"
            machine, _ = moved(machine, address, cache)
            machine.console.wait_for(re.compile(r"steady \d+\r\n"), 90)
            assert "TROUBLE" not in machine.console.output
        shell = Shell(machine)
        said = shell.run("pidof steady; dmesg")
        assert not re.search(r"rcu.*stall|lockup|unstable|backwards|BUG|Oops", said)
        assert "TROUBLE" not in machine.console.output
    finally:
        machine.close()


@pytest.mark.parametrize("watched", [2_000_000_000], indirect=True)
def test_two_go_on_from_one_snapshot_of_a_host_with_another_rate(
    watched: Machine, cache: Path, tmp_path: Path
) -> None:
    """On a host of 2 GHz the guest's counter would be the host's; here it is scaled."""
    watched.snapshot(tmp_path / "saved")
    watched.stop()
    clones = [
        Machine.restore(tmp_path / "saved", engine="translate", cache_dir=cache) for _ in range(2)
    ]
    try:
        for clone in clones:
            clone.start()
        for _ in range(4):
            for clone in clones:
                clone.console.wait_for(re.compile(r"steady \d+\r\n"), 90)
        for clone in clones:
            said = Shell(clone).run("pidof steady; dmesg")
            assert not re.search(r"rcu.*stall|lockup|unstable|backwards|BUG|Oops", said)
            assert "TROUBLE" not in clone.console.output
    finally:
        for clone in clones:
            clone.close()


TARGET = """
import os
import sys
from functools import partial
from pathlib import Path
from ringfence import Machine
from ringfence.api import names
from ringfence.api.server import published
from ringfence.memory.missing import Userfault
from ringfence.state import arrival
from ringfence.state.receive import Allowed
from ringfence.state.wire import Tls
arrival.PATIENCE = float(os.environ["TARGET_PATIENCE"])
arrival.Userfault = partial(Userfault, user_only="TARGET_USER_ONLY" in os.environ)
files = [Path(each) for each in sys.argv[3:]]
machine = Machine.receive(
    sys.argv[1], Allowed(engine="translate", cache_dir=Path(sys.argv[2])),
    tls=Tls(*files) if files else None,
    listening=lambda where: print(where, flush=True),
    progress=lambda stage, come: print(stage, flush=True),
)
claimed = names.claim(f"arrived-{os.getpid()}")
reachable = published(machine, claimed.__enter__())
reachable.__enter__()
print("here", flush=True)
for _ in range(3):
    machine.console.wait_for("steady", 90)
while machine.incomplete:
    machine.console.wait_for("steady", 90)
print("steady" if "TROUBLE" not in machine.console.output else "trouble", flush=True)
"""


def start_target(
    cache: Path, tls: Tls | None = None, **settings: str
) -> tuple[subprocess.Popen[str], str]:
    """A process that receives, and where; ``settings`` are in its environment."""
    files = map(str, (tls.certificate, tls.key, tls.authority)) if tls else ()
    process = subprocess.Popen(
        [sys.executable, "-c", TARGET, "tcp://127.0.0.1:0", str(cache), *files],
        env={**environment(), "TARGET_PATIENCE": "3", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_the_target_is_killed_then_the_source(watched: Machine, cache: Path) -> None:
    """Killed before it has the machine, a target leaves it here; afterwards nobody needs us."""
    for stage in ("connect", "memory", "stop"):
        process, address = start_target(cache)

        def kill(progress: object, stage: str = stage, process: object = process) -> None:
            if getattr(progress, "stage", "") == stage:
                assert isinstance(process, subprocess.Popen)
                process.send_signal(signal.SIGKILL)
                process.wait()

        with pytest.raises(Exception, match="goes on here"):
            watched.migrate(address, progress=kill)  # type: ignore[arg-type]
        process.communicate()
        watched.console.wait_for("steady", 90)
    process, address = start_target(cache)
    watched.migrate(address)
    watched.close()
    said, _ = process.communicate(timeout=180)
    assert said.splitlines()[-1] == "steady"


# ---- RAM that follows


@pytest.fixture
def hasty(watched: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A guest of which a migration believes that it writes too fast."""
    try:
        Userfault().close()
    except HostError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(send, "SHRINKING", -1.0)
    return watched


def test_ram_follows_the_guest(hasty: Machine, cache: Path) -> None:
    process, address = start_target(cache)
    told: list[Progress] = []
    report = hasty.migrate(address, downtime=0.0, postcopy=True, progress=told.append)
    assert hasty.outcome is StopReason.MIGRATED
    assert report.followed > 0
    assert told[-1].stage in ("handover", "follow")
    hasty.close()
    said, _ = process.communicate(timeout=180)
    assert said.splitlines()[-1] == "steady"


@needs_openssl
def test_ram_follows_the_guest_over_tls(hasty: Machine, cache: Path, tmp_path: Path) -> None:
    """A line that is cut while it does is made anew, by those who trust each other."""
    authority = make_authority(tmp_path, "authority")
    target, source = (make_tls(tmp_path, name, authority) for name in ("target", "source"))
    process, address = start_target(cache, target)
    line = Line(tmp_path, address)
    line.changes[:] = [(cut_at(20_000), nothing), (nothing, nothing)]
    report = hasty.migrate(line.address, tls=source, downtime=0.0, postcopy=True)
    assert not line.changes
    assert report.followed > 0
    hasty.close()
    said, _ = process.communicate(timeout=180)
    line.close()
    assert said.splitlines()[-1] == "steady"


def test_the_line_is_cut_while_ram_follows_and_comes_back(
    hasty: Machine, cache: Path, tmp_path: Path
) -> None:
    """Where the host lets nobody wait for pages but user mode, as most do for their users."""
    process, address = start_target(cache, TARGET_USER_ONLY="1")
    line = Line(tmp_path, address)
    line.changes[:] = [(cut_at(30_000), nothing), (cut_at(20_000), nothing), (nothing, nothing)]
    hasty.migrate(line.address, downtime=0.0, postcopy=True)
    assert not line.changes
    hasty.close()
    said, _ = process.communicate(timeout=180)
    line.close()
    assert said.splitlines()[-1] == "steady"


def test_the_line_is_cut_for_good(
    hasty: Machine, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target gives up what it can't complete; here the machine is as it was when it moved."""
    monkeypatch.setattr("ringfence.state.remainder.PATIENCE", 0.5)
    process, address = start_target(cache, TARGET_PATIENCE="8")
    line = Line(tmp_path, address, once=True)
    line.changes[:] = [(cut_at(30_000), nothing), (nothing, nothing)]
    # On a slow host the target may not have said yet that it runs.
    with pytest.raises(MoveFailed, match=r"stays paused here"):
        hasty.migrate(line.address, downtime=0.0, postcopy=True)
    with Client(f"arrived-{process.pid}") as client:  # who waits for pages keeps nobody waiting
        assert client.call("status")["state"] == "running"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "the machine is lost" in errors
    hasty.resume()
    hasty.console.wait_for("steady", 90)
    assert "TROUBLE" not in hasty.console.output
    line.close()


def test_where_ram_can_not_follow(
    hasty: Machine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise HostError("not permitted")

    monkeypatch.setattr("ringfence.state.receive.Arrival", refuse)
    target = Target("tcp://127.0.0.1:0", Allowed(engine="translate", cache_dir=cache))
    with pytest.raises(MoveFailed, match=r"userfaultfd is not permitted .*; it goes on here"):
        hasty.migrate(target.address, postcopy=True)
    target.close()
