"""What all tests share: nobody's home folder is touched."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and translations go below the test's own folder."""
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path / "ringfence-home"))
