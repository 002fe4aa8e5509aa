"""What all tests share: nobody's home folder is touched, signals do what they do in a terminal."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# Started in the background or by nohup, the tests' children would ignore these for ever.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        default = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, default)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and compiled code go below the test's own folder."""
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "ringfence-home"))
