"""Virtio over PCI (4.1): where a driver finds the registers of a device, and how it is reset.

One BAR has four structures, each in a page of its own: common configuration, ISR status, the
device's configuration, notifications. Vendor-specific capabilities tell where (4.1.4); another one
gives access to all that through configuration space. MSI-X has a BAR of its own.

The registers of the common configuration are a table of offset, width, reader and writer; an access
that is not exactly one register reads bytes and writes nothing (4.1.3.1 demands natural widths).

A driver that breaks a ring's rules gets DEVICE_NEEDS_RESET and a configuration interrupt; until
the reset its queues rest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from functools import partial

from ringfence.chipset.pci.config import Identity, Register
from ringfence.chipset.pci.device import PciDevice
from ringfence.chipset.state import Saved, State
from ringfence.devices.gathering import Gatherer
from ringfence.devices.natives import UNKEPT, Natives
from ringfence.devices.virtio.device import VERSION_1, VirtioDevice
from ringfence.devices.virtio.moderation import InterruptModerator, Poller
from ringfence.devices.virtio.ring import Chain, PackedRing, Ring, RingError, SplitRing
from ringfence.devices.virtio.rules import EVENT_IDX, INDIRECT_DESC, RING_PACKED
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory
from ringfence.pacing import Pacing

VENDOR, FIRST_DEVICE, REVISION = 0x1AF4, 0x1040, 1
"""PCI identity (4.1.2.1)."""
MSIX_BAR, BAR = 1, 4
PAGE = 0x1000
COMMON, ISR, DEVICE, NOTIFY = (page * PAGE for page in range(4))
NOTIFY_MULTIPLIER = 4
NO_VECTOR = 0xFFFF
MASK32 = 0xFFFF_FFFF
DEFAULT_PACING = Pacing()


class DeviceStatus(IntEnum):
    """Device status (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


_WORKING = DeviceStatus.DRIVER_OK | DeviceStatus.DEVICE_NEEDS_RESET
"""Bits that say whether queues are worked on."""


class IsrStatus(IntEnum):
    """ISR status (4.1.4.5)."""

    QUEUE = 1
    CONFIGURATION = 2


class QueueRegisters(Saved):
    """What the driver has set for one queue (4.1.4.3)."""

    FIELDS = ("size", "vector", "enabled", "descriptors", "driver", "device")

    def __init__(self, size: int) -> None:
        self.maximum = size
        self.ring: Ring | None = None
        self.deferred = False
        """Whether a notification is put off."""
        self.told = 0
        """Of the chains that the ring has given back, those that were published."""
        self.reset()

    def reset(self) -> None:
        """Go back to what it is before a driver comes."""
        self.size = self.maximum
        self.vector = NO_VECTOR
        self.enabled = 0
        self.descriptors = self.driver = self.device = 0
        self.ring = None
        self.told = 0


class _Capability:
    """Types of virtio's PCI capabilities (4.1.4), and the layout of one."""

    VENDOR_SPECIFIC = 0x09
    COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = range(1, 6)
    FIELDS = struct.Struct("<BBBB2xII")
    """cap_len, cfg_type, bar, id, offset, length: what follows ID and link."""


class VirtioPci(PciDevice):
    """A virtio device in a PCI slot.

    Parameters
    ----------
    device : VirtioDevice
        The device.
    memory : GuestMemory
        Guest RAM.
    packed : bool
        Whether packed rings are offered.
    pacing : Pacing
        How often driver and device tell each other of work.
    code : Natives
        Where native code is found.
    """

    FIELDS = (
        *PciDevice.FIELDS,
        "status",
        "driver_features",
        "device_feature_select",
        "driver_feature_select",
        "config_vector",
        "generation",
        "queue_select",
        "isr",
    )

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        packed: bool = False,
        pacing: Pacing = DEFAULT_PACING,
        code: Natives = UNKEPT,
    ) -> None:
        number = FIRST_DEVICE + device.TYPE
        super().__init__(Identity(VENDOR, number, device.CLASS_CODE, REVISION, VENDOR, number))
        self.device = device
        self._memory = memory
        self._natives = code
        self.queues = [QueueRegisters(size) for size in device.queue_sizes]
        self._moderators = [
            InterruptModerator(pacing, self.later, partial(self._tell, queue))
            for queue in self.queues
        ]
        self._pollers = [
            Poller(pacing, self.later, partial(self.look, number))
            for number in range(len(self.queues))
        ]
        self._gatherers = [
            Gatherer(
                0 if pacing.poll else 1000 * pacing.gather,
                self.put_off,
                partial(self.look, number),
                few=device.FEW,
            )
            for number in range(len(self.queues))
        ]
        self.offered = device.features | VERSION_1 | INDIRECT_DESC
        if pacing.event_idx:
            self.offered |= EVENT_IDX
        if packed:
            self.offered |= RING_PACKED
        self.add_bar(BAR, 4 * PAGE)
        self.add_msix(MSIX_BAR, len(self.queues) + 1)
        self._vectors = len(self.queues) + 1
        for kind, offset, length in (
            (_Capability.COMMON_CFG, COMMON, 64),
            (_Capability.ISR_CFG, ISR, PAGE),
            (_Capability.DEVICE_CFG, DEVICE, PAGE),
        ):
            self._add_structure(kind, offset, length)
        notify = struct.pack("<I", NOTIFY_MULTIPLIER)
        self._add_structure(_Capability.NOTIFY_CFG, NOTIFY, PAGE, notify)
        at = self._add_structure(_Capability.PCI_CFG, 0, 0, bytes(4))
        self._window_bar = Register(at + 4, 1)
        self._window_offset = Register(at + 8, 4)
        self._window_length = Register(at + 12, 4)
        self._window_data = Register(at + 16, 4)
        for register in (
            self._window_bar, self._window_offset, self._window_length, self._window_data,
        ):  # fmt: skip
            self.config.allow(register, (1 << 8 * register.size) - 1)
        self._resetting = False
        self._clear()
        self._registers = self._common_registers()
        device.attach(self)

    def _add_structure(self, kind: int, offset: int, length: int, more: bytes = b"") -> int:
        body = _Capability.FIELDS.pack(
            16 + len(more), kind, BAR if length else 0, 0, offset, length
        )
        return self.config.add_capability(_Capability.VENDOR_SPECIFIC, body + more)

    def _clear(self) -> None:
        """Put all registers of the transport into the state after a reset."""
        self.status = 0
        self.driver_features = 0
        self.device_feature_select = self.driver_feature_select = 0
        self.config_vector = NO_VECTOR
        self.generation = 0
        self.queue_select = 0
        self.isr = 0
        for queue in self.queues:
            queue.reset()

    # ---- what the device calls (see device.Transport)

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""
        return self._memory

    @property
    def natives(self) -> Natives:
        """Where native code is found."""
        return self._natives

    @property
    def features(self) -> int:
        """What the driver has accepted."""
        return self.driver_features

    def ring(self, number: int) -> Ring | None:
        """See `Transport.ring`."""
        if not self._alive or number >= len(self.queues):
            return None
        return self.queues[number].ring

    def take(self, number: int) -> Chain | None:
        """See `Transport.take`."""
        ring = self.ring(number)
        try:
            return None if ring is None else ring.pop()
        except RingError:
            self.broken()
            return None

    def publish(self, number: int) -> None:
        """See `Transport.publish`."""
        queue = self.queues[number]
        if queue.ring is not None:
            wanted = queue.ring.flush()
            chains, queue.told = queue.ring.given - queue.told, queue.ring.given
            self._moderators[number].published(chains, wanted)

    def config_changed(self) -> None:
        """See `Transport.config_changed`."""
        self.generation = self.generation + 1 & 0xFF
        if self.status & DeviceStatus.DRIVER_OK:
            self._interrupt(self.config_vector, IsrStatus.CONFIGURATION)

    def finished(self) -> None:
        """See `Transport.finished`."""
        if self._resetting and not self.device.busy:
            self._resetting = False
            self._clear()

    def polls(self, number: int, found: int, size: int) -> bool:
        """See `Transport.polls`."""
        self._gatherers[number].found(found, size)
        return self._pollers[number].found(found)

    def again(self, number: int) -> None:
        """See `Transport.again`."""
        queue = self.queues[number]

        def notify() -> None:
            queue.deferred = False
            self.look(number)

        if not queue.deferred:
            queue.deferred = True
            self.later(notify)

    # ---- state machine

    @property
    def _alive(self) -> bool:
        """Whether queues may be worked on."""
        working = self.status & _WORKING == DeviceStatus.DRIVER_OK
        return working and self.bus_master and not self._resetting

    def _tell(self, queue: QueueRegisters) -> None:
        """Tell the driver of what it got back in a queue."""
        self._interrupt(queue.vector, IsrStatus.QUEUE)

    def _interrupt(self, vector: int, cause: IsrStatus) -> None:
        if self.msix is not None and self.msix.enabled:
            if vector != NO_VECTOR:
                self.msix.signal(vector)
            return
        self.isr |= cause
        self.set_intx(True)

    def _kicked(self, number: int) -> None:
        """The driver says that a queue, if there is one of that number, has chains."""
        ring = self.ring(number)
        if ring is not None and self.device.gathers(number) and self._gatherers[number].notified():
            ring.want_kicks(False)
        else:
            self.look(number)

    def look(self, number: int) -> None:
        """See `Transport.look`."""
        if self.ring(number) is None:
            return
        try:
            self.device.notified(number)
        except RingError:
            self.broken()

    def broken(self) -> None:
        """See `Transport.broken` (2.1.2)."""
        if not self.status & DeviceStatus.DEVICE_NEEDS_RESET:
            self.status |= DeviceStatus.DEVICE_NEEDS_RESET
            self.config_changed()

    def _set_status(self, value: int) -> None:
        if self._resetting:
            return
        if value == 0:
            self._begin_reset()
            return
        new = value & ~self.status
        if new & DeviceStatus.FEATURES_OK and not self._acceptable():
            value &= ~DeviceStatus.FEATURES_OK
        self.status = value | self.status & DeviceStatus.DEVICE_NEEDS_RESET
        if new & DeviceStatus.DRIVER_OK:
            self.device.started()

    def _acceptable(self) -> bool:
        return bool(self.driver_features & VERSION_1 and not self.driver_features & ~self.offered)

    def _begin_reset(self) -> None:
        self._resetting = True
        for queue in self.queues:
            queue.ring = None
        parts = zip(self._moderators, self._pollers, self._gatherers, strict=True)
        for moderator, poller, gatherer in parts:
            moderator.forget()
            poller.forget()
            gatherer.forget()
        self.set_intx(False)
        self.device.reset()
        self.finished()

    def _enable(self, value: int) -> None:
        """Queue enable: only a one means something (4.1.4.3.2)."""
        queue = self._queue
        if value != 1 or queue is None or queue.enabled or not self.status:
            return
        queue.enabled = 1
        try:
            queue.ring = self._make_ring(queue)
        except RingError:
            self.broken()

    def _make_ring(self, queue: QueueRegisters) -> Ring:
        if queue.size > queue.maximum:
            raise RingError(f"a queue of {queue.size}: expected at most {queue.maximum}")
        areas = (queue.descriptors, queue.driver, queue.device)
        kind = PackedRing if self.driver_features & RING_PACKED else SplitRing
        return kind(
            *(self._memory, queue.size, *areas, self.driver_features),
            natives=self.natives,
            layout=self.device.QUEUE,
        )

    # ---- registers

    @property
    def _queue(self) -> QueueRegisters | None:
        """The queue that queue_select names."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`."""
        del bar
        if offset < ISR:
            return self._common_read(offset, size)
        if offset < DEVICE:
            return self._isr_read() if offset == ISR else 0
        if offset < NOTIFY:
            at = offset - DEVICE
            return int.from_bytes(self.device.config()[at : at + size].ljust(size, b"\0"), "little")
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`."""
        del bar
        if offset >= NOTIFY:
            self._kicked((offset - NOTIFY) // NOTIFY_MULTIPLIER)
        elif offset >= DEVICE:
            self.device.config_write(offset - DEVICE, value.to_bytes(size, "little"))
        elif offset < ISR:
            register = self._registers.get(offset)
            if register is not None and register[0] == size:
                register[2](value)

    def _isr_read(self) -> int:
        """Reading clears the causes and withdraws the interrupt (4.1.4.5.1)."""
        value, self.isr = self.isr, 0
        self.set_intx(False)
        return value

    def _common_read(self, offset: int, size: int) -> int:
        register = self._registers.get(offset)
        if register is not None and register[0] == size:
            return register[1]()
        start = offset & ~3
        image = bytearray(4 + size)
        for at in range(start, start + len(image)):
            if at in self._registers:
                width, read, _ = self._registers[at]
                image[at - start : at - start + width] = read().to_bytes(width, "little")
        at = offset - start
        return int.from_bytes(image[at : at + size], "little")

    def _common_registers(
        self,
    ) -> dict[int, tuple[int, Callable[[], int], Callable[[int], None]]]:
        """Offset to width, reader and writer (4.1.4.3, struct virtio_pci_common_cfg)."""

        def plain(name: str) -> tuple[Callable[[], int], Callable[[int], None]]:
            return lambda: getattr(self, name), lambda value: setattr(self, name, value)

        def constant(read: Callable[[], int]) -> tuple[Callable[[], int], Callable[[int], None]]:
            return read, lambda value: None

        def half(select: int) -> int:
            return 32 * select if select < 2 else 64

        def set_driver_features(value: int) -> None:
            shift = half(self.driver_feature_select)
            if self.status & DeviceStatus.FEATURES_OK or shift == 64:
                return
            kept = self.driver_features & ~(MASK32 << shift)
            self.driver_features = kept | value << shift

        def queue(
            name: str, shift: int = 0, mask: int = 0xFFFF
        ) -> tuple[Callable[[], int], Callable[[int], None]]:
            def read() -> int:
                at = self._queue
                return 0 if at is None else getattr(at, name) >> shift & mask

            def write(value: int) -> None:
                at = self._queue
                if at is not None and not at.enabled:
                    setattr(at, name, getattr(at, name) & ~(mask << shift) | value << shift)

            return read, write

        def vector(value: int) -> int:
            return value if value < self._vectors else NO_VECTOR

        def set_config_vector(value: int) -> None:
            self.config_vector = vector(value)

        def set_queue_vector(value: int) -> None:
            at = self._queue
            if at is not None:
                at.vector = vector(value)

        def queue_vector() -> int:
            return NO_VECTOR if self._queue is None else self._queue.vector

        return {
            0x00: (4, *plain("device_feature_select")),
            0x04: (
                4,
                *constant(lambda: self.offered >> half(self.device_feature_select) & MASK32),
            ),
            0x08: (4, *plain("driver_feature_select")),
            0x0C: (
                4,
                lambda: self.driver_features >> half(self.driver_feature_select) & MASK32,
                set_driver_features,
            ),
            0x10: (2, lambda: self.config_vector, set_config_vector),
            0x12: (2, *constant(lambda: len(self.queues))),
            0x14: (1, lambda: self.status, self._set_status),
            0x15: (1, *constant(lambda: self.generation)),
            0x16: (2, *plain("queue_select")),
            0x18: (2, *queue("size")),
            0x1A: (2, queue_vector, set_queue_vector),
            0x1C: (2, queue("enabled")[0], self._enable),
            0x1E: (2, *constant(lambda: self.queue_select if self._queue is not None else 0)),
            0x20: (4, *queue("descriptors", 0, MASK32)),
            0x24: (4, *queue("descriptors", 32, MASK32)),
            0x28: (4, *queue("driver", 0, MASK32)),
            0x2C: (4, *queue("driver", 32, MASK32)),
            0x30: (4, *queue("device", 0, MASK32)),
            0x34: (4, *queue("device", 32, MASK32)),
        }

    # ---- the window in configuration space (4.1.4.9)

    def config_read(self, offset: int, size: int) -> int:
        """See `PciDevice.config_read`."""
        if self._window_data.touched(offset, size):
            at = self._window()
            if at is not None:
                value = self.bar_read(BAR, *at)
                self.config.set(self._window_data, value & MASK32)
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """See `PciDevice.config_write`."""
        super().config_write(offset, size, value)
        if self._window_data.touched(offset, size):
            at = self._window()
            if at is not None:
                data = self.config.get(self._window_data) & (1 << 8 * at[1]) - 1
                self.bar_write(BAR, *at, data)

    def _window(self) -> tuple[int, int] | None:
        """Offset and size of the access that the window is set to, if it is a possible one."""
        offset, length = (
            self.config.get(each) for each in (self._window_offset, self._window_length)
        )
        if self.config.get(self._window_bar) != BAR or length not in (1, 2, 4):
            return None
        if offset % length or offset + length > 4 * PAGE:
            return None
        return offset, length

    # ---- state

    def quiesce(self) -> None:
        """See `PciDevice.quiesce`; interrupts that wait are sent, so they need not be saved."""
        self.device.quiesce()
        with self.lock:
            for moderator in self._moderators:
                moderator.settle()

    def save(self) -> State:
        """See `Saved.save`; `quiesce` first."""
        return super().save() | {
            "queues": [queue.save() for queue in self.queues],
            "rings": [queue.ring.save() if queue.ring else {} for queue in self.queues],
            "device": self.device.save(),
        }

    def restore(self, state: State) -> None:
        """See `Saved.restore`; guest memory has to be restored first.

        All queues are looked at afterwards: what was put off, or polled for, has no notification.
        """
        missing = {"queues", "rings", "device"} - set(state)
        if missing or any(len(state[each]) != len(self.queues) for each in ("queues", "rings")):
            raise ImageError("saved virtio device has other queues: restore it into one alike")
        super().restore(state)
        rows = zip(self.queues, state["queues"], state["rings"], strict=True)
        for queue, registers, ring in rows:
            queue.restore(registers)
            queue.ring = None
            if ring:
                try:
                    queue.ring = self._make_ring(queue)
                except RingError as error:
                    raise ImageError(f"saved virtio queue is impossible: {error}") from error
                queue.ring.restore(ring)
            queue.told = 0
        self.device.restore(state["device"])
        for number, queue in enumerate(self.queues):
            if queue.ring is not None:
                self.again(number)

    def close(self) -> None:
        """See `PciDevice.close`: nothing touches guest RAM any more when this has returned."""
        with self.lock:
            self._begin_reset()
        self.quiesce()
        self.device.close()
