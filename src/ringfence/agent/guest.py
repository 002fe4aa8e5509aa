"""The agent itself, in the native dialect: a server on a vsock port, a process per command.

No library, no heap, no writable data: `Session` lies on the stack. `agent_main` accepts and forks;
`serve` reads a request and starts the program, or has `stir` reseed the random number generator;
`pump` moves bytes until the program has ended and its output is read. Only the connection is
written to without looking whether it takes bytes: the host's end always reads. The program's input
waits in the session's one buffer, and while it does, nothing more is read from the host; so nobody
waits for each other in a circle.

The agent trusts the host, which could do anything to the guest anyway. Others can't reach it: it
accepts from the host's CID only. Numbers are those of x86-64 Linux (asm/unistd_64.h and friends).
"""

from __future__ import annotations

from typing import Annotated

from ringfence.agent.wire import ENTROPY, PAYLOAD, PORT, TTY, Kind
from ringfence.native.dialect import (
    address_of,
    external,
    load8,
    load16,
    load32,
    native,
    rep_stosb,
    slt,
    store8,
    store32,
    store64,
)
from ringfence.native.layout import Array, Struct, u8, u32, u64

READ, WRITE, CLOSE, POLL, IOCTL, DUP2 = 0, 1, 3, 7, 16, 33
PIPE2, RT_SIGACTION, RT_SIGPROCMASK, SOCKET, BIND, LISTEN, ACCEPT4 = 293, 13, 14, 41, 49, 50, 288
FORK, EXECVE, EXIT, WAIT4, KILL, SETSID, OPEN, FCNTL = 57, 59, 60, 61, 62, 112, 2, 72
PIDFD_OPEN = 434

EAGAIN = -11
AF_VSOCK, SOCK_STREAM, CLOEXEC, NONBLOCK = 40, 1, 0o2000000, 0o4000
CID_ANY, CID_HOST = 0xFFFF_FFFF, 2
POLLIN, POLLOUT, POLLHANGUP = 0x01, 0x04, 0x38
"""POLLHANGUP is any of POLLERR, POLLHUP and POLLNVAL."""
WNOHANG, SIG_BLOCK, SIG_SETMASK, F_SETFL = 1, 0, 2, 4
SIGHUP, SIGPIPE = 1, 13
O_RDWR, O_NOCTTY = 0o2, 0o400
TIOCSCTTY, TIOCSWINSZ, TIOCSPTLCK, TIOCGPTPEER = 0x540E, 0x5414, 0x4004_5431, 0x5441
RNDADDENTROPY, RNDRESEEDCRNG = 0x4008_5203, 0x5207

HEADER = 8
ENTROPY_HEADER = 8
REQUEST_HEAD = 16
NONE = (1 << 64) - 1
"""A descriptor that there isn't: poll() passes over it."""
CONNECTION, INPUT, OUTPUT, ERRORS, PROCESS = 0, 8, 16, 24, 32
"""Where each descriptor's pollfd is in `Session.polls`."""


class Session(Struct):
    """All that the agent remembers of one command."""

    connection: Annotated[int, u64]
    input: Annotated[int, u64]
    """Descriptors of the program's three streams on our side; a terminal is input and output."""
    output: Annotated[int, u64]
    errors: Annotated[int, u64]
    terminal: Annotated[int, u64]
    """Whether they are a terminal."""
    pid: Annotated[int, u64]
    process: Annotated[int, u64]
    """A pidfd, NONE on kernels before 5.3: then the streams' ends have to do."""
    given: Annotated[int, u64]
    """Bytes of ``buffer`` that the program's input has taken…"""
    held: Annotated[int, u64]
    """…of so many."""
    scratch: Annotated[Array, u64, 8]
    polls: Annotated[Array, u64, 5]
    vector: Annotated[Array, u64, 1024]
    """Pointers to arguments and environment, each list ended by 0."""
    header: Annotated[Array, u32, 2]
    buffer: Annotated[Array, u8, PAYLOAD]
    """A payload from the host; behind a header, so that one write sends both."""
    answer: Annotated[Array, u32, 2]
    said: Annotated[Array, u8, PAYLOAD]
    """A payload for the host, behind ``answer``."""


def text(characters: bytes) -> int:
    """Up to eight characters as the number that is stored for them."""
    return int.from_bytes(characters, "little")


@external
def system_call(number: int, a: int, b: int, c: int, d: int, e: int) -> int:
    """Do a system call; it is in `program.START`."""
    return 0


