"""What a machine is made of as plain data, and whether this host can have such a machine.

`describe` writes a `MachineConfig` field by field, so that one that is added later is not
forgotten; `configured` reads it back and checks every type. What only exists in a process
(callables behind named ports) is described by name.

**CPU features.** A guest has looked at CPUID once and relies on it for good. So a description lists
the features that the guest was offered, and the machine that goes on offers exactly these; a host
that lacks one of them can't have the machine.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ringfence.assembly import MachineConfig
from ringfence.boot.firmware import Firmware
from ringfence.engine import EngineConfig
from ringfence.errors import ImageError
from ringfence.firmware import TestDevices
from ringfence.pacing import Pacing
from ringfence.sharing.options import ShareOptions
from ringfence.storage.options import DiskOptions
from ringfence.storage.seed import Seed

CLASS = "class"
_CLASSES: dict[str, Any] = {
    each.__name__: each
    for each in (
        MachineConfig,
        EngineConfig,
        DiskOptions,
        ShareOptions,
        Pacing,
        TestDevices,
        Firmware,
        Seed,
    )
}
_UNSAID = {"cache_dir"}
"""Fields that concern the host only and are not told."""


def describe(config: MachineConfig) -> dict[str, Any]:
    """A machine's configuration as plain data; paths become absolute."""
    described = _describe(config)
    assert isinstance(described, dict)
    return described


def _describe(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and type(value).__name__ in _CLASSES:
        fields = [each.name for each in dataclasses.fields(value) if each.name not in _UNSAID]
        return {CLASS: type(value).__name__} | {
            name: _describe(getattr(value, name)) for name in fields
        }
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        return tuple(_describe(each) for each in value)
    if isinstance(value, Mapping):
        return {name: _describe(each) for name, each in value.items()}
    if callable(value):
        return None  # who takes what a guest writes is a matter of the process
    if isinstance(value, frozenset):
        return tuple(sorted(value))
    return value


def configured(described: Any) -> MachineConfig:
    """The configuration that was described.

    Raises
    ------
    ImageError
        It is of another release or damaged.
    """
    try:
        config = _rebuild(described, MachineConfig)
    except (TypeError, ValueError, KeyError) as error:
        raise ImageError(
            f"the machine's description can't be understood ({error}): it is damaged or of another"
            " release"
        ) from error
    assert isinstance(config, MachineConfig)
    return config


def _rebuild(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` says; TypeError if it can't be that."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for each in arguments:
            try:
                return _rebuild(value, each)
            except TypeError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, tuple):
        many = arguments[-1] is Ellipsis
        if not many and len(value) != len(arguments):
            raise TypeError(f"{len(value)} items where {hint} was expected")
        hints = arguments[:1] * len(value) if many else arguments
        return tuple(_rebuild(each, one) for each, one in zip(value, hints, strict=True))
    elif origin is frozenset and isinstance(value, tuple):
        return frozenset(_rebuild(each, arguments[0]) for each in value)
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {_rebuild(name, str): _nobody for name in value}
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif dataclasses.is_dataclass(hint):
        return _rebuild_class(value, hint)
    elif isinstance(hint, type) and isinstance(value, hint) and type(value) in (hint, *_PATHS):
        return value
    raise TypeError(f"{value!r} where {hint} was expected")


_PATHS = (type(Path()),)


def _nobody(data: bytes) -> None:
    """Takes what a guest writes to a port that nobody listens at."""


def _rebuild_class(value: Any, hint: Any) -> Any:
    if not isinstance(value, dict) or value.get(CLASS) != hint.__name__:
        raise TypeError(f"{hint.__name__} was expected")
    hints = get_type_hints(hint)
    unknown = set(value) - set(hints) - {CLASS}
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    return hint(**{name: _rebuild(value[name], hints[name]) for name in hints if name in value})
