"""The Internet checksum (RFC 1071), fast: with large frames it is most of what is left to do.

The sum is machine code: 8 bytes are added at a time, the carry added in again at the low end.
65535 divides 2**64 - 1, so what is right modulo the latter is right modulo the former; and the sum
of words with swapped bytes is the sum with swapped bytes (RFC 1071, 2), so that the host's order of
bytes doesn't matter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from ringfence.native.routine import routine

_CODE = bytes.fromhex(
    "4801f7"  # add rdi, rsi: the first byte
    "31c0"  # xor eax, eax: the sum
    "4889d1"  # mov rcx, rdx
    "48c1e903"  # shr rcx, 3: whole words
    "7410"  # jz rest
    "480307"  # word: add rax, [rdi]
    "4883d000"  # adc rax, 0
    "488d7f08"  # lea rdi, [rdi + 8]
    "48ffc9"  # dec rcx
    "75f0"  # jnz word
    "83e207"  # rest: and edx, 7
    "7416"  # jz done
    "31c9"  # xor ecx, ecx: the last word, as far as there is one
    "48c1e108"  # byte: shl rcx, 8
    "8a4c17ff"  # mov cl, [rdi + rdx - 1]
    "48ffca"  # dec rdx
    "75f3"  # jnz byte
    "4801c8"  # add rax, rcx
    "4883d000"  # adc rax, 0
    "c3"  # done: ret
)
SHORT = 64
"""Bytes that Python sums up sooner than a call takes: as one large number, modulo 65535."""


@cache
def _sum() -> Callable[..., int]:
    return routine(_CODE, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


def add(data: bytes | bytearray, start: int = 0, stop: int | None = None) -> int:
    """Return the sum of a range's 16-bit big-endian words, folded to 16 bits.

    A byte that is left over is the upper one of a word. The sum is 0 only where all bytes are.

    Raises
    ------
    IndexError
        The range is not inside ``data``.
    """
    end = len(data) if stop is None else stop
    if not 0 <= start <= end <= len(data):
        raise IndexError(f"bytes {start} to {end} of {len(data)}")
    if end - start <= SHORT:
        return fold(int.from_bytes(data[start:end], "big") << 8 * ((end - start) % 2))
    place = data if isinstance(data, bytes) else (ctypes.c_char * len(data)).from_buffer(data)
    low = fold(_sum()(place, start, end - start))
    return low >> 8 | (low & 0xFF) << 8


def fold(total: int) -> int:
    """Return what a sum of words is with its carries added in: 16 bits."""
    return total and (total % 0xFFFF or 0xFFFF)


def checksum(
    data: bytes | bytearray, start: int = 0, stop: int | None = None, more: int = 0
) -> int:
    """Return the checksum of a range of ``data``, and of what else has summed up to ``more``.

    It is 0 where the checksum's own field, being in the range, is right.
    """
    return 0xFFFF - fold(add(data, start, stop) + more)
