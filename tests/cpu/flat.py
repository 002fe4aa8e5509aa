"""Linear memory as one host buffer, and counters for the hooks: what effects run on in tests."""

# mypy: disable-error-code="index"

from __future__ import annotations

from typing import Annotated

from ringfence.cpu.flags import is_canonical, raise_fault
from ringfence.cpu.state import FAULT, GP, OK, PF, PF_USER, PF_WRITE, Cpu
from ringfence.native.dialect import (
    load8,
    load16,
    load32,
    load64,
    native,
    store8,
    store16,
    store32,
    store64,
)
from ringfence.native.layout import u64

CLOBBERED = 0xBAD_0BAD_0BAD_0BAD


class FlatCpu(Cpu):
    """A CPU with a buffer as its linear memory."""

    flat_host: Annotated[int, u64]
    flat_base: Annotated[int, u64]
    """Linear address of the buffer's first byte."""
    flat_size: Annotated[int, u64]
    flat_hole: Annotated[int, u64]
    """A page number where every access faults; ~0 for none."""
    flat_supervisor: Annotated[int, u64]
    """User accesses at or above this address fault."""
    mode_changes: Annotated[int, u64]
    interrupt_checks: Annotated[int, u64]
    debug_changes: Annotated[int, u64]
    debug_noted: Annotated[int, u64]
    flushes_all: Annotated[int, u64]
    flushes_nonglobal: Annotated[int, u64]
    flushes_page: Annotated[int, u64]
    flushed_page: Annotated[int, u64]


@native
def flat_check(cpu: FlatCpu, address: int, size: int, user: int, write: int) -> int:
    """Whether an access is allowed; leaves the host address in ``cpu.value`` if so."""
    if not is_canonical(address) or not is_canonical(address + size - 1):
        return raise_fault(cpu, GP, 0)
    offset = address - cpu.flat_base
    last = address + size - 1
    bad = offset >= cpu.flat_size or offset + size > cpu.flat_size
    if address >> 12 == cpu.flat_hole or last >> 12 == cpu.flat_hole:
        bad = 1
    if user and last >= cpu.flat_supervisor:
        bad = 1
    if bad:
        cpu.exc_address = address
        return raise_fault(cpu, PF, (PF_WRITE if write else 0) | (PF_USER if user else 0))
    cpu.value = cpu.flat_host + offset
    return OK


@native
def linear_read(cpu: FlatCpu, address: int, size: int, user: int) -> int:
    """See ``ringfence.cpu.ports``."""
    if flat_check(cpu, address, size, user, 0):
        return FAULT
    at = cpu.value
    if size == 8:
        cpu.value = load64(at)
    elif size == 4:
        cpu.value = load32(at)
    elif size == 2:
        cpu.value = load16(at)
    else:
        result = 0
        for i in range(size):
            result = result | (load8(at + i) << (i * 8))
        cpu.value = result
    return OK


@native
def linear_write(cpu: FlatCpu, address: int, size: int, value: int, user: int) -> int:
    """See ``ringfence.cpu.ports``."""
    if flat_check(cpu, address, size, user, 1):
        return FAULT
    at = cpu.value
    cpu.value = CLOBBERED
    if size == 8:
        store64(at, value)
    elif size == 4:
        store32(at, value)
    elif size == 2:
        store16(at, value)
    else:
        for i in range(size):
            store8(at + i, value >> (i * 8))
    return OK


@native
def tlb_flush_all(cpu: FlatCpu) -> int:
    """Count."""
    cpu.flushes_all += 1
    return OK


@native
def tlb_flush_nonglobal(cpu: FlatCpu) -> int:
    """Count."""
    cpu.flushes_nonglobal += 1
    return OK


@native
def tlb_flush_page(cpu: FlatCpu, address: int) -> int:
    """Count, and remember the address."""
    cpu.flushes_page += 1
    cpu.flushed_page = address
    return OK


@native
def mode_changed(cpu: FlatCpu) -> int:
    """Count."""
    cpu.mode_changes += 1
    return OK


@native
def interrupts_enabled(cpu: FlatCpu) -> int:
    """Count."""
    cpu.interrupt_checks += 1
    return OK


@native
def debug_changed(cpu: FlatCpu) -> int:
    """Count."""
    cpu.debug_changes += 1
    return OK


@native
def step_masked(cpu: FlatCpu) -> int:
    """Nothing steps here."""
    return OK


@native
def debug_note(cpu: FlatCpu, bits: int) -> int:
    """Remember the bits."""
    cpu.debug_noted |= bits
    return OK
