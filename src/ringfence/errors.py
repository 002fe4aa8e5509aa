"""What can go wrong, said once: every error that reaches a user, with the exit status of each.

Shape: one class per exit status. A message is one line that says what was wrong, what was
expected and what to do; the command line prints it and exits with ``exit_status``.
"""

from __future__ import annotations


class RingfenceError(Exception):
    """Base of all errors that Ringfence raises on purpose; ``exit_status`` is the CLI's."""

    exit_status = 1


class UsageError(RingfenceError):
    """The request itself makes no sense (unknown option value, absurd size)."""

    exit_status = 2


class ImageError(RingfenceError):
    """A kernel, initrd or image file is unreadable, truncated, of another kind, or too large."""

    exit_status = 3


class GuestCrash(RingfenceError):
    """The guest triple-faulted or asked for a mode the engine does not offer.

    ``registers`` is the register dump (text, several lines) at the moment of the crash.
    """

    exit_status = 4

    def __init__(self, message: str, registers: str = "") -> None:
        super().__init__(message)
        self.registers = registers


class GuestTimeout(RingfenceError):
    """The guest did not power off within the time the user allowed."""

    exit_status = 5


class HostError(RingfenceError):
    """The host lacks something that is needed (memory, a CPU feature, a tool, disk space)."""

    exit_status = 6


class GuestReset(RingfenceError):
    """The guest asked for a reset while the machine was told not to reboot."""

    exit_status = 7
