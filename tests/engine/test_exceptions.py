"""Exceptions: which, where, with what error code, and the state that their handler finds."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from engine.harness import CODE0, CODE3, DATA3, HANDLERS, HIGH, STACK_TOP, Guest, difference
from engine.native import (
    ALIAS,
    CODE,
    DATA,
    NO_TRAP,
    PAGE,
    STATUS_FLAGS,
    Case,
    Oracle,
    Outcome,
    initial_vector,
)
from ringfence.cpu import state

HOLE, READ_ONLY = DATA + 4 * PAGE, DATA + 5 * PAGE
FAR = 0x8000_0000_0000
KERNEL = HIGH + 0x100000
"""The data buffer as supervisors see it."""


def registers(**values: int) -> list[int]:
    """General registers, small numbers where nothing else is said."""
    gpr = [0x1111 * n for n in range(16)]
    gpr[4] = DATA + 2 * PAGE + 0x800
    for name, value in values.items():
        gpr[state.GPR_NAMES.index(name)] = value
    return gpr


def make(guest: Guest, code: str, gpr: list[int] | None = None, **rest: Any) -> Case:
    """A case at a fresh address."""
    body = bytes.fromhex(code.replace(" ", ""))
    return Case(guest.place(len(body) + 16), body, len(body), gpr or registers(), text=code, **rest)


def mxcsr(value: int) -> bytes:
    """Vector state with a control word and 1.0 / 0.0 in XMM0 and XMM1."""
    area = initial_vector()
    struct.pack_into("<I", area, 24, value)
    struct.pack_into("<f", area, 160, 1.0)
    return bytes(area)


def x87(control: int) -> bytes:
    """Vector state with an x87 control word."""
    area = initial_vector()
    struct.pack_into("<H", area, 0, control)
    return bytes(area)


LIKE_HOST: dict[str, tuple[str, dict[str, Any]]] = {
    "divide by zero": ("31c9 f7f1", {}),
    "quotient too large": ("ba05000000 f7f1", {"gpr": registers(rcx=2)}),
    "divide memory, extended register": ("49f731", {"gpr": registers(r9=DATA, rdx=1 << 62)}),
    "idiv of too much": ("48f7f9", {"gpr": registers(rax=1 << 63, rdx=1 << 63, rcx=7)}),
    "ud2": ("90 0f0b", {}),
    "ud2 after flags": ("39c0 0f0b", {}),
    "lock on a register": ("f0 01c8", {}),
    "movaps misaligned": ("0f2801", {"gpr": registers(rcx=DATA + 8)}),
    "movaps misaligned store": ("90 410f2901", {"gpr": registers(r9=DATA + 0x101)}),
    "misaligned operand": ("660ffe01", {"gpr": registers(rcx=DATA + 4)}),
    "vmovdqa misaligned": ("c5fd6f01", {"gpr": registers(rcx=DATA + 16)}),
    "cmpxchg16b misaligned": ("480fc709", {"gpr": registers(rcx=DATA + 8)}),
    "read hole": ("39c0 488b01", {"gpr": registers(rcx=HOLE)}),
    "write hole": ("488901", {"gpr": registers(rcx=HOLE + 8)}),
    "write read-only": ("488901", {"gpr": registers(rcx=READ_ONLY + 8)}),
    "modify read-only": ("48ff01", {"gpr": registers(rcx=READ_ONLY)}),
    "compare-exchange read-only": ("480fb111", {"gpr": registers(rcx=READ_ONLY)}),
    "read read-only": ("488b01", {"gpr": registers(rcx=READ_ONLY + 8)}),
    "jump to data": ("ffe1", {"gpr": registers(rcx=DATA)}),
    "jump to hole": ("ffe1", {"gpr": registers(rcx=HOLE + 5)}),
    "call hole": ("ffd1", {"gpr": registers(rcx=HOLE + 5)}),
    "non-canonical read": ("488b01", {"gpr": registers(rcx=FAR)}),
    "non-canonical by displacement": ("488b4108", {"gpr": registers(rcx=FAR - 8)}),
    "non-canonical on stack": ("488b45f8", {"gpr": registers(rbp=FAR + 16)}),
    "non-canonical push": ("50", {"gpr": registers(rsp=FAR + 16)}),
    "non-canonical pop": ("58", {"gpr": registers(rsp=FAR)}),
    "non-canonical pop to memory": ("8f01", {"gpr": registers(rcx=FAR)}),
    "non-canonical string": ("a4", {"gpr": registers(rsi=FAR, rdi=DATA)}),
    "non-canonical with segment": (
        "64488b01", {"gpr": registers(rcx=0x10010), "fs_base": FAR - 0x10000},
    ),
    "push faults": ("50", {"gpr": registers(rsp=DATA)}),
    "call faults": ("e800000000", {"gpr": registers(rsp=DATA)}),
    "push memory faults": ("ff31", {"gpr": registers(rcx=HOLE)}),
    "pop to hole": ("8f01", {"gpr": registers(rcx=HOLE)}),
    "xmm division by zero": ("0f5ec1", {"vector": mxcsr(0x1D80)}),
    "xmm masked": ("0f5ec1", {"vector": mxcsr(0x1F80)}),
    "xmm memory": ("0f5e01", {"vector": mxcsr(0x1D80), "patches": [(0, bytes(16))],
                              "gpr": registers(rcx=DATA)}),
    "ldmxcsr reserved bit": ("0fae11", {"gpr": registers(rcx=DATA),
                                        "patches": [(0, b"\xff\xff\xff\xff")]}),
    "x87 division by zero": ("d9e8 d9ee def9 9b", {"vector": x87(0x37B)}),
    "x87 waits": ("d9e8 d9ee def9 90 dd01", {"vector": x87(0x37B), "gpr": registers(rcx=DATA)}),
    "int3": ("39c0 cc", {}),
    "leave to hole": ("c9", {"gpr": registers(rbp=HOLE)}),
    "far beyond, 32-bit address": ("67488b01", {"gpr": registers(rcx=HOLE | 5 << 32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_HOST)
def test_like_host(name: str, guest: Guest, oracle: Oracle) -> None:
    """The same exception with the same state as on the host."""
    code, options = LIKE_HOST[name]
    case = make(guest, code, **options)
    want = oracle.run([case])[0]
    assert want is not None
    for cpl in (3, 0):
        if cpl == 0 and "read-only" not in name and want.trap == 14 and want.error & 1:
            continue  # pages that only user code may not reach
        got = guest.run(case, cpl)
        ignore = 0 if want.trap in (NO_TRAP, 0, 3, 6) else STATUS_FLAGS
        if "div" in name or "quotient" in name:
            ignore = STATUS_FLAGS
        assert not difference(want, got, ignore_flags=ignore, user=cpl == 3)


@pytest.mark.parametrize("consumer", ["0f92c2", "7200", "11d8", "9f", "0f42d8"])
@pytest.mark.parametrize("access", ["488b01", "488901", "8f01", "ff31", "a4", "4c8b09", "f3a4"])
def test_live_flags_at_fault(consumer: str, access: str, guest: Guest, oracle: Oracle) -> None:
    """Flags that are still to be read are right in the handler's frame."""
    for left, right in ((1, 2), (2, 1), (5, 5), (1 << 63, 1)):
        gpr = registers(rcx=HOLE, rsi=HOLE, rdi=DATA, rax=left, rdx=right)
        case = make(guest, f"4839d0 {access} {consumer}", gpr)
        want = oracle.run([case])[0]
        assert want is not None
        got = guest.run(case)
        assert want.trap == got.trap == 14
        live = 1 if consumer != "9f" else 0xD5
        assert (want.flags ^ got.flags) & live == 0


