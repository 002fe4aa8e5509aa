"""Hostile drivers of what is soldered to the board: ports, device memory, MSRs, configuration.

The board has everything that one can have: firmware's flash memory and configuration device, test
devices, the PIIX, two CPUs, cards of both kinds. A target is a part of it: the addresses where the
part is, and one thing that it must still do when the driver has gone, after the state of the whole
board went through save and restore.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from chipset.conftest import Rig
from devices.virtio.backends import Inline, Ramdisk, Wire
from fuzzing.harness import FAR, Fuzzer
from ringfence.boot.firmware import Firmware
from ringfence.chipset import flash, fwcfg, ioapic, lapic, pit, pm, rtc, uart
from ringfence.chipset.pci import host, hotplug
from ringfence.cpu.faults import GeneralProtection
from ringfence.devices import testing
from ringfence.devices.e1000.card import E1000
from ringfence.devices.natives import natives
from ringfence.devices.virtio.blk import VirtioBlk
from ringfence.devices.virtio.pci import VirtioPci
from ringfence.firmware import (
    TestDevices,
    attach_configuration,
    attach_firmware,
    attach_test_devices,
)
from ringfence.memory.ram import GuestMemory
from ringfence.storage.nvram import Nvram

RAM = 4 << 20
CPUS = 2
COMMAND, TARGET = 0x1000, 0x200000
FLASH_SIZE = 4 * flash.BLOCK
OUTPUT_LIMIT = 64 << 10
"""Bytes that one input may put out."""


class Bench(Rig):
    """A board with all parts."""

    def __init__(self) -> None:
        super().__init__(cpus=CPUS, memory_size=RAM)
        firmware = Firmware(bytes(64 << 10), bytes(b"\xff" * FLASH_SIZE))
        self.memory = GuestMemory(RAM, firmware.code)
        self.output = bytearray()
        files = attach_firmware(
            self.board, self.memory, firmware, Nvram(None, firmware.variables), CPUS
        )
        assert self.memory.rom is not None
        self.flash_base = self.memory.rom.base - FLASH_SIZE
        self.disk = VirtioPci(VirtioBlk(Ramdisk(), Inline()), self.memory)
        self.board.plug(self.disk)
        self.board.on_eject = lambda slot, device: device.close()
        mac = bytes.fromhex("020000000001")
        self.board.plug(E1000(self.memory, self.board.timers, Wire(), mac, natives()))
        console = TestDevices(testing.EXIT_PORT, self.output.extend, ports=True)
        attach_test_devices(self.board, console, lambda status: self.events.append(status))
        attach_configuration(self.board, self.memory, CPUS, files)

    def plug(self) -> int | None:
        """Plug one more disk in, if there is a slot; return it."""
        free = [slot for slot in hotplug.SLOTS if not self.board.pci.present(slot)]
        if not free:
            return None
        return self.board.hot_plug(VirtioPci(VirtioBlk(Ramdisk(), Inline()), self.memory))

    def close(self) -> None:
        self.board.close()
        self.memory.close()


Ranges = tuple[tuple[int, int], ...]
"""Bases and lengths."""


@dataclass(frozen=True)
class Chip:
    """A part of the board: where it is, and whether it works (its driver begins anew)."""

    works: Callable[[Bench], None]
    ports: Ranges = ()
    memory: Ranges = ()
    messages: bool = False
    """Whether the local APICs' MSRs and CR8 are part of it."""


