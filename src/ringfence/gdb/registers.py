"""The registers that GDB sees, and where they are in a vCPU.

GDB learns from a *target description* which registers there are and in which order they travel; the
one list here makes the description and both directions. Features with names that begin in
``org.gnu.gdb`` have registers that GDB itself prescribes, the last one has what it only shows.

Sources: GDB manual, appendix G (Target Descriptions) and G.5.17 (i386 features); Intel SDM vol. 1,
10.5.1 (FXSAVE area) and 8.1.7 (x87 tag word).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ringfence.cpu import components

MASK64 = (1 << 64) - 1
GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
SYSTEM = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0")
EFLAGS = {
    "CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11, "NT": 14,
    "RF": 16, "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21,
}  # fmt: skip
X87_CONTROL = {
    "fctrl": (0, 2), "fstat": (2, 2), "ftag": (4, 1), "fiseg": (12, 2), "fioff": (8, 4),
    "foseg": (20, 2), "fooff": (16, 4), "fop": (6, 2),
}  # fmt: skip
"""Offset and bytes in the FXSAVE area; ``ftag`` has one bit a register there."""
_ST_STRIDE = 16


@dataclass(frozen=True, slots=True)
class Register:
    """A register as GDB knows it."""

    name: str
    bits: int
    kind: str
    group: str = ""

    @property
    def size(self) -> int:
        """Bytes that it takes in a packet."""
        return self.bits // 8


FEATURES: dict[str, tuple[Register, ...]] = {
    "org.gnu.gdb.i386.core": (
        *(
            Register(name, 64, "data_ptr" if name in ("rsp", "rbp") else "int64")
            for name in GENERAL
        ),
        Register("rip", 64, "code_ptr"),
        Register("eflags", 32, "i386_eflags"),
        *(Register(name, 32, "int32") for name in SEGMENTS),
        *(Register(f"st{n}", 80, "i387_ext") for n in range(8)),
        *(Register(name, 32, "int", "float") for name in X87_CONTROL),
    ),
    "org.gnu.gdb.i386.sse": (
        *(Register(f"xmm{n}", 128, "vec128") for n in range(16)),
        Register("mxcsr", 32, "int", "vector"),
    ),
    "org.gnu.gdb.i386.avx": tuple(Register(f"ymm{n}h", 128, "uint128") for n in range(16)),
    "org.gnu.gdb.i386.segments": (
        Register("fs_base", 64, "int"),
        Register("gs_base", 64, "int"),
    ),
    "org.ringfence.system": tuple(Register(name, 64, "int", "system") for name in SYSTEM),
}
REGISTERS = tuple(register for feature in FEATURES.values() for register in feature)


def _types(feature: str) -> Iterator[str]:
    """Declarations that a feature's registers refer to."""
    if feature.endswith("core"):
        yield '<flags id="i386_eflags" size="4">'
        yield from (
            f'<field name="{name}" start="{bit}" end="{bit}"/>' for name, bit in EFLAGS.items()
        )
        yield "</flags>"
    elif feature.endswith("sse"):
        parts = (
            ("v4f", "ieee_single", 4, "v4_float"), ("v2d", "ieee_double", 2, "v2_double"),
            ("v16i8", "int8", 16, "v16_int8"), ("v8i16", "int16", 8, "v8_int16"),
            ("v4i32", "int32", 4, "v4_int32"), ("v2i64", "int64", 2, "v2_int64"),
        )  # fmt: skip
        for name, element, count, _ in parts:
            yield f'<vector id="{name}" type="{element}" count="{count}"/>'
        yield '<union id="vec128">'
        yield from (f'<field name="{field}" type="{name}"/>' for name, _, _, field in parts)
        yield '<field name="uint128" type="uint128"/></union>'


def target_description() -> bytes:
    """The XML document that says all this."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>i386:x86-64</architecture>",
    ]
    for feature, registers in FEATURES.items():
        lines += [f'<feature name="{feature}">', *_types(feature)]
        for register in registers:
            group = f' group="{register.group}"' if register.group else ""
            lines.append(
                f'<reg name="{register.name}" bitsize="{register.bits}" type="{register.kind}"'
                f"{group}/>"
            )
        lines.append("</feature>")
    return "\n".join([*lines, "</target>"]).encode()


class Registers(Protocol):
    """A vCPU's registers, as `ringfence.engine.VirtualCpu` gives them."""

    def registers(self) -> dict[str, int]:
        """By the manual's lower-case names."""

    def set_registers(self, values: dict[str, int]) -> None:
        """Change some; KeyError for one that can't be changed."""

    def vector_state(self) -> bytes:
        """An XSAVE area in standard format."""

    def set_vector_state(self, area: bytes) -> None:
        """Change it."""


