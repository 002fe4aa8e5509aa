"""The ACPI tables that tell the guest what is on the board.

One blob, for guest-physical 0xE0000: RSDP first, then XSDT, FADT, FACS, MADT, MCFG and DSDT, each
aligned to 64 bytes. The DSDT is assembled by `ringfence.chipset.aml`. Field order and names are
those of the ACPI specification, release 6.4, chapter 5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ringfence.chipset import aml, generation, ioapic, lapic, pm, rtc, uart
from ringfence.chipset.pci import host as pci
from ringfence.chipset.pci import hotplug

ADDRESS = 0xE0000
"""Where firmware-less kernels look for the RSDP (5.2.5.1)."""
LIMIT = 0x20000
"""The tables must end before the BIOS area does."""
OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"RINGFC", b"RINGFENC", b"RFNC"
PCI_MEMORY = (0xC000_0000, ioapic.BASE - 1)
"""PCI memory window: from the end of low RAM to the interrupt controllers."""
DEVICE_CHECK, EJECT_REQUEST = 1, 3
"""Notifications for any device (5.6.6)."""
STATUS_CHANGE = 0x80
"""Notification whose meaning is the device's own (5.6.6)."""
FIRMWARE_PCI_MEMORY = 0x8000_0000
"""Where it begins under firmware, unless there is RAM: there firmware assigns BARs from."""

# FADT IAPC_BOOT_ARCH (5.2.9.3) and fixed feature flags (table 5.10)
LEGACY_DEVICES, VGA_NOT_PRESENT = 1 << 0, 1 << 2
WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC, TMR_VAL_EXT, RESET_REG_SUP = (
    1 << bit for bit in (0, 2, 5, 6, 8, 10)
)


@dataclass(frozen=True)
class Hardware:
    """What the tables say of a machine.

    Attributes
    ----------
    cpus : int
        How many there are.
    pm_base : int
        First port of the power management registers.
    pci_memory : int
        Where the PCI memory window begins; it ends before the interrupt controllers.
    """

    cpus: int = 1
    pm_base: int = pm.BASE
    pci_memory: int = PCI_MEMORY[0]


def build_tables(base: int = ADDRESS, hardware: Hardware = Hardware()) -> bytes:
    """Build all tables for a blob at guest-physical ``base``; the RSDP is its start."""
    parts: list[bytes] = [bytes(64)]

    def place(table: bytes) -> int:
        address = base + sum(map(len, parts))
        parts.append(table.ljust(-(-len(table) // 64) * 64, b"\0"))
        return address

    dsdt = place(_table(b"DSDT", 2, build_dsdt(hardware)))
    facs = place(struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2))
    fadt = place(_fadt(dsdt, facs, hardware.pm_base))
    madt = place(_madt(hardware.cpus))
    mcfg = place(_mcfg())
    xsdt = place(_table(b"XSDT", 1, struct.pack("<3Q", fadt, madt, mcfg)))
    parts[0] = _rsdp(xsdt).ljust(64, b"\0")
    return b"".join(parts)


def _checksum(data: bytes) -> int:
    """Return the byte that makes the sum of all bytes zero."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the header (5.2.6) before a table's body."""
    table = struct.pack(
        "<4sIBB6s8sI4sI",
        signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1,
    ) + body  # fmt: skip
    return table[:9] + bytes([_checksum(table)]) + table[10:]


def _rsdp(xsdt: int) -> bytes:
    """Build the root system description pointer, revision 2 (5.2.5.3)."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, 0)
    first = first[:8] + bytes([_checksum(first)]) + first[9:]
    whole = first + struct.pack("<IQB3x", 36, xsdt, 0)
    return whole[:32] + bytes([_checksum(whole)]) + whole[33:]


def _io_address(port: int, bits: int, access: int) -> bytes:
    """Return the generic address structure of an I/O port (5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, bits, 0, access, port) if port else bytes(12)


def _fadt(dsdt: int, facs: int, pm_base: int) -> bytes:
    """Build the fixed ACPI description table, 6.3 (5.2.9); not hardware-reduced."""
    event, control, timer, gpe0 = (
        pm_base + at - pm.BASE for at in (pm.PM1_EVENT, pm.PM1_CONTROL, pm.PM_TIMER, pm.GPE0)
    )
    flags = WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP
    body = struct.pack("<IIBBHIBBBB", facs, dsdt, 0, 0, pm.SCI_IRQ, 0, 0, 0, 0, 0)
    body += struct.pack("<8I", event, 0, control, 0, 0, timer, gpe0, 0)
    # lengths: PM1 event, PM1 control, PM2, PM timer, GPE0, GPE1; GPE1_BASE, CST_CNT
    body += bytes([4, 2, 0, 4, pm.GPE0_LENGTH, 0, 0, 0])
    # P_LVL2_LAT, P_LVL3_LAT beyond their limits: no C2, no C3
    body += struct.pack("<HHHHBBBBB", 101, 1001, 0, 0, 0, 0, 0, 0, rtc.CENTURY)
    body += struct.pack("<HBI", LEGACY_DEVICES | VGA_NOT_PRESENT, 0, flags)
    body += _io_address(pm.RESET_CONTROL, 8, 1)
    body += struct.pack("<BHB", pm.RESET_VALUE, 0, 3)  # RESET_VALUE, ARM_BOOT_ARCH, minor
    body += struct.pack("<QQ", 0, dsdt)  # X_FIRMWARE_CTRL (FIRMWARE_CTRL is used), X_DSDT
    for port, bits, access in (
        (event, 32, 2), (0, 0, 0), (control, 16, 2), (0, 0, 0),
        (0, 0, 0), (timer, 32, 3), (gpe0, 8 * pm.GPE0_LENGTH, 1), (0, 0, 0),
        (0, 0, 0), (0, 0, 0),  # sleep control and status: hardware-reduced only
    ):  # fmt: skip
        body += _io_address(port, bits, access)
    body += b"RINGFENC"  # hypervisor vendor identity
    return _table(b"FACP", 6, body)


def _madt(cpus: int) -> bytes:
    """Build the multiple APIC description table (5.2.12)."""
    pcat_compat = 1
    body = struct.pack("<II", lapic.DEFAULT_BASE, pcat_compat)
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, ioapic.BASE, 0)
    # Interrupt source overrides (5.2.12.5): ISA IRQ, GSI, flags (0xd: active high, level).
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, pm.SCI_IRQ, pm.SCI_IRQ, 0xD)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI at every CPU's LINT1
    return _table(b"APIC", 5, body)


