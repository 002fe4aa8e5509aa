"""Pages of RAM that are not there yet: Linux tells of accesses to them and takes their contents.

userfaultfd(2) and ioctl_userfaultfd(2), for memory of a memfd. Whoever touches a page that has no
contents sleeps until somebody has filled it in. Where the host permits only
``UFFD_USER_MODE_ONLY``, an access by the kernel (a read from a file into the page, say) fails
instead of sleeping; who hands pages to the kernel has to touch them first
(`GuestMemory.await_pages`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from ringfence.errors import HostError

_SYSCALL = 323
"""userfaultfd on x86-64."""
_USER_MODE_ONLY = 1
_API, _FEATURE_MISSING_SHMEM = 0xAA, 1 << 5
_IOCTL_API, _IOCTL_REGISTER, _IOCTL_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_IOCTL_COPY, _IOCTL_ZEROPAGE = 0xC028AA03, 0xC020AA04
_MODE_MISSING = 1
_EVENT_PAGEFAULT = 0x12
_MESSAGE = struct.Struct("<B7xQQ8x")
"""struct uffd_msg of a page fault: event, flags, address."""
EVENTS = 64
"""Events that are read at once."""

_libc = ctypes.CDLL(None, use_errno=True)


class Userfault:
    """An open userfaultfd.

    Parameters
    ----------
    fd : int, optional
        One that another process has opened, for its memory.
    user_only : bool
        Don't ask for more than any process may have.

    Attributes
    ----------
    user_only : bool
        Whether accesses by the kernel fail instead of waiting.

    Raises
    ------
    HostError
        The host doesn't permit it.
    """

    def __init__(self, fd: int | None = None, *, user_only: bool = False) -> None:
        self.user_only = user_only
        if fd is not None:
            self.fd = fd
            return
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self.fd = -1 if user_only else _libc.syscall(_SYSCALL, flags)
        if self.fd < 0:
            self.user_only = True
            self.fd = _libc.syscall(_SYSCALL, flags | _USER_MODE_ONLY)
        if self.fd < 0:
            raise HostError(
                f"userfaultfd is not permitted here ({os.strerror(ctypes.get_errno())}): RAM can't"
                " follow a machine (--postcopy)"
            )
        try:
            fcntl.ioctl(
                self.fd, _IOCTL_API, bytearray(struct.pack("<QQQ", _API, _FEATURE_MISSING_SHMEM, 0))
            )
        except OSError as error:
            self.close()
            raise HostError(f"userfaultfd lacks shared memory here ({error.strerror})") from error

    def register(self, address: int, length: int) -> None:
        """Tell of accesses to pages without contents in this range; OSError."""
        arguments = struct.pack("<QQQQ", address, length, _MODE_MISSING, 0)
        fcntl.ioctl(self.fd, _IOCTL_REGISTER, bytearray(arguments))

    def unregister(self, address: int, length: int) -> None:
        """Leave a range alone again, and wake who sleeps there; OSError."""
        fcntl.ioctl(self.fd, _IOCTL_UNREGISTER, bytearray(struct.pack("<QQ", address, length)))

    def copy(self, address: int, data: bytes | memoryview) -> None:
        """Fill whole pages; one that has contents already keeps them. OSError."""
        source = ctypes.create_string_buffer(bytes(data), len(data))
        arguments = struct.pack(
            "<QQQQq", address, ctypes.addressof(source), len(data), 0, 0
        )  # dst, src, len, mode, copied
        self._fill(_IOCTL_COPY, arguments)

    def zero(self, address: int, length: int) -> None:
        """Fill whole pages with zeroes; one that has contents already keeps them. OSError."""
        self._fill(_IOCTL_ZEROPAGE, struct.pack("<QQQq", address, length, 0, 0))

    def _fill(self, request: int, arguments: bytes) -> None:
        while True:
            try:
                fcntl.ioctl(self.fd, request, bytearray(arguments))
            except OSError as error:
                if error.errno == errno.EAGAIN:  # the mapping is being changed
                    continue
                if error.errno != errno.EEXIST:
                    raise
            return

    def faults(self) -> list[int]:
        """Addresses that somebody waits for, as far as they are not known yet."""
        try:
            data = os.read(self.fd, EVENTS * 32)
        except BlockingIOError:
            return []
        found = _MESSAGE.iter_unpack(data)
        return [address for event, _, address in found if event == _EVENT_PAGEFAULT]

    def close(self) -> None:
        """Give it back. Safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
