"""``ringfence cache``: look at the folder of the engine's compiled code, or clear it.

The cache is a folder of files that can be made again; nothing here needs to know their format.
Only what lies in that folder is counted or removed, links are never followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ringfence.errors import HostError, UsageError
from ringfence.settings import default_cache_dir

SUFFIXES = (".o",)
"""Endings of the files that the cache consists of; others are left alone."""


def info(folder: Path | None, *, as_json: bool) -> None:
    """Print folder, number of files and bytes."""
    where = folder or default_cache_dir()
    sizes = [entry.stat(follow_symlinks=False).st_size for entry in _files(where)]
    if as_json:
        print(json.dumps({"folder": str(where), "files": len(sizes), "bytes": sum(sizes)}))
    else:
        print(f"{where}: {len(sizes)} files, {sum(sizes) / (1 << 20):.1f} MiB")


def clear(folder: Path | None) -> None:
    """Remove the cache's files."""
    where = folder or default_cache_dir()
    count = 0
    for entry in list(_files(where)):
        try:
            Path(entry.path).unlink(missing_ok=True)
        except OSError as error:
            raise HostError(f"{entry.path} can't be removed: {error.strerror}") from error
        count += 1
    print(f"{where}: {count} files removed")


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"cache folder {folder} is not a folder")
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and entry.name.endswith(SUFFIXES):
                    yield entry
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cache folder {folder} can't be read: {error.strerror}") from error
