"""Commands for devices that come and go: see `hotplug`."""

from __future__ import annotations

from typing import Any

from ringfence.api.commands import Call, command
from ringfence.errors import UsageError

PATIENCE = 30.0
"""Seconds that a guest gets to let go of a device."""


@command("devices")
def devices(call: Call) -> dict[str, Any]:
    """List the machine's disks; those with a slot were added while it ran."""
    return {
        "disks": [
            {
                "slot": disk.slot,
                "path": str(disk.path.absolute()),
                "format": disk.format,
                "read_only": disk.read_only,
                "snapshot": disk.snapshot,
                "serial": disk.serial,
            }
            for disk in call.machine.config.disks
        ]
    }


@command("device-add", disk=str)
def device_add(call: Call) -> dict[str, Any]:
    """Plug a disk in, described as for ``--disk``; answer with its slot."""
    if "disk" not in call.arguments:
        raise UsageError("device-add needs an argument: disk")
    return {"slot": call.machine.add_disk(call.arguments["disk"])}


@command("device-remove", slot=int, timeout=float)
def device_remove(call: Call) -> dict[str, Any]:
    """Have the guest let go of the disk in ``slot``, within ``timeout`` seconds."""
    if "slot" not in call.arguments:
        raise UsageError("device-remove needs an argument: slot")
    call.machine.remove_disk(call.arguments["slot"], call.arguments.get("timeout", PATIENCE))
    return {}
