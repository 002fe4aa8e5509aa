"""What firmware and test kernels find on the board, beyond what every machine has.

`attach_firmware` makes of a board the one that PC firmware was written for: an i440FX with a PIIX,
the ROM and the flash memory of its variables. `attach_test_devices` adds what test kernels expect.
Both are told about the machine by the configuration device, `attach_configuration`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.boot.bzimage import SECTOR, parse_header
from ringfence.boot.firmware import Firmware
from ringfence.boot.source import ImageSource, read_image
from ringfence.chipset import fwcfg, piix, uart
from ringfence.chipset.acpi import FIRMWARE_PCI_MEMORY, Hardware
from ringfence.chipset.acpi_loader import RSDP_FILE, SCRIPT_FILE, TABLES_FILE, loader_files
from ringfence.chipset.flash import Flash, Rom
from ringfence.chipset.fwcfg import Item, number
from ringfence.devices.testing import DebugConsole, DebugExit, TestPorts

if TYPE_CHECKING:
    from ringfence.chipset.board import Board
    from ringfence.memory.ram import GuestMemory
    from ringfence.storage.nvram import Nvram


@dataclass(frozen=True, slots=True)
class TestDevices:
    """What a machine has for test kernels (see `devices.testing`).

    Attributes
    ----------
    exit_port : int or None
        Where a write ends the machine with an exit status.
    console : callable or None
        Takes the bytes written to ``console_port``.
    console_port : int
        0xe9, or 0x402 where firmware says what it does.
    ports : bool
        Whether there are pc-testdev's ports and the firmware configuration device.
    """

    __test__ = False  # for pytest: this is no test

    exit_port: int | None = None
    console: Callable[[bytes], None] | None = None
    console_port: int = 0xE9
    ports: bool = False


@dataclass(frozen=True, slots=True)
class DirectKernel:
    """A kernel that UEFI firmware starts without a disk, as `MachineConfig` has it."""

    kernel: ImageSource
    initrd: ImageSource | None
    cmdline: str


def attach_test_devices(board: Board, wanted: TestDevices, on_exit: Callable[[int], None]) -> None:
    """Add what the owner wants for a test kernel, but for the configuration device."""
    if wanted.exit_port is not None:
        DebugExit(on_exit).attach(board, wanted.exit_port)
    if wanted.console is not None:
        DebugConsole(wanted.console).attach(board, wanted.console_port)
    if wanted.ports:
        TestPorts(board).attach(board)


def attach_firmware(
    board: Board, memory: GuestMemory, firmware: Firmware, nvram: Nvram, cpus: int
) -> Mapping[str, Item]:
    """Turn the board into firmware's, before anything else is plugged in; RAM stays as it is.

    Returns the files by which the configuration device tells firmware of it.
    """
    assert memory.rom is not None
    board.mmio.register(memory.rom.base, memory.rom.size, Rom(firmware.code))
    if nvram.content:
        flash = Flash(bytes(nvram.content), nvram.write)
        board.mmio.register(memory.rom.base - len(nvram.content), len(nvram.content), flash)
        board.add("flash", flash)
    piix.detach_power(board.ports)
    power = piix.PowerFunction(board.pm)
    board.pci.plug(piix.IsaBridge(), piix.SLOT, piix.ISA_FUNCTION)
    board.pci.plug(power, piix.SLOT, piix.POWER_FUNCTION)
    window = max(FIRMWARE_PCI_MEMORY, memory.regions[0].size)

    def acpi(name: str) -> Callable[[], bytes]:
        """Tables say where firmware has put the power management registers by then."""
        return lambda: loader_files(Hardware(cpus, power.base, window))[name]

    return {
        **{name: acpi(name) for name in (TABLES_FILE, RSDP_FILE, SCRIPT_FILE)},
        "etc/sercon-port": number(uart.BASE, 2),
    }


def attach_configuration(
    board: Board,
    memory: GuestMemory,
    cpus: int,
    files: Mapping[str, Item],
    direct: DirectKernel | None = None,
) -> None:
    """Add the configuration device, with the items that every machine has and these files."""
    items = {**fwcfg.machine_items(memory, cpus), **(_kernel_items(direct) if direct else {})}
    device = fwcfg.FwCfg(memory, items, {"etc/e820": fwcfg.ram_map(memory), **files})
    device.attach(board.ports)
    board.add("fw_cfg", device)


def _kernel_items(direct: DirectKernel) -> dict[int, Item]:
    """The parts of a bzImage, initrd and command line."""
    image = read_image(direct.kernel, "kernel")
    split = SECTOR * (1 + (parse_header(image).setup_sects or 4))
    initrd = read_image(direct.initrd, "initrd") if direct.initrd is not None else b""
    cmdline = direct.cmdline.encode("utf-8", "surrogateescape") + b"\0"
    items: dict[int, Item] = {}
    for size, data, content in (
        (fwcfg.SETUP_SIZE, fwcfg.SETUP_DATA, image[:split]),
        (fwcfg.KERNEL_SIZE, fwcfg.KERNEL_DATA, image[split:]),
        (fwcfg.INITRD_SIZE, fwcfg.INITRD_DATA, initrd),
        (fwcfg.CMDLINE_SIZE, fwcfg.CMDLINE_DATA, cmdline),
    ):
        items |= {size: number(len(content), 4), data: content}
    return items
