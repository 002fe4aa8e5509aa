"""The symbols that a Linux kernel carries in itself, for its own backtraces (kallsyms).

Distributions strip their kernels, but not of these: names, compressed by a table of 256 tokens, and
addresses, as 32-bit distances. Nothing says where they are. So the token table is looked for, by
the digits that are always in it; its index, which follows, says where it begins; in front of it are
the markers, which say where every 256th name is and ascend from 0, and in front of these the names,
which tell their beginning by leading to each of the markers. A wrong guess passes none of these.

Sources: Linux, scripts/kallsyms.c, kernel/kallsyms.c and kallsyms_internal.h (CONFIG_KALLSYMS,
KALLSYMS_BASE_RELATIVE and KALLSYMS_ABSOLUTE_PERCPU; the order of tables up to 6.3 and since 6.4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ringfence.errors import ImageError

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS = 256
_CHUNK = 256
"""Names a marker."""
_STEP_MIN, _STEP_MAX = 2 * _CHUNK, 256 * _CHUNK
"""Bytes between two markers."""
_KERNEL_HALF = 0xFFFF << 48


@dataclass(frozen=True, slots=True)
class Symbol:
    """A symbol: ``kind`` is a letter as nm(1) has it, small for a local one."""

    address: int
    kind: str
    name: str


def read_kallsyms(data: bytes) -> list[Symbol]:
    """The symbols in a kernel's read-only data, by address.

    Raises
    ------
    ImageError
        There are none, or they are laid out in a way that is not known here.
    """
    at = data.find(_DIGITS)
    while at >= 0:
        table = _Tables.find(data, at)
        if table is not None:
            return table.symbols()
        at = data.find(_DIGITS, at + 1)
    raise ImageError("the kernel has no symbols (kallsyms) in itself: expected CONFIG_KALLSYMS")


@dataclass(frozen=True)
class _Tables:
    """Where the parts are."""

    data: bytes
    tokens: tuple[bytes, ...]
    names: int
    """Offset of the compressed names."""
    count: int
    behind: int
    """Offset behind the token index."""

    @classmethod
    def find(cls, data: bytes, digits: int) -> _Tables | None:
        """The tables around what may be the tokens of the ten digits."""
        found = _find_tokens(data, digits)
        if found is None:
            return None
        start, behind, tokens = found
        for first, count in _find_markers(data, start):
            names = _find_names(data, first, struct.unpack_from(f"<{count}I", data, first))
            if names is not None:
                return cls(data, tokens, *names, behind)
        return None

    def symbols(self) -> list[Symbol]:
        """All symbols, by address."""
        addresses = self._addresses()
        made = []
        at = self.names
        for address in addresses:
            at, raw = _name(self.data, at)
            text = b"".join([self.tokens[code] for code in raw]).decode("ascii", "replace")
            if text:
                made.append(Symbol(address, text[0], text[1:]))
        made.sort(key=lambda symbol: symbol.address)
        return made

    def _addresses(self) -> list[int]:
        """Addresses in order of names."""
        size = -(-4 * self.count // 8) * 8
        before = self.names - 8  # the number of symbols, padded
        for offsets, base in ((before - 8 - size, before - 8), (self.behind, self.behind + size)):
            if offsets < 0 or base + 8 > len(self.data):
                continue
            (relative,) = struct.unpack_from("<Q", self.data, base)
            if relative & _KERNEL_HALF == _KERNEL_HALF:
                signed = struct.unpack_from(f"<{self.count}i", self.data, offsets)
                if any(offset < 0 for offset in signed):  # KALLSYMS_ABSOLUTE_PERCPU
                    return [each if each >= 0 else relative - 1 - each for each in signed]
                return [relative + (each & 0xFFFFFFFF) for each in signed]
        raise ImageError("the kernel's symbols have no addresses where they are expected")


def _aligned(at: int, to: int = 8) -> int:
    return -(-at // to) * to


def _find_tokens(data: bytes, digits: int) -> tuple[int, int, tuple[bytes, ...]] | None:
    """Begin of the token table, the end of its index, and the tokens."""
    at = digits
    for _ in range(_TOKENS - ord("0")):
        at = data.find(b"\0", at) + 1
        if not at:
            return None
    for to in (8, 4):
        index = _aligned(at, to)
        if index + 2 * _TOKENS > len(data):
            continue
        places = struct.unpack_from(f"<{_TOKENS}H", data, index)
        start = digits - places[ord("0")]
        if places[0] or start < 0 or start + places[-1] >= at:
            continue
        if all(low < high for low, high in pairwise(places)):
            tokens = tuple(
                data[start + place : data.index(b"\0", start + place)] for place in places
            )
            return start, _aligned(index + 2 * _TOKENS), tokens
    return None


def _find_markers(data: bytes, end: int) -> Iterator[tuple[int, int]]:
    """Offset and number of what may be the markers before ``end``: they ascend from 0."""
    words = memoryview(data)[: end & ~7].cast("I")
    for first in range(len(words) - 2, -1, -2):
        if words[first] or not _STEP_MIN <= words[first + 1] <= _STEP_MAX:
            continue
        last = first
        while last + 1 < len(words) and _STEP_MIN <= words[last + 1] - words[last] <= _STEP_MAX:
            last += 1
        yield 4 * first, last - first + 1


def _find_names(data: bytes, end: int, markers: tuple[int, ...]) -> tuple[int, int] | None:
    """Offset and number of the names that end before ``end``."""
    highest = end - markers[-1]
    for at in range(highest - highest % 8, max(highest - _STEP_MAX, 8), -8):
        (count,) = struct.unpack_from("<I", data, at - 8)
        if -(-count // _CHUNK) == len(markers) and _leads_to(data, at, end, count, markers):
            return at, count
    return None


def _leads_to(data: bytes, names: int, end: int, count: int, markers: tuple[int, ...]) -> bool:
    """Whether ``count`` names from ``names`` on have every 256th where the markers say."""
    at = names
    for n in range(count):
        if n % _CHUNK == 0 and at - names != markers[n // _CHUNK]:
            return False
        if at + 2 > end:
            return False
        at, _ = _name(data, at)
    return end - 8 < at <= end


def _name(data: bytes, at: int) -> tuple[int, bytes]:
    """The compressed name at an offset, and where the next one is (a length of up to 14 bits)."""
    length = data[at]
    at += 1
    if length & 0x80:
        length = length & 0x7F | data[at] << 7
        at += 1
    return at + length, data[at : at + length]
