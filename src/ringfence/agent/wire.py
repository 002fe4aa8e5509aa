"""What the agent and the host's end say to each other, over one vsock stream per command.

Frames: payload length (u32), `Kind` (u32), payload; little-endian. The host begins with REQUEST:
a `REQUEST_HEAD`, then NUL-ended strings: the program's path and its arguments, then its
environment. Then data goes both ways, until the agent says EXIT, with the status as wait(2) has
it. Or the host begins with ENTROPY, which the agent answers by EXIT.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum

from ringfence.errors import UsageError

PORT = 1022
"""The agent's vsock port; below 1024, so that only the guest's root can listen there."""
FRAME = struct.Struct("<II")
REQUEST_HEAD = struct.Struct("<IIIHH")
"""Number of arguments, of environment strings, flags, and the terminal's rows and columns."""
TTY = 1
"""Flag: give the program a terminal."""
PAYLOAD = 32 << 10
"""Bytes of a payload at most."""
SIZE = struct.Struct("<HH")
NUMBER = struct.Struct("<I")


ENTROPY_HEAD = struct.Struct("<II")
"""Bits of entropy, bytes that follow: struct rand_pool_info."""
ENTROPY = 64
"""Bytes that a guest is given, as much as fits into Linux's pool twice."""


class Kind(IntEnum):
    """What a frame is; ENTROPY and the first four go to the guest."""

    REQUEST = 0
    STDIN = 1
    """Input for the program; an empty one is its end."""
    RESIZE = 2
    """The terminal's rows and columns, `SIZE`."""
    SIGNAL = 3
    """A signal for the program's process group, `NUMBER`."""
    STDOUT = 4
    STDERR = 5
    EXIT = 6
    """The wait status, `NUMBER`. Nothing follows."""
    ENTROPY = 7
    """Random bytes behind an `ENTROPY_HEAD`: mix them in and use them from now on."""


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return FRAME.pack(len(payload), kind) + payload


def entropy(random: bytes) -> bytes:
    """The frame that gives the guest's random number generator a new seed."""
    return frame(Kind.ENTROPY, ENTROPY_HEAD.pack(8 * len(random), len(random)) + random)


def request(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    terminal: tuple[int, int] | None = None,
) -> bytes:
    """The frame that starts a program.

    Parameters
    ----------
    arguments : sequence of str
        The program's path, then its arguments.
    environment : mapping
        All its environment.
    terminal : (int, int), optional
        Rows and columns of a terminal to run it on.

    Raises
    ------
    UsageError
        It is too long, or a string has a NUL in it.
    """
    strings = [*arguments, *(f"{name}={value}" for name, value in environment.items())]
    if any("\0" in each for each in strings):
        raise UsageError("a command for the guest can't have NUL bytes in it")
    rows, columns = terminal or (0, 0)
    flags = TTY if terminal else 0
    head = REQUEST_HEAD.pack(len(arguments), len(environment), flags, rows, columns)
    payload = head + b"".join(each.encode("utf-8", "surrogateescape") + b"\0" for each in strings)
    if len(payload) > PAYLOAD:
        raise UsageError(f"a command for the guest is too long: expected at most {PAYLOAD} bytes")
    return frame(Kind.REQUEST, payload)
