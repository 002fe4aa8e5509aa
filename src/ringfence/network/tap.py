"""A TAP interface of the host's: the guest's card becomes one more interface of the host's kernel.

The interface is made, or opened if it is there, as tuntap.rst of the kernel's documentation says.
Making one needs CAP_NET_ADMIN; opening one that an administrator made for the user doesn't
(``ip tuntap add NAME mode tap user USER``). Addresses, bridges and routes are the host's affair.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct

from ringfence.errors import HostError, UsageError
from ringfence.network.backend import BATCH, MAXIMUM_FRAME
from ringfence.network.threaded import ThreadedBackend

DEVICE = "/dev/net/tun"
NAME_LIMIT = 15
"""IFNAMSIZ without its NUL."""
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000


class TapNetwork(ThreadedBackend):
    """The interface ``name``.

    Raises
    ------
    UsageError
        No interface can have that name.
    HostError
        The host has no TUN/TAP driver, or does not permit it.
    """

    NAME = "tap"

    def __init__(self, name: str) -> None:
        if not 0 < len(name.encode()) <= NAME_LIMIT or "/" in name or name.isspace():
            raise UsageError(f"{name!r} is no interface's name: expected 1 to {NAME_LIMIT} bytes")
        super().__init__()
        self._descriptor = -1
        self._gone = False
        try:
            self._descriptor = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
            fcntl.ioctl(self._descriptor, TUNSETIFF, request)
        except OSError as error:
            self.close()
            raise HostError(
                f"tap interface {name} is not possible ({error.strerror}): have an administrator"
                f" run 'ip tuntap add {name} mode tap user $USER', or use --net user"
            ) from error

    def _interest(self) -> tuple[list[tuple[int, int]], float | None]:
        if self._gone or self._stalled:
            return [], None
        return [(self._descriptor, select.POLLIN)], None

    def _handle(self, ready: dict[int, int]) -> None:
        for _ in range(BATCH if ready else 0):
            if self._stalled:
                break
            try:
                frame = os.read(self._descriptor, MAXIMUM_FRAME)
            except BlockingIOError:
                break
            except OSError:
                self._gone = True  # the interface was removed
                break
            self._deliver(frame)

    def _send(self, frame: bytes) -> None:
        try:
            os.write(self._descriptor, frame)
        except OSError:  # down, or its queue is full
            self._counters["dropped_sending"] += 1

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
