"""The device for shared folders: type 9 (5), which carries 9P messages.

There is one queue. A chain has a request, then room for its answer; both are handed to the
folder's server as they are (`sharing.session`), by one thread, in order. What the server can answer
without waiting for the host is answered on the spot, unless others are being worked on: changing
threads takes longer than most requests.

The configuration is the tag that the guest mounts the folder by: its length in two bytes, and its
bytes (struct virtio_9p_config of Linux, whose transport is the reference here: the standard only
reserves the number).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ringfence.chipset.state import State
from ringfence.devices.virtio.deferred import DeferringDevice, Workers
from ringfence.devices.virtio.ring import Chain
from ringfence.errors import ImageError
from ringfence.memory.buffers import Buffers

T = TypeVar("T")
MOUNT_TAG = 1 << 0
"""Feature: the configuration has a tag."""
QUEUE_SIZE = 128
TURN = 2 << 20
"""Bytes of answers that may be made on the spot in one turn; others are left to the thread."""


class FileServer(Protocol):
    """What holds the files; see ``sharing.session.FolderServer``, whose methods these are."""

    tag: str

    def handle(self, request: Buffers, reply: Buffers) -> int:
        """Carry out a request; return how much of ``reply`` was filled."""

    def handle_now(self, request: Buffers, reply: Buffers) -> int | None:
        """As `handle`, if that needs no waiting for the host; else None, and nothing is done."""

    def reset(self) -> None:
        """End the session."""

    def save(self) -> dict[str, Any]:
        """The session as plain data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned."""


class Virtio9p(DeferringDevice):
    """A shared folder.

    Parameters
    ----------
    server : FileServer
        The files. It is not closed with the device: it outlives a reset of the machine.
    worker : Workers
        One thread, which carries out requests in order.
    """

    TYPE = 9
    CLASS_CODE = 0x018000

    def __init__(self, server: FileServer, worker: Workers) -> None:
        super().__init__(MOUNT_TAG, (QUEUE_SIZE,), worker)
        self._server = server

    def config(self) -> bytes:
        """See `VirtioDevice.config`."""
        tag = self._server.tag.encode()
        return len(tag).to_bytes(2, "little") + tag

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`."""
        ring = self.transport.ring(number)
        if ring is None:
            return
        left = 0 if ring.memory.incomplete else TURN

        def begin(chain: Chain) -> int | None:
            nonlocal left
            written = None
            if left > 0 and not self.busy:
                written = _answered(self._server.handle_now, chain)
            if written is None:
                self.defer(number, ring, chain, self._perform)
            else:
                left -= written
            return written

        self.drain(number, begin)

    def _perform(self, chain: Chain) -> int:
        return _answered(self._server.handle, chain)

    def reset(self) -> None:
        """See `VirtioDevice.reset`: the session ends behind the requests that are under way."""
        self._workers.submit(self._server.reset)

    def save(self) -> State:
        """See `Saved.save`."""
        return super().save() | {"session": self._server.save()}

    def restore(self, state: State) -> None:
        """See `Saved.restore`: files are opened again by their names."""
        super().restore(state)
        if not isinstance(state.get("session"), dict):
            raise ImageError("saved shared folder has no session: take the snapshot anew")
        self._server.restore(state["session"])


def _answered(answer: Callable[[Buffers, Buffers], T], chain: Chain) -> T | int:
    """What comes of a chain's request; a bug of ours costs the guest just this answer."""
    try:
        return answer(chain.readable, chain.writable)
    except Exception:
        return 0