@native
def read_all(descriptor: int, target: int, length: int) -> int:
    """Read exactly so many bytes; whether that was possible."""
    done = 0
    while done < length:
        count = system_call(READ, descriptor, target + done, length - done, 0, 0)
        if slt(count, 1):
            return 0
        done += count
    return 1


@native
def write_all(descriptor: int, source: int, length: int) -> int:
    """Write all bytes; whether that was possible."""
    done = 0
    while done < length:
        count = system_call(WRITE, descriptor, source + done, length - done, 0, 0)
        if slt(count, 1):
            return 0
        done += count
    return 1


@native
def close(descriptor: int) -> int:
    """Close a descriptor, if there is one."""
    if descriptor != NONE:
        system_call(CLOSE, descriptor, 0, 0, 0, 0)
    return NONE


@native
def watch(session: Session, at: int, descriptor: int, events: int) -> int:
    """Fill one pollfd."""
    entry = address_of(session.polls[0]) + at
    store32(entry, descriptor)
    store32(entry + 4, events)
    return 0


@native
def ready(session: Session, at: int) -> int:
    """What poll() found at one pollfd."""
    return load16(address_of(session.polls[0]) + at + 6)


@native
def say(session: Session, kind: int, length: int) -> int:
    """Send ``said`` as a frame; whether the host is still there."""
    session.answer[0] = length
    session.answer[1] = kind
    return write_all(session.connection, address_of(session.answer[0]), HEADER + length)


@native
def relay(session: Session, descriptor: int, kind: int) -> int:
    """Send what a stream has: NONE if it is at its end, 0 if the host is gone, else 1."""
    count = system_call(READ, descriptor, address_of(session.said[0]), PAYLOAD, 0, 0)
    if count == EAGAIN:
        return 1
    if slt(count, 1):
        return NONE
    return say(session, kind, count)


@native
def feed(session: Session) -> int:
    """Give the program what waits for it, as far as it takes that."""
    where = address_of(session.buffer[0]) + session.given
    count = system_call(WRITE, session.input, where, session.held - session.given, 0, 0)
    if count == EAGAIN:
        return 0
    if slt(count, 0):
        session.given = session.held  # nobody reads it any more
        if not session.terminal:
            session.input = close(session.input)
        return 0
    session.given += count
    return 0


@native
def listen_to_host(session: Session) -> int:
    """Read a frame and follow it; 0 if the host is gone."""
    if not read_all(session.connection, address_of(session.header[0]), HEADER):
        return 0
    length = session.header[0]
    kind = session.header[1]
    buffer = address_of(session.buffer[0])
    if length > PAYLOAD or not read_all(session.connection, buffer, length):
        return 0
    if kind == Kind.STDIN:
        session.given = 0
        session.held = length
        if length == 0:
            if session.terminal:
                store8(buffer, 4)  # Ctrl-D
                session.held = 1
            else:
                session.input = close(session.input)
        if session.input == NONE:
            session.held = 0
    elif kind == Kind.RESIZE and session.terminal:
        resize(session.input, load16(buffer), load16(buffer + 2), address_of(session.scratch[0]))
    elif kind == Kind.SIGNAL:
        system_call(KILL, 0 - session.pid, load32(buffer), 0, 0, 0)
    return 1


@native
def resize(terminal: int, rows: int, columns: int, scratch: int) -> int:
    """Set a terminal's size (struct winsize)."""
    store64(scratch, rows | columns << 16)
    return system_call(IOCTL, terminal, TIOCSWINSZ, scratch, 0, 0)


@native
def pump(session: Session) -> int:
    """Move bytes until the program has ended and its output is read; 0 if the host went first."""
    ended = 0
    while True:
        waiting = session.given < session.held
        quiet = NONE if waiting else session.connection
        watch(session, CONNECTION, quiet, POLLIN)
        watch(session, INPUT, session.input if waiting else NONE, POLLOUT)
        watch(session, OUTPUT, session.output, POLLIN)
        watch(session, ERRORS, session.errors, POLLIN)
        watch(session, PROCESS, NONE if ended else session.process, POLLIN)
        silent = session.output == NONE and session.errors == NONE
        if silent and (ended or session.process == NONE):
            return 1
        count = system_call(POLL, address_of(session.polls[0]), 5, 0 if ended else NONE, 0, 0)
        if count == 0 and ended:
            return 1
        if slt(count, 0):
            continue
        if ready(session, OUTPUT):
            result = relay(session, session.output, Kind.STDOUT)
            if result == 0:
                return 0
            if result == NONE:
                session.output = NONE if session.terminal else close(session.output)
        if ready(session, ERRORS):
            result = relay(session, session.errors, Kind.STDERR)
            if result == 0:
                return 0
            if result == NONE:
                session.errors = close(session.errors)
        if ready(session, INPUT):
            feed(session)
        if ready(session, PROCESS):
            ended = 1
        if ready(session, CONNECTION) and not listen_to_host(session):
            return 0


