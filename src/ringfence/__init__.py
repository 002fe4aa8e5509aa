"""Ringfence: a virtual machine monitor in Python.

``from ringfence import Machine`` is the whole API that most programs need; the names are loaded
on first use, so that ``import ringfence`` (and with it ``ringfence --help``) stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfence.engine import StopReason
    from ringfence.errors import (
        GuestCrash,
        GuestReset,
        GuestTimeout,
        HostError,
        ImageError,
        RingfenceError,
        UsageError,
    )
    from ringfence.machine import Machine

__version__ = "0.1.0"

_HOME = {
    "Machine": "ringfence.machine",
    "StopReason": "ringfence.engine",
    "GuestCrash": "ringfence.errors",
    "GuestReset": "ringfence.errors",
    "GuestTimeout": "ringfence.errors",
    "HostError": "ringfence.errors",
    "ImageError": "ringfence.errors",
    "RingfenceError": "ringfence.errors",
    "UsageError": "ringfence.errors",
}
"""Where each public name lives."""

__all__ = [
    "GuestCrash",
    "GuestReset",
    "GuestTimeout",
    "HostError",
    "ImageError",
    "Machine",
    "RingfenceError",
    "StopReason",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ringfence' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)