def _mcfg() -> bytes:
    """Build the table of PCI configuration windows (PCI Firmware 3.0, 4.1.2): bus 0 has one."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", pci.ECAM_BASE, 0, 0, 0))


def build_dsdt(hardware: Hardware) -> bytes:
    r"""Assemble the DSDT's AML: processors, devices of the board, \_S5, events."""
    s5 = aml.package(*map(aml.integer, (pm.SLP_TYP_S5, pm.SLP_TYP_S5, 0, 0)))
    processors = [
        aml.device(
            f"C{cpu:03X}",
            aml.name("_HID", aml.string("ACPI0007")),
            aml.name("_UID", aml.integer(cpu)),
        )
        for cpu in range(hardware.cpus)
    ]
    routes = [
        aml.package(
            aml.integer(slot << 16 | 0xFFFF),
            aml.integer(pin),
            aml.integer(0),
            aml.integer(pci.gsi_of(slot, pin)),
        )
        for slot in range(1, pci.SLOTS)
        for pin in range(4)
    ]
    pci_host = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_range(0, 0),
                aml.io(pci.BASE, pci.LENGTH),
                aml.io_range(0x0000, pci.BASE - 1),
                aml.io_range(pci.BASE + pci.LENGTH, 0xFFFF),
                aml.memory_range(hardware.pci_memory, PCI_MEMORY[1]),
            ),
        ),
        aml.name("_PRT", aml.package(*routes)),
        aml.registers("HPLG", hotplug.BASE, "HPFL", "HPWA", "HPEJ"),
        *(_slot(slot) for slot in hotplug.SLOTS),
        _look_at_slots(),
    )
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_STA", aml.integer(0xF)),
        aml.name("_CRS", aml.resources(aml.io(uart.BASE, uart.LENGTH), aml.irq(uart.IRQ))),
    )
    clock = aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io(rtc.BASE, rtc.LENGTH), aml.irq(8))),
    )
    board = aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name(
            "_CRS",
            aml.resources(
                aml.io(hardware.pm_base, pm.LENGTH),
                aml.io(hotplug.BASE, hotplug.LENGTH),
                aml.memory(pci.ECAM_BASE, pci.ECAM_LENGTH),
                aml.memory(generation.BASE, generation.LENGTH),
            ),
        ),
    )
    devices = (*processors, pci_host, com1, clock, board, _generation_id())
    told = (
        aml.method(f"_E{pm.Gpe.GENERATION:02X}", aml.notify("\\_SB.VGID", STATUS_CHANGE)),
        aml.method(f"_E{pm.Gpe.HOT_PLUG:02X}", aml.path("\\_SB.PCI0.LOOK")),
    )
    return aml.name("\\_S5", s5) + aml.scope("\\_SB", *devices) + aml.scope("\\_GPE", *told)


def _slot(slot: int) -> bytes:
    """Assemble a slot that may be filled and emptied (6.1.1, 6.1.8, 6.3.3)."""
    eject = aml.store(aml.integer(1 << slot), aml.path("HPEJ"))
    return aml.device(
        f"S{slot:02X}",
        aml.name("_ADR", aml.integer(slot << 16)),
        aml.name("_SUN", aml.integer(slot)),
        aml.method("_EJ0", eject, arguments=1),
    )


def _look_at_slots() -> bytes:
    """Assemble the method that tells which slots were filled, and which are to be emptied.

    Reading a register clears it, so each is read once.
    """
    terms = []
    for register, notification in (("HPFL", DEVICE_CHECK), ("HPWA", EJECT_REQUEST)):
        terms.append(aml.store(aml.path(register), aml.LOCAL0))
        terms += [
            aml.when(aml.LOCAL0, 1 << slot, aml.notify(f"S{slot:02X}", notification))
            for slot in hotplug.SLOTS
        ]
    return aml.method("LOOK", *terms, serialized=True)


def _generation_id() -> bytes:
    """Assemble the generation ID's device; it goes by its compatible and DOS names.

    The names and ADDR are those of Microsoft's specification; VMGENCTR is a name that ACPI's rules
    for identifiers allow, too.
    """
    return aml.device(
        "VGID",
        aml.name("_HID", aml.string("RFNC0001")),
        aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name(
            "ADDR",
            aml.package(
                aml.integer(generation.BASE & 0xFFFF_FFFF), aml.integer(generation.BASE >> 32)
            ),
        ),
    )
