"""The registers of a virtual CPU by name, as owners and debuggers ask for them.

Names are the manual's, in lower case (Intel SDM vol. 1, 3.4; vol. 3, 2.5).
"""

from __future__ import annotations

from typing import Any

from ringfence.cpu.dump import rflags
from ringfence.cpu.state import GPR_NAMES, OTHER_FLAGS, SEGMENT_NAMES, STATUS_FLAGS

_MASK64 = (1 << 64) - 1


def named_registers(cpu: Any) -> dict[str, int]:
    """General, control and segment registers of a ``Cpu`` view."""
    values = {name: cpu.gpr[n] for n, name in enumerate(GPR_NAMES)}
    values["rip"] = cpu.rip
    values["rflags"] = rflags(cpu)
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "cpl"):
        values[name] = getattr(cpu, name)
    for n, name in enumerate(SEGMENT_NAMES):
        values[name] = cpu.seg_selector[n]
        values[f"{name}_base"] = cpu.seg_base[n]
    return values


def set_rflags(cpu: Any, value: int) -> None:
    """Spread RFLAGS over a view's fields."""
    cpu.status = value & STATUS_FLAGS
    cpu.other_flags = value & OTHER_FLAGS
    cpu.flag_if = value >> 9 & 1
    cpu.flag_df = value >> 10 & 1


def set_named_register(cpu: Any, name: str, value: int) -> None:
    """Change a general register, ``rip`` or ``rflags`` of a view; KeyError for any other."""
    if name in GPR_NAMES:
        cpu.gpr[GPR_NAMES.index(name)] = value & _MASK64
    elif name == "rip":
        cpu.rip = value & _MASK64
    elif name == "rflags":
        set_rflags(cpu, value)
    else:
        raise KeyError(f"register {name} can't be set")
