"""A guest's programs give the host's results: processes, signals, memory, floating point."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from guest.support import PROGRAMS, Shell

pytestmark = pytest.mark.boot


def test_script_and_program_print_the_same_as_on_the_host(
    shell: Shell, life: Path, host_root: Path, tmp_path: Path
) -> None:
    shutil.copy(life, tmp_path / "life")
    host = subprocess.run(
        [host_root / "busybox", "sh", PROGRAMS / "life.sh", tmp_path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": str(host_root)},
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert host.endswith("status 23\n"), host
    assert "changed the sum" not in host
    said = shell.run(
        "mkdir /tmp/life && cp /test/life /tmp/life && env -i PATH=/usr/sbin:/usr/bin"
        " busybox sh /test/life.sh /tmp/life",
        timeout=90,
    )
    assert said.splitlines() == host.splitlines()


def test_the_same_again(shell: Shell) -> None:
    """What is translated by now, linked and evicted, still gives the same."""
    once = shell.run("cd /tmp/life && ./life", timeout=60, status=23)
    assert shell.run("cd /tmp/life && ./life", timeout=60, status=23) == once
