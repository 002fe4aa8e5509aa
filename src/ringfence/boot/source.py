"""Where an image's bytes come from: a file or a buffer, with every way to fail said plainly.

Shape: one function. Everything that the boot room loads passes through it, so that a missing
file, a directory and an empty file give the same kind of message whatever they were meant to be.
"""

from __future__ import annotations

from pathlib import Path

from ringfence.errors import ImageError

ImageSource = bytes | bytearray | memoryview | str | Path
"""An image given as its bytes or as the path of a file."""

MAXIMUM_IMAGE_SIZE = 4 << 30
"""Bytes; nothing that fits below a guest's 4 GiB line is larger."""


def read_image(source: ImageSource, what: str) -> bytes:
    """All bytes of an image.

    Parameters
    ----------
    source : bytes or path
        The image itself, or the file that holds it.
    what : str
        What it is meant to be ("kernel", "initrd"); used in messages.

    Raises
    ------
    ImageError
        The file is missing, unreadable, not a regular file, empty or absurdly large.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ImageError(f"the {what} is empty: expected an image of some bytes")
        return bytes(source)
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{what} {path} is a directory: name the file inside it")
        if not path.exists():
            raise ImageError(f"{what} {path} does not exist: check the path")
        if not path.is_file():
            raise ImageError(f"{what} {path} is not a regular file: copy it to one first")
        size = path.stat().st_size
        if size > MAXIMUM_IMAGE_SIZE:
            raise ImageError(
                f"{what} {path} has {size >> 20} MiB: expected at most"
                f" {MAXIMUM_IMAGE_SIZE >> 20} MiB, is it a disk image?"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(
            f"{what} {path} can't be read ({reason}): check its permissions"
        ) from error
    if not data:
        raise ImageError(f"{what} {path} is empty: was it cut off while it was copied?")
    return data
