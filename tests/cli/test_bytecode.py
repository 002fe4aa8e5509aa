"""Where compiled Python code goes, in a checkout whose sources are to stay alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ringfence

SAY = "import sys; from ringfence.cli.bytecode import keep_bytecode; keep_bytecode()\n"
SAY += "import ringfence.pacing; print(sys.pycache_prefix)"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, without compiled code."""
    source = Path(ringfence.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "src" / "ringfence", ignore=ignored)
    return tmp_path / "src"


def prefix(checkout: Path, home: Path, **more: str) -> str:
    """Where Python keeps compiled code from then on."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(checkout), "RINGFENCE_HOME": str(home), **more}
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_sources_that_may_be_written_keep_it_themselves(checkout: Path, tmp_path: Path) -> None:
    assert prefix(checkout, tmp_path) == "None"
    assert list(checkout.glob("ringfence/__pycache__/pacing.*.pyc"))


def test_sources_that_are_to_stay_alone(checkout: Path, tmp_path: Path) -> None:
    kept = tmp_path / "python"
    assert prefix(checkout, tmp_path, PYTHONDONTWRITEBYTECODE="1") == str(kept)
    assert list(kept.rglob("ringfence/pacing.*.pyc"))
    assert not list(checkout.rglob("*.pyc"))


def test_others_could_write_there(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "python").chmod(0o777)
    assert prefix(checkout, tmp_path, PYTHONDONTWRITEBYTECODE="1") == "None"


def test_nobody_s_home(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "home"
    assert prefix(checkout, nowhere, PYTHONDONTWRITEBYTECODE="1") == "None"


def test_what_the_user_says_counts(checkout: Path, tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    assert prefix(checkout, tmp_path, PYTHONPYCACHEPREFIX=own) == own
