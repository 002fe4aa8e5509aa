"""What a machine was started from goes along when it moves, where it may be needed again.

A reset that starts the guest anew loads its kernel once more; firmware is there all the time, and
what it may start without a disk, too. At the target there are no such files, and none may be
opened because a sender says so. So the bytes themselves are sent, before RAM. They are bounded by
the guest's RAM, into which all but a ROM have to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ringfence.assembly import MachineConfig
from ringfence.boot.firmware import Firmware, check_size
from ringfence.boot.modules import parse_module
from ringfence.boot.source import read_image
from ringfence.errors import ImageError
from ringfence.memory.ram import MAXIMUM_ROM

KERNEL, INITRD, MODULE, FIRMWARE, VARIABLES = "kernel", "initrd", "module", "firmware", "variables"
NAMES = (KERNEL, INITRD, MODULE, FIRMWARE, VARIABLES)


@dataclass(frozen=True, slots=True)
class Carried:
    """One image: what it is, its bytes, and a module's command line."""

    name: str
    data: bytes
    text: str = ""


def gather(config: MachineConfig) -> list[Carried]:
    """The images that a machine needs wherever it goes; ImageError where one can't be read."""
    found = []
    firmware = config.firmware
    if firmware is not None:
        found.append(Carried(FIRMWARE, firmware.code))
        if firmware.variables:
            found.append(Carried(VARIABLES, firmware.variables))
    if firmware is None and config.on_reset != "reboot":
        return found
    if config.kernel is not None:
        found.append(Carried(KERNEL, read_image(config.kernel, KERNEL)))
    if config.initrd is not None:
        found.append(Carried(INITRD, read_image(config.initrd, INITRD)))
    for each in config.modules:
        source, text = parse_module(each) if isinstance(each, str) else each
        found.append(Carried(MODULE, read_image(source, MODULE), text))
    return found


def without(config: MachineConfig) -> MachineConfig:
    """A configuration that names no images."""
    return replace(config, kernel=b"", initrd=None, modules=(), firmware=None)


def with_images(config: MachineConfig, images: Sequence[Carried]) -> MachineConfig:
    """A configuration with images that were carried; ImageError where they are none."""
    one = {each.name: each.data for each in images}
    if FIRMWARE in one:
        check_size(one[FIRMWARE], one.get(VARIABLES, b""))
        firmware = Firmware(one[FIRMWARE], one.get(VARIABLES, b""))
        config = replace(config, firmware=firmware, kernel=None)
    if KERNEL in one:
        config = replace(config, kernel=one[KERNEL])
    modules = tuple((each.data, each.text) for each in images if each.name == MODULE)
    return replace(config, initrd=one.get(INITRD), modules=modules)


def announce(images: Sequence[Carried]) -> list[dict[str, Any]]:
    """What will be sent, as plain data."""
    return [{"name": each.name, "size": len(each.data), "text": each.text} for each in images]


def announced(content: Any, memory: int) -> list[tuple[str, int, str]]:
    """Name, size and text of what comes for ``memory`` bytes of RAM; ImageError for nonsense."""
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise ImageError("the sender does not say which images it has")
    found = [(each.get("name"), each.get("size"), each.get("text")) for each in content]
    sound = all(
        name in NAMES and type(size) is int and size > 0 and isinstance(text, str)
        for name, size, text in found
    )
    if not sound or sum(size for _, size, _ in found) > memory + MAXIMUM_ROM:
        raise ImageError("the sender's images are none, or larger than the guest's RAM")
    return found