def fault(guest: Guest, code: str, cpl: int = 3, gpr: list[int] | None = None) -> Outcome:
    """Run a few bytes and return how they ended."""
    return guest.run(make(guest, code, gpr), cpl)


def test_supervisor_pages(guest: Guest) -> None:
    """User code gets protection faults on supervisor pages, in reads, writes and fetches."""
    for code, error in (("488b01", 5), ("488901", 7), ("ffe1", 0x15)):
        got = fault(guest, code, 3, registers(rcx=KERNEL))
        assert (got.trap, got.error, got.address) == (state.PF, error, KERNEL)
    assert fault(guest, "488b01", 0, registers(rcx=KERNEL)).trap == NO_TRAP


def test_no_execute(guest: Guest) -> None:
    """A fetch from a no-execute page tells so at either privilege level."""
    for cpl, user in ((3, 4), (0, 0)):
        got = fault(guest, "ffe1", cpl, registers(rcx=DATA + 16))
        assert (got.trap, got.error) == (state.PF, 0x11 | user)
        assert got.rip == got.address == DATA + 16


def test_write_protect(guest: Guest) -> None:
    """CR0.WP makes read-only pages read-only for supervisors, and only WP does."""
    got = fault(guest, "488901", 0, registers(rcx=READ_ONLY))
    assert (got.trap, got.error) == (state.PF, 3)