class RegisterFile:
    """The registers of a vCPU that stands still, by `Register`."""

    def __init__(self, vcpu: Registers) -> None:
        self._vcpu = vcpu
        self._named = vcpu.registers()
        self._area = bytearray(vcpu.vector_state())

    def get(self, register: Register) -> int:
        """A register's value."""
        name = register.name
        if name == "eflags":
            return self._named["rflags"] & 0xFFFFFFFF
        if name in self._named:
            return self._named[name] & (1 << register.bits) - 1
        if name == "ftag":
            return self._tags()
        at, size, component = _place(register)
        present = int.from_bytes(self._area[components.HEADER : components.HEADER + 8], "little")
        if not present & component and name != "mxcsr":
            return 0x37F if name == "fctrl" else 0  # in its initial configuration
        return int.from_bytes(self._area[at : at + size], "little")

    def set(self, register: Register, value: int) -> None:
        """Change a register; KeyError for one that can't be changed."""
        name = register.name
        if name in self._named or name == "eflags":
            if name in SEGMENTS or name in SYSTEM or name.endswith("_base"):
                raise KeyError(f"register {name} can't be set")
            self._vcpu.set_registers({"rflags" if name == "eflags" else name: value})
            self._named = self._vcpu.registers()
            return
        at, size, component = _place(register)
        if name == "ftag":
            value = sum((value >> 2 * n & 3 != 3) << n for n in range(8))
        header = slice(components.HEADER, components.HEADER + 8)
        present = int.from_bytes(self._area[header], "little")
        if not present & component:
            for other in REGISTERS:  # the whole component begins to count
                if other.name not in self._named and _component(other.name) == component:
                    where, length, _ = _place(other)
                    initial = 0x37F if other.name == "fctrl" else 0
                    if other.name != "mxcsr":
                        self._area[where : where + length] = initial.to_bytes(length, "little")
        self._area[header] = (present | component).to_bytes(8, "little")
        self._area[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self._vcpu.set_vector_state(bytes(self._area))

    def _tags(self) -> int:
        """The x87 tag word with two bits a register: 0 valid, 1 zero, 2 special, 3 empty."""
        top = int.from_bytes(self._area[2:4], "little") >> 11 & 7
        present = self._area[components.HEADER] & components.X87_STATE
        tags = 0
        for physical in range(8):
            tag = 3
            if present and self._area[4] >> physical & 1:
                at = components.X87_REGISTERS + ((physical - top) & 7) * _ST_STRIDE
                significand = int.from_bytes(self._area[at : at + 8], "little")
                exponent = int.from_bytes(self._area[at + 8 : at + 10], "little") & 0x7FFF
                if exponent == 0:
                    tag = 1 if significand == 0 else 2
                else:
                    tag = 0 if exponent != 0x7FFF and significand >> 63 else 2
            tags |= tag << 2 * physical
        return tags


def _component(name: str) -> int:
    """The bit in XSTATE_BV of a register in the XSAVE area."""
    if name.startswith("ymm"):
        return components.AVX_STATE
    if name.startswith("xmm") or name == "mxcsr":
        return components.SSE_STATE
    return components.X87_STATE if name.startswith(("st", "f")) else 0


def _place(register: Register) -> tuple[int, int, int]:
    """Offset and bytes in an XSAVE area, and the component's bit in XSTATE_BV."""
    name = register.name
    component = _component(name)
    if name in X87_CONTROL:
        return (*X87_CONTROL[name], component)
    if name == "mxcsr":
        return components.MXCSR, 4, component
    number = int(name.strip("stxymh"))
    if name.startswith("xmm"):
        return components.XMM + 16 * number, 16, component
    if name.startswith("ymm"):
        return components.AVX.offset + 16 * number, 16, component
    return components.X87_REGISTERS + _ST_STRIDE * number, 10, component
