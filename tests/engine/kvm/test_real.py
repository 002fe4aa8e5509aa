"""Whole machines on this host's KVM, whatever kind it is: the built-in guest and tiny kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence import Machine
from ringfence.engine import StopReason
from ringfence.engine.exits import TraceRecord
from ringfence.images.builtin import LOAD_ADDRESS, assemble, elf_kernel
from ringfence.life import State

pytestmark = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this host has no /dev/kvm")


def kernel(source: str) -> bytes:
    """A kernel that is a few instructions."""
    return elf_kernel(assemble(f".intel_syntax noprefix\n.text\n{source}\n"), LOAD_ADDRESS)


def tiny(source: str, **options: object) -> Machine:
    """A machine that runs such a kernel."""
    return Machine(kernel=kernel(source), engine="kvm", memory="4M", **options)  # type: ignore[arg-type]


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_the_built_in_guest_boots() -> None:
    records: list[TraceRecord] = []
    with Machine(image="builtin", engine="kvm", memory="4M") as machine:
        machine.set_trace(records.append)
        machine.start()
        machine.console.wait_for("guest> ", 10)
        machine.console.send("cpuid\n")
        machine.console.wait_for("AuthenticAMD", 10)
        machine.console.send("echo once more\n")
        machine.console.wait_for("once more\r\n", 10)
        machine.console.send("poweroff\n")
        assert machine.wait(10) is StopReason.POWER_OFF
        stats = machine.stats()
    assert stats["machine"]["engine"] == "kvm"
    assert stats["exits"]["port_out"]["count"] > 100
    assert stats["time"]["guest"] > 0
    assert "Goodbye" in machine.console.output
    assert {r.event.reason.label for r in records} == {"port_in", "port_out"}
    assert all(LOAD_ADDRESS <= r.rip < LOAD_ADDRESS + 4096 for r in records)


def test_pause_look_inside_change_and_go_on() -> None:
    source = (
        "mov rbx, 0x1122334455667788\n1: cmp eax, 0x77\njne 1b\n"
        "mov dx, 0x604\nmov ax, 0x3400\nout dx, ax\n2: hlt\njmp 2b\n"
    )
    with tiny(source) as machine:
        machine.set_registers({"rax": 0})
        machine.start()
        time.sleep(0.02)
        machine.pause()
        found = machine.registers()
        assert found["rbx"] == 0x1122334455667788
        assert LOAD_ADDRESS <= found["rip"] < LOAD_ADDRESS + 32
        assert found["cs"] == 0x10
        assert machine.read_virtual(LOAD_ADDRESS, 2) == b"\x48\xbb"
        with pytest.raises(IndexError):
            machine.read_virtual(1 << 46, 1)
        machine.resume()
        machine.pause()
        machine.set_registers({"rax": 0x77})
        machine.resume()
        assert machine.wait(10) is StopReason.POWER_OFF


def test_a_reset_builds_everything_anew() -> None:
    source = "mov dx, 0x3f8\nmov al, 'x'\nout dx, al\nmov al, 0xfe\nout 0x64, al\n1: hlt\njmp 1b\n"
    with tiny(source, on_reset="reboot") as machine:
        machine.start()
        until(lambda: machine.stats()["machine"]["resets"] >= 3)
        machine.stop()
        assert machine.state is State.ENDED
        assert machine.console.output.startswith("xxx")


def test_a_crash_shows_registers() -> None:
    with tiny("mov rbx, 0x4242\nlidt [rip + 1f]\nud2\n1: .quad 0, 0\n") as machine:
        machine.start()
        assert machine.wait(10) is StopReason.CRASH
        assert machine.crash_report.startswith("triple fault\nRAX=")


def test_a_spinning_guest_is_paused_and_stopped_often() -> None:
    with tiny("cli\n1: inc rax\njmp 1b\n") as machine:
        machine.start()
        seen = []
        for _ in range(10):
            time.sleep(0.002)
            machine.pause()
            seen.append(machine.registers()["rax"])
            machine.resume()
        machine.stop()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_the_log_of_written_pages() -> None:
    source = (
        "mov dword ptr [0x200000], 1\nmov dword ptr [0x203ffc], 1\n"
        "mov al, 1\nmov dx, 0x3f8\nout dx, al\n1: in al, 0x64\njmp 1b\n"
    )
    with tiny(source) as machine:
        parts = machine._parts
        parts.log_dirty(True)
        machine.start()
        machine.console.wait_for("\x01", 10)
        machine.pause()
        parts.engine.fetch_dirty()
        written = {
            page
            for run in parts.memory.dirty.take()
            for page in range(run.first, run.first + run.count)
        }
        assert {0x200, 0x203} <= written
        assert 0x201 not in written
        parts.engine.fetch_dirty()
        assert not any(0x200 <= run.first <= 0x208 for run in parts.memory.dirty.take())
        parts.log_dirty(False)
        machine.stop()


def test_guest_and_board_agree_on_time() -> None:
    """RDTSC in the guest lies between two readings of the board's counter."""
    source = (
        "rdtsc\nshl rdx, 32\nor rax, rdx\nmov [0x300000], rax\n"
        "mov dx, 0x604\nmov ax, 0x3400\nout dx, ax\n1: hlt\njmp 1b\n"
    )
    with tiny(source) as machine:
        tsc = machine._parts.board.tsc.vcpu(0)
        before = tsc.read()
        machine.start()
        assert machine.wait(10) is StopReason.POWER_OFF
        seen = int.from_bytes(machine.read_physical(0x300000, 8), "little")
        assert before < seen < tsc.read()
