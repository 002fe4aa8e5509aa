"""RAM that follows a machine which runs here already: our side of the `pager`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ringfence.errors import HostError
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.missing import Userfault
from ringfence.memory.ram import GuestMemory
from ringfence.state.pager import PATIENCE
from ringfence.state.wire import Tls


class Arrival:
    """Has a process fill in what is missing of a machine's RAM.

    Parameters
    ----------
    memory : GuestMemory
        The RAM, shared memory.
    listener : int
        Descriptor of the socket at which the sender connects.
    token : str
        What the sender calls the machine.
    tls : Tls, optional
        How the sender and we know each other.

    Raises
    ------
    HostError
        The host doesn't permit it.
    """

    def __init__(
        self, memory: GuestMemory, listener: int, token: str, tls: Tls | None = None
    ) -> None:
        self._memory = memory
        self._waiting: threading.Thread | None = None
        self._uffd = Userfault()
        self.user_only = self._uffd.user_only
        """Whether the kernel can't wait for pages."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ringfence.state.pager"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._uffd.fd, listener),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except OSError as error:
            self._uffd.close()
            raise HostError(f"no process could be started for RAM ({error})") from error
        self._tell(
            uffd=self._uffd.fd,
            listener=listener,
            base=memory.host_base,
            pages=memory.size // PAGE,
            token=token,
            patience=PATIENCE,
            tls=[str(each) for each in (tls.certificate, tls.key, tls.authority)] if tls else None,
        )
        if self._answer() != b"ready\n":
            self.close()
            raise HostError("the process for RAM that follows did not start")

    def _tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def expect(self, runs: Sequence[Run]) -> None:
        """These pages come later; what RAM holds of them is thrown away."""
        memory = self._memory
        for run in runs:
            memory.discard_pages(run)
        self._tell(missing=[[run.first, run.count] for run in runs])
        # The pager has to know before the first access: it fills what is not missing with zeroes.
        if self._answer() != b"known\n":
            raise HostError("the process for RAM that follows has died")
        try:
            self._uffd.register(memory.host_base, memory.size)
        except OSError as error:
            raise HostError(f"RAM can't follow a machine here ({error.strerror})") from error
        self._tell(armed=True)
        memory.incomplete = True

    def follow(self, done: Callable[[], None]) -> None:
        """The machine runs; ``memory.incomplete`` says whether all of its RAM is here.

        ``done`` is called, from another thread, when the sender knows that, or won't ask any more.
        """
        memory = self._memory
        memory.before_close = self.close
        self._tell(fate="running")

        def wait() -> None:
            complete = self._answer() == b"done\n"
            if not complete and memory.before_close is not None:
                # Nobody brings the missing pages any more, and whoever needs one sleeps for ever.
                print("ringfence: the machine is lost: its pager has died", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGKILL)
            memory.before_close = None
            memory.incomplete = False
            self._end()
            done()

        self._waiting = threading.Thread(target=wait, name="ringfence-arrival", daemon=True)
        self._waiting.start()

    def close(self) -> None:
        """End the process. Safe to repeat."""
        if self._waiting is None:
            self._end()
        else:
            # The thread sees the process end, and does the rest.
            self._process.terminate()
            self._waiting.join()

    def _end(self) -> None:
        self._process.communicate()
        self._uffd.close()
