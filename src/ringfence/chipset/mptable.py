"""Tables of the MultiProcessor Specification: CPUs and interrupts for kernels that know no ACPI.

The floating pointer is where kernels search for it, in the BIOS area; the configuration table lies
behind it. They say what the ACPI tables say of CPUs, I/O APIC and wires. Only kernels that are
loaded without firmware get these; firmware makes its own.

Source: Intel, MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

import struct

from ringfence.chipset import ioapic, lapic
from ringfence.chipset.pci.host import gsi_of

ADDRESS = 0xF0000
"""Guest-physical, where we have it; any multiple of 16 in the BIOS area would do."""
POINTER, TABLE = b"_MP_", b"PCMP"
REVISION = 4
POINTER_SIZE, HEADER_SIZE = 16, 44

# Entry types (4.3)
PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
CPU_ENABLED, CPU_BOOT = 1 << 0, 1 << 1
APIC_USABLE = 1 << 0
# Interrupt types (table 4-10)
INT, NMI, EXTINT = 0, 1, 3
CONFORMS = 0
"""Polarity and trigger mode are those of the bus (table 4-10)."""
PCI_BUS, ISA_BUS = 0, 1
EVERY_APIC = 0xFF
IO_APIC_ID = 0
TIMER_PIN, CASCADE = 2, 2
"""The timer is at the I/O APIC's pin 2, which the 8259s' cascade leaves free."""
ISA_IRQS, SLOTS, PINS = 16, 32, 4
CPU_SIGNATURE, CPU_FEATURES = 0x600, 1 << 9 | 1 << 0
"""A CPU's model, for kernels that ask no CPUID, and features: APIC, FPU."""


def build_mp_tables(address: int, cpus: int) -> bytes:
    """The floating pointer for guest-physical ``address``, and the table behind it."""
    entries = [_processor(cpu) for cpu in range(cpus)]
    entries += [struct.pack("<BB6s", BUS, PCI_BUS, b"PCI   ")]
    entries += [struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   ")]
    version = ioapic.VERSION & 0xFF
    entries += [struct.pack("<BBBBI", IO_APIC, IO_APIC_ID, version, APIC_USABLE, ioapic.BASE)]
    for slot in range(SLOTS):
        for pin in range(PINS):
            entries.append(_wire(PCI_BUS, slot << 2 | pin, gsi_of(slot, pin)))
    for irq in range(ISA_IRQS):
        if irq != CASCADE:
            entries.append(_wire(ISA_BUS, irq, irq or TIMER_PIN))
    for kind, lint in ((EXTINT, 0), (NMI, 1)):
        entries.append(
            struct.pack("<BBHBBBB", LOCAL_INTERRUPT, kind, CONFORMS, ISA_BUS, 0, EVERY_APIC, lint)
        )
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB", TABLE, HEADER_SIZE + len(body), REVISION, 0, b"RINGFENC",
        b"RINGFENCE".ljust(12), 0, 0, len(entries), lapic.DEFAULT_BASE, 0, 0, 0,
    )  # fmt: skip
    pointer = struct.pack(
        "<4sIBBB5x", POINTER, address + POINTER_SIZE, POINTER_SIZE // 16, REVISION, 0
    )
    return _summed(pointer, 10) + _summed(header + body, 7)


def _processor(cpu: int) -> bytes:
    """The entry of a CPU, whose APIC has its number."""
    flags = CPU_ENABLED | (CPU_BOOT if cpu == 0 else 0)
    version = lapic.VERSION & 0xFF
    return struct.pack("<BBBBII8x", PROCESSOR, cpu, version, flags, CPU_SIGNATURE, CPU_FEATURES)


def _wire(bus: int, source: int, pin: int) -> bytes:
    """The entry of an interrupt line that leads to a pin of the I/O APIC."""
    return struct.pack("<BBHBBBB", IO_INTERRUPT, INT, CONFORMS, bus, source, IO_APIC_ID, pin)


def _summed(table: bytes, at: int) -> bytes:
    """A table with its checksum, the byte at ``at``, by which all bytes add up to 0."""
    return table[:at] + bytes((-sum(table) & 0xFF,)) + table[at + 1 :]
