"""The paravirtual clock's structures, as a guest reads them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from ringfence.chipset.board import Board
from ringfence.chipset.clock import HostClock
from ringfence.chipset.timekeeping import PauseClock, Timekeeper
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.tsc import MASK64, MSR_TSC, Tsc
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory
from ringfence.paravirt import clock as pv
from ringfence.paravirt import services
from ringfence.paravirt.eoi import MSR_PV_EOI
from ringfence.paravirt.hypercalls import Functions
from ringfence.paravirt.services import Paravirtual
from ringfence.paravirt.steal import MSR_STEAL_TIME

SECOND = 1_000_000_000
PAGE = 0x2000


class World:
    """A host whose time and counter move when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hz: int = 2_600_000_000) -> None:
        self.hz = hz
        self.ns = 77 * SECOND
        monkeypatch.setattr("time.monotonic_ns", lambda: self.ns)
        monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000 * SECOND + self.ns)

    def read(self) -> int:
        return self.ns * self.hz // SECOND

    def wait(self, ns: int) -> None:
        self.ns += ns


class Guest:
    """A machine's services, and what its vCPUs read."""

    def __init__(self, world: World, cpus: int = 1, hz: int | None = None) -> None:
        self.memory = GuestMemory(1 << 20)
        self.time = Timekeeper(HostClock(), Tsc(hz, world))
        self.cpus = cpus
        for cpu in range(cpus):
            view = SimpleNamespace(tsc_offset=0, tsc_ratio=0, tsc_adjust=0)
            self.time.tsc.vcpu(cpu).attach(view)
        board = Board(
            clock=self.time.clock,
            tsc=self.time.tsc,
            memory_size=1 << 20,
            cpus=cpus,
            console_sink=lambda data: None,
        )
        kicks = [lambda: None] * cpus
        self.services = Paravirtual(self.memory, self.time, board, kicks, Functions())

    def enable(self) -> None:
        for cpu in range(self.cpus):
            self.services.vcpus[cpu].msr_write(pv.MSR_SYSTEM_TIME, PAGE + 64 * cpu | 1)

    def info(self, cpu: int = 0) -> tuple[int, ...]:
        return struct.unpack("<IIQQIbBxx", self.memory.read(PAGE + 64 * cpu, 32))

    def now(self, cpu: int = 0) -> int:
        """Nanoseconds, by the guest's calculation (__pvclock_read_cycles)."""
        version, _, origin, base, multiplier, shift, _ = self.info(cpu)
        assert version % 2 == 0
        assert version
        ticks = self.time.tsc.vcpu(cpu).read() - origin & MASK64
        ticks = ticks << shift & MASK64 if shift >= 0 else ticks >> -shift
        return base + (ticks * multiplier >> 32)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def make(world: World) -> Iterator[type[Guest]]:
    made: list[Guest] = []

    class Made(Guest):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            made.append(self)

    yield Made
    for guest in made:
        guest.memory.close()


@pytest.mark.parametrize("hz", [1_000_000, 999_999_999, 1_000_000_000, 2_596_000_000, 6 << 30])
def test_scale_gives_nanoseconds(hz: int) -> None:
    multiplier, shift = pv.time_scale(hz)
    assert 0 < multiplier < 1 << 32
    ticks = hz * 100
    shifted = ticks << shift if shift >= 0 else ticks >> -shift
    assert abs((shifted * multiplier >> 32) - 100 * SECOND) < 1000


@pytest.mark.parametrize("hz", [None, 1_000_000_000, 4_100_000_000])
def test_time_in_the_guest(world: World, make: type[Guest], hz: int | None) -> None:
    guest = make(world, hz=hz)
    world.wait(5 * SECOND)
    guest.enable()
    assert guest.info()[6] == 1
    assert abs(guest.now() - 5 * SECOND) < 10
    world.wait(3600 * SECOND)
    assert abs(guest.now() - 3605 * SECOND) < 5000
    assert guest.services.vcpus[0].msr_read(pv.MSR_SYSTEM_TIME) == PAGE | 1