def test_accessed_and_dirty(guest: Guest) -> None:
    """Reads set the accessed bit, writes the dirty bit too; a failed write sets none."""
    accessed, dirty = 0x20, 0x40
    for place, code, bits in (
        (DATA, "488b01", accessed), (DATA, "488901", accessed | dirty),
        (ALIAS, "48ff01", accessed | dirty), (READ_ONLY, "488901", 0), (DATA, "a4", accessed),
    ):  # fmt: skip
        entry = guest.entry(place) & ~(accessed | dirty)
        guest.map(place, entry & ~0xFFF, entry & 0xFFF)
        guest.flush()
        fault(guest, code, 3, registers(rcx=place, rsi=place, rdi=DATA + PAGE))
        assert guest.entry(place) & (accessed | dirty) == bits


def test_dirty_after_read(guest: Guest) -> None:
    """A page that was read first still gets its dirty bit at the first write."""
    entry = guest.entry(DATA) & ~0x60
    guest.map(DATA, entry & ~0xFFF, entry & 0xFFF)
    guest.flush()
    fault(guest, "488b01", 3, registers(rcx=DATA))
    assert guest.entry(DATA) & 0x60 == 0x20
    fault(guest, "488901", 3, registers(rcx=DATA))
    assert guest.entry(DATA) & 0x60 == 0x60


def test_privileged(guest: Guest) -> None:
    """Privileged instructions are #GP(0) at CPL 3."""
    for code in ("f4", "fa", "0f22d8", "0f20c0", "0f01f8", "0f30", "0f32", "0f06", "0f09"):
        if code == "fa":
            continue  # IOPL is 3 here
        got = fault(guest, code)
        assert (got.trap, got.error) == (state.GP, 0), code


def test_software_interrupts(guest: Guest) -> None:
    """INT n goes through a gate that user code may use, or is #GP with the gate's selector."""
    got = fault(guest, "cd80")
    assert got.trap == 0x80
    assert got.rip == guest_next(guest, 2)
    got = fault(guest, "cd81")
    assert (got.trap, got.error) == (state.GP, 0x81 << 3 | 2)


def guest_next(guest: Guest, length: int) -> int:
    """Address behind an instruction of the case placed last."""
    return last_place(guest, length) + length


def last_place(guest: Guest, length: int) -> int:
    """Address of the case placed last."""
    return guest.next_code - (length + 16 + 15 & ~15)


def test_single_step(guest: Guest) -> None:
    """TF traps after each instruction with DR6.BS; the handler sees TF, its own code runs free."""
    # Every trap returns; the sum must come out right although each instruction is stepped.
    case = make(guest, "b80a000000 4801c3 48ffc8 75f8 90", registers(rbx=0))
    got = guest.run(case, step=True)
    assert got.trap == NO_TRAP
    assert got.gpr[3] == 55
    assert guest.view.dr[6] & 1 << 14


def test_system_call(guest: Guest) -> None:
    """SYSCALL and SYSRET: there and back, flags and return address in R11 and RCX."""
    # The handler at LSTAR: mov rbx, rcx; sysretq
    saved = guest.memory.read(HANDLERS + 16 * 0xF0, 16)
    guest.memory.write(HANDLERS + 16 * 0xF0, bytes.fromhex("4889cb480f07"))
    try:
        for cpl in (3,):
            case = make(guest, "39c0 0f05 0f94c2 4c89d8", registers(rdx=0))
            got = guest.run(case, cpl)
            assert got.trap == NO_TRAP
            assert got.gpr[3] == got.gpr[1] == case.address + 4
            assert got.gpr[2] == 1
            assert got.gpr[0] & STATUS_FLAGS == 0x44
    finally:
        guest.engine.translator.flush()
        guest.memory.write(HANDLERS + 16 * 0xF0, saved)


