"""One run of a machine at the command line: bytes in, bytes out, signals, time limit, ending.

The main thread sits in one ``poll`` over stdin and a wake-up pipe, and blocks nowhere else.
Signals (through ``signal.set_wakeup_fd``) write their number into the pipe, whatever else needs
the main thread writes 0; so nothing is done inside a signal handler, and nothing can be missed.

The machine's threads write the guest's console bytes to stdout as they come; a slow reader slows
the guest down. What is typed goes through a thread of its own (`_Typist`), because the guest may
be waiting for such a reader just then. It takes no more from stdin than the guest keeps up with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ringfence.cli.terminal import HELP, Escape, EscapeFilter, RawTerminal
from ringfence.errors import GuestTimeout, HostError
from ringfence.life import State

if TYPE_CHECKING:
    from ringfence.console import Console
    from ringfence.engine.exits import TraceRecord
    from ringfence.gdb.server import GdbServer
    from ringfence.machine import Machine

STDIN, STDOUT, STDERR = 0, 1, 2
CHUNK = 4096
"""At most so many bytes a write: a pipe that polls writable takes them without blocking."""
GREETING = "ringfence: Ctrl-A x ends the machine, Ctrl-A h shows more\n"
UNREAD = 4 * CHUNK
"""Bytes that may wait in the serial port for the guest to read them."""
BACKLOG = 4
"""Pieces of stdin that may wait in front of it."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that stop the machine; the exit status is 128 and the signal's number."""


class Ending(Enum):
    """How a session came to its end, where no signal did it."""

    GUEST = "the guest ended"
    QUIT = "the user quit"
    PIPE = "nobody reads stdout"


class _Output:
    """Bytes on their way to ``fd``; gives up as soon as nobody wants them."""

    def __init__(self, fd: int, wake: int) -> None:
        self._fd = fd
        self._wake = wake
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.closing = False
        self.failure: OSError | None = None

    def write(self, data: bytes) -> None:
        """Write all of ``data``, waiting for a slow reader as long as the session goes on."""
        view = memoryview(data)
        while view and not self.closing and self.failure is None:
            if not self._poll.poll(100):
                continue
            try:
                view = view[os.write(self._fd, view[:CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                self.failure = error
                _poke(self._wake)


class _Typist:
    """Hands bytes to the guest, in its own time and in order."""

    def __init__(self, console: Console, wake: int) -> None:
        self._console = console
        self._wake = wake
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="typist", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether to hold back; the main thread is woken when that changes."""
        return self._waiting.qsize() >= BACKLOG

    def put(self, data: bytes) -> None:
        """Queue bytes for the guest; never blocks."""
        self._waiting.put(data)

    def close(self) -> None:
        """Drop what is left. Output must have been given up before, so that `send` returns."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            while self._console.unread > UNREAD and not self._closing.wait(0.005):
                pass
            if self._closing.is_set():
                return
            self._console.send(data)
            if self._waiting.qsize() == BACKLOG - 1:
                _poke(self._wake)


class Session:
    """Drives ``machine`` between stdin and stdout until something ends it.

    Parameters
    ----------
    machine : Machine
        Ready, not started.
    timeout : float or None
        Seconds of host time that the guest may take.
    trace : bool
        Whether to print each exit on stderr.
    started : callable, optional
        Called once the machine runs.
    gdb : GdbServer, optional
        A server for GDB, to be closed before the machine is.
    wait : bool
        Whether GDB starts the machine.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        timeout: float | None,
        trace: bool,
        started: Callable[[], None] | None = None,
        gdb: GdbServer | None = None,
        wait: bool = False,
    ) -> None:
        self.machine = machine
        self._gdb = gdb
        self._wait = wait
        self._started = started
        self.timeout = timeout
        self.terminal = RawTerminal(STDIN)
        self._escapes = EscapeFilter()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._output = _Output(STDOUT, self._wake_write)
        self._errors = _Output(STDERR, self._wake_write)
        self._typist = _Typist(machine.console, self._wake_write)
        if trace:
            machine.set_trace(self._trace)

    def run(self) -> Ending | signal.Signals:
        """Start the machine and stay until it ended or was stopped; GuestTimeout if too late."""
        machine = self.machine
        machine.console.listen(self._output.write)
        machine.when_ended(lambda: _poke(self._wake_write))
        try:
            with _signals(self._wake_write):
                try:
                    with self.terminal:
                        if self.terminal.active:
                            self.terminal.say(GREETING)
                        if not self._wait and machine.state is State.READY:
                            machine.start()
                        if self._started is not None:
                            self._started()
                        return self._loop()
                finally:
                    self._output.closing = self._errors.closing = True
                    self._typist.close()
                    if self._gdb is not None:
                        self._gdb.close()
                    machine.close()
        finally:
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _loop(self) -> Ending | signal.Signals:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        listening = True
        while True:
            if listening and (self.terminal.active or not self._typist.full):
                poll.register(STDIN, select.POLLIN)
            else:
                with contextlib.suppress(KeyError):
                    poll.unregister(STDIN)
            wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = dict(poll.poll(wait))
            if self._wake_read in ready:
                ending = self._woken()
                if ending is not None:
                    return ending
            if deadline is not None and time.monotonic() >= deadline:
                raise GuestTimeout(f"the guest did not power off within {self.timeout:g} s")
            if STDIN in ready:
                data = _read_stdin(ready[STDIN])
                if data is not None and not data:
                    listening = False
                elif data and self._typed(data):
                    return Ending.QUIT

    def _woken(self) -> Ending | signal.Signals | None:
        """What the wake-up pipe says; None if it is nothing that ends the session."""
        for number in os.read(self._wake_read, 512):
            if number == signal.SIGCONT:
                self.terminal.enter()
            elif number in ENDING:
                return signal.Signals(number)
        failure = self._output.failure
        if failure is None:
            return Ending.GUEST if self.machine.outcome is not None else None
        if failure.errno in (errno.EPIPE, errno.EIO):
            return Ending.PIPE
        raise HostError(f"the guest's output can't be written: {failure.strerror}") from failure

    def _typed(self, data: bytes) -> bool:
        """Hand on what was typed; True if the user wants to leave."""
        if not self.terminal.active:
            self._typist.put(data)
            return False
        for piece in self._escapes.feed(data):
            if isinstance(piece, bytes):
                self._typist.put(piece)
            elif piece is Escape.QUIT:
                self.terminal.say("\nringfence: the machine was ended with Ctrl-A x\n")
                return True
            elif piece is Escape.STATS:
                from ringfence.cli.report import stats_text

                self.terminal.say("\n" + stats_text(self.machine.stats()))
            else:
                self.terminal.say("\n" + HELP)
        return False

    def _trace(self, record: TraceRecord) -> None:
        end = "\r\n" if self.terminal.active else "\n"
        self._errors.write(f"{record}{end}".encode())


def _poke(fd: int) -> None:
    """Wake the main thread; a full or closed pipe means that it is awake already."""
    with contextlib.suppress(OSError):
        os.write(fd, b"\0")


def _read_stdin(events: int) -> bytes | None:
    """What there is to read, None for nothing yet; empty at the end or where stdin is no use."""
    if events & select.POLLNVAL:
        return b""
    try:
        return os.read(STDIN, CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


@contextlib.contextmanager
def _signals(wake: int) -> Iterator[None]:
    """Turn the signals that matter into bytes in the wake-up pipe."""
    handled = (*ENDING, signal.SIGCONT)
    before = {number: signal.getsignal(number) for number in handled}
    previous = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in handled:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(previous)