@native
def collect_strings(session: Session, length: int) -> int:
    """Make the two lists of pointers; 0 if the request makes no sense."""
    buffer = address_of(session.buffer[0])
    end = buffer + length
    arguments = load32(buffer)
    environment = load32(buffer + 4)
    if arguments == 0 or arguments + environment > 1000:
        return 0
    if length <= REQUEST_HEAD or load8(end - 1) != 0:
        return 0
    at = buffer + REQUEST_HEAD
    slot = 0
    for index in range(arguments + environment):
        if index == arguments:
            session.vector[slot] = 0
            slot += 1
        if at >= end:
            return 0
        session.vector[slot] = at
        slot += 1
        while load8(at) != 0:
            at += 1
        at += 1
    session.vector[slot] = 0
    if environment == 0:
        session.vector[slot + 1] = 0
    return 1


@native
def open_terminal(session: Session) -> int:
    """Make a terminal; its program's side, or NONE."""
    scratch = address_of(session.scratch[0])
    store64(scratch, text(b"/dev/ptm"))
    store64(scratch + 8, text(b"x"))
    ours = system_call(OPEN, scratch, O_RDWR | O_NOCTTY | CLOEXEC, 0, 0, 0)
    if slt(ours, 0):
        return NONE
    store64(scratch, 0)
    system_call(IOCTL, ours, TIOCSPTLCK, scratch, 0, 0)
    buffer = address_of(session.buffer[0])
    resize(ours, load16(buffer + 12), load16(buffer + 14), scratch)
    theirs = system_call(IOCTL, ours, TIOCGPTPEER, O_RDWR | O_NOCTTY | CLOEXEC, 0, 0)
    if slt(theirs, 0):
        return NONE
    session.input = ours
    session.output = ours
    session.terminal = 1
    return theirs


@native
def become(session: Session, standard_in: int, standard_out: int, standard_error: int) -> int:
    """Be the program, on three descriptors that are above 2; never returns."""
    system_call(SETSID, 0, 0, 0, 0, 0)
    if session.terminal:
        system_call(IOCTL, standard_in, TIOCSCTTY, 0, 0, 0)
    system_call(DUP2, standard_in, 0, 0, 0, 0)
    system_call(DUP2, standard_out, 1, 0, 0, 0)
    system_call(DUP2, standard_error, 2, 0, 0, 0)
    forget_signals(address_of(session.scratch[0]))
    arguments = address_of(session.vector[0])
    environment = arguments + 8 * (load32(address_of(session.buffer[0])) + 1)
    system_call(EXECVE, session.vector[0], arguments, environment, 0, 0)
    return system_call(EXIT, 127, 0, 0, 0, 0)


@native
def block_broken_pipes(scratch: int) -> int:
    """Hear of SIGPIPE by EPIPE."""
    store64(scratch, 1 << (SIGPIPE - 1))
    return system_call(RT_SIGPROCMASK, SIG_BLOCK, scratch, 0, 8, 0)


@native
def forget_signals(scratch: int) -> int:
    """As a program expects it: none blocked, none ignored.

    Whoever started the agent in the background of a shell had it ignore SIGINT (POSIX, 2.11).
    """
    rep_stosb(scratch, 0, 32)  # SIG_DFL, no flags, an empty mask
    for number in range(1, 65):
        system_call(RT_SIGACTION, number, scratch, 0, 8, 0)
    return system_call(RT_SIGPROCMASK, SIG_SETMASK, scratch, 0, 8, 0)


