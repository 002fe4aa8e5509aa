"""``ringfence device``: disks that come and go while a machine runs."""

from __future__ import annotations

import json

from ringfence.api.client import Client
from ringfence.storage.options import parse_disk

OPENING = 30.0
"""Seconds that a machine gets to open an image, or to answer behind the guest."""


def add(name: str, disk: str, *, as_json: bool) -> None:
    """Plug a disk in, and print its slot. A path is the caller's, not the machine's process's."""
    _, comma, options = disk.replace(",,", "\0").partition(",")
    path = str(parse_disk(disk).path.absolute()).replace(",", ",,")
    with Client(name) as client:
        answer = client.call("device-add", patience=OPENING, disk=f"{path}{comma}{options}")
    print(json.dumps(answer) if as_json else answer["slot"])


def remove(name: str, slot: int, *, timeout: float) -> None:
    """Have the guest let go of what was added."""
    with Client(name) as client:
        client.call("device-remove", patience=timeout + OPENING, slot=slot, timeout=timeout)


def show(name: str, *, as_json: bool) -> None:
    """Print a machine's disks."""
    with Client(name) as client:
        rows = client.call("devices")["disks"]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        slot = "-" if row["slot"] is None else str(row["slot"])
        flags = [flag for flag in ("read_only", "snapshot") if row[flag]]
        print("  ".join((slot.ljust(2), row["path"], row["format"], *flags)))
