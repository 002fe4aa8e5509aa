"""Drivers for devices, closed after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from devices.virtio.driver import Driver
from ringfence.devices.virtio.device import VirtioDevice

Drive = Callable[..., Driver]


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Make a driver: ``drive(device, packed=False)``."""
    made: list[Driver] = []

    def make(device: VirtioDevice, *, packed: bool = False) -> Driver:
        made.append(Driver(device, packed=packed))
        return made[-1]

    yield make
    for driver in made:
        driver.close()
