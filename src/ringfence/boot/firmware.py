"""Firmware instead of a kernel: a ROM that ends at 4 GiB, and a copy below 1 MiB.

The CPU starts at 0xFFFFFFF0, in the ROM. Firmware of old goes on below 1 MiB, where a PC has the
last 128 KiB of the ROM, too (real chipsets copy or shadow it there; here it is RAM from the start).
UEFI firmware has a second image, its variables in flash memory, right below its code.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.boot.layout import BIOS_END
from ringfence.boot.source import ImageSource, read_image
from ringfence.errors import ImageError
from ringfence.memory.ram import MAXIMUM_ROM, PAGE, GuestMemory

SHADOW = 128 << 10
"""Bytes that are below 1 MiB, too."""
SMALLEST = 64 << 10


@dataclass(frozen=True)
class Firmware:
    """``code`` is the ROM; ``variables`` what a new flash memory for variables holds, if any."""

    code: bytes
    variables: bytes = b""


def read_firmware(source: ImageSource, variables: ImageSource | None = None) -> Firmware:
    """Firmware from files.

    Raises
    ------
    ImageError
        A file can't be read, or is of a size that firmware doesn't have.
    """
    code = read_image(source, "firmware")
    kept = read_image(variables, "firmware's variables") if variables is not None else b""
    check_size(code, kept)
    return Firmware(code, kept)


def check_size(code: bytes, variables: bytes) -> None:
    """Refuse what can't lie below 4 GiB."""
    if len(code) < SMALLEST or len(code) % PAGE or len(variables) % PAGE:
        raise ImageError(
            f"the firmware has {len(code)} bytes, its variables {len(variables)}: expected a"
            f" multiple of 4 KiB, at least {SMALLEST >> 10} KiB; is it firmware at all?"
        )
    if len(code) + len(variables) > MAXIMUM_ROM:
        raise ImageError(
            f"the firmware has {len(code) + len(variables) >> 20} MiB with its variables:"
            f" expected at most {MAXIMUM_ROM >> 20} MiB"
        )


def place_firmware(memory: GuestMemory, firmware: Firmware) -> None:
    """Put the copy below 1 MiB, as after power-on; ``memory`` has the code as its ROM."""
    shadow = firmware.code[-SHADOW:]
    memory.write(BIOS_END - len(shadow), shadow)
