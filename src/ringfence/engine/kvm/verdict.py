"""What this host's /dev/kvm is, found out once and remembered until the host is started anew.

`probe` runs a loop under KVM, and so has to load most of the engine; against a slow KVM that takes
longer than all else before a guest's first instruction. What it found holds for as long as device,
kernel and boot are the same, and is kept in the cache folder under their names. That there is
nothing to use is not kept: that is seen at once.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from ringfence.settings import default_cache_dir

DEVICE = Path("/dev/kvm")
BOOT = Path("/proc/sys/kernel/random/boot_id")
FILE = "kvm.json"
_LIMIT = 4096


class Kind(Enum):
    """What is behind /dev/kvm."""

    HARDWARE = "hardware"
    SOFTWARE = "software"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the probe found.

    Attributes
    ----------
    kind : Kind
        What is there.
    detail : str
        For people: what was found, and if there is nothing to use, what to do.
    guest_ns, host_ns : int
        How long the loop took inside, entry and exit included, and on the host; 0 if not run.
    """

    kind: Kind
    detail: str
    guest_ns: int = 0
    host_ns: int = 0


@cache
def verdict() -> Verdict:
    """What this host's /dev/kvm is; found out once per process."""
    host = _host()
    known = _recall(host)
    if known is not None:
        return known
    from ringfence.engine.kvm.probe import probe_host

    found = probe_host()
    if host is not None and found.kind is not Kind.NONE:
        _remember(host, found)
    return found


def hardware() -> bool:
    """Whether there is hardware to use; where there is no device, nothing is loaded to say so."""
    return os.access(DEVICE, os.R_OK | os.W_OK) and verdict().kind is Kind.HARDWARE


def _host() -> str | None:
    """What a verdict is about: this device, under this kernel, until it is started anew."""
    try:
        device = DEVICE.stat()
        boot = BOOT.read_text().strip()
    except OSError:
        return None
    return f"{boot} {os.uname().release} {device.st_dev} {device.st_ino} {device.st_rdev}"


def _recall(host: str | None) -> Verdict | None:
    """The verdict that is kept for this host, in a file that nobody else could have written."""
    try:
        descriptor = os.open(
            default_cache_dir() / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                return None
            kept = json.loads(file.read(_LIMIT))
        if host is None or kept["host"] != host or status.st_mode & 0o022:
            return None
        times = int(kept["guest_ns"]), int(kept["host_ns"])
        return Verdict(Kind(kept["kind"]), str(kept["detail"]), *times)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _remember(host: str, found: Verdict) -> None:
    """Keep a verdict, whole or not at all; without a place for it, the next start asks again."""
    with suppress(OSError, RuntimeError):  # the latter: a user without a home folder
        folder = default_cache_dir()
        part = folder / f"{FILE}.{os.getpid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.write_text(json.dumps({"host": host, **asdict(found), "kind": found.kind.value}))
        part.chmod(0o600)
        part.replace(folder / FILE)
