"""User code that runs directly: it can't tell, but for the time it takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, PROGRAMS, Shell
from ringfence import Machine
from ringfence.engine.direct import policy
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