class ChipFuzzer(Fuzzer):
    """A driver of one part of the board."""

    def __init__(self, seed: int, chip: Chip) -> None:
        super().__init__(seed)
        self.chip = chip
        self.bench = Bench()
        steps: list[Callable[[], None]] = [self.time, self.interrupt, self.host]
        steps += [self.port] * 12 if chip.ports else []
        steps += [self.mmio] * 12 if chip.memory else []
        steps += [self.message] * 6 if chip.messages else []
        self.steps = steps

    def close(self) -> None:
        self.bench.close()

    def begin(self) -> None:
        self.bench.events.clear()

    def after(self) -> None:
        bench = self.bench
        assert len(bench.output) + len(bench.console) <= OUTPUT_LIMIT
        assert len(bench.events) <= 4096
        bench.output.clear()
        bench.console.clear()
        bench.events.clear()

    def check(self) -> None:
        board = self.bench.board
        assert len(board.timers._heap) < 1024
        state = board.save()
        board.restore(state)
        again = board.save()
        assert again.keys() == state.keys()
        self.chip.works(self.bench)

    # ---- steps

    def _place(self, ranges: Ranges) -> tuple[int, int]:
        """An address, mostly aligned and within, and a size."""
        base, length = self.source.choice(ranges)
        size = self.pick(1, 1, 2, 4)
        at = base + self.source.randrange(length)
        return at if self.chance(0.1) else at & ~(size - 1), size

    def port(self) -> None:
        at, size = self._place(self.chip.ports)
        at &= 0xFFFF
        if self.chance(0.3):
            assert 0 <= self.bench.board.port_read(at, size) < 1 << 8 * size
        else:
            self.bench.board.port_write(at, size, self.data(size))

    def mmio(self) -> None:
        at, size = self._place(self.chip.memory)
        size = self.pick(size, size, size, 4, 8)
        cpu = self.source.randrange(CPUS)
        if self.chance(0.3):
            assert 0 <= self.bench.board.mmio_read(at, size, cpu) < 1 << 8 * size
        else:
            self.bench.board.mmio_write(at, size, self.data(size), cpu)

    def data(self, size: int) -> int:
        """What is written: anything; for DMA sometimes the address of a command that could be."""
        if size == 4 and self.chance(0.3):
            key = self.pick(0x19, *range(0x20, 0x26), self.value(16))
            control = key << 16 | self.source.getrandbits(5)
            target = self.pick(TARGET, COMMAND, RAM - 16, RAM, *FAR, self.source.getrandbits(64))
            length = self.pick(0, 1, 4096, self.value())
            self.bench.memory.write(COMMAND, struct.pack(">IIQ", control, length, target))
            return int.from_bytes(self.pick(COMMAND, RAM - 8).to_bytes(4, "little"), "big")
        return self.value(8 * size)

    def message(self) -> None:
        """The local APIC by MSR and CR8."""
        board, cpu = self.bench.board, self.source.randrange(CPUS)
        index = 0x800 + self.pick(*range(0x40), self.source.randrange(0x100))
        index = self.pick(index, index, index, lapic.APIC_BASE, lapic.TSC_DEADLINE)
        kind = self.source.randrange(5)
        with contextlib.suppress(GeneralProtection):
            if kind == 0:
                board.msr_read(cpu, index)
            elif kind == 1:
                board.write_cr8(cpu, self.source.randrange(16))
                assert board.read_cr8(cpu) < 16
            elif index == lapic.APIC_BASE:
                flags = self.pick(0, 0x800, 0x900, 0x900, 0xC00, 0xD00, self.value(12))
                base = self.pick(0xFEE00000, 0xFEE00000, 0x1000, ioapic.BASE, self.value(40))
                board.msr_write(cpu, index, base & ~0xFFF | flags)
            else:
                board.msr_write(cpu, index, self.value(64))

    def interrupt(self) -> None:
        """Interrupts come, and are taken; ends of them are the driver's matter."""
        board, cpu = self.bench.board, self.source.randrange(CPUS)
        kind = self.source.randrange(4)
        if kind == 0:
            board.set_irq(self.source.randrange(16), self.chance(0.5))
        elif kind == 1:
            board.send_msi(0xFEE00000 | self.value(20), self.value(16))
        elif board.interrupt_pending(cpu):
            assert 0 <= board.acknowledge(cpu) < 256

    def host(self) -> None:
        """The owner types, presses the button, or plugs disks in and out."""
        board = self.bench.board
        if self.chance(0.1):
            self.bench.plug()
        slot = self.pick(*hotplug.SLOTS)
        if self.chance(0.1) and board.pci.present(slot):
            board.request_removal(slot)
        if board.uart.pending_input() < 4096:
            board.receive(self.source.randbytes(self.pick(1, 16, 100)))
        if self.chance(0.1):
            board.press_power_button()

    def time(self) -> None:
        self.bench.clock.advance(self.pick(1, 1000, 20_000, 100_000))


