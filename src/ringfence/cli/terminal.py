"""The user's terminal while a guest has it: raw mode, and the escape that leads back out.

Shape: `EscapeFilter` is a pure function of the bytes typed (tests feed it tables); `RawTerminal`
is a context manager around termios that may be re-entered after the job was suspended.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import Any

PREFIX = 0x01
"""Ctrl-A."""

HELP = """\
Ctrl-A x       end the machine and leave
Ctrl-A s       show statistics
Ctrl-A Ctrl-A  send Ctrl-A to the guest
Ctrl-A h       this help
"""
ATTACHED_HELP = """\
Ctrl-A d       detach; the machine goes on
Ctrl-A Ctrl-A  send Ctrl-A to the guest
Ctrl-A h       this help
"""


class Escape(Enum):
    """What the user asks of Ringfence rather than of the guest."""

    QUIT = "x"
    DETACH = "d"
    STATS = "s"
    HELP = "h"


IN_RUN = (Escape.QUIT, Escape.STATS, Escape.HELP)
"""What there is to ask where the machine is in the same process."""
ATTACHED = (Escape.DETACH, Escape.HELP)
"""What there is to ask on the console of a machine elsewhere."""


class EscapeFilter:
    """Separates what is typed for the guest from what is meant for us.

    Parameters
    ----------
    escapes : sequence of Escape
        Those that mean something here.
    """

    def __init__(self, escapes: Sequence[Escape] = IN_RUN) -> None:
        self._prefixed = False
        self._keys = {ord(key): each for each in escapes for key in each.value + each.value.upper()}
        self._keys[ord("?")] = Escape.HELP

    def feed(self, data: bytes) -> list[bytes | Escape]:
        """Bytes for the guest and escapes, in the order they were typed.

        An unknown key after the prefix is dropped with it; a prefix at the end waits for more.
        """
        found: list[bytes | Escape] = []
        plain = bytearray()
        for byte in data:
            if not self._prefixed:
                if byte == PREFIX:
                    self._prefixed = True
                else:
                    plain.append(byte)
                continue
            self._prefixed = False
            if byte == PREFIX:
                plain.append(byte)
            elif byte in self._keys:
                if plain:
                    found.append(bytes(plain))
                    plain.clear()
                found.append(self._keys[byte])
        if plain:
            found.append(bytes(plain))
        return found


class RawTerminal:
    """Raw mode for the terminal behind ``fd``; does nothing where there is none."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.active = False
        self._saved: list[Any] | None = None

    def __enter__(self) -> RawTerminal:
        if _is_terminal(self.fd):
            self._saved = termios.tcgetattr(self.fd)
            self.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def enter(self) -> None:
        """Raw mode, again if the shell changed it meanwhile."""
        if self._saved is not None:
            tty.setraw(self.fd, termios.TCSANOW)
            self.active = True

    def restore(self) -> None:
        """The mode that was found; a terminal that is gone is no error."""
        if self._saved is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(self.fd, termios.TCSANOW, self._saved)
            self.active = False

    def say(self, text: str) -> None:
        """Print on stderr, with the line ends that a raw terminal needs."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text.replace("\n", "\r\n") if self.active else text)
            sys.stderr.flush()


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False