def test_writing_again_changes_nothing_but_the_version(world: World, make: type[Guest]) -> None:
    guest = make(world)
    guest.enable()
    before = guest.info()
    world.wait(12345)
    guest.enable()
    after = guest.info()
    assert after[0] == before[0] + 2
    assert after[1:] == before[1:]


def test_wall_clock_is_that_of_the_line_s_beginning(world: World, make: type[Guest]) -> None:
    guest = make(world)
    start = 1_700_000_000 * SECOND + world.ns
    world.wait(5 * SECOND + 123)
    guest.services.vcpus[0].msr_write(pv.MSR_WALL_CLOCK, 0x3000)
    version, seconds, ns = struct.unpack("<III", guest.memory.read(0x3000, 12))
    assert version == 2
    assert abs(seconds * SECOND + ns - start) < 10


def test_disabled_writes_nothing(world: World, make: type[Guest]) -> None:
    guest = make(world)
    guest.services.vcpus[0].msr_write(pv.MSR_SYSTEM_TIME, PAGE)
    guest.time.pause()
    guest.time.resume()
    assert guest.memory.read(PAGE, 32) == bytes(32)


@pytest.mark.parametrize("policy", list(PauseClock))
def test_a_pause(world: World, make: type[Guest], policy: PauseClock) -> None:
    guest = make(world, 2)
    guest.time.policy = policy
    guest.enable()
    world.wait(SECOND)
    before = [guest.now(0), guest.now(1)]
    guest.time.pause()
    world.wait(60 * SECOND)
    guest.time.resume()
    gone = 60 * SECOND if policy is PauseClock.RUN else 0
    for cpu in range(2):
        assert abs(guest.now(cpu) - before[cpu] - gone) < 50
        assert bool(guest.info(cpu)[6] & 2) == (policy is PauseClock.RUN)


def test_a_counter_that_one_vcpu_sets(world: World, make: type[Guest]) -> None:
    """The clock stays right, and says that counters of vCPUs can't be compared any more."""
    guest = make(world, 2)
    guest.enable()
    world.wait(SECOND)
    guest.time.tsc.vcpu(1).msr_write(MSR_TSC, 1 << 60)
    world.wait(SECOND)
    for cpu in range(2):
        assert abs(guest.now(cpu) - 2 * SECOND) < 10
        assert guest.info(cpu)[6] == 0
    ahead = guest.time.tsc.vcpu(1).offset - guest.time.tsc.offset & MASK64
    guest.time.tsc.vcpu(0).msr_write(MSR_TSC, guest.time.tsc.vcpu(0).read() + ahead)
    guest.time.tsc.vcpu(0).msr_write(0x3B, 0)
    guest.time.tsc.vcpu(1).msr_write(0x3B, 0)
    assert guest.info(0)[6] == guest.info(1)[6] == 1


@pytest.mark.parametrize("hz", [2_600_000_000, 2_600_050_000, 1_234_567_890])
def test_twenty_hosts(monkeypatch: pytest.MonkeyPatch, make: type[Guest], hz: int) -> None:
    """Saved and restored from host to host, the clock goes on to the nanosecond's rounding."""
    source = random.Random(hz)
    world = World(monkeypatch)
    guest = make(world)
    guest.enable()
    expected = 0
    for turn in range(20):
        wait = source.randrange(10 * SECOND)
        world.wait(wait)
        expected += wait
        guest.time.pause()
        before = guest.now()
        assert abs(before - expected) < 100_000
        time, state, ram = guest.time.save(1), guest.services.save(), guest.memory.read(0, 1 << 20)
        world = World(monkeypatch, hz if turn % 2 == 0 else 2_600_000_000)
        world.ns = source.randrange(1 << 60)
        guest = make(world, hz=time["hz"])
        world.wait(5000)
        guest.memory.write(0, ram)
        guest.time.restore(time)
        guest.services.restore(state)
        assert guest.now() == before
        guest.time.resume()
        assert 0 <= guest.now() - before < 3