# ---- what still works


def _uart_works(bench: Bench) -> None:
    bench.out(uart.BASE + 4, 0)
    bench.out(uart.BASE + 3, 3)
    bench.out(uart.BASE, *b"hello\n")
    bench.board.flush()
    assert bench.console.endswith(b"hello\n")


def _rtc_works(bench: Bench) -> None:
    bench.out(rtc.BASE, 0x0B)
    bench.out(rtc.BASE + 1, 0x02)
    bench.out(rtc.BASE, 0x40)
    bench.out(rtc.BASE + 1, 0x5A)
    assert bench.inb(rtc.BASE + 1) == 0x5A


def _pit_works(bench: Bench) -> None:
    bench.out(pit.BASE + pit.CONTROL, 0x34)
    bench.out(pit.BASE, 0, 0x10)
    bench.clock.advance(1_000_000)
    bench.out(pit.BASE + pit.CONTROL, 0)
    assert 0 < bench.inb(pit.BASE) + (bench.inb(pit.BASE) << 8) <= 0x1000


def _pic_works(bench: Bench) -> None:
    for irq in range(16):
        bench.board.set_irq(irq, False)
    for base, first, cascade in ((0x20, 0x20, 4), (0xA0, 0x28, 2)):
        bench.out(base, 0x11)
        bench.out(base + 1, first, cascade, 1, 0)
    bench.out(0x4D0, 0)
    bench.out(0x4D1, 0)
    bench.board.set_irq(5, True)
    assert bench.board.pic.output
    assert bench.board.pic.acknowledge() == 0x25
    bench.board.set_irq(5, False)
    bench.out(0x20, 0x65)


def _ioapic_works(bench: Bench) -> None:
    bench.board.mmio_write(ioapic.BASE, 4, 0x10 + 2 * 9)
    bench.board.mmio_write(ioapic.BASE + 0x10, 4, 0x1_0042)
    assert bench.board.mmio_read(ioapic.BASE + 0x10, 4) & 0x1_00FF == 0x1_0042


def _lapic_works(bench: Bench) -> None:
    for value in (0xFEE00900 & ~0x800, 0xFEE00900):
        bench.board.msr_write(0, lapic.APIC_BASE, value)
    bench.board.mmio_write(0xFEE00080, 4, 0)  # TPR
    bench.board.mmio_write(0xFEE000F0, 4, 0x1FF)
    bench.board.mmio_write(0xFEE00300, 4, 0x4_4055)  # to itself
    assert bench.board.acknowledge(0) == 0x55
    bench.board.mmio_write(0xFEE000B0, 4, 0)


def _pm_works(bench: Bench) -> None:
    before = bench.board.pm.timer()
    bench.clock.advance(1_000_000)
    assert before != bench.board.pm.timer()


def _i8042_works(bench: Bench) -> None:
    bench.out(0x64, 0xAA)
    assert bench.inb(0x60) == 0x55


def _configure(bench: Bench, slot: int, register: int, value: int | None = None) -> int:
    bench.board.port_write(host.BASE, 4, host.ENABLE | slot << 11 | register)
    if value is not None:
        bench.board.port_write(host.BASE + 4, 4, value)
    return bench.board.port_read(host.BASE + 4, 4)


def _pci_works(bench: Bench) -> None:
    found = {_configure(bench, slot, 0) for slot in range(host.SLOTS)}
    assert {0x1237_8086, 0x1042_1AF4, 0x100E_8086} <= found
    slot = next(slot for slot in range(32) if _configure(bench, slot, 0) == 0x1042_1AF4)
    _configure(bench, slot, 0x20, 0xC000_0000)
    _configure(bench, slot, 4, 6)
    bench.board.mmio_write(0xC000_0014, 1, 0)
    assert bench.board.mmio_read(0xC000_0012, 2) == 1  # num_queues