def test_interrupt_return(guest: Guest) -> None:
    """IRETQ to user code with flags and stack of its frame."""
    target = guest.place(32)
    # At the target: setc al, then the end.
    tail = Case(target, bytes.fromhex("0f92c0"), 3, registers())
    guest.run(tail)
    stack = DATA + 2 * PAGE
    frame = struct.pack("<5Q", target, CODE3, 0x3203 | 0x800, DATA + PAGE, DATA3)
    case = make(guest, "48cf", registers(rsp=stack), patches=[(2 * PAGE, frame)])
    got = guest.run(case, 0)
    assert got.trap == NO_TRAP
    assert guest.view.cpl == 3
    assert got.gpr[0] & 0xFF == 1
    assert got.gpr[4] == DATA + PAGE
    assert got.flags & STATUS_FLAGS == 0x801


def test_interrupt_return_within(guest: Guest) -> None:
    """IRETQ at one level; a bad selector is #GP with that selector."""
    target = guest.place(32)
    guest.run(Case(target, b"\x90", 1, registers()), 0)
    stack = DATA + 2 * PAGE
    for selector, trap in ((CODE0, NO_TRAP), (0x77, state.GP)):
        frame = struct.pack("<5Q", target, selector, 0x3002, DATA + PAGE, 0x10)
        case = make(guest, "48cf", registers(rsp=stack), patches=[(2 * PAGE, frame)])
        got = guest.run(case, 0)
        assert got.trap == trap
        if trap == state.GP:
            assert got.error == 0x74
            assert got.gpr[4] == stack


def test_error_frame(guest: Guest) -> None:
    """The frame that a handler finds: error code, RIP, CS, RFLAGS with RF, RSP, SS."""
    case = make(guest, "488b01", registers(rcx=HOLE))
    guest.run(case)
    error, rip, cs, flags, rsp, ss = struct.unpack("<6Q", guest.memory.read(STACK_TOP - 48, 48))
    assert (error, rip, cs, rsp, ss) == (4, case.address, CODE3, case.gpr[4], DATA3)
    assert flags & 0x10000
    assert flags & 0x200


def test_code_across_a_hole(guest: Guest, oracle: Oracle) -> None:
    """An instruction whose last bytes lie in an absent page faults with CR2 at that page."""
    last = CODE + 200 * PAGE
    guest.next_code = max(guest.next_code, last + 2 * PAGE)
    entry = guest.entry(last + PAGE)
    guest.map(last + PAGE, 0, 0)
    guest.flush()
    try:
        for room in range(1, 10):
            address = last + PAGE - room
            # mov rax, imm64
            code = b"\x48\xb8" + bytes(range(8))
            guest.memory.write(address - CODE + 0x200000, code)
            case = Case(address, b"", 0, registers())
            case.code, case.end = code, len(code)
            got = guest.run(case)
            assert (got.trap, got.error) == (state.PF, 0x14)
            assert (got.rip, got.address) == (address, last + PAGE)
    finally:
        guest.map(last + PAGE, entry & ~0xFFF, entry & 0xFFF)
        guest.flush()
        guest.forget()


def test_emulated_faults(guest: Guest, oracle: Oracle) -> None:
    """A gather whose third element faults keeps the first two, and clears their masks."""
    area = initial_vector()
    for n, index in enumerate((0, 8, 4 * PAGE, 4)):
        struct.pack_into("<i", area, 160 + 4 * n, index)
    area[160 + 16 : 160 + 32] = b"\xff" * 16
    case = make(
        guest, "c4e271901401", registers(rcx=DATA), vector=bytes(area)
    )  # vpgatherdd xmm2, [rcx+xmm0], xmm1
    want = oracle.run([case])[0]
    assert want is not None
    got = guest.run(case)
    assert not difference(want, got, ignore_flags=STATUS_FLAGS)
    assert got.trap == state.PF
