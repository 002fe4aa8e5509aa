"""The entropy device (5.4): buffers are filled with the host's random bytes."""

from __future__ import annotations

import os

from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.ring import Chain

AT_ONCE = 4096
"""Bytes given for one request at most; the driver asks again for more."""


class VirtioRng(VirtioDevice):
    """A source of entropy."""

    TYPE = 4
    CLASS_CODE = 0x00FF00

    def __init__(self) -> None:
        super().__init__(0, (64,))

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`."""
        self.drain(number, _fill)


def _fill(chain: Chain) -> int:
    return chain.write(os.urandom(min(chain.writable_length, AT_ONCE)))
