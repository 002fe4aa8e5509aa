"""libslirp's C interface, as its header ``libslirp.h`` (4.0 and later) declares it, by ctypes.

Only what `ringfence.network.user` needs: configuration version 1, one instance, polling, frames,
port forwards. Functions are called through ``PyDLL``, that is with Python's global lock held: none
of them blocks, most of them call back into Python, and the library's few global variables are
thereby protected when several machines share a process.

libslirp writes warnings about a guest's misbehaviour with GLib's logging, to stderr: a guest could
flood it. They are switched off.
"""

from __future__ import annotations

import ctypes
import functools
import socket
import sys
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint8,
    c_uint32,
    c_void_p,
)

from ringfence.errors import HostError

SONAME = "libslirp.so.0"
PACKAGE = "libslirp0"
POLL_IN, POLL_OUT, POLL_PRI, POLL_ERR, POLL_HUP = 1, 2, 4, 8, 16
CONFIG_VERSION = 1

SendPacket = CFUNCTYPE(c_ssize_t, c_void_p, c_size_t, c_void_p)
GuestError = CFUNCTYPE(None, c_char_p, c_void_p)
ClockGetNs = CFUNCTYPE(c_int64, c_void_p)
TimerNew = CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p)
TimerFree = CFUNCTYPE(None, c_void_p, c_void_p)
TimerMod = CFUNCTYPE(None, c_void_p, c_int64, c_void_p)
PollFd = CFUNCTYPE(None, c_int, c_void_p)
Notify = CFUNCTYPE(None, c_void_p)
AddPoll = CFUNCTYPE(c_int, c_int, c_int, c_void_p)
GetRevents = CFUNCTYPE(c_int, c_int, c_void_p)
_Log = CFUNCTYPE(None, c_char_p, c_int, c_char_p, c_void_p)


class Callbacks(ctypes.Structure):
    """``SlirpCb``; the last two belong to configuration version 4 and stay empty."""

    _fields_ = [
        ("send_packet", SendPacket),
        ("guest_error", GuestError),
        ("clock_get_ns", ClockGetNs),
        ("timer_new", TimerNew),
        ("timer_free", TimerFree),
        ("timer_mod", TimerMod),
        ("register_poll_fd", PollFd),
        ("unregister_poll_fd", PollFd),
        ("notify", Notify),
        ("init_completed", c_void_p),
        ("timer_new_opaque", c_void_p),
    ]


class InAddr(ctypes.Structure):
    """``struct in_addr``: an address in network byte order."""

    _fields_ = [("s_addr", c_uint32)]

    @classmethod
    def of(cls, dotted: str) -> InAddr:
        """Return an address from its dotted text."""
        return cls(int.from_bytes(socket.inet_aton(dotted), sys.byteorder))


_In6Addr = c_uint32 * 4
"""``struct in6_addr``, with its alignment."""


class Config(ctypes.Structure):
    """``SlirpConfig``; fields behind version 1 are there for their room only."""

    _fields_ = [
        ("version", c_uint32),
        ("restricted", c_int),
        ("in_enabled", c_bool),
        ("vnetwork", InAddr),
        ("vnetmask", InAddr),
        ("vhost", InAddr),
        ("in6_enabled", c_bool),
        ("vprefix_addr6", _In6Addr),
        ("vprefix_len", c_uint8),
        ("vhost6", _In6Addr),
        ("vhostname", c_char_p),
        ("tftp_server_name", c_char_p),
        ("tftp_path", c_char_p),
        ("bootfile", c_char_p),
        ("vdhcp_start", InAddr),
        ("vnameserver", InAddr),
        ("vnameserver6", _In6Addr),
        ("vdnssearch", POINTER(c_char_p)),
        ("vdomainname", c_char_p),
        ("if_mtu", c_size_t),
        ("if_mru", c_size_t),
        ("disable_host_loopback", c_bool),
        ("enable_emu", c_bool),
        ("outbound_addr", c_void_p),
        ("outbound_addr6", c_void_p),
        ("disable_dns", c_bool),
        ("disable_dhcp", c_bool),
    ]


_PROTOTYPES = {
    "slirp_new": (c_void_p, [POINTER(Config), POINTER(Callbacks), c_void_p]),
    "slirp_cleanup": (None, [c_void_p]),
    "slirp_pollfds_fill": (None, [c_void_p, POINTER(c_uint32), AddPoll, c_void_p]),
    "slirp_pollfds_poll": (None, [c_void_p, c_int, GetRevents, c_void_p]),
    "slirp_input": (None, [c_void_p, c_char_p, c_int]),
    "slirp_add_hostfwd": (c_int, [c_void_p, c_int, InAddr, c_int, InAddr, c_int]),
    "slirp_remove_hostfwd": (c_int, [c_void_p, c_int, InAddr, c_int]),
    "slirp_connection_info": (c_void_p, [c_void_p]),
    "slirp_version_string": (c_char_p, []),
}
_LOG_LEVELS = 0xFC
"""All levels of GLib's GLogLevelFlags."""


@functools.cache
def library() -> ctypes.PyDLL:
    """Load libslirp.

    Raises
    ------
    HostError
        It is not installed, or is older than 4.0.
    """
    try:
        found = ctypes.PyDLL(SONAME, use_errno=True)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        glib = _glib()
    except (OSError, AttributeError) as error:
        raise HostError(
            f"user-mode networking needs libslirp 4.0 or later ({error}):"
            f" install {PACKAGE} (Debian, Ubuntu) or libslirp (Fedora), or use --net none"
        ) from error
    glib.g_log_set_handler(b"Slirp", _LOG_LEVELS, _silent, None)
    return found


def connections(slirp: int) -> list[bytes]:
    """Return a line for each connection, forward and the like: ``PROTOCOL[STATE] ...``."""
    text = library().slirp_connection_info(slirp)
    try:
        return ctypes.string_at(text).splitlines()[1:]
    finally:
        _glib().g_free(text)


@functools.cache
def _glib() -> ctypes.PyDLL:
    found = ctypes.PyDLL("libglib-2.0.so.0")
    found.g_free.restype, found.g_free.argtypes = None, [c_void_p]
    return found


def version() -> str:
    """Return the library's own version; HostError where there is none."""
    text: bytes = library().slirp_version_string()
    return text.decode()


_silent = _Log(lambda domain, level, message, data: None)
