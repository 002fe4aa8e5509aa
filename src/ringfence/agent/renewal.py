"""Making a guest that goes on from a snapshot one of its own, by the agent in it.

`stir` gives its kernel random bytes of the host's, for kernels that don't hear of the VM generation
ID. `rename` tells a clone what it is called now: its host name, the address of its network card
(which the driver has read once, when it found the card), and a machine id of its own. Then it runs
the guest's own scripts in `HOOKS`, for all that its owner knows better.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ringfence.agent import wire
from ringfence.agent.client import Command
from ringfence.errors import HostError

# The shell's own commands where they do: what a clone runs is translated by each of them.
HOOKS = "/etc/ringfence/clone.d"
"""The guest's folder of scripts that a clone runs, with what it has become in the environment."""
PATIENCE = 3.0
"""Seconds that a guest that goes on gets to have its agent heard."""
_SAID = 4096
_RENAME = f"""\
read -r old < /proc/sys/kernel/hostname
echo "$RINGFENCE_HOSTNAME" > /proc/sys/kernel/hostname
[ ! -e /etc/hostname ] || echo "$RINGFENCE_HOSTNAME" > /etc/hostname
[ ! -e /etc/hosts ] || sed -i "s/\\\\b$old\\\\b/$RINGFENCE_HOSTNAME/g" /etc/hosts
[ ! -s /etc/machine-id ] || echo "$RINGFENCE_MACHINE_ID" > /etc/machine-id
for card in /sys/class/net/*; do
    read -r mac < "$card/address" && [ "$mac" = "$RINGFENCE_OLD_MAC" ] || continue
    ip link set dev "${{card##*/}}" address "$RINGFENCE_MAC"
done
for hook in {HOOKS}/*; do
    [ ! -x "$hook" ] || "$hook" || exit 1
done
"""
_NOT_OF_HOST_NAMES = re.compile("[^A-Za-z0-9-]")


class NotStirred(HostError):
    """There is an agent, but it could not reseed the guest's random number generator."""


def stir(vsock: Path, patience: float = PATIENCE) -> None:
    """Give a guest's random number generator a new seed.

    Raises
    ------
    HostError
        No agent answers.
    NotStirred
        The agent is of an earlier release, or the guest's kernel refuses.
    """
    command = Command(vsock, wire.entropy(os.urandom(wire.ENTROPY)), patience=patience)
    try:
        status = command.run(None, _drop, _drop)
    except HostError as error:
        raise NotStirred(
            "the guest's agent is too old to reseed random numbers: pull the image again"
        ) from error
    finally:
        command.close()
    if status:
        raise NotStirred("the guest's kernel takes no random numbers")


def rename(
    vsock: Path, name: str, macs: tuple[bytes, bytes], environment: Mapping[str, str]
) -> None:
    """Tell a clone who it is.

    Parameters
    ----------
    vsock : Path
        The socket that leads to the guest's.
    name : str
        The machine's name; what no host name may have in it becomes "-".
    macs : (bytes, bytes)
        The address that its network card had, and the one that it has now.
    environment : mapping
        What programs in the guest are started with.

    Raises
    ------
    HostError
        No agent answers, or something failed in the guest: with its last words.
    """
    old, new = (":".join(f"{byte:02x}" for byte in mac) for mac in macs)
    more = {
        "RINGFENCE_NAME": name,
        "RINGFENCE_HOSTNAME": _NOT_OF_HOST_NAMES.sub("-", name),
        "RINGFENCE_OLD_MAC": old,
        "RINGFENCE_MAC": new,
        "RINGFENCE_MACHINE_ID": os.urandom(16).hex(),
    }
    said = bytearray()

    def listen(data: bytes) -> None:
        said.extend(data[: _SAID - len(said)])

    request = wire.request(["/bin/sh", "-c", _RENAME], {**environment, **more})
    command = Command(vsock, request, patience=PATIENCE)
    try:
        status = command.run(None, _drop, listen)
    finally:
        command.close()
    if status:
        words = said.decode("utf-8", "replace").strip() or f"status {status}"
        raise HostError(f"the guest did not take its new name: {words}")


def _drop(data: bytes) -> None:
    """Nobody asks for this output."""