def test_states_that_are_not_ours(world: World, make: type[Guest]) -> None:
    guest = make(world, 2)
    state = guest.services.save()
    for bad in (
        state | {"version": 9},
        state | {"vcpus": state["vcpus"][:1]},
        state | {"vcpus": [{"version": 1}, {"version": 1}]},
        {"version": 1},
    ):
        with pytest.raises(ImageError):
            guest.services.restore(bad)


FORGED = [
    ("clock", {"system_time": 0xFFFFD}), ("clock", {"system_time": -1}),
    ("steal", {"register": 1 << 20 | 1}), ("eoi", {"register": 0xFEE00001}),
]  # fmt: skip


@pytest.mark.parametrize(("service", "fields"), FORGED)
def test_forged_states(
    world: World, make: type[Guest], service: str, fields: dict[str, int]
) -> None:
    guest = make(world)
    state = guest.services.save()
    state["vcpus"][0][service] |= fields
    with pytest.raises(ImageError, match="outside RAM"):
        guest.services.restore(state)
    for hz in (0, -1, 1 << 60):
        with pytest.raises(ImageError, match="Hz"):
            guest.services.restore(state | {"line": state["line"] | {"hz": hz}})


@pytest.mark.parametrize("index", pv.MSRS)
@pytest.mark.parametrize("address", [0xFFFFC, 0xFEE00000, 1 << 63, MASK64 - 8, 1 << 20])
def test_outside_ram_is_a_fault(world: World, make: type[Guest], index: int, address: int) -> None:
    guest = make(world)
    guest.enable()
    with pytest.raises(GeneralProtection):
        guest.services.vcpus[0].msr_write(index, address | 1)
    guest.time.pause()
    guest.time.resume()
    assert guest.services.vcpus[0].msr_read(pv.MSR_SYSTEM_TIME) == PAGE | 1


def test_across_a_page(world: World, make: type[Guest]) -> None:
    guest = make(world)
    guest.services.vcpus[0].msr_write(pv.MSR_SYSTEM_TIME, 0x2FF0 | 1)
    assert struct.unpack("<Q", guest.memory.read(0x2FF0, 8))[0]


def test_armed_anew_while_it_moves(world: World, make: type[Guest]) -> None:
    """What the VMM writes is sent, across a page's end, too; then only the new place counts."""
    here, there = make(world), make(world)
    here.enable()
    here.memory.dirty.enabled = True
    here.memory.dirty.clear()
    vcpu = here.services.vcpus[0]
    vcpu.msr_write(pv.MSR_SYSTEM_TIME, 0x4FF0 | 1)
    vcpu.msr_write(MSR_STEAL_TIME, 0x7000 | 1)
    vcpu.msr_write(MSR_PV_EOI, 0x8FFF & ~3 | 1)
    written = {
        page for run in here.memory.dirty.take() for page in range(run.first, run.first + run.count)
    }
    assert {4, 5, 7} <= written
    assert PAGE // 4096 not in written
    here.time.pause()
    there.memory.write(0, bytes(here.memory.view))
    there.time.pause()
    there.time.restore(here.time.save(1))
    there.services.restore(here.services.save())
    before = there.memory.read(PAGE, 32)
    there.time.resume()
    assert there.memory.read(PAGE, 32) == before
    assert there.services.vcpus[0].msr_read(pv.MSR_SYSTEM_TIME) == 0x4FF0 | 1
    version = struct.unpack("<I", there.memory.read(0x4FF0, 4))[0]
    there.services.vcpus[0].msr_write(pv.MSR_SYSTEM_TIME, PAGE | 1)
    there.time.pause()
    there.time.resume()
    assert struct.unpack("<I", there.memory.read(0x4FF0, 4))[0] == version


def test_registers_that_are_not_offered(world: World, make: type[Guest]) -> None:
    it = make(world).services.vcpus[0]
    for index in set(services.MSRS) - set(it.indexes):
        with pytest.raises(GeneralProtection):
            it.msr_read(index)
        with pytest.raises(GeneralProtection):
            it.msr_write(index, 1)
