"""``ringfence run --detach``: a machine in a process of its own that outlives the terminal.

The process forks before it has threads, descriptors or memory of a machine's. The child becomes a
daemon in a session of its own, with nothing to read and a log for stderr. The parent waits on a
pipe for the word that the machine runs. If the child dies before, what it had to say is in the log,
and its exit status is the parent's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ringfence.errors import HostError

_READY = b"+"


def daemonize(log: Path) -> Callable[[], None] | int:
    """Split in two. In the child, return the function that tells that all is well.

    In the parent, wait for that, and return the exit status to leave with.

    Parameters
    ----------
    log : Path
        Where the child's stderr goes; emptied first.

    Raises
    ------
    HostError
        The log can't be written, or the host gives no process.
    """
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
    except OSError as error:
        raise HostError(
            f"the machine can't be detached ({error.strerror}; its log is {log})"
        ) from error
    if child:
        os.close(writing)
        os.close(target)
        return _await(child, reading, log)
    os.close(reading)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for source, number in ((nothing, 0), (nothing, 1), (target, 2)):
        os.dup2(source, number)
    os.close(nothing)
    os.close(target)

    def ready() -> None:
        with suppress(BrokenPipeError):  # who waited has been killed; the machine lives on
            os.write(writing, _READY)
        os.close(writing)

    return ready


def _await(child: int, reading: int, log: Path) -> int:
    """Wait until the child is ready or dead."""
    with os.fdopen(reading, "rb") as words:
        if words.read(1) == _READY:
            return 0
    _, status = os.waitpid(child, 0)
    sys.stderr.write(log.read_text(errors="replace"))
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
