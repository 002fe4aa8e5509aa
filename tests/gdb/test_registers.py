"""Registers on their way to GDB and back."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET

import pytest

from ringfence.cpu import components
from ringfence.gdb.registers import REGISTERS, RegisterFile, target_description

BY_NAME = {register.name: register for register in REGISTERS}


class Vcpu:
    """Registers in a dictionary."""

    def __init__(self) -> None:
        self.values = dict.fromkeys(
            (
                *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "rflags"),
                *(f"r{n}" for n in range(8, 16)), *("cs", "ss", "ds", "es", "fs", "gs"),
                *("fs_base", "gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0"),
            ), 0,
        )  # fmt: skip
        self.area = bytearray(2432)

    def registers(self) -> dict[str, int]:
        return dict(self.values)

    def set_registers(self, values: dict[str, int]) -> None:
        self.values.update(values)

    def vector_state(self) -> bytes:
        return bytes(self.area)

    def set_vector_state(self, area: bytes) -> None:
        self.area[:] = area


def test_the_description_lists_all() -> None:
    root = ET.fromstring(target_description())
    names = [each.get("name") for each in root.iter("reg")]
    assert names == [register.name for register in REGISTERS]
    assert {"rip", "eflags", "st7", "fop", "xmm15", "mxcsr", "ymm15h", "gs_base", "cr3"} <= set(
        names
    )
    defined = {each.get("id") for kind in ("flags", "vector", "union") for each in root.iter(kind)}
    assert {"i386_eflags", "vec128"} <= defined


@pytest.mark.parametrize("name", ["rax", "r15", "rip", "eflags", "xmm3", "ymm15h", "st5", "mxcsr"])
def test_set_and_get(name: str) -> None:
    vcpu, register = Vcpu(), BY_NAME[name]
    value = 0x1122334455667788_99AABBCCDDEEFF01_2345 & (1 << register.bits) - 1
    RegisterFile(vcpu).set(register, value)
    assert RegisterFile(vcpu).get(register) == value
    others = [each for each in REGISTERS if each.name not in (name, "fctrl", "ftag")]
    assert not any(RegisterFile(vcpu).get(each) for each in others)


def test_what_is_in_its_initial_configuration_does_not_show() -> None:
    vcpu = Vcpu()
    vcpu.area[components.XMM : components.XMM + 16] = b"\xff" * 16
    assert RegisterFile(vcpu).get(BY_NAME["xmm0"]) == 0
    assert RegisterFile(vcpu).get(BY_NAME["fctrl"]) == 0x37F
    assert RegisterFile(vcpu).get(BY_NAME["ftag"]) == 0xFFFF
    RegisterFile(vcpu).set(BY_NAME["xmm1"], 5)
    assert RegisterFile(vcpu).get(BY_NAME["xmm0"]) == 0


def test_tags() -> None:
    vcpu = Vcpu()
    vcpu.area[components.HEADER] = 1
    struct.pack_into("<HHB", vcpu.area, 0, 0x37F, 6 << 11, 0b1100_0001)  # TOP is 6
    one, infinite = struct.pack("<QH", 1 << 63, 0x3FFF), struct.pack("<QH", 1 << 63, 0x7FFF)
    for n, value in enumerate((one, bytes(10), infinite)):  # physical 6, 7 and 0
        at = components.X87_REGISTERS + 16 * n
        vcpu.area[at : at + 10] = value
    assert RegisterFile(vcpu).get(BY_NAME["ftag"]) == 0b01_00_11_11_11_11_11_10


@pytest.mark.parametrize("name", ["cs", "cr3", "fs_base", "efer"])
def test_what_can_not_be_set(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        RegisterFile(Vcpu()).set(BY_NAME[name], 1)
