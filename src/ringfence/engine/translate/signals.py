"""Host signals that guest code may cause: SIGSEGV, SIGBUS, SIGFPE, SIGILL.

The handler is a thunk. If the fault is inside the code cache it sends the thread to the thunk that
leaves guest code; anywhere else the fault is the host's own, and the process ends with SIGILL.
"""

from __future__ import annotations

import ctypes
import signal

_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_SA_SIGINFO = 4
_libc = ctypes.CDLL(None, use_errno=True)
_installed: set[int] = set()


class _Sigaction(ctypes.Structure):
    """``struct sigaction`` of glibc on x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def install(handler: int) -> None:
    """Make ``handler`` (a host address) the action of the signals, once a process."""
    if handler in _installed:
        return
    action = _Sigaction(handler=handler, flags=_SA_SIGINFO)
    for number in _SIGNALS:
        if _libc.sigaction(int(number), ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), "sigaction")
    _installed.add(handler)
