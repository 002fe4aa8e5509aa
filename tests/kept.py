"""Waiting for the engine's optimized code, which another process makes."""

from __future__ import annotations

import time
from pathlib import Path


def kept_code(folder: Path) -> Path:
    """The optimized code that a process of the engine's leaves in its cache folder before long."""
    for _ in range(600):
        found = list(folder.glob("native-*.o"))
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError("nothing was kept")
