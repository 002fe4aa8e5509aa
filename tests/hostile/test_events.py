"""Whatever a guest does to itself ends in an event of the architecture, and can be ended."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from engine.harness import (
    HIGH,
    IDT,
    INTERRUPT,
    STACK_TOP,
    TABLES,
    TSS,
    Guest,
    P,
    W,
)
from hostile.support import DONE, MMIO, PAGE, HostileGuest, code
from ringfence.cpu import state
from ringfence.cpu.cpuid import PHYSICAL_BITS
from ringfence.engine import StopReason

AT = 0x4000_0000
UD, DF, GP, PF = state.UD, state.DF, state.GP, state.PF


@pytest.fixture
def gates(guest: HostileGuest) -> Iterator[HostileGuest]:
    """A guest whose IDT and TSS are put back afterwards."""
    saved = guest.memory.read(IDT, 4096), guest.memory.read(TSS, 104)
    yield guest
    guest.memory.write(IDT, saved[0])
    guest.memory.write(TSS, saved[1])


def gate(guest: Guest, vector: int, target: int, ist: int = 0, kind: int = 0xE) -> None:
    """Point a vector somewhere."""
    low = target & 0xFFFF | 8 << 16 | ist << 32 | (0x80 | kind) << 40
    entry = struct.pack("<QQ", low | (target >> 16 & 0xFFFF) << 48, target >> 32)
    guest.memory.write(IDT + 16 * vector, entry)


# --- endless deliveries: nothing of the guest's is executed between two of them ------------------


@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_handler_of_page_faults_is_not_mapped(gates: HostileGuest, kind: int) -> None:
    """#PF whose handler's fetch is a #PF, on a stack of its own: endless, on real CPUs too."""
    gate(gates, PF, 0x5000_0000, ist=1, kind=kind)
    at = gates.page()
    gates.put(at, code("mov eax, [0x50000000]"))
    gates.endless(HIGH + at)


def test_handler_outside_ram(gates: HostileGuest) -> None:
    """#UD whose handler is fetched from a device."""
    gates.map(0x4040_0000, MMIO, P | W)
    gate(gates, UD, 0x4040_0000, ist=1)
    at = gates.page()
    gates.put(at, code("ud2"))
    gates.endless(HIGH + at)


def test_handler_straddles_a_missing_page(gates: HostileGuest) -> None:
    """The handler's first instruction ends in a page that is not there."""
    page = gates.page()
    gates.put(page + PAGE - 2, b"\xb8\x01")
    gates.map(0x4041_0000, page, P | W)
    gates.map(0x4041_1000, 0, 0)
    gate(gates, PF, 0x4041_0000 + PAGE - 2, ist=1)
    at = gates.page()
    gates.put(at, code("mov eax, [0x50000000]"))
    gates.endless(HIGH + at)


@pytest.mark.parametrize(
    "body",
    [
        "ud2",
        "int 3",
        "mov eax, [0x50000000]",
        "mov rax, 0x8000000000000000; mov eax, [rax]",
        "xor eax, eax; div eax",
        ".byte 0xf1",
        "int 0x80",
        "mov cr3, rdi; hlt; cli; hlt",
    ],
)
def test_exception_storm(gates: HostileGuest, body: str) -> None:
    """The handler of everything raises the same again, on one stack."""
    at = gates.page()
    gates.put(at, code(body))
    for vector in (*range(32), 0x80):
        gate(gates, vector, HIGH + at, ist=1)
    gates.endless(HIGH + at, rdi=TABLES)


# --- triple faults ---------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["idt limit", "idt outside", "no tss stack", "gate", "stack"])
@pytest.mark.parametrize("first", ["ud2", "mov eax, [0x50000000]", "int 0x21"])
def test_triple_fault(gates: HostileGuest, first: str, last: str) -> None:
    """However the double fault can't be delivered, the machine ends with a report."""
    at = gates.page()
    gates.put(at, code(first))
    registers = {}
    if last == "idt limit":
        gates.memory.write(IDT, bytes(4096))
    elif last == "idt outside":
        gates.map(0x4042_0000, 0xFF00_0000, P | W)
        registers["idt"] = 0x4042_0000
    elif last == "no tss stack":
        for vector in range(256):
            gate(gates, vector, HIGH + at, ist=2)
        gates.memory.write(TSS + 0x2C, struct.pack("<Q", 0x8000_0000_0000_0000))
    elif last == "gate":
        for vector in range(256):
            gate(gates, vector, 0x8000_0000_0000_0000)
    else:
        for vector in range(256):
            gate(gates, vector, HIGH + at)
        registers["rsp"] = 0x5000_0000
    end = gates.go(HIGH + at, **registers)
    assert end.reason is StopReason.CRASH
    assert "triple fault" in gates.engine.crash_dump()


