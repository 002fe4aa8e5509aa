"""All that a machine offers to enlightened guests, as KVM defined it: who owns which register.

`Paravirtual` belongs to a machine and gives each vCPU its registers (`VcpuServices`) and the table
of hypercalls. CPUID announces what there is (`features`), so that guests which don't know of it
never come here.

Source: Linux, Documentation/virt/kvm/x86/cpuid.rst and msr.rst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ringfence.chipset.board import Board
from ringfence.chipset.state import State, check_version
from ringfence.chipset.timekeeping import Timekeeper
from ringfence.cpu.faults import GeneralProtection
from ringfence.errors import ImageError
from ringfence.memory.ram import GuestMemory
from ringfence.paravirt import clock, cpus, steal
from ringfence.paravirt.clock import ParavirtualClock, TimeLine
from ringfence.paravirt.cpus import CpuCalls
from ringfence.paravirt.eoi import FEATURE_PV_EOI, MSR_PV_EOI, PvEoi
from ringfence.paravirt.hypercalls import Functions, Hypercalls
from ringfence.paravirt.steal import FEATURE_STEAL_TIME, MSR_STEAL_TIME, StealTime
from ringfence.paravirt.timecalls import TimeCalls

FEATURE_NOP_IO_DELAY = 1 << 1
"""CPUID 0x40000001 EAX: devices need no pauses between accesses to ports."""
MSRS = range(0x4B564D00, 0x4B564D10)
"""The registers of KVM's services; those that aren't offered raise #GP."""


def features(hypercalls: bool, vcpus: int) -> int:
    """EAX of CPUID 0x40000001, under an engine that hands us hypercalls or doesn't.

    A single vCPU is not promised what several do with hypercalls: it can go on under any engine.
    """
    found = clock.FEATURES | FEATURE_NOP_IO_DELAY | FEATURE_PV_EOI
    if steal.available():
        found |= FEATURE_STEAL_TIME
    return found | (cpus.FEATURES if hypercalls and vcpus > 1 else 0)


class Service(Protocol):
    """What answers for some of the registers, one for each vCPU."""

    def msr_read(self, index: int) -> int:
        """What the guest wrote last."""

    def msr_write(self, index: int, value: int) -> None:
        """Set the service up; GeneralProtection where its structure can't be."""

    def save(self) -> State:
        """See ``chipset.state.Saved``."""

    def restore(self, state: State) -> None:
        """See ``chipset.state.Saved``."""


class VcpuServices:
    """One vCPU's services: the owner of all `MSRS`."""

    VERSION = 1

    def __init__(
        self, number: int, memory: GuestMemory, line: TimeLine, board: Board, table: Hypercalls
    ) -> None:
        self._number = number
        self._table = table
        self.clock = ParavirtualClock(memory, line, line.time.tsc.vcpu(number))
        self.steal = StealTime(memory, steal.available())
        self.eoi = PvEoi(memory, board, number)
        self._services: dict[str, Service] = {
            "clock": self.clock,
            "steal": self.steal,
            "eoi": self.eoi,
        }
        self._owners: dict[int, Service] = {
            **dict.fromkeys(clock.MSRS, self.clock),
            MSR_STEAL_TIME: self.steal,
            MSR_PV_EOI: self.eoi,
        }

    def begin(self) -> None:
        """See ``engine.protocol.Services``."""
        self.steal.begin()

    def helped(self, process: int) -> None:
        """See ``engine.Services``."""
        self.steal.helped(process)

    def end(self) -> None:
        """See ``engine.protocol.Services``."""
        self.steal.end()

    def refresh(self) -> None:
        """See ``engine.protocol.Services``."""
        self.steal.refresh()

    def hypercall(self, cpl: int, number: int, arguments: Sequence[int], bits: int) -> int:
        """See ``engine.protocol.Services``."""
        return self._table.call(self._number, cpl, number, arguments, bits)

    @property
    def indexes(self) -> tuple[int, ...]:
        """The registers that exist."""
        return tuple(self._owners)

    def msr_read(self, index: int) -> int:
        """What the guest wrote last; GeneralProtection if there is no such register."""
        return self._owner(index).msr_read(index)

    def msr_write(self, index: int, value: int) -> None:
        """Set a service up; GeneralProtection where its structure can't be."""
        self._owner(index).msr_write(index, value)

    def save(self) -> State:
        """All services' state as plain data."""
        parts = {name: service.save() for name, service in self._services.items()}
        return {"version": self.VERSION, **parts}

    def restore(self, state: State) -> None:
        """Take over what `save` returned; ImageError where it is of another version or shape."""
        check_version("paravirtual services", state, self.VERSION)
        for name, service in self._services.items():
            if name not in state:
                raise ImageError(f"saved services lack {name!r}: take the snapshot anew")
            service.restore(state[name])

    def _owner(self, index: int) -> Service:
        if index not in self._owners:
            raise GeneralProtection(f"MSR {index:#x} is not offered")
        return self._owners[index]


class Paravirtual:
    """A machine's services.

    Parameters
    ----------
    memory : GuestMemory
        Guest RAM, where the guest's structures are.
    time : Timekeeper
        The machine's time.
    board : Board
        The chipset.
    kicks : sequence of Callable[[], None]
        By vCPU: ends its HLT.
    functions : Functions
        The owner's hypercalls.
    """

    VERSION = 1

    def __init__(
        self,
        memory: GuestMemory,
        time: Timekeeper,
        board: Board,
        kicks: Sequence[Callable[[], None]],
        functions: Functions,
    ) -> None:
        self.line = TimeLine(time)
        self.hypercalls = Hypercalls(memory, functions)
        TimeCalls(time).provide(self.hypercalls)
        CpuCalls(board, kicks).provide(self.hypercalls)
        numbers = range(len(kicks))
        self.vcpus = [
            VcpuServices(number, memory, self.line, board, self.hypercalls) for number in numbers
        ]
        for number in numbers:
            time.tsc.vcpu(number).on_set = self.line.publish
        time.on_resume.append(lambda jumped: self.line.publish(stopped=jumped))

    def stats(self) -> State:
        """Counters: calls by name, and nanoseconds stolen by vCPU."""
        stolen = {str(number): vcpu.steal.stolen for number, vcpu in enumerate(self.vcpus)}
        return {"hypercalls": dict(self.hypercalls.counts), "steal_ns": stolen}

    def save(self) -> State:
        """State as plain data; the machine must be paused."""
        vcpus = [vcpu.save() for vcpu in self.vcpus]
        return {"version": self.VERSION, "line": self.line.save(), "vcpus": vcpus}

    def restore(self, state: State) -> None:
        """Take over what `save` returned; the time must have been restored before.

        Raises
        ------
        ImageError
            The state is of another version or shape, or for another number of vCPUs.
        """
        check_version("paravirtual services", state, self.VERSION)
        vcpus = state.get("vcpus", [])
        if len(vcpus) != len(self.vcpus) or "line" not in state:
            raise ImageError(f"saved paravirtual services are not for {len(self.vcpus)} vCPUs")
        self.line.restore(state["line"])
        for vcpu, saved in zip(self.vcpus, vcpus, strict=True):
            vcpu.restore(saved)
