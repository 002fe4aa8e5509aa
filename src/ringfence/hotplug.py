"""Disks that come and go while a machine runs.

`Pluggable` is what a `Machine` can do with them. A disk that is added becomes part of the machine's
description, with its slot, as it is part of snapshots, migrations and resets from then on. One is
removed by the guest: it is asked to, and when it has let go (or does so unasked), the device leaves
the bus and the description at once, by the vCPU's thread; what the host holds of it is closed by a
thread of its own, as requests may still be under way.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ringfence.assembly import HostSide, MachineConfig, Parts
from ringfence.errors import GuestTimeout
from ringfence.storage.options import DiskOptions, open_disk, parse_disk

if TYPE_CHECKING:
    from ringfence.chipset.pci.device import PciDevice


class Slots:
    """Who plugs disks into one machine, and takes them out.

    Parameters
    ----------
    machine : Pluggable
        The machine.
    host : HostSide
        Where its disks are open.
    """

    def __init__(self, machine: Pluggable, host: HostSide) -> None:
        self._machine = machine
        self._host = host
        self._emptied = threading.Condition()
        self._closers: list[threading.Thread] = []

    def add(self, options: DiskOptions) -> int:
        """Plug a disk in; return its slot."""
        disk = open_disk(options)
        try:
            with self._machine.unchanging() as parts, parts.board.lock:
                config = self._machine.config
                slot = parts.plug_disk(config, options, disk, self._host.storage.pool)
                self._host.storage.add(replace(options, slot=slot), disk)
                disks = (*config.disks, replace(options, slot=slot))
                self._machine.config = replace(config, disks=disks)
                return slot
        except BaseException:
            disk.close()
            raise

    def remove(self, slot: int, timeout: float) -> None:
        """Have the guest let go of a disk."""
        with self._machine.unchanging() as parts:
            parts.board.request_removal(slot)
        with self._emptied:
            if not self._emptied.wait_for(lambda: not self._has(slot), timeout):
                raise GuestTimeout(
                    f"the guest did not let go of the device in slot {slot} within {timeout:g} s:"
                    " it may be in use"
                )

    def _has(self, slot: int) -> bool:
        return any(options.slot == slot for options in self._machine.config.disks)

    def ejected(self, parts: Parts, slot: int, device: PciDevice) -> None:
        """The guest has let go of a device, which is off the bus; the board's lock is held."""
        config = self._machine.config
        at = [options.slot for options in config.disks].index(slot)
        disk = self._host.storage.remove(at)
        del parts.devices.disks[at]

        def close() -> None:
            device.close()
            disk.close()

        closer = threading.Thread(target=close, name=f"ringfence-eject-{slot}", daemon=True)
        self._closers = [each for each in self._closers if each.is_alive()]
        self._closers.append(closer)
        closer.start()
        with self._emptied:
            self._machine.config = replace(
                config, disks=(*config.disks[:at], *config.disks[at + 1 :])
            )
            self._emptied.notify_all()

    def settle(self) -> None:
        """Wait until nothing of a removed disk touches RAM any more; without the board's lock."""
        for closer in self._closers:
            closer.join()


class Pluggable(ABC):
    """A machine whose disks may come and go."""

    config: MachineConfig

    @property
    @abstractmethod
    def slots(self) -> Slots:
        """Who plugs disks in, and takes them out."""

    @abstractmethod
    def unchanging(self) -> AbstractContextManager[Parts]:
        """The parts of a machine that has begun and not ended, and doesn't start anew meanwhile."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Have no snapshot or migration meanwhile; UsageError where there is one."""

    def add_disk(self, disk: str | Path | DiskOptions) -> int:
        """Plug a disk into the running machine; return its PCI slot.

        The guest sees a new virtio-blk device if its kernel knows ACPI's hot-plug.

        Raises
        ------
        UsageError, ImageError, HostError
            It can't be opened, all slots are taken, or a snapshot or migration is under way.
        """
        with self.alone():
            return self.slots.add(parse_disk(disk))

    def remove_disk(self, slot: int, timeout: float = 30.0) -> None:
        """Have the guest let go of a disk that was added; its image is free afterwards.

        Raises
        ------
        UsageError
            There is no such disk. Those that the machine was made with stay.
        GuestTimeout
            The guest has not let go within ``timeout`` seconds; it may do so later.
        """
        self.slots.remove(slot, timeout)
