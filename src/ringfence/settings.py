"""Sizes as people write them, and the folders where Ringfence keeps things.

Shape: plain functions over text and the environment; nothing here touches a guest.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ringfence.errors import HostError, UsageError

MINIMUM_MEMORY = 1 << 20
MAXIMUM_MEMORY = 1 << 40
_PAGE = 4096
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, what: str = "size") -> int:
    """Bytes that ``536870912``, ``512M``, ``1G`` or ``1GiB`` stand for; UsageError if none."""
    match = re.fullmatch(r"\s*(\d{1,20})\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"{what} {text!r} is not a size: expected one like 512M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_memory(size: int | str) -> int:
    """Bytes of guest RAM from ``536870912``, ``"512M"``, ``"1G"``, ``"1GiB"``.

    Raises
    ------
    UsageError
        Not a size, not a multiple of 4 KiB, or outside 1 MiB to 1 TiB.
    HostError
        More than the host has altogether.
    """
    value = parse_size(size, "memory") if isinstance(size, str) else size
    if not MINIMUM_MEMORY <= value <= MAXIMUM_MEMORY or value % _PAGE:
        raise UsageError(
            f"memory {size!r} is out of range: expected a multiple of 4 KiB from 1M to 1T"
            " (a number without a unit is bytes)"
        )
    total = host_memory()
    if total and value > total:
        raise HostError(
            f"memory {size!r} is more than this host has ({total >> 20}M): ask for less"
        )
    return value


def host_memory() -> int:
    """Bytes of RAM that the host has; 0 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def default_cache_dir() -> Path:
    """Folder of the engine's compiled code.

    ``$RINGFENCE_HOME/code``, else ``$XDG_CACHE_HOME/ringfence/code``, else the
    same below ``~/.cache`` (XDG Base Directory Specification).
    """
    home = os.environ.get("RINGFENCE_HOME")
    if home:
        return Path(home) / "code"
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "ringfence" / "code"
