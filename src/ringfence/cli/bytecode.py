"""Where Python's own compiled code of ours is kept, if not beside its sources.

An installed package has been compiled. A checkout is compiled at its first start, unless the
sources can't be written, or PYTHONDONTWRITEBYTECODE asks to leave no traces among them, as
container images often do: then each start would compile all of it anew, which takes longer than all
else up to the guest's first instruction. So it is kept in a folder of the user's instead, by
Python's own means (`sys.pycache_prefix`), for the life of the process and for nobody else.
"""

from __future__ import annotations

import os
import stat
import sys
from importlib.util import cache_from_source
from pathlib import Path

from ringfence.settings import default_cache_dir


def keep_bytecode() -> None:
    """Have modules that are imported from now on kept, where nothing else sees to it."""
    beside = Path(cache_from_source(__file__))
    if sys.pycache_prefix is not None or beside.exists():
        return
    if not sys.dont_write_bytecode and os.access(Path(__file__).parent, os.W_OK):
        return
    try:
        folder = default_cache_dir().with_name("python")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder):
            sys.pycache_prefix = str(folder)
            sys.dont_write_bytecode = False
    except (OSError, RuntimeError):  # a user without a home folder has the latter
        return  # it only takes longer


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put code there, which would be executed."""
    status = folder.lstat()
    mode = stat.S_IMODE(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not mode & 0o022
