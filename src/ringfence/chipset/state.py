"""Saving and restoring a device: plain versioned data, declared as a list of attribute names.

A device derives from `Saved` and names its state in ``FIELDS``; the data is a dict of ints,
strings, bytes, lists and dicts. What must follow a restore (re-arming a timer, say) goes into
``restored()``. One declaration per device keeps ``save`` and ``restore`` from drifting apart.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

from ringfence.errors import ImageError

State = dict[str, Any]
"""Plain data: ints, strings, bytes, lists and dicts of the same."""


class Saved:
    """Base of everything on the board that has state."""

    VERSION: ClassVar[int] = 1
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def save(self) -> State:
        """Return the state as plain data; the device goes on undisturbed."""
        state: State = {"version": self.VERSION}
        for name in self.FIELDS:
            state[name] = deepcopy(getattr(self, name))
        return state

    def restore(self, state: State) -> None:
        """Take over a state that `save` returned.

        Raises
        ------
        ImageError
            The version is unknown, a field is missing or has another type.
        """
        check_version(type(self).__name__, state, self.VERSION)
        for name in self.FIELDS:
            wanted = type(getattr(self, name))
            if name not in state or type(state[name]) is not wanted:
                raise ImageError(
                    f"saved {type(self).__name__}: field {name!r} is"
                    f" {type(state.get(name)).__name__}, expected {wanted.__name__};"
                    " take the snapshot anew"
                )
        for name in self.FIELDS:
            setattr(self, name, deepcopy(state[name]))
        self.restored()

    def restored(self) -> None:
        """Do what must follow a restore."""


def check_version(what: str, state: State, expected: int) -> None:
    """Raise ImageError unless ``state`` is of the expected version."""
    if state.get("version") != expected:
        raise ImageError(
            f"saved {what} has version {state.get('version')!r}, expected {expected};"
            " take the snapshot anew with this release"
        )
