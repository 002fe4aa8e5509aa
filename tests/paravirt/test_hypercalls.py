"""The table of hypercalls: whom it answers, what it lets them copy, and what it refuses."""

from __future__ import annotations

import random
import struct
import time

import pytest

from paravirt.support import CPUS, RAM, Guest
from ringfence.chipset.timekeeping import PauseClock
from ringfence.cpu.tsc import MASK64
from ringfence.errors import UsageError
from ringfence.paravirt import hypercalls
from ringfence.paravirt.hypercalls import Call, Error, HypercallError, Number

# --- who is answered ----------------------------------------------------------------------------


def test_unknown_numbers_and_user_mode(guest: Guest) -> None:
    guest.functions.add(0x1000, lambda call: 42)
    assert guest.call(0x1000) == 42
    assert guest.call(Number.VAPIC_POLL_IRQ) == 0
    for number in (0, 2, 3, 4, 6, 7, 8, 12, 0x1001, 0x5246_0001, MASK64):
        assert guest.call(number) == -Error.ENOSYS
    for cpl in (1, 2, 3):
        for number in (0x1000, Number.SEND_IPI, 77):
            assert guest.call(number, 1, 0, 0, 0x41, cpl=cpl) == -Error.EPERM
    assert guest.requests(0) == 0
    counts = guest.services.hypercalls.counts
    assert counts == {"0x1000": 1, "vapic_poll_irq": 1, "unknown": 11, "from user mode": 9}


def test_numbers_that_owners_may_take(guest: Guest) -> None:
    guest.functions.add(0xFFFF, lambda call: None)
    assert guest.call(0xFFFF) == 0
    for number in (0xFFFF, 0xFFF, 0x10000, 5, -1, Number.PAUSE_CLOCK):
        with pytest.raises(UsageError, match="hypercall"):
            guest.functions.add(number, lambda call: None)


