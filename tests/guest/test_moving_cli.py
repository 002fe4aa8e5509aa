"""Snapshots, clones and migration from the command line, with the built-in guest."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import Commands, command

pytestmark = pytest.mark.boot


@pytest.fixture
def ringfence(tmp_path: Path, cache: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path / "home", cache)
    yield commands
    commands.stop()


def test_a_machine_is_saved_cloned_and_moved(ringfence: Commands, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    ringfence("run", "builtin", "--memory", "16M", "--engine", "translate", "-d", "--name", "one")
    ringfence("snapshot", "one", saved, "--incremental")
    ringfence("snapshot", "one", tmp_path / "second", "--base", saved)
    assert "exists" in ringfence("snapshot", "one", saved, status=2).stderr
    assert "no snapshot" in ringfence("restore", tmp_path, status=3).stderr

    ringfence("restore", tmp_path / "second", "--detach", "--verify", "--name", "again")
    clones = ringfence("clone", saved, "-n", "3", "--name", "copy").stdout.split()
    assert clones == ["copy", "copy-2", "copy-3"]
    assert ringfence.running() == sorted(["again", "copy", "copy-2", "copy-3", "one"])

    with subprocess.Popen(
        command("receive", "tcp://127.0.0.1:0", "--name", "moved"),
        env=ringfence.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as target:
        assert target.stderr is not None
        found = re.search(r"tcp://127\.0\.0\.1:\d+", target.stderr.readline())
        assert found is not None
        report = json.loads(ringfence("migrate", "copy-2", found[0], "--json").stdout)
        assert report["downtime"] <= report["total"]
        said, _ = target.communicate("echo still here\npoweroff\n", timeout=180)
        assert "\nstill here\n" in said
    assert target.returncode == 0
    assert "copy-2" not in ringfence.running()
    error = ringfence("migrate", "copy", "tcp://127.0.0.1:1", status=6).stderr
    assert "goes on here" in error
    assert "copy" in ringfence.running()