@native
def start(session: Session) -> int:
    """Start the program that the request names; whether there is one now."""
    scratch = address_of(session.scratch[0])
    theirs_in = NONE
    theirs_out = NONE
    theirs_errors = NONE
    if load32(address_of(session.buffer[0]) + 8) & TTY:
        theirs_in = open_terminal(session)
        theirs_out = theirs_in
        theirs_errors = theirs_in
        if theirs_in == NONE:
            return 0
    else:
        system_call(PIPE2, scratch, CLOEXEC, 0, 0, 0)
        theirs_in = load32(scratch)
        session.input = load32(scratch + 4)
        system_call(PIPE2, scratch, CLOEXEC, 0, 0, 0)
        session.output = load32(scratch)
        theirs_out = load32(scratch + 4)
        if slt(system_call(PIPE2, scratch, CLOEXEC, 0, 0, 0), 0):
            return 0
        session.errors = load32(scratch)
        theirs_errors = load32(scratch + 4)
    session.pid = system_call(FORK, 0, 0, 0, 0, 0)
    if session.pid == 0:
        become(session, theirs_in, theirs_out, theirs_errors)
    if slt(session.pid, 0):
        return 0
    close(theirs_in)
    if not session.terminal:
        close(theirs_out)
        close(theirs_errors)
        system_call(FCNTL, session.errors, F_SETFL, NONBLOCK, 0, 0)
        system_call(FCNTL, session.input, F_SETFL, NONBLOCK, 0, 0)
    system_call(FCNTL, session.output, F_SETFL, NONBLOCK, 0, 0)
    process = system_call(PIDFD_OPEN, session.pid, 0, 0, 0, 0)
    session.process = NONE if slt(process, 0) else process
    return 1


@native
def stir(session: Session, length: int) -> int:
    """Mix what the host gave into the kernel's random state and make it count at once."""
    buffer = address_of(session.buffer[0])
    scratch = address_of(session.scratch[0])
    failed = 1
    if length == ENTROPY_HEADER + ENTROPY and read_all(session.connection, buffer, length):
        store64(scratch, text(b"/dev/ura"))
        store64(scratch + 8, text(b"ndom"))
        device = system_call(OPEN, scratch, O_RDWR | CLOEXEC, 0, 0, 0)
        if not system_call(IOCTL, device, RNDADDENTROPY, buffer, 0, 0):
            failed = system_call(IOCTL, device, RNDRESEEDCRNG, 0, 0, 0) != 0
    store32(address_of(session.said[0]), failed << 8)
    return say(session, Kind.EXIT, 4)


@native
def serve(session: Session, connection: int) -> int:
    """Do one command, from its request to its exit status."""
    session.connection = connection
    session.input = NONE
    session.output = NONE
    session.errors = NONE
    session.process = NONE
    block_broken_pipes(address_of(session.scratch[0]))
    if not read_all(connection, address_of(session.header[0]), HEADER):
        return 0
    length = session.header[0]
    if session.header[1] == Kind.ENTROPY:
        return stir(session, length)
    if session.header[1] != Kind.REQUEST or length > PAYLOAD or length < REQUEST_HEAD:
        return 0
    if not read_all(connection, address_of(session.buffer[0]), length):
        return 0
    if not collect_strings(session, length) or not start(session):
        return 0
    if not pump(session):
        system_call(KILL, 0 - session.pid, SIGHUP, 0, 0, 0)
        return 0
    scratch = address_of(session.scratch[0])
    store64(scratch, 0)
    system_call(WAIT4, session.pid, scratch, 0, 0, 0)
    store32(address_of(session.said[0]), load32(scratch))
    return say(session, Kind.EXIT, 4)


@native
def agent_main(session: Session) -> int:
    """Listen for ever; returns only if there is no vsock, with a status for exit()."""
    rep_stosb(address_of(session), 0, Session.size)
    listener = system_call(SOCKET, AF_VSOCK, SOCK_STREAM | CLOEXEC, 0, 0, 0)
    address = address_of(session.scratch[0])
    # struct sockaddr_vm: family, reserved, port, CID, zeros
    store64(address, AF_VSOCK | PORT << 32)
    store64(address + 8, CID_ANY)
    if slt(system_call(BIND, listener, address, 16, 0, 0), 0):
        return 1
    if slt(system_call(LISTEN, listener, 32, 0, 0, 0), 0):
        return 1
    while True:
        store64(address + 16, 16)
        connection = system_call(ACCEPT4, listener, address, address + 16, CLOEXEC, 0)
        while not slt(system_call(WAIT4, NONE, 0, WNOHANG, 0, 0), 1):
            pass
        if slt(connection, 0):
            continue
        if load32(address + 8) == CID_HOST and system_call(FORK, 0, 0, 0, 0, 0) == 0:
            close(listener)
            serve(session, connection)
            system_call(EXIT, 0, 0, 0, 0, 0)
        close(connection)
