"""Registers by name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from ringfence.cpu import state
from ringfence.cpu.registers import named_registers, set_named_register
from ringfence.cpu.reset import reset


@pytest.fixture
def cpu() -> Iterator[Any]:
    """A view of a CPU after power-up."""
    room = ctypes.create_string_buffer(state.Cpu.size + 64)
    view = state.Cpu.at(ctypes.addressof(room) + 63 & ~63)
    reset(view)
    yield view


@pytest.mark.parametrize(
    ("name", "value"),
    [("rax", 5), ("r15", (1 << 64) - 1), ("rip", 0x1234), ("rflags", 0x246), ("rflags", 0x3FD7)],
)
def test_what_is_set_is_read(cpu: Any, name: str, value: int) -> None:
    before = named_registers(cpu)
    set_named_register(cpu, name, value)
    after = named_registers(cpu)
    assert after[name] == value
    assert {k: v for k, v in after.items() if k != name} == {
        k: v for k, v in before.items() if k != name
    }


def test_larger_values_are_cut(cpu: Any) -> None:
    set_named_register(cpu, "rbx", 1 << 64 | 7)
    set_named_register(cpu, "rip", -1)
    found = named_registers(cpu)
    assert (found["rbx"], found["rip"]) == (7, (1 << 64) - 1)


def test_after_power_up(cpu: Any) -> None:
    found = named_registers(cpu)
    assert (found["rip"], found["rflags"], found["cs"], found["cs_base"]) == (
        0xFFF0, 2, 0xF000, 0xFFFF0000,
    )  # fmt: skip
    assert {"cr0", "cr8", "efer", "xcr0", "tr_base", "gs"} <= found.keys()


@pytest.mark.parametrize("name", ["cr3", "eax", "cs", ""])
def test_others_can_t_be_set(cpu: Any, name: str) -> None:
    with pytest.raises(KeyError, match=f"register {name} can't be set"):
        set_named_register(cpu, name, 0)
