"""All effects of the virtual CPU by name, and the modules whose sources they come from.

Nothing is listed by hand: every module beside this one is taken, and every native function in it
whose name starts with ``fx_``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import ringfence.cpu as package
from ringfence.native.dialect import NativeFunction


def _load_modules() -> tuple[ModuleType, ...]:
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    return tuple(
        importlib.import_module(f"{package.__name__}.{name}") for name in names if name != "library"
    )


def _collect_effects() -> dict[str, Any]:
    effects: dict[str, Any] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            own = isinstance(value, NativeFunction) and value.function.__module__ == module.__name__
            if own and name.startswith("fx_"):
                if name in effects:
                    raise TypeError(f"two effects are called {name}")
                effects[name] = value
    return effects


MODULES = _load_modules()
"""Modules of the virtual CPU, for hashing their sources."""

EFFECTS = _collect_effects()
"""Native functions that carry out one instruction each, by name."""