@pytest.mark.parametrize(
    "cr3", [(1 << PHYSICAL_BITS) - 0x1000, 0xFEE0_0000, 0x100_0000, 0xF_FFFF_F000]
)
def test_page_tables_outside_ram(guest: HostileGuest, cr3: int) -> None:
    """MOV CR3 to a place that is not RAM: the next fetch faults three times over."""
    end = guest.kernel(f"mov rax, {cr3}; mov cr3, rax; nop", rsp=HIGH + STACK_TOP)
    assert end.reason is StopReason.CRASH


@pytest.mark.parametrize("what", ["idt", "gdt", "tss"])
@pytest.mark.parametrize("where", ["device", "beyond", "last byte", "host"])
def test_tables_anywhere(gates: HostileGuest, what: str, where: str) -> None:
    """Descriptor tables in device memory, beyond RAM, at its last byte, at a host address."""
    size = gates.memory.size
    gates.map(0x4043_0000, MMIO, P | W)
    gates.map(0x4044_0000, 0x10_0000_0000, P | W)
    gates.map(0x4045_0000, size - PAGE, P | W)
    gates.map(0x4045_1000, size, P | W)
    place = {
        "device": 0x4043_0000,
        "beyond": 0x4044_0000,
        "last byte": 0x4045_0FFF,
        "host": gates.memory.host_base,
    }[where]
    at = gates.page()
    gates.put(at, code("ud2"))
    gate(gates, UD, HIGH + 0x4000 + 16 * UD, ist=1 if what == "tss" else 0)
    end = gates.go(HIGH + at, **{what: place})
    assert end.reason is StopReason.CRASH or end.trap >= 0


@pytest.mark.parametrize("where", ["device", "beyond", "last byte", "across", "host"])
def test_stack_anywhere(gates: HostileGuest, where: str) -> None:
    """An interrupt frame for a stack that is no RAM vanishes, or is a fault; the VMM lives."""
    size = gates.memory.size
    gates.map(0x4043_0000, MMIO, P | W)
    gates.map(0x4044_0000, 0x10_0000_0000, P | W)
    gates.map(0x4045_0000, size - PAGE, P | W)
    gates.map(0x4045_1000, size, P | W)
    place = {
        "device": 0x4043_0800,
        "beyond": 0x4044_0800,
        "last byte": 0x4045_0FFF,
        "across": 0x4045_1010,
        "host": gates.memory.host_base + 0x1000,
    }[where]
    for source in ("push rax; pop rbx; call 1f; 1: ud2", "enter 64, 5; ud2", "pushfq; popfq; ud2"):
        at = gates.page()
        gates.put(at, code(source))
        end = gates.go(HIGH + at, rsp=place)
        assert end.reason is StopReason.CRASH or end.trap >= -1


# --- fetching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [MMIO, 16 << 20, 0xFEE0_0000, 0xF_FFFF_F000])
@pytest.mark.parametrize("cut", range(1, 10))
def test_instruction_runs_out_of_ram(guest: HostileGuest, second: int, cut: int) -> None:
    """The first bytes in the last page of RAM, the others where none is: they read as ones."""
    page = guest.memory.size - PAGE
    instruction = bytes.fromhex("48b81122334455667788")
    guest.put(page + PAGE - cut, instruction[:cut])
    guest.map(AT, page, P | W)
    guest.map(AT + PAGE, second, P | W)
    end = guest.go(AT + PAGE - cut)
    assert end.trap in (UD, PF)


def test_fetch_from_a_device(guest: HostileGuest) -> None:
    """Jump, call, return and fall into memory that is none."""
    guest.map(AT, MMIO, P | W)
    for source in (f"mov eax, {AT}; jmp rax", f"mov eax, {AT}; call rax", f"push {AT}; ret"):
        assert guest.kernel(source).trap == UD


@pytest.mark.parametrize("room", range(1, 17))
def test_too_long_instruction_at_the_end_of_a_page(guest: HostileGuest, room: int) -> None:
    """Sixteen prefixes and more; the next page is there or not."""
    page, following = guest.page(2), 0
    following = page + PAGE
    guest.put(page + PAGE - room, b"\x66" * 32)
    guest.map(AT, page, P | W)
    for present in (False, True):
        guest.map(AT + PAGE, following, P | W if present else 0)
        end = guest.go(AT + PAGE - room)
        assert end.trap in ((GP, UD) if present or room > 14 else (PF,))


