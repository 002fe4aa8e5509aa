"""User code that runs directly: it can't tell, but for the time it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, PROGRAMS, Shell
from ringfence import Machine
from ringfence.engine.direct import policy
from ringfence.errors import HostError
from ringfence.images.debian import Image
from ringfence.images.root import build_initramfs

pytestmark = pytest.mark.boot


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Programs for the guest."""
    folder = tmp_path_factory.mktemp("direct")
    return {"/test/user": support.compile_c(PROGRAMS / "user.c", folder / "user")}


@pytest.fixture(scope="module")
def initrd(
    cloud: Image, programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("direct") / "initrd"
    target.write_bytes(build_initramfs(cloud.folder / "busybox", programs))
    return target


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs directly that can, however little that pays."""
    monkeypatch.setattr(policy, "PATIENCE", 0)
    monkeypatch.setattr(policy, "SHORTEST", 0.0)
    monkeypatch.setattr(policy, "ENTRIES_PER_SECOND", 1e9)
    monkeypatch.setattr(policy, "START_BUDGET", 1 << 62)
    monkeypatch.setattr(policy, "FIRST_PENALTY", 0.0)


def machine(cloud: Image, initrd: Path, cache: Path, *, direct: bool, cpus: int = 1) -> Machine:
    return Machine(
        kernel=cloud.kernel,
        initrd=initrd,
        append=APPEND,
        engine="translate",
        cache_dir=cache,
        cpus=cpus,
        direct=direct,
    )


def log(cloud: Image, initrd: Path, cache: Path, *, direct: bool) -> tuple[list[str], int]:
    """What the program says, and how many pieces of user code ran directly."""
    with machine(cloud, initrd, cache, direct=direct) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        said = shell.run("/test/user")
        return said.splitlines(), made.stats()["direct"]["runs"]


def test_a_program_that_looks_at_everything(
    cloud: Image, initrd: Path, programs: dict[str, Path], cache: Path, eager: None
) -> None:
    """Exceptions, flags, selectors, code that changes: as translated, and as on the host."""
    host = subprocess.run([programs["/test/user"]], capture_output=True, text=True, check=True)
    translated, none = log(cloud, initrd, cache, direct=False)
    direct, runs = log(cloud, initrd, cache, direct=True)
    assert none == 0
    assert runs > 1000
    assert direct == translated
    own = ("identity", "icebp")  # virtual hosts are known to take INT1 wrongly
    same = [line for line in translated if not line.startswith(own)]
    wanted = [line for line in host.stdout.splitlines() if not line.startswith(own)]
    assert same == wanted


def processes(machine: Machine) -> list[int]:
    """Numbers of the processes that run user code."""
    return [pid for vcpu in machine._parts.engine.vcpus for pid in vcpu._direct._running]


def test_several_cpus(cloud: Image, initrd: Path, cache: Path, eager: None) -> None:
    """Two programs at once, and a third that makes the kernel drop pages under them."""
    with machine(cloud, initrd, cache, direct=True, cpus=2) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        alone = shell.run("/test/user")
        shell.run("for n in 1 2; do /test/user > /tmp/$n & done; wait", timeout=120)
        for n in (1, 2):
            said = shell.run(f"cat /tmp/{n}")
            assert same_on_any_cpu(said) == same_on_any_cpu(alone)
        assert made.stats()["direct"]["runs"] > 1000


def same_on_any_cpu(said: str) -> list[str]:
    return [line for line in said.splitlines() if "identity" not in line]


def test_a_machine_without_it(cloud: Image, initrd: Path, cache: Path) -> None:
    with machine(cloud, initrd, cache, direct=False) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        shell.run("i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")
        assert made.stats()["direct"]["spaces"] == 0


def test_a_process_that_is_killed(cloud: Image, initrd: Path, cache: Path) -> None:
    """It may have had the guest's registers: then the machine ends and says so, at once."""
    with machine(cloud, initrd, cache, direct=True) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        made.console.send("i=0; while :; do i=$((i + 1)); done\n")
        deadline = time.monotonic() + support.BOOT
        while not processes(made):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        victims = processes(made)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(HostError, match="killed"):
            made.wait(support.BOOT)
        assert not any(Path(f"/proc/{pid}").exists() for pid in victims)


def wait_for_idle(made: Machine) -> None:
    """Wait until no user code has run directly for a while: a shell that has answered runs on."""
    deadline = time.monotonic() + support.BOOT
    runs, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        now = made.stats()["direct"]["runs"]
        if now != runs:
            runs, since = now, time.monotonic()


def test_a_process_that_is_killed_meanwhile(cloud: Image, initrd: Path, cache: Path) -> None:
    """It did not run: nothing is lost."""
    with machine(cloud, initrd, cache, direct=True) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        shell.run("i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done")
        wait_for_idle(made)
        for pid in processes(made):
            os.kill(pid, signal.SIGKILL)
        shell.run("i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done; echo $i")


def test_a_pause_ends_its_processes(cloud: Image, initrd: Path, cache: Path) -> None:
    """And the guest goes on; nothing is left behind when the machine is closed."""
    with machine(cloud, initrd, cache, direct=True) as made:
        made.start()
        shell = Shell(made)
        shell.take_over()
        made.console.send("i=0; while [ $i -lt 400000 ]; do i=$((i + 1)); done; echo '[['sum $i\n")
        deadline = time.monotonic() + support.BOOT
        seen: list[int] = []
        while not seen:
            assert time.monotonic() < deadline
            seen = processes(made)
        made.pause()
        assert not processes(made)
        assert not any(Path(f"/proc/{pid}").exists() for pid in seen)
        made.resume()
        made.console.wait_for("[[sum 400000", support.BOOT)
