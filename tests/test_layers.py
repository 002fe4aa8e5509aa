"""The house stands: imports point downward only, and its plan shows the rooms that there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_imports_point_downward_only() -> None:
    beside = Path(sys.executable).with_name("lint-imports")
    tool = str(beside) if beside.exists() else shutil.which("lint-imports")
    if tool is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [tool, "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


PLAN = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "src" / "ringfence"


def test_the_plan_shows_every_module() -> None:
    """By its name, and where modules share one, as often as there are such."""
    there = Counter(path.name for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    shown = Counter(re.findall(r"(\w+\.py)\b", PLAN))
    missing = {name for name, count in there.items() if shown[name] < count}
    assert not missing, "docs/architecture.md says nothing of these modules"


def test_the_plan_shows_nothing_else() -> None:
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", PLAN))
    gone = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    assert not gone, "docs/architecture.md tells of modules that are not there"
    folders = set(re.findall(r"`([a-z]\w*(?:/\w+)*)/`", PLAN))
    rooms = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/") if path.is_dir()}
    gone = {name for name in folders if not any(f"/{room}".endswith(f"/{name}") for room in rooms)}
    assert not gone, "docs/architecture.md tells of folders that are not there"
