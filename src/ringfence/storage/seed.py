"""What cloud-init is told at a guest's first boot: a NoCloud seed, as files and as a disk.

cloud-init in a guest looks for a file system called CIDATA (cloudinit.readthedocs.io, "NoCloud")
with two files: what its owner wants of the system, and what the system is. The disk exists in
memory only and is part of the machine's description, so that snapshots and migrations need no file
for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ringfence.errors import UsageError
from ringfence.memory.buffers import Buffers, scatter, total
from ringfence.storage.disk import SECTOR, Disk
from ringfence.storage.iso9660 import make_iso

LABEL = "CIDATA"
MAX_USER_DATA = 256 << 10
ROOT_MAY_LOG_IN = b"#cloud-config\ndisable_root: false\n"
"""What is wanted where the owner doesn't say: keys are for root, too."""
_HOSTNAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_KEY = re.compile(r"(?:[^#\s].*\s)?(?:ssh|ecdsa|sk)-\S+ [A-Za-z0-9+/]+=*(?: .*)?")
"""A line of an authorized_keys file (sshd(8))."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A seed.

    Attributes
    ----------
    user_data : bytes
        A cloud-config, a script, or whatever else cloud-init takes as user data.
    keys : tuple of str
        Public keys of who may log in by SSH.
    hostname : str
        The system's name; empty: as it is.
    """

    user_data: bytes = ROOT_MAY_LOG_IN
    keys: tuple[str, ...] = ()
    hostname: str = ""

    def files(self) -> dict[str, bytes]:
        """Name to contents. Another seed has another instance-id, so that it is followed, too."""
        metadata: dict[str, object] = {}
        if self.hostname:
            metadata["local-hostname"] = self.hostname
        if self.keys:
            metadata["public-keys"] = list(self.keys)
        told = json.dumps(metadata, sort_keys=True).encode() + self.user_data
        metadata["instance-id"] = f"ringfence-{hashlib.sha256(told).hexdigest()[:16]}"
        return {
            "user-data": self.user_data,
            "meta-data": json.dumps(metadata, indent=1).encode() + b"\n",  # which is YAML, too
        }


def parse_seed(
    user_data: bytes | None = None, keys: Sequence[str] = (), hostname: str | None = None
) -> Seed | None:
    """A seed of what was given; None if nothing was.

    Parameters
    ----------
    user_data : bytes, optional
        As in `Seed`.
    keys : sequence of str
        Contents of files of public keys.
    hostname : str, optional
        The system's name.

    Raises
    ------
    UsageError
        There is no key where one should be, the name is none, the user data are too long.
    """
    if user_data is None and not keys and hostname is None:
        return None
    if user_data is not None and len(user_data) > MAX_USER_DATA:
        raise UsageError(f"user data of {len(user_data)} bytes: expected up to {MAX_USER_DATA}")
    if hostname is not None and not _HOSTNAME.fullmatch(hostname):
        raise UsageError(f"host name {hostname!r}: expected letters, digits, '-' and '.'")
    lines: list[str] = []
    for text in keys:
        found = [line.strip() for line in text.splitlines()]
        found = [line for line in found if line and not line.startswith("#")]
        if not found or not all(_KEY.fullmatch(line) for line in found):
            raise UsageError(
                "no public SSH key: expected lines such as 'ssh-ed25519 AAAA... name', which"
                " ssh-keygen writes to files that end in .pub"
            )
        lines += found
    return Seed(ROOT_MAY_LOG_IN if user_data is None else user_data, tuple(lines), hostname or "")


class SeedDisk(Disk):
    """A seed's file system, read-only and in memory."""

    def __init__(self, seed: Seed) -> None:
        self._image = make_iso(LABEL, seed.files())
        self.size = len(self._image)
        assert self.size % SECTOR == 0
        self.read_only = True

    def read(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.read`."""
        scatter(memoryview(self._image)[offset : offset + total(buffers)], buffers)

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        """See `Disk.read_now`."""
        self.read(offset, buffers)
        return True

    def write(self, offset: int, buffers: Buffers) -> None:
        """See `Disk.write`: refused."""
        raise _read_only()

    def flush(self) -> None:
        """See `Disk.flush`: there is nothing to do."""

    def discard(self, offset: int, length: int) -> None:
        """See `Disk.discard`: refused."""
        raise _read_only()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """See `Disk.write_zeroes`: refused."""
        raise _read_only()

    def close(self) -> None:
        """See `Disk.close`."""


def _read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))
