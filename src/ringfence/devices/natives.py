"""The devices' native code: one small library, loaded by the first device that needs it.

What a device does for each descriptor of a ring is written in the native dialect, beside the device
(`_MODULES`); all else is Python. The code is compiled once and kept in the cache folder, if the
machine has one. Functions take 64-bit integers and addresses, and are over in microseconds, so they
keep Python's global lock, but where pages of RAM are still to come from another host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringfence.devices.e1000 import landing
from ringfence.devices.virtio import beside, frames, layouts, packed, queue, rules, split, transfer
from ringfence.memory import reach, summons
from ringfence.native import hostcall
from ringfence.native.library import (
    Library,
    image_path,
    prune,
    read_image,
    source_key,
    write_image,
)

_MODULES = (
    reach,
    summons,
    hostcall,
    landing,
    rules,
    queue,
    split,
    packed,
    layouts,
    frames,
    beside,
    transfer,
)
_FUNCTIONS: dict[str, tuple[Any, int]] = {
    "land": (landing.land, 1),
    "take": (layouts.take, 1),
    "give": (layouts.give, 4),
    "publish": (layouts.publish, 1),
    "ask_kicks": (layouts.ask_kicks, 1),
    "refuse_kicks": (layouts.refuse_kicks, 1),
    "store": (frames.store, 1),
    "fetch": (frames.fetch, 1),
    "serve": (transfer.serve, 1),
    "lacks_worker": (beside.lacks_worker, 1),
    "work": (beside.work, 2),
    "bring_back": (beside.bring_back, 3),
    "await_done": (beside.await_done, 2),
}
"""What Python calls, and with how many arguments."""
KIND = "devices"
KEPT_FILES = 4
"""Versions of the library that stay in the cache folder."""

Natives = Callable[..., Any]
"""Finds a function by its name; the first argument is the address of its structure.

With ``long`` behind the name it leaves Python's lock to others, as it may have to wait for RAM.
"""


def natives(cache: Path | None = None) -> Natives:
    """The library's functions; nothing is loaded before the first is asked for."""
    return functools.partial(_function, cache)


def preload(cache: Path | None) -> None:
    """Load the library, or make it, ahead of the first device."""
    _library(cache)


@functools.cache
def _function(cache: Path | None, name: str, long: bool = False) -> Any:
    return _library(cache).function(name, _FUNCTIONS[name][1], long=long)


@functools.cache
def _library(cache: Path | None) -> Library:
    path = image_path(cache, source_key(_MODULES), KIND) if cache else None
    code = read_image(path) if path else None
    if code is None:
        from ringfence.native.compiler import compile_image  # only this needs LLVM

        code = compile_image([root for root, _ in _FUNCTIONS.values()], hostcall.ASSEMBLY)
        if path is not None:
            write_image(path, code)
            prune(path.parent, f"{KIND}-*", KEPT_FILES)
    return Library(code)


UNKEPT: Natives = natives()
"""Of a library that is made anew by each process."""
