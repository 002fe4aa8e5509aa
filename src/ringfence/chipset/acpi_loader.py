"""ACPI tables for firmware: files for its configuration device, and a script to place them.

Firmware allocates memory for the files, so pointers in them are offsets until it has carried out
the script: allocate, add a file's address to a pointer, compute a checksum. Source: QEMU,
hw/acpi/bios-linker-loader.c describes the commands; each has 128 bytes.
"""

from __future__ import annotations

import struct

from ringfence.chipset.acpi import Hardware, build_tables

TABLES_FILE, RSDP_FILE, SCRIPT_FILE = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"
RSDP_BYTES = 36
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
HIGH_ZONE, F_SEGMENT = 1, 2
_COMMAND_BYTES = 128
_LENGTH, _CHECKSUM, _HEADER = 4, 9, 36
"""Offsets in a table's header (5.2.6), and its size."""
_XSDT_ADDRESS = 24
"""Offset in the RSDP (5.2.5.3)."""
_FADT_POINTERS = ((36, 4), (40, 4), (140, 8))
"""FIRMWARE_CTRL, DSDT and X_DSDT: offset, size (5.2.9)."""


def _name(file: str) -> bytes:
    return file.encode().ljust(56, b"\0")


def _command(kind: int, body: bytes) -> bytes:
    return (struct.pack("<I", kind) + body).ljust(_COMMAND_BYTES, b"\0")


def _allocate(file: str, align: int, zone: int) -> bytes:
    return _command(ALLOCATE, _name(file) + struct.pack("<IB", align, zone))


def _add_pointer(target: str, offset: int, size: int) -> bytes:
    return _command(
        ADD_POINTER, _name(target) + _name(TABLES_FILE) + struct.pack("<IB", offset, size)
    )


def _add_checksum(file: str, offset: int, start: int, length: int) -> bytes:
    return _command(ADD_CHECKSUM, _name(file) + struct.pack("<III", offset, start, length))


def loader_files(hardware: Hardware) -> dict[str, bytes]:
    """The three files: tables, RSDP, and the script."""
    blob = bytearray(build_tables(0, hardware))
    rsdp = bytearray(blob[:RSDP_BYTES])
    (xsdt,) = struct.unpack_from("<Q", blob, _XSDT_ADDRESS)
    (xsdt_size,) = struct.unpack_from("<I", blob, xsdt + _LENGTH)
    script = [_allocate(RSDP_FILE, 16, F_SEGMENT), _allocate(TABLES_FILE, 64, HIGH_ZONE)]
    changed = [xsdt]
    for entry in range(xsdt + _HEADER, xsdt + xsdt_size, 8):
        script.append(_add_pointer(TABLES_FILE, entry, 8))
        (table,) = struct.unpack_from("<Q", blob, entry)
        if blob[table : table + 4] == b"FACP":
            script += [_add_pointer(TABLES_FILE, table + at, size) for at, size in _FADT_POINTERS]
            changed.append(table)
    for table in changed:
        (size,) = struct.unpack_from("<I", blob, table + _LENGTH)
        blob[table + _CHECKSUM] = 0
        script.append(_add_checksum(TABLES_FILE, table + _CHECKSUM, table, size))
    script.append(_add_pointer(RSDP_FILE, _XSDT_ADDRESS, 8))
    for at, size in ((8, 20), (32, RSDP_BYTES)):  # checksum, extended checksum
        rsdp[at] = 0
        script.append(_add_checksum(RSDP_FILE, at, 0, size))
    return {TABLES_FILE: bytes(blob), RSDP_FILE: bytes(rsdp), SCRIPT_FILE: b"".join(script)}
