"""Breakpoints, watchpoints and steps of a machine's owner, on the tiny built-in guest's machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdb.support import AGAIN, COUNTER, DEC, LOADED, SOURCE, SPIN, START
from ringfence import Machine
from ringfence.engine import StopReason
from ringfence.engine.debug import Access, DebugStop, StopKind
from ringfence.engine.kvm.verdict import Kind, verdict
from ringfence.errors import GuestTimeout, UsageError
from ringfence.images.builtin import LOAD_ADDRESS, assemble, elf_kernel
from ringfence.life import State

KERNEL = elf_kernel(assemble(SOURCE), LOAD_ADDRESS)
WAIT = 20.0


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(
        kernel=KERNEL,
        memory="16M",
        engine="translate",
        cache=False,
    ) as made:
        yield made


def test_breakpoints_and_steps(machine: Machine) -> None:
    debug = machine.debug
    debug.breakpoint(AGAIN)
    machine.start()
    for left in (3, 2, 1):
        stop = debug.wait(WAIT)
        assert stop is not None
        assert (stop.kind, stop.rip) == (StopKind.BREAKPOINT, AGAIN)
        registers = machine.registers()
        assert (registers["rip"], registers["rcx"]) == (AGAIN, left)
        if left > 1:
            machine.resume()
    for at in (LOADED, DEC):
        stop = debug.step()
        assert stop is not None
        assert (stop.kind, stop.rip) == (StopKind.STEP, at)
    assert machine.registers()["rax"] == 1
    debug.remove_breakpoint(AGAIN)
    machine.resume()
    with pytest.raises(GuestTimeout):
        debug.wait(0.1)
    machine.pause()
    assert debug.stops == () and machine.state is State.PAUSED
    assert SPIN <= machine.registers()["rip"] < SPIN + 5


def test_under_kvm() -> None:
    if verdict().kind is Kind.NONE:
        pytest.skip("no KVM here")
    with Machine(kernel=KERNEL, memory="16M", engine="kvm") as machine:
        debug = machine.debug
        debug.breakpoint(AGAIN)
        machine.start()
        for left in (3, 2):
            stop = debug.wait(WAIT)
            assert stop == DebugStop(StopKind.BREAKPOINT, 0, AGAIN)
            assert machine.registers()["rcx"] == left
            machine.resume()
        assert debug.wait(WAIT) is not None
        for at in (LOADED, DEC):
            assert debug.step() == DebugStop(StopKind.STEP, 0, at)
        for n in range(1, 4):
            debug.breakpoint(SPIN + n)
        with pytest.raises(UsageError, match="has 4"):
            debug.watchpoint(COUNTER)
        debug.clear()
        with pytest.raises(UsageError, match="aligned"):
            debug.watchpoint(COUNTER + 1, 8)


def test_a_breakpoint_in_running_code(machine: Machine) -> None:
    machine.start()
    machine.pause()
    machine.debug.breakpoint(SPIN)
    machine.resume()
    for _ in range(3):
        stop = machine.debug.wait(WAIT)
        assert stop is not None and stop.rip == SPIN
        before = machine.registers()["rbx"]
        machine.resume()
        machine.debug.wait(WAIT)
        assert machine.registers()["rbx"] == before + 1


def test_watchpoints(machine: Machine) -> None:
    debug = machine.debug
    written = debug.watchpoint(COUNTER, 8)
    debug.watchpoint(COUNTER + 4, 4, Access.READ)
    machine.start()
    stop = debug.wait(WAIT)
    assert stop is not None
    assert (stop.kind, stop.rip, stop.watchpoint) == (StopKind.WATCHPOINT, LOADED, written)
    assert machine.read_virtual(COUNTER, 1) == b"\3"
    machine.resume()
    stop = debug.wait(WAIT)
    assert stop is not None and stop.watchpoint is not None
    assert (stop.rip, stop.watchpoint.access) == (DEC, Access.READ)
    debug.clear()
    debug.breakpoint(SPIN)
    machine.resume()
    debug.wait(WAIT)
    assert machine.read_virtual(COUNTER, 1) == b"\1"


def test_memory_and_registers(machine: Machine) -> None:
    machine.write_virtual(SPIN, b"\xeb\xfe")
    assert machine.read_virtual(SPIN, 2) == b"\xeb\xfe"
    with pytest.raises(IndexError, match="not mapped"):
        machine.write_virtual((1 << 47) - 2, b"1234")
    machine.start()
    machine.pause()
    machine.set_registers({"rip": START, "rbx": 5})
    machine.debug.breakpoint(SPIN)
    machine.resume()
    machine.debug.wait(WAIT)
    machine.debug.step()
    assert machine.registers()["rip"] == SPIN and machine.registers()["rbx"] == 5
    # Code that ran already is changed as well.
    machine.write_virtual(SPIN, b"\x90\x90")
    stop = machine.debug.step()
    assert stop is not None and stop.rip == SPIN + 1


def test_refused(machine: Machine) -> None:
    debug = machine.debug
    for length in (0, 1 << 64):
        with pytest.raises(UsageError):
            debug.watchpoint(COUNTER, length)
    for n in range(8):
        debug.watchpoint(COUNTER + 8 * n)
    with pytest.raises(UsageError, match="at most 8"):
        debug.watchpoint(COUNTER + 64)
    assert len(debug.points.watchpoints) == 8
    machine.start()
    with pytest.raises(UsageError, match="running"):
        debug.breakpoint(START)


def test_all_of_many(machine: Machine) -> None:
    for n in range(1024):
        machine.debug.breakpoint(COUNTER + n)
    with pytest.raises(UsageError, match="at most 1024"):
        machine.debug.breakpoint(1 << 40)


def test_restored_debug_registers_fire(machine: Machine) -> None:
    vcpu = machine.vcpus[0]
    saved = vcpu.save()
    saved["cpu"]["dr"][0], saved["cpu"]["dr"][7] = AGAIN, 0x402
    vcpu.restore(saved)
    machine.start()
    assert machine.wait(WAIT) is StopReason.CRASH  # the guest has no handler for its #DB
    assert machine.registers()["rip"] == AGAIN
