"""What all tests share: nobody's home folder is touched, signals do what they do in a terminal."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Started in the background or by nohup, the tests' children would ignore these for ever.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        default = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, default)

# Each test has a home of its own, so the commands that tests start would each compile all sources,
# where Python is told to leave no compiled code beside them.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", "") and sys.pycache_prefix is None:
    _compiled = tempfile.TemporaryDirectory(prefix="ringfence-tests-")
    os.environ["PYTHONPYCACHEPREFIX"] = _compiled.name


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and compiled code go below the test's own folder."""
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "ringfence-home"))
