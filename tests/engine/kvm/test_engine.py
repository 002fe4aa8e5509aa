"""The engine's loop against a scripted KVM: what goes wrong, and what has to be in which order."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.kvm.fake import DATA, POWER_OFF, FakeKernel, leave, port
from ringfence import engine as engines
from ringfence.chipset.board import Board
from ringfence.chipset.clock import HostClock
from ringfence.cpu import msr, tsc
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.reset import EntryState
from ringfence.cpu.tsc import Tsc
from ringfence.engine import Engine, EngineConfig, StopReason
from ringfence.engine.exits import TraceRecord
from ringfence.engine.kvm.abi import Exit, Request
from ringfence.engine.kvm.engine import AGAIN_MAX, KICK, create_vcpus
from ringfence.errors import HostError
from ringfence.machine import Machine
from ringfence.memory.ram import GuestMemory

SELF_IPI = 0x300, 0x40041
"""Offset and value of the ICR for an interrupt to itself, vector 0x41."""


class Rig:
    """An engine on a real board and a scripted KVM."""

    def __init__(self, *script: Any, **options: Any) -> None:
        self.kernel = FakeKernel(script, **options)
        self.memory = GuestMemory(1 << 20)
        self.console = bytearray()
        self.board = Board(
            clock=HostClock(),
            tsc=Tsc(),
            memory_size=1 << 20,
            console_sink=self.console.extend,
            on_power_off=lambda: self.engine.request_stop(),
        )
        self.vcpu = create_vcpus(self.memory, self.board, EngineConfig(), self.kernel)[0]
        self.engine = Engine([self.vcpu], self.board)
        boot = EntryState(
            rip=0x1000, rsp=0, rsi=0, cr0=0x80000011, cr3=0, cr4=0x20, efer=0x500,
            gdt_base=0, gdt_limit=0, cs=8, ds=16,
        )  # fmt: skip
        self.engine.set_boot_state(boot)
        self.board.mmio_write(0xFEE000F0, 4, 0x1FF)

    def close(self) -> None:
        self.engine.close()
        self.memory.close()


@pytest.fixture
def made() -> Iterator[list[Rig]]:
    """Rigs that a test makes; closed at its end."""
    rigs: list[Rig] = []
    yield rigs
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(made: list[Rig]) -> Any:
    """Make a rig."""

    def make(*script: Any, **options: Any) -> Rig:
        made.append(Rig(*script, **options))
        return made[-1]

    return make


def interrupt(target: Rig) -> None:
    """The local APIC gets vector 0x41."""
    target.board.mmio_write(0xFEE00000 + SELF_IPI[0], 4, SELF_IPI[1])


# --- what KVM may say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (errno.EFAULT, "can't run the guest any more .Bad address"),
        (errno.ENOMEM, "can't run the guest any more"),
        (errno.EIO, "can't run the guest any more"),
        (leave(99), "reason 99"),
        (leave(Exit.UNKNOWN), "reason 0"),
        (leave(Exit.HYPERCALL), "reason 3"),
        (leave(Exit.SYSTEM_EVENT), "reason 24"),
        (
            leave(Exit.FAIL_ENTRY, fail_entry__hardware_entry_failure_reason=0x80000021),
            "0x80000021",
        ),
        (
            leave(Exit.IO, io__size=4, io__count=1 << 31, io__data_offset=DATA),
            "outside its shared area",
        ),
    ],
)
def test_trouble_is_said_plainly(rig: Any, step: Any, message: str) -> None:
    with pytest.raises(HostError, match=message):
        rig(step).engine.run()


def test_moments_of_refusal_pass(rig: Any) -> None:
    it = rig(errno.EINTR, errno.EAGAIN, errno.EINTR, errno.EAGAIN, POWER_OFF)
    assert it.engine.run() is StopReason.STOPPED


def test_refusal_for_ever_ends(rig: Any) -> None:
    it = rig(*[errno.EAGAIN] * (AGAIN_MAX + 1))
    with pytest.raises(HostError, match="temporarily unavailable"):
        it.engine.run()


@pytest.mark.parametrize(
    ("step", "report", "reason"),
    [
        (leave(Exit.SHUTDOWN), "triple fault", "shutdown"),
        (leave(Exit.INTERNAL_ERROR, internal__suberror=3), "internal error 3", "unsupported"),
        (
            leave(Exit.INTERNAL_ERROR, internal__suberror=1, emulation_failure__insn_size=200),
            "can't emulate (00 00",
            "unsupported",
        ),
        (
            leave(Exit.INTERNAL_ERROR, internal__suberror=1, emulation_failure__insn_size=0),
            "can't emulate (unknown)",
            "unsupported",
        ),
    ],
)
def test_what_the_guest_did_is_its_crash(rig: Any, step: Any, report: str, reason: str) -> None:
    it = rig(step)
    assert it.engine.run() is StopReason.CRASH
    assert report in it.engine.crash_dump()
    assert it.engine.stats()["exits"][reason]["count"] == 1


# --- accesses -----------------------------------------------------------------------------------


def test_ports(rig: Any) -> None:
    seen: list[bytes] = []
    it = rig(
        port(0x3F8, b"Hello"),
        port(0x5F0, bytes(12), size=4, out=False),
        lambda run: (seen.append(bytes(it.kernel.shared[DATA : DATA + 12])), POWER_OFF(run)),
    )
    records: list[TraceRecord] = []
    it.engine.set_trace(records.append)
    assert it.engine.run() is StopReason.STOPPED
    assert bytes(it.console) == b"Hello"
    assert seen == [b"\xff" * 12]
    assert [str(r).split()[1] for r in records] == ["port_out", "port_in", "port_out"]
    assert it.engine.stats()["exits"]["port_out"]["count"] == 2


def test_device_memory(rig: Any) -> None:
    read: list[int] = []
    it = rig(
        leave(Exit.MMIO, mmio__phys_addr=0xFEE00080, mmio__len=4, mmio__is_write=1),
        leave(Exit.MMIO, mmio__phys_addr=0xFEE00030, mmio__len=4, mmio__is_write=0),
        lambda run: (read.append(int.from_bytes(run.mmio.data, "little")), POWER_OFF(run)),
    )
    it.kernel.run.mmio.data[:] = [0x20, 0, 0, 0, 0, 0, 0, 0]
    assert it.engine.run() is StopReason.STOPPED
    assert read == [0x50014]
    assert it.board.read_cr8(0) == 2
    assert it.kernel.run.cr8 == 2


def test_absurd_lengths_stay_within_the_shared_area(rig: Any) -> None:
    it = rig(
        leave(Exit.MMIO, mmio__phys_addr=0xD0000000, mmio__len=0xFFFFFFFF, mmio__is_write=0),
        leave(Exit.MMIO, mmio__phys_addr=0xD0000000, mmio__len=0xFFFFFFFF, mmio__is_write=1),
        POWER_OFF,
    )
    assert it.engine.run() is StopReason.STOPPED


def test_an_access_is_finished_before_run_returns(rig: Any) -> None:
    it = rig(lambda run: (it.engine.request_pause(), port(0x3F8, b"a")(run)), POWER_OFF)
    it.kernel.pending = [port(0x3F8, b"b"), errno.EINTR]
    assert it.engine.run() is StopReason.PAUSED
    assert bytes(it.console) in (b"", b"ab")
    it.board.flush()
    assert bytes(it.console) == b"ab"
    assert it.kernel.run.immediate_exit == 0
    assert it.engine.run() is StopReason.STOPPED


def test_an_access_that_ends_in_a_crash(rig: Any) -> None:
    it = rig(lambda run: (it.engine.request_pause(), port(0x3F8, b"a")(run)))
    it.kernel.pending = [leave(Exit.SHUTDOWN)]
    assert it.engine.run() is StopReason.CRASH


class Registers:
    """A device with one register."""

    def __init__(self) -> None:
        self.value = 7

    def msr_read(self, index: int) -> int:
        return self.value

    def msr_write(self, index: int, value: int) -> None:
        if value == 13:
            raise GeneralProtection
        self.value = value


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        (0x4B564D00, 5, 0),
        (0x4B564D00, 13, 1),
        (0x1B, 0xFEE00900, 0),
        (0x803, 0, 1),
        (msr.MTRR_DEF_TYPE, 0xC06, 0),
        (msr.MTRR_DEF_TYPE, 0xFFFF, 1),
        (msr.HWCR, 1, 0),
        (msr.LSTAR, 1 << 63, 1),
        (msr.EFER, 1 << 40, 1),
        (0xDEADBEEF, 0, 1),
    ],
)
def test_register_writes(rig: Any, index: int, value: int, error: int) -> None:
    errors: list[int] = []
    it = rig(
        leave(Exit.X86_WRMSR, msr__index=index, msr__data=value, msr__error=9),
        lambda run: (errors.append(run.msr.error), POWER_OFF(run)),
    )
    it.vcpu.attach_msrs([0x4B564D00], Registers())
    it.engine.run()
    assert errors == [error]


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (0x4B564D00, 7),
        (0x1B, 0xFEE00900),
        (msr.MTRR_CAP, msr.MTRR_CAP_VALUE),
        (msr.PATCH_LEVEL, msr.PATCH_VALUE),
        (msr.EFER, None),
        (0xDEADBEEF, None),
    ],
)
def test_register_reads(rig: Any, index: int, wanted: int | None) -> None:
    seen: list[Any] = []
    it = rig(
        leave(Exit.X86_RDMSR, msr__index=index, msr__error=9),
        lambda run: (seen.append(None if run.msr.error else run.msr.data), POWER_OFF(run)),
    )
    it.vcpu.attach_msrs([0x4B564D00], Registers())
    it.engine.run()
    assert seen == [wanted]


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("movable", [True, False])
def test_time_stands_still_over_a_pause_where_kvm_can(rig: Any, movable: bool) -> None:
    it = rig(
        lambda run: (it.engine.request_pause(), port(0x80, b"x")(run)),
        POWER_OFF,
        movable_tsc=movable,
    )
    counter = it.board.tsc.vcpu(0)
    start = counter.read()
    assert it.engine.run() is StopReason.PAUSED
    it.board.tsc.pause()
    before = counter.read()
    time.sleep(0.05)
    it.board.tsc.resume()
    it.engine.run()
    after = counter.read()
    passed = it.board.tsc.hz // 20
    if movable:
        assert start < 100 * it.board.tsc.hz  # it began at 0
        assert after - before < passed
    else:
        assert it.kernel.tsc_offset == it.vcpu.view.tsc_offset == 0
        assert after - before >= passed


def test_a_written_counter_is_followed(rig: Any) -> None:
    it = rig(leave(Exit.X86_WRMSR, msr__index=tsc.MSR_TSC, msr__data=1 << 50), POWER_OFF)
    it.engine.run()
    assert 0 <= it.board.tsc.vcpu(0).read() - (1 << 50) < 100 * it.board.tsc.hz
    assert it.kernel.tsc_offset == it.vcpu.view.tsc_offset


# --- interrupts ---------------------------------------------------------------------------------


def test_an_interrupt_waits_until_the_guest_is_ready(rig: Any) -> None:
    it = rig(
        leave(Exit.IRQ_WINDOW_OPEN, ready=False),
        leave(Exit.IRQ_WINDOW_OPEN, ready=True),
        errno.EINTR,
        POWER_OFF,
    )
    interrupt(it)
    it.engine.run()
    assert it.kernel.interrupts == [0x41]
    assert it.kernel.windows[:3] == [1, 1, 0]
    assert it.engine.stats()["interrupts"] == {"0x41": 1}


def test_the_second_interrupt_waits_for_the_next_window(rig: Any) -> None:
    it = rig(
        leave(Exit.IRQ_WINDOW_OPEN, ready=True),
        errno.EINTR,
        leave(Exit.IRQ_WINDOW_OPEN, ready=True),
        POWER_OFF,
    )
    interrupt(it)
    it.board.mmio_write(0xFEE00300, 4, 0x40061)
    it.engine.run()
    assert it.kernel.interrupts == [0x61]  # 0x41 has a lower class: it waits for the EOI
    assert it.kernel.windows == [1, 0, 0, 0]


def test_the_guest_s_cr8_reaches_the_board(rig: Any) -> None:
    def raise_priority(run: Any) -> None:
        run.cr8 = 5
        leave(Exit.IRQ_WINDOW_OPEN, ready=True)(run)

    it = rig(raise_priority, POWER_OFF)
    interrupt(it)
    it.engine.run()
    assert it.board.read_cr8(0) == 5
    assert it.kernel.interrupts == []


def test_a_priority_raised_before_a_kick_counts(rig: Any) -> None:
    def raise_priority(run: Any) -> None:
        run.cr8 = 5
        run.ready_for_interrupt_injection = run.if_flag = 1
        interrupt(it)
        raise OSError(errno.EINTR, "kicked")

    it = rig(raise_priority, POWER_OFF)
    it.engine.run()
    assert it.kernel.interrupts == []


def kicked(action: Any) -> Any:
    """A KVM_RUN that lasts until a signal ends it; meanwhile ``action`` runs in another thread."""

    def step(run: Any) -> None:
        other = threading.Thread(target=action)
        other.start()
        assert signal.sigtimedwait({KICK}, 10) is not None, "nobody kicked the vCPU"
        signal.pthread_kill(threading.get_ident(), KICK)  # KVM leaves the signal pending
        other.join()
        raise OSError(errno.EINTR, "kicked")

    return step


def test_requests_end_a_run_of_guest_code(rig: Any) -> None:
    it = rig(
        kicked(lambda: it.engine.request_pause()),
        kicked(lambda: interrupt(it)),
        leave(Exit.IRQ_WINDOW_OPEN, ready=True),
        kicked(lambda: it.engine.request_stop()),
    )
    assert it.engine.run() is StopReason.PAUSED
    assert it.engine.run() is StopReason.STOPPED
    assert it.kernel.interrupts == [0x41]
    assert KICK not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert KICK not in signal.sigpending()
    it.engine.request_stop()  # nobody is inside: no signal


def test_a_request_before_the_run_is_remembered(rig: Any) -> None:
    it = rig()
    it.engine.request_pause()
    assert it.engine.run() is StopReason.PAUSED
    it.engine.request_stop()
    assert it.engine.run() is StopReason.STOPPED
    assert it.kernel.windows == []


def test_a_halted_guest_sleeps_until_an_interrupt(rig: Any) -> None:
    later = threading.Timer(0.05, lambda: interrupt(it))
    it = rig(lambda run: (later.start(), leave(Exit.HLT, ready=True)(run)), POWER_OFF)
    it.engine.run()
    assert it.kernel.interrupts == [0x41]
    assert it.engine.stats()["time"]["idle"] > 30_000_000


def test_a_pause_does_not_end_the_guest_s_sleep(rig: Any) -> None:
    later = threading.Timer(0.05, lambda: it.engine.request_pause())
    it = rig(lambda run: (later.start(), leave(Exit.HLT, ready=True)(run)), POWER_OFF)
    assert it.engine.run() is StopReason.PAUSED
    threading.Timer(0.05, interrupt, (it,)).start()
    assert it.engine.run() is StopReason.STOPPED
    assert it.kernel.interrupts == [0x41]


def test_a_halted_guest_that_takes_no_interrupts_can_be_stopped(rig: Any) -> None:
    it = rig(leave(Exit.HLT, ready=False))
    interrupt(it)
    threading.Timer(0.05, it.engine.request_stop).start()
    assert it.engine.run() is StopReason.STOPPED


def test_a_guest_that_was_saved_asleep_hears_interrupts(rig: Any) -> None:
    """Before its first entry KVM has not said yet that the guest takes them."""
    it = rig(leave(Exit.IRQ_WINDOW_OPEN, ready=True), POWER_OFF)
    state = it.vcpu.save()
    state["cpu"]["halted"] = state["cpu"]["flag_if"] = 1
    it.vcpu.restore(state)
    interrupt(it)
    it.engine.run()
    assert it.kernel.interrupts == [0x41]


# --- the rest of the protocol -------------------------------------------------------------------


def test_registers(rig: Any) -> None:
    it = rig(POWER_OFF)
    assert it.engine.registers()["rip"] == 0x1000
    it.engine.set_registers({"rax": 5, "rip": 0x2000, "rflags": 0x246})
    found = it.engine.registers()
    assert (found["rax"], found["rip"], found["rflags"]) == (5, 0x2000, 0x246)
    assert found["cr0"] == 0x80000011
    with pytest.raises(KeyError, match="cr3"):
        it.engine.set_registers({"cr3": 0})
    it.memory.write(0x0FF0, b"0123456789abcdefXY")
    assert it.engine.translate(0xFFE) == 0xFFE
    assert it.engine.translate(1 << 40) is None


def test_files_are_closed_when_something_is_refused() -> None:
    for request in (Request.X86_SET_MSR_FILTER, Request.SET_CPUID2, Request.SET_DEVICE_ATTR):
        with pytest.raises(HostError, match=request.name):
            Rig(refused={request: errno.EINVAL})
    kernel = FakeKernel(refused={Request.SET_CPUID2: errno.EINVAL})
    memory = GuestMemory(1 << 20)
    board = Rig(POWER_OFF).board
    with pytest.raises(HostError):
        create_vcpus(memory, board, EngineConfig(), kernel)
    assert kernel.closed == [105, 104, 103]


def test_a_vcpu_thread_that_dies_ends_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(run: Any) -> None:
        raise RuntimeError("a bug of ours")

    kernel = FakeKernel([die])
    monkeypatch.setitem(
        engines._factories, "kvm", lambda *given: create_vcpus(*given, kernel=kernel)
    )
    monkeypatch.setattr(engines, "resolve", lambda name: "kvm")
    with Machine(image="builtin", engine="kvm", memory="2M") as machine:
        machine.start()
        with pytest.raises(RuntimeError, match="a bug of ours"):
            machine.wait(10)
    assert kernel.closed == [105, 104, 103]


def test_loading_it_loads_no_compiler() -> None:
    code = (
        "import sys\n"
        "import ringfence.engine.kvm.engine, ringfence.engine.kvm.probe\n"
        "assert not {'llvmlite', 'iced_x86', 'numba'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
