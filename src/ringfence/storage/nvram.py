"""A file that keeps a flash memory's contents: read once, written where it changes.

The file has exactly the chip's size. A new one is made from a template, beside its place and linked
there when it is complete. One machine at a time may have it open, as both would believe
to know what is in it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ringfence.errors import HostError, ImageError


class Nvram:
    """The open file ``path``; without one, ``template`` is what is kept, in memory only.

    While it is ``awaited``, because another machine still has it, the file is not opened before
    `reclaim`, and ``template`` stands for its content.

    Raises
    ------
    ImageError
        The file has another size than the template, or is missing and there is no template.
    HostError
        It can't be read, written or made, or another machine uses it.
    """

    def __init__(self, path: Path | None, template: bytes, *, awaited: bool = False) -> None:
        self._fd = -1
        self._path = path
        self.content = bytearray(template)
        if path is not None and not awaited:
            self._open(path, template)

    def _open(self, path: Path, template: bytes) -> None:
        try:
            if not path.exists():
                if not template:
                    raise ImageError(f"{path} does not exist, and the firmware has no variables")
                _create(path, template)
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.content = bytearray(os.pread(self._fd, 1 << 26, 0))
        except BlockingIOError as error:
            self.close()
            raise HostError(f"{path} is in use: give each machine a file of its own") from error
        except OSError as error:
            self.close()
            raise HostError(f"{path} can't be used for variables: {error.strerror}") from error
        if template and len(template) != len(self.content):
            size = len(self.content)
            self.close()
            raise ImageError(
                f"{path} has {size} bytes: this firmware's variables take {len(template)}"
            )

    def lend(self) -> None:
        """Let another machine have the file; only `reclaim` or `close` may follow."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def reclaim(self) -> None:
        """Have the file, again or at last; see above for what may be wrong with it.

        It may hold anything but what the chip does: who had it last tells its contents (see
        `chipset.flash.Flash.restored`).
        """
        if self._path is None:
            return
        self.close()
        self._open(self._path, bytes(self.content))

    def write(self, offset: int, data: bytes) -> None:
        """Keep changed bytes; OSError if the host can't (none of them is kept then)."""
        if self._fd >= 0 and os.pwrite(self._fd, data, offset) != len(data):
            raise OSError("short write")
        self.content[offset : offset + len(data)] = data

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _create(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.link(name, path)
    finally:
        with suppress(OSError):
            Path(name).unlink()