def _hotplug_works(bench: Bench) -> None:
    bench.board.port_write(hotplug.BASE + hotplug.EJECT, 4, 0xFFFFFFFF)
    bench.board.port_read(hotplug.BASE + hotplug.FILLED, 4)
    slot = bench.plug()
    assert slot == hotplug.SLOTS[0]
    assert bench.board.port_read(hotplug.BASE + hotplug.FILLED, 4) == 1 << slot
    assert _configure(bench, slot, 0) == 0x1042_1AF4
    bench.board.port_write(hotplug.BASE + hotplug.EJECT, 4, 1 << slot)
    assert _configure(bench, slot, 0) == 0xFFFFFFFF
    assert bench.board.pci.present(1)


def _fwcfg_works(bench: Bench) -> None:
    bench.board.port_write(fwcfg.BASE, 2, fwcfg.SIGNATURE)
    assert bytes(bench.inb(fwcfg.BASE + 1) for _ in range(4)) == b"QEMU"


def _flash_works(bench: Bench) -> None:
    def write(*values: int) -> None:
        for value in values:
            bench.board.mmio_write(bench.flash_base, 1, value)

    write(*(flash.READ_ARRAY,) * (flash.BUFFER_MAXIMUM + 2))  # a write to buffer takes so many
    write(flash.CLEAR_STATUS, flash.ERASE, flash.CONFIRM, flash.READ_ARRAY)
    assert bench.board.mmio_read(bench.flash_base, 1) == 0xFF
    write(flash.PROGRAM, 0x3C, flash.READ_ARRAY)
    assert bench.board.mmio_read(bench.flash_base, 1) == 0x3C


def _testing_works(bench: Bench) -> None:
    bench.board.port_write(testing.LATCH_PORT, 4, 0x12345678)
    assert bench.board.port_read(testing.LATCH_PORT, 4) == 0x12345678
    bench.out(testing.CONSOLE_PORT, 0x41)
    assert bench.output.endswith(b"A")


def _buses_work(bench: Bench) -> None:
    assert bench.board.port_read(0x5000, 1) == 0xFF or _configure(bench, 0, 0)


CHIPS: dict[str, Chip] = {
    "uart": Chip(_uart_works, ports=((uart.BASE, uart.LENGTH),)),
    "rtc": Chip(_rtc_works, ports=((rtc.BASE, rtc.LENGTH),)),
    "pit": Chip(_pit_works, ports=((pit.BASE, 4), (pit.BASE, 4), (pit.SYSTEM_PORT, 1))),
    "pic": Chip(_pic_works, ports=((0x20, 2), (0xA0, 2), (0x4D0, 2))),
    "ioapic": Chip(
        _ioapic_works, memory=((ioapic.BASE, 4), (ioapic.BASE + 0x10, 4), (ioapic.BASE, 0x1000))
    ),
    "lapic": Chip(_lapic_works, memory=((0xFEE00000, 0x400),), messages=True),
    "pm": Chip(_pm_works, ports=((pm.BASE, pm.LENGTH), (0xB2, 2), (0xCF9, 1))),
    "i8042": Chip(_i8042_works, ports=((0x60, 1), (0x64, 1), (0x92, 1))),
    "pci": Chip(
        _pci_works,
        ports=((host.BASE, 8), (host.BASE, 4), (host.BASE + 4, 4)),
        memory=((host.ECAM_BASE, 0x40000),),
    ),
    "hotplug": Chip(
        _hotplug_works,
        ports=((hotplug.BASE, hotplug.LENGTH), (hotplug.BASE + hotplug.EJECT, 4)),
        memory=((host.ECAM_BASE, 0x100000),),
    ),
    "fwcfg": Chip(_fwcfg_works, ports=((fwcfg.BASE, fwcfg.LENGTH), (fwcfg.BASE + 8, 4))),
    "flash": Chip(_flash_works, memory=((0xFFFF_0000 - FLASH_SIZE, FLASH_SIZE),)),
    "testing": Chip(
        _testing_works,
        ports=((0xE0, 16), (testing.EXIT_PORT, 4), (testing.IRQ_PORT, 24)),
        memory=((testing.MEMORY_BASE, testing.MEMORY_LENGTH),),
    ),
    "buses": Chip(
        _buses_work,
        ports=((0, 0x10000), (0, 0x1000)),
        memory=((0xFEC00000, 0x400000), (0xFFF00000, 0x100000), (1 << 32, 1 << 40)),
    ),
}
