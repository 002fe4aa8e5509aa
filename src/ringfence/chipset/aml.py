"""A small assembler for AML, the byte code of ACPI tables (ACPI 6.4, chapter 20).

Each function returns the bytes of one term; nesting calls nests terms. Only what our DSDT needs is
here: names, scopes, devices, methods, packages, integers, strings, resource descriptors (6.4),
registers in ports, and what methods do with them.
"""

from __future__ import annotations

import struct

_OPEN_SCOPE, _DEVICE, _METHOD, _NOTIFY = b"\x10", b"\x5b\x82", b"\x14", b"\x86"
_REGION, _FIELD, _SYSTEM_IO = b"\x5b\x80", b"\x5b\x81", b"\x01"
_STORE, _AND, _IF, _NOWHERE = b"\x70", b"\x7b", b"\xa0", b"\0"
LOCAL0 = b"\x60"
"""A method's first variable (20.2.6.2)."""
_DWORD_ACCESS = 3


def _length(body: bytes) -> bytes:
    """Prepend PkgLength, which counts itself (20.2.4)."""
    for extra in range(4):
        total = len(body) + 1 + extra
        if extra == 0 and total < 0x40:
            return bytes([total]) + body
        if extra and total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"AML package of {len(body)} bytes: expected less than 256 MiB")


def path(name: str) -> bytes:
    r"""Encode a name string such as ``_HID`` or ``\_SB`` (20.2.2)."""
    root = b"\\" if name.startswith("\\") else b""
    segments = [part.ljust(4, "_").encode() for part in name.lstrip("\\").split(".")]
    if any(len(part) != 4 for part in segments):
        raise ValueError(f"AML name {name!r}: expected segments of up to four characters")
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + b"\x2e" + b"".join(segments)
    return root + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def integer(value: int) -> bytes:
    """Encode a constant in the shortest form (20.2.3)."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value:#x}: expected 64 bits at most")


def string(text: str) -> bytes:
    """Encode a string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode a compressed EISA ID such as ``PNP0501`` (19.3.4)."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    vendor = letters[0] << 10 | letters[1] << 5 | letters[2]
    value = int.from_bytes(struct.pack(">HH", vendor, int(text[3:], 16)), "little")
    return b"\x0c" + value.to_bytes(4, "little")


def package(*elements: bytes) -> bytes:
    """Encode a package of terms."""
    return b"\x12" + _length(bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Encode a buffer."""
    return b"\x11" + _length(integer(len(data)) + data)


def name(where: str, value: bytes) -> bytes:
    """Encode ``Name (where, value)``."""
    return b"\x08" + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    """Encode ``Scope (where) {terms}``."""
    return _OPEN_SCOPE + _length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Encode ``Device (where) {terms}``."""
    return _DEVICE + _length(path(where) + b"".join(terms))


def method(where: str, *terms: bytes, arguments: int = 0, serialized: bool = False) -> bytes:
    """Encode ``Method (where, arguments) {terms}`` (20.2.5.2)."""
    flags = bytes([arguments | serialized << 3])
    return _METHOD + _length(path(where) + flags + b"".join(terms))


def registers(where: str, base: int, *names: str) -> bytes:
    """Encode a region of ports that is a row of 32-bit registers, by their names (20.2.5.2)."""
    length = 4 * len(names)
    region = _REGION + path(where) + _SYSTEM_IO + integer(base) + integer(length)
    bits = b"".join(path(each) + b"\x20" for each in names)  # a length of 32
    return region + _FIELD + _length(path(where) + bytes([_DWORD_ACCESS]) + bits)


def store(source: bytes, target: bytes) -> bytes:
    """Encode ``Store (source, target)`` (20.2.5.4)."""
    return _STORE + source + target


def when(value: bytes, mask: int, *terms: bytes) -> bytes:
    """Encode ``If (And (value, mask)) {terms}`` (20.2.5.3)."""
    return _IF + _length(_AND + value + integer(mask) + _NOWHERE + b"".join(terms))


def notify(where: str, value: int) -> bytes:
    """Encode ``Notify (where, value)`` (20.2.5.3)."""
    return _NOTIFY + path(where) + integer(value)


def resources(*descriptors: bytes) -> bytes:
    """Encode a resource template: descriptors, end tag without checksum (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, length: int) -> bytes:
    """I/O ports, fixed, 16-bit decode (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def memory(base: int, length: int) -> bytes:
    """Writable memory at a fixed place below 4 GiB (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


def irq(number: int) -> bytes:
    """One edge-triggered, active-high, exclusive interrupt (6.4.2.1, without flags)."""
    return struct.pack("<BH", 0x22, 1 << number)


def bus_range(first: int, last: int) -> bytes:
    """Bus numbers that a bridge produces (6.4.3.5.3)."""
    return struct.pack(
        "<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1
    )  # fmt: skip


def io_range(first: int, last: int) -> bytes:
    """I/O ports that a bridge passes on (6.4.3.5.3)."""
    return struct.pack(
        "<BHBBBHHHHH", 0x88, 13, 1, 0x0C, 3, 0, first, last, 0, last - first + 1
    )  # fmt: skip


def memory_range(first: int, last: int) -> bytes:
    """Non-cacheable, writable memory below 4 GiB that a bridge passes on (6.4.3.5.2)."""
    return struct.pack(
        "<BHBBBIIIII", 0x87, 23, 0, 0x0C, 1, 0, first, last, 0, last - first + 1
    )  # fmt: skip