def test_errors_of_functions(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(call: Call) -> int:
        raise HypercallError(Error.EBUSY)

    def fail(call: Call) -> int:
        raise KeyError("a bug of the owner's")

    guest.functions.add(0x1000, refuse)
    guest.functions.add(0x1001, fail)
    guest.functions.add(0x1002, lambda call: -5)
    assert guest.call(0x1000) == -Error.EBUSY
    assert [guest.call(0x1001) for _ in range(100)] == [-Error.EINVAL] * 100
    assert guest.call(0x1002) == -5
    said = capsys.readouterr().err
    assert said.count("shown once") == 1
    assert isinstance(guest.functions.failed[0x1001], KeyError)


# --- copies -------------------------------------------------------------------------------------


def test_copies(guest: Guest) -> None:
    seen: list[int] = []
    guest.memory.watch_dma(lambda at, length: seen.append(at))

    def swap(call: Call) -> int:
        source, target, length, _ = call.arguments
        call.write(target, call.read(source, length)[::-1])
        return length

    guest.functions.add(0x1000, swap)
    guest.memory.write(0x5000, b"a hypercall")
    assert guest.call(0x1000, 0x5000, 0x6FFA, 11) == 11
    assert guest.memory.read(0x6FFA, 11) == b"llacrepyh a"
    assert seen == [0x6FFA]
    assert guest.call(0x1000, RAM - 1, 0x6000, 1) == 1


BAD = [
    (RAM, 1), (RAM - 1, 2), (0xFEE00000, 4), (MASK64, 1), (MASK64 - 7, 16), (1 << 63, 8),
    (0x1000, hypercalls.COPY_MAX + 1), (0x1000, MASK64), (RAM - 8, 1 << 63), (3 << 30, 4),
]  # fmt: skip


@pytest.mark.parametrize(("address", "length"), BAD)
def test_bad_addresses_and_lengths(guest: Guest, address: int, length: int) -> None:
    before = guest.memory.read(0, RAM)
    what = Error.E2BIG if length > hypercalls.COPY_MAX else Error.EFAULT
    guest.functions.add(0x1000, lambda call: len(call.read(address, length)))
    guest.functions.add(0x1002, lambda call: len(call.handle(address, "B", length)))
    guest.functions.add(0x1003, lambda call: len(call.read_segments(0x100, 1)))
    guest.memory.write(0x100, struct.pack("<QQ", address, length))
    for number in (0x1000, 0x1002, 0x1003):
        assert guest.call(number) == -what
    if length <= hypercalls.COPY_MAX:
        guest.functions.add(0x1001, lambda call: call.write(address, bytes(length)))
        assert guest.call(0x1001) == -what
    guest.memory.write(0x100, bytes(16))
    assert guest.memory.read(0, RAM) == before


def test_all_copies_of_a_call_are_counted(guest: Guest) -> None:
    def greedy(call: Call) -> int:
        for _ in range(17):
            call.read(0, hypercalls.COPY_MAX // 16)
        return 0

    guest.functions.add(0x1000, greedy)
    assert guest.call(0x1000) == -Error.E2BIG


def test_handles(guest: Guest) -> None:
    guest.memory.write(0x3FF8, struct.pack("<4I", 1, 2, 3, 4))

    def scale(call: Call) -> int:
        handle = call.handle(call.arguments[0], "<II", call.arguments[1])
        assert len(handle) == 2
        total = sum(first * second for first, second in handle)
        handle[1] = (handle[0][1] * 10, 0xFFFFFFFF)
        with pytest.raises(IndexError):
            handle[2]
        with pytest.raises(IndexError):
            handle[-1] = (0, 0)
        return total

    guest.functions.add(0x1000, scale)
    assert guest.call(0x1000, 0x3FF8, 2) == 14
    assert guest.memory.read(0x3FF8, 16) == struct.pack("<4I", 1, 2, 20, 0xFFFFFFFF)
    guest.functions.add(0x1001, lambda call: call.handle(0x4000, "<Q", 2).write(bytes(17)))
    guest.functions.add(0x1002, lambda call: call.handle(0x4000, "<Q", 2).write(b"x" * 16))
    assert guest.call(0x1001) == -Error.EFAULT
    assert guest.call(0x1002) == 0
    assert guest.memory.read(0x4000, 17) == b"x" * 16 + b"\0"


def test_what_was_copied_stays(guest: Guest) -> None:
    """Another CPU that changes the memory between check and use changes nothing."""

    def careful(call: Call) -> int:
        ((length,),) = call.handle(0x100, "<Q")
        assert length == 8
        guest.memory.write(0x100, struct.pack("<Q", MASK64))
        return len(call.read(0x200, length))

    guest.memory.write(0x100, struct.pack("<Q", 8))
    guest.functions.add(0x1000, careful)
    assert guest.call(0x1000) == 8


def test_segments(guest: Guest) -> None:
    guest.functions.add(0x1000, lambda call: sum(call.read_segments(*call.arguments[:2])))
    guest.memory.write(0x2000, struct.pack("<6Q", 0x5000, 3, 0x7FFE, 4, RAM - 1, 1))
    for at, value in ((0x5000, 1), (0x7FFE, 10), (0x8001, 100), (RAM - 1, 7)):
        guest.memory.write(at, bytes([value]))
    assert guest.call(0x1000, 0x2000, 3) == 118
    assert guest.call(0x1000, 0x2000, 0) == 0
    assert guest.call(0x1000, 0x2000, 257) == guest.call(0x1000, 0x2000, MASK64) == -Error.E2BIG


# --- KVM's ----------------------------------------------------------------------------------------


def test_interrupts_to_many(guest: Guest) -> None:
    assert guest.call(Number.SEND_IPI, 0b1010, 0, 0, 0x41) == 2
    assert [guest.requests(cpu) for cpu in range(CPUS)] == [0, 1 << 0x41, 0, 1 << 0x41]
    assert guest.call(Number.SEND_IPI, 0b1, 0, 2, 0x42) == 1
    assert guest.requests(2) == 1 << 0x42
    # CPUs that don't exist, high words, and nobody at all.
    assert guest.call(Number.SEND_IPI, MASK64, MASK64, 3, 0x43) == 1
    assert guest.call(Number.SEND_IPI, MASK64, MASK64, MASK64, 0x43) == 0
    assert guest.call(Number.SEND_IPI, 0, 1, 0, 0x44) == 0
    assert guest.call(Number.SEND_IPI, 0, 0, 0, 0x44) == 0
    assert guest.call(Number.SEND_IPI, 0xF, 0, 0, 0x400) == CPUS
    assert guest.signals == [(cpu, "NMI") for cpu in range(CPUS)]
    for icr in (0x40041, 0x80041, 0x541, 0x600, 0x200, 0x700):
        assert guest.call(Number.SEND_IPI, 1, 0, 0, icr) == -Error.EINVAL
    assert guest.call(Number.SEND_IPI, 1, 0, 0, 0x0F) == 0


def test_kicks_and_yields(guest: Guest) -> None:
    for cpu in (2, 0, CPUS, MASK64):
        assert guest.call(Number.KICK_CPU, 0, cpu) == 0
        assert guest.call(Number.SCHED_YIELD, cpu) == 0
    assert guest.kicked == [2, 0]


def test_clock_pairing(guest: Guest) -> None:
    before = time.time_ns(), guest.time.tsc.read()
    assert guest.call(Number.CLOCK_PAIRING, 0x2FF0, 0) == 0
    after = time.time_ns(), guest.time.tsc.read()
    seconds, ns, ticks, flags = struct.unpack("<QQQI36x", guest.memory.read(0x2FF0, 64))
    assert before[0] <= seconds * 10**9 + ns <= after[0]
    assert before[1] <= ticks <= after[1]
    assert flags == 0
    assert guest.call(Number.CLOCK_PAIRING, 0x2000, 1) == -Error.EOPNOTSUPP
    for address in (RAM - 63, 0xFEE00000, MASK64):
        assert guest.call(Number.CLOCK_PAIRING, address, 0) == -Error.EFAULT


def test_the_guest_chooses_what_a_pause_does(guest: Guest) -> None:
    assert guest.call(Number.PAUSE_CLOCK, 2) == 0
    assert guest.call(Number.PAUSE_CLOCK, 1) == 0
    assert guest.time.policy is PauseClock.RUN
    assert guest.call(Number.PAUSE_CLOCK, 0) == 1
    assert guest.time.policy is PauseClock.STOP
    for wrong in (3, MASK64):
        assert guest.call(Number.PAUSE_CLOCK, wrong) == -Error.EINVAL


@pytest.mark.parametrize("seed", range(4))
def test_anything_at_all(guest: Guest, seed: int) -> None:
    """Random numbers and arguments: an error or a result, nothing beyond RAM, nothing raised."""
    source = random.Random(seed)
    guest.functions.add(
        0x1000, lambda call: call.write(call.arguments[0], call.read(*call.arguments[1:3]))
    )
    guest.functions.add(0x1001, lambda call: sum(call.read_segments(*call.arguments[:2])))
    numbers = [*Number, 0x1000, 0x1001]

    def value() -> int:
        return source.choice(
            [source.getrandbits(64), source.getrandbits(22), source.getrandbits(5), RAM - 8]
        )

    for _ in range(3000):
        number = source.choice(numbers) if source.random() < 0.9 else value()
        guest.call(number, *(value() for _ in range(4)), bits=source.choice([32, 64]))
    assert not guest.functions.failed