def test_code_up_to_the_last_canonical_address(guest: HostileGuest) -> None:
    """Falling over the edge is a #GP; a split instruction there, too; and around 2^64."""
    page = guest.page()
    for top, trap in ((0x7FFF_FFFF_F000, GP), ((1 << 64) - PAGE, PF)):
        guest.map(top, page, P | W)
        for tail in (b"\x90" * 4, b"\x90\x90\x90\xb8"):
            guest.forget()
            guest.put(page + PAGE - 4, tail)
            end = guest.go(top + PAGE - 4)
            assert end.trap == trap, (hex(top), tail)
        if top >> 63:
            guest.map(0, guest.page(), P | W)
            guest.put(guest.next_free - PAGE, code(f"{DONE}"))
            guest.put(page + PAGE - 4, b"\x90" * 4)
            guest.forget()
            assert guest.go(top + PAGE - 4).trap == -1


# --- single step -------------------------------------------------------------------------------


def test_single_step_storm(gates: HostileGuest) -> None:
    """TF set by a handler that sets it again for every return."""
    handler = gates.page()
    gates.put(handler, code("or dword ptr [rsp + 16], 0x100; iretq"))
    gate(gates, 1, HIGH + handler, ist=1)
    at = gates.page()
    gates.put(at, code("1: inc rax; push rax; pop rbx; call 2f; jmp 1b; 2: ret"))
    gates.endless(HIGH + at, flags=0x100)
    assert gates.view.gpr[0] > 100


# --- devices in the middle of string instructions --------------------------------------------


@pytest.mark.parametrize("name", ["lodsd", "movsd", "stosd"])
def test_interrupt_between_access_and_completion(gates: HostileGuest, name: str) -> None:
    """A handler's own string access to a device does not take the interrupted one's place."""
    gates.map(0x4050_0000, MMIO, P | W)
    gates.map(0x4051_0000, MMIO + PAGE, P | W)
    ram = gates.page()
    gates.map(0x4052_0000, ram, P | W)
    gates.board.mmio.update(dict.fromkeys(range(MMIO, MMIO + 64), 17))
    gates.board.mmio.update(dict.fromkeys(range(MMIO + PAGE, MMIO + PAGE + 64), 34))
    handler = gates.page()
    gates.put(
        handler,
        code(
            """
            push rsi; push rdi; push rax
            mov esi, 0x40510000; mov edi, 0x40520800
            movsd
            mov esi, 0x40520800; mov edi, 0x40510020
            movsd
            mov eax, [0x40520800]
            mov [0x40520900], eax
            pop rax; pop rdi; pop rsi
            iretq
            """
        ),
    )
    gate(gates, INTERRUPT, HIGH + handler)
    at = gates.page()
    source, target = (0x4050_0000, 0x4052_0000) if name != "stosd" else (0, 0x4050_0010)
    gates.put(at, code(f"sti; mov ecx, 4; mov eax, 0x33333333; rep {name}; {DONE}"))
    board = gates.board
    read, write = board.mmio_read, board.mmio_write
    due = [True]

    def interrupt() -> None:
        if due.pop() if due else False:
            board.pending.append(INTERRUPT)
            gates.view.irq_request = gates.view.attention = 1

    def mmio_read(address: int, size: int, cpu: int = 0) -> int:
        interrupt()
        value: int = read(address, size)
        return value

    def mmio_write(address: int, size: int, value: int, cpu: int = 0) -> None:
        interrupt()
        write(address, size, value)

    vars(board).update(mmio_read=mmio_read, mmio_write=mmio_write)
    try:
        end = gates.go(HIGH + at, rsi=source, rdi=target)
    finally:
        del board.mmio_read, board.mmio_write
        gates.view.irq_request = 0
    assert end.trap == -1
    assert gates.memory.read(ram + 0x900, 4) == b"\x22" * 4
    assert (MMIO + PAGE + 0x20, 4, 0x22222222) in board.mmio_writes
    if name == "movsd":
        assert gates.memory.read(ram, 16) == b"\x11" * 16
    elif name == "lodsd":
        assert end.rax & 0xFFFFFFFF == 0x11111111
    else:
        assert [w for w in board.mmio_writes if w[0] < MMIO + PAGE] == [
            (MMIO + 0x10 + 4 * n, 4, 0x33333333) for n in range(4)
        ]
