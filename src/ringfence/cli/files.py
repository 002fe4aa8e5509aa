"""Files that options name, read whole, with an error for the user where that fails."""

from __future__ import annotations

from pathlib import Path

from ringfence.errors import UsageError


def read_user_file(path: Path) -> bytes:
    """A file's contents; UsageError if it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error


def read_text_file(path: Path) -> str:
    """A file's contents as text; UsageError if it is none."""
    try:
        return read_user_file(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text file") from error
