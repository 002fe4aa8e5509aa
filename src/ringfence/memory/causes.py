"""Interrupt causes, the mask of those that are wanted, and the line, in one word.

A device raises causes from any thread; a driver reads and thereby clears them, masks and unmasks.
All that decides about the line is one 64-bit word, and every change of it one compare-and-exchange.
So native code may carry out the driver's part beside Python, without a lock: whoever comes second
sees what the first has done, and acts on it.

| bits | |
|---|---|
| 0 to 30 | causes |
| 31 | the line, as it was driven last |
| 32 to 62 | the mask: causes that are wanted |

The line is Python's, as it leads to the interrupt controllers. What raises it is never done here:
the driver's access leaves guest code. What lets it fall is done here, and the line follows when
guest code is left the next time (`registers.RegisterMap.posted`), before anything that could tell
the difference: an end of interrupt, or the controllers' registers.
"""

from __future__ import annotations

import ctypes

from ringfence.native.atomics import compare_exchange
from ringfence.native.dialect import atomic_cas64, load64, native, native_inline, store32

CAUSES = 0x7FFF_FFFF
LINE = 1 << 31
MASK_SHIFT = 32
TRIES = 8
"""Times that native code tries to change the word before it leaves that to Python."""


LEFT, DONE, FELL = 0, 1, 2
"""What native code has done: nothing, Python has to; all of it; all but letting the line fall."""


@native_inline
def falls(word: int) -> int:
    """DONE, or FELL where the line is asserted without a cause."""
    if word & LINE and not word & (word >> MASK_SHIFT) & CAUSES:
        return FELL
    return DONE


@native
def take_causes(word: int, result: int) -> int:
    """Store all causes (32 bits) at a host address and forget them, as reading the register does.

    ``word`` is the host address of the causes' word.
    """
    for _ in range(TRIES):
        old = load64(word)
        if atomic_cas64(word, old, old & ~CAUSES):
            store32(result, old & CAUSES)
            return falls(old & ~CAUSES)
    return LEFT


@native
def unmask_causes(word: int, bits: int) -> int:
    """Want causes; LEFT where one is noted and the line not asserted yet."""
    for _ in range(TRIES):
        old = load64(word)
        new = old | (bits & CAUSES) << MASK_SHIFT
        if new & (new >> MASK_SHIFT) & CAUSES and not new & LINE:
            return LEFT
        if atomic_cas64(word, old, new):
            return DONE
    return LEFT


@native
def mask_causes(word: int, bits: int) -> int:
    """Want causes no more."""
    for _ in range(TRIES):
        old = load64(word)
        new = old & ~((bits & CAUSES) << MASK_SHIFT)
        if atomic_cas64(word, old, new):
            return falls(new)
    return LEFT


def unmasked(word: int) -> int:
    """The causes of a word that are noted and wanted."""
    return word & word >> MASK_SHIFT & CAUSES


class CauseWord:
    """Python's side; the board's lock is held, so that only native code interferes.

    Parameters
    ----------
    address : int
        Of the word in the host, 8-aligned.
    """

    def __init__(self, address: int) -> None:
        self._word = ctypes.c_uint64.from_address(address)
        self._address = address
        self._exchange = compare_exchange()

    @property
    def value(self) -> int:
        """The word."""
        return self._word.value

    @property
    def causes(self) -> int:
        """What is noted."""
        return self._word.value & CAUSES

    @property
    def mask(self) -> int:
        """What is wanted."""
        return self._word.value >> MASK_SHIFT

    @property
    def line(self) -> bool:
        """How the line was driven last."""
        return bool(self._word.value & LINE)

    def note(self, bits: int) -> None:
        """Note causes."""
        self._change(0, bits & CAUSES)

    def forget(self, bits: int) -> int:
        """Forget causes; return those that were noted, of all."""
        return self._change(bits & CAUSES, 0) & CAUSES

    def want(self, bits: int) -> None:
        """Unmask causes."""
        self._change(0, (bits & CAUSES) << MASK_SHIFT)

    def refuse(self, bits: int) -> None:
        """Mask causes."""
        self._change((bits & CAUSES) << MASK_SHIFT, 0)

    def put(self, causes: int, mask: int, line: bool) -> None:
        """Replace all of it, while no guest runs or because it is reset."""
        word = causes & CAUSES | (mask & CAUSES) << MASK_SHIFT | (LINE if line else 0)
        self._change((1 << 64) - 1, word)

    def drive(self) -> bool | None:
        """Let the line follow the causes; what it is now if it has changed, None otherwise."""
        while True:
            old = self._word.value
            wanted = bool(unmasked(old))
            if wanted == bool(old & LINE):
                return None
            if self._exchange(self._address, old, old ^ LINE) == old:
                return wanted

    def _change(self, clear: int, add: int) -> int:
        """Clear and set bits in one step; the word as it was."""
        while True:
            old = self._word.value
            if self._exchange(self._address, old, old & ~clear | add) == old:
                return old
