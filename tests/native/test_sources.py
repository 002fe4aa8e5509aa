"""What a kept library is known by: the sources of every function in it."""

from __future__ import annotations

import re

import pytest

from ringfence.devices import natives as devices
from ringfence.engine.translate import natives as engine
from ringfence.native import hostcall
from ringfence.native.dialect import Unit

LIBRARIES = {
    "engine": (engine._ALL, engine._assembly(), engine._MODULES),
    "devices": (
        [root for root, _ in devices._FUNCTIONS.values()],
        hostcall.ASSEMBLY,
        devices._MODULES,
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_sources(name: str) -> None:
    """A change of a module that isn't in the list would leave old code in use."""
    roots, assembly, modules = LIBRARIES[name]
    unit = Unit(roots, re.findall(r"(?m)^\.globl (\w+)$", assembly))
    unit.ir()
    sources = {function.function.__module__ for function in unit.functions.values()}
    assert sources <= {module.__name__ for module in modules}
