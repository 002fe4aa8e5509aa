"""A virtual CPU's state as plain data, between two instructions.

Everything is derived from the declaration in `cpu.state`: a field that is added there is saved,
unless it is named in `TRANSIENT`. So the data suits every engine, and one engine may go on where
another has stopped.

What is read back may come from a damaged or forged file. Fields that our own code relies on (bytes
that are flags, the privilege level, the image for XRSTOR) are therefore checked here; all others
are registers, which may hold anything that a guest could have put there.
"""

from __future__ import annotations

import struct
from typing import Any

from ringfence.cpu.components import HEADER, MXCSR
from ringfence.cpu.reset import MXCSR_MASK
from ringfence.cpu.signals import MAX_NMIS
from ringfence.cpu.state import (
    NO_EXCEPTION,
    OTHER_FLAGS,
    SHADOW_MOV_SS,
    SHADOW_STI,
    STATUS_FLAGS,
    XSAVE_BYTES,
    Cpu,
)
from ringfence.errors import ImageError
from ringfence.native.layout import Field

VERSION = 1

TRANSIENT = frozenset(
    {
        # Meaningful only inside an instruction; `next_rip` follows from `rip`.
        "next_rip", "op", "ea", "linear", "value", "exit_reason", "exit_data", "delivering",
        # How the guest's counter follows from this host's; the machine's time is saved elsewhere.
        "tsc_offset", "tsc_ratio",
        # The engine's own, made anew with it.
        "cpuid_table", "cpuid_rows",
        # Statistics.
        "exceptions", "software_interrupts", "interrupts",
        # Saved as bytes, as it is an image and not an array of registers.
        "xsave",
    }
)  # fmt: skip
"""Fields of `Cpu` that are no register, or are saved in another form."""

_BOOLEANS = (
    "flag_if", "flag_df", "nmi_blocked", "halted", "kicked", "apic_disabled", "wait_for_sipi",
    "init_pending", "sipi_pending",
)  # fmt: skip

State = dict[str, Any]


def saved_fields() -> list[Field]:
    """The fields that are saved by name."""
    return [field for field in Cpu.fields.values() if field.name not in TRANSIENT]


def save_cpu(cpu: Any) -> State:
    """The architectural state of a ``Cpu`` view: integers, lists of them, and bytes."""
    state: State = {"version": VERSION}
    for field in saved_fields():
        value = getattr(cpu, field.name)
        state[field.name] = list(value) if field.is_array else value
    state["xsave"] = bytes(cpu.xsave[:XSAVE_BYTES])
    return state


def restore_cpu(cpu: Any, state: State, components: int) -> None:
    """Put a saved state into a ``Cpu`` view, which may use these ``components`` (bits of XCR0).

    Raises
    ------
    ImageError
        The state is of another version, lacks something, or can't be a CPU's. The view is
        unchanged then.
    """
    if state.get("version") != VERSION:
        raise ImageError(
            f"saved vCPU has version {state.get('version')!r}, expected {VERSION};"
            " take the snapshot anew with this release"
        )
    fields = saved_fields()
    for field in fields:
        _check_field(field, state.get(field.name))
    _check_values(state)
    area = _checked_area(state, components)
    for field in fields:
        if field.is_array:
            getattr(cpu, field.name)[:] = state[field.name]
        else:
            setattr(cpu, field.name, state[field.name])
    for at in range(len(cpu.xsave)):
        cpu.xsave[at] = 0
    cpu.xsave[: len(area)] = list(area)
    cpu.next_rip = cpu.rip
    cpu.delivering = NO_EXCEPTION


def _check_field(field: Field, value: Any) -> None:
    """An integer of the field's width, or a list of as many as it has elements."""
    values = value if field.is_array else [value]
    limit = 1 << 8 * field.width
    if (
        not isinstance(values, list)
        or len(values) != max(field.count, 1)
        or not all(type(each) is int and 0 <= each < limit for each in values)
    ):
        raise ImageError(f"saved vCPU: field {field.name!r} is missing or out of range")


def _check_values(state: State) -> None:
    """What emitted code and effects take for granted."""
    wrong = [name for name in _BOOLEANS if state[name] > 1]
    if state["nmi_pending"] > MAX_NMIS:
        wrong.append("nmi_pending")
    if state["cpl"] > 3:
        wrong.append("cpl")
    if state["interrupt_shadow"] not in (0, SHADOW_MOV_SS, SHADOW_STI):
        wrong.append("interrupt_shadow")
    if state["status"] & ~STATUS_FLAGS:
        wrong.append("status")
    if state["other_flags"] & ~OTHER_FLAGS:
        wrong.append("other_flags")
    if state["exc_vector"] > 31 and state["exc_vector"] != NO_EXCEPTION:
        wrong.append("exc_vector")
    if wrong:
        raise ImageError(f"saved vCPU: impossible {', '.join(wrong)}")


def _checked_area(state: State, components: int) -> bytes:
    """The XSAVE area, such that XRSTOR can't refuse it (SDM vol. 1, 13.8)."""
    area = state.get("xsave")
    if not isinstance(area, bytes) or len(area) != XSAVE_BYTES:
        raise ImageError(f"saved vCPU: its vector state is not {XSAVE_BYTES} bytes")
    present, compaction = struct.unpack_from("<QQ", area, HEADER)
    (mxcsr,) = struct.unpack_from("<I", area, MXCSR)
    if (
        present & ~components
        or compaction
        or any(area[HEADER + 16 : HEADER + 64])
        or mxcsr & ~MXCSR_MASK
    ):
        raise ImageError("saved vCPU: its vector state can't be restored by a CPU")
    return area
