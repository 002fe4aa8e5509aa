"""A vCPU's state as plain data: all of it, and nothing impossible."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.cpu import reset, saved
from ringfence.cpu.state import CR0_PE, NO_EXCEPTION, XSAVE_BYTES, Cpu
from ringfence.errors import ImageError
from ringfence.state import plain


def made() -> tuple[Any, Any]:
    """A CPU after reset, and what keeps it in memory."""
    room = ctypes.create_string_buffer(Cpu.size + 64)
    cpu = Cpu.at(-(-ctypes.addressof(room) // 64) * 64)
    reset.reset(cpu)
    return cpu, room


def fill(cpu: Any, chance: random.Random) -> None:
    """Give every register a value of its own that a CPU could have."""
    for field in saved.saved_fields():
        if field.width > 1:
            limit = 1 << 8 * field.width
            values = [chance.randrange(limit) for _ in range(max(field.count, 1))]
            if field.is_array:
                getattr(cpu, field.name)[:] = values
            else:
                setattr(cpu, field.name, values[0])
    cpu.status, cpu.other_flags = 0x8D5, 0x3000
    cpu.flag_if, cpu.cpl, cpu.halted, cpu.exc_vector = 1, 3, 1, 14
    cpu.xsave[512] = 7
    cpu.xsave[576:832] = [chance.randrange(256) for _ in range(256)]


def test_everything_comes_back() -> None:
    (cpu, _one), (other, _two) = made(), made()
    fill(cpu, random.Random(6))
    state = plain.loads(plain.dumps(saved.save_cpu(cpu)), "vCPU")
    saved.restore_cpu(other, state, 7)
    for field in saved.saved_fields():
        before, after = getattr(cpu, field.name), getattr(other, field.name)
        assert (list(before) == list(after)) if field.is_array else before == after, field.name
    assert bytes(cpu.xsave[:XSAVE_BYTES]) == bytes(other.xsave[:XSAVE_BYTES])
    assert other.next_rip == cpu.rip


def test_what_is_not_saved_is_known() -> None:
    assert set(Cpu.fields) >= saved.TRANSIENT
    assert {"gpr", "rip", "cr3", "star", "exc_vector"} <= {f.name for f in saved.saved_fields()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=99), "version 99"),
        (lambda s: s.pop("rip"), "'rip'"),
        (lambda s: s.update(rip="0"), "'rip'"),
        (lambda s: s.update(rip=1 << 64), "'rip'"),
        (lambda s: s.update(cr0=-1), "'cr0'"),
        (lambda s: s.update(gpr=[0] * 15), "'gpr'"),
        (lambda s: s.update(cpl=4), "cpl"),
        (lambda s: s.update(flag_if=2), "flag_if"),
        (lambda s: s.update(status=2), "status"),
        (lambda s: s.update(other_flags=1), "other_flags"),
        (lambda s: s.update(exc_vector=32), "exc_vector"),
        (lambda s: s.pop("xsave"), "vector state"),
        (lambda s: s.update(xsave=s["xsave"][:-1]), "vector state"),
        (lambda s: s.update(xsave=patched(s["xsave"], 512, 8)), "can't be restored"),
        (lambda s: s.update(xsave=patched(s["xsave"], 520, 1)), "can't be restored"),
        (lambda s: s.update(xsave=patched(s["xsave"], 575, 1)), "can't be restored"),
        (lambda s: s.update(xsave=patched(s["xsave"], 27, 1)), "can't be restored"),
    ],
)
def test_what_no_cpu_can_be_is_refused(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    cpu, _room = made()
    state = saved.save_cpu(cpu)
    change(state)
    cpu.cr0, cpu.exc_vector = CR0_PE, NO_EXCEPTION
    with pytest.raises(ImageError, match=message):
        saved.restore_cpu(cpu, state, 7)
    assert cpu.cr0 == CR0_PE


def patched(area: bytes, at: int, value: int) -> bytes:
    return area[:at] + bytes([value]) + area[at + 1 :]
