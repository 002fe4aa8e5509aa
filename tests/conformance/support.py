"""One small machine for all engines: a program in assembly, and what it wrote down before it ended.

A program runs in 64-bit mode at CPL 0 with a GDT, a TSS, an IDT and page tables that are made here.
It keeps a log of 64-bit words (R15 points at its end): what it reports itself, and for each
exception ``FAULT | vector``, the error code, and for a page fault the address. A handler logs and
goes on at the address in R14, at CPL 0, with the exception's frame on the stack; the macros below
set R14. R10 to R15 belong to the macros and handlers.

What an engine can't do by declaration (`Capabilities`) and what a processor does not offer (CPUID,
as a program on that engine sees it) skips a case; so does an instruction that a *software* KVM says
it can't emulate. Everything else that differs from the outcome that the case states is a failure.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from conformance.exclusions import KNOWN
from ringfence import engine as engines
from ringfence.chipset.board import Board
from ringfence.chipset.clock import HostClock
from ringfence.chipset.timekeeping import Timekeeper
from ringfence.cpu import cpuid
from ringfence.cpu.reset import EntryState
from ringfence.cpu.tsc import Tsc
from ringfence.engine import Engine, EngineConfig, StopReason
from ringfence.engine.kvm.verdict import Kind, verdict
from ringfence.images.builtin import assemble
from ringfence.memory.ram import GuestMemory
from ringfence.paravirt.hypercalls import Functions
from ringfence.paravirt.services import MSRS, Paravirtual

RAM = 4 << 20
PAGE = 4096
PML4, PDPT, PD, PT, WINDOW_PT, HIGH_PD = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
"""Page tables: the first 2 MiB map to themselves, the next 2 MiB (the window) are the program's."""
GDT, TSS, IDT = 0x7000, 0x7800, 0x8000
KSTACK, IST1, USTACK = 0xC000, 0xD000, 0xE000
CODE, MAIN, LOG, DATA = 0x10000, 0x11000, 0x40000, 0x60000
STACKS = 0x80000
"""Of vCPUs beside the boot CPU: two pages each, growing down, its log growing up."""
WINDOW = 0x200000
LARGE = 0x400000
"""A 2 MiB page that maps physical 0 on."""
KCODE, KDATA, UDATA, UCODE, TSS_SELECTOR = 0x10, 0x18, 0x23, 0x2B, 0x30
CODE32 = 0x40
FAULT = 0xFA00
SYSTEM_CALL = 0x80
"""A vector that user code may call; its handler goes on at R14 and logs nothing."""
LEAVE = 0x1EA7E
"""R10 where #UD stands for the end of user code (not every KVM passes INT on)."""
POWER_OFF_PORT, POWER_OFF = 0x604, 5 << 10 | 1 << 13
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17, 21)
P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
TIMEOUT = 10.0
FLAT_CODE, FLAT_DATA = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF

MACROS = r"""
.macro report value             # a register to the log
    mov [r15], \value
    lea r15, [r15 + 8]
.endm
.macro mark number              # a constant to the log
    mov qword ptr [r15], \number
    lea r15, [r15 + 8]
.endm
.macro try                      # an exception leads to the next `caught`
    lea r14, [rip + 9f]
.endm
.macro caught
9:  mov rsp, KSTACK
.endm
.macro user flags=2             # what follows runs at CPL 3, up to `kernel`
    lea r14, [rip + 9f]
    lea r11, [rip + 8f]
    push UDATA
    push USTACK
    push \flags
    push UCODE
    push r11
    iretq
8:
.endm
.macro kernel
    mov r10d, LEAVE
    ud2
9:  mov rsp, KSTACK
.endm
.macro gate vector, handler     # another handler for a vector
    lea r11, [rip + \handler]
    mov r12, r11
    mov word ptr [IDT + 16 * \vector], r12w
    shr r12, 16
    mov word ptr [IDT + 16 * \vector + 6], r12w
.endm
"""

RUNTIME = "".join(
    f".org {16 * n}\n"
    + ("jmp r14\n" if n == SYSTEM_CALL else "")
    + ("" if n in WITH_ERROR_CODE else "push 0\n")
    + f"push {n}\njmp handle\n"
    for n in range(256)
) + (
    f".org {MAIN - CODE}\n"
    "jmp program\n"
    "handle:\n"
    "cmp r10, LEAVE\njne 2f\nxor r10d, r10d\njmp r14\n"
    "2: pop r13\npop r12\n"
    f"lea r11, [r13 + {FAULT}]\nmov [r15], r11\nmov [r15 + 8], r12\nlea r15, [r15 + 16]\n"
    "cmp r13, 14\njne 1f\nmov r11, cr2\nmov [r15], r11\nlea r15, [r15 + 8]\n"
    "1: jmp r14\n"
    "finish:\n"
    f"mov dx, {POWER_OFF_PORT}\nmov ax, {POWER_OFF}\nout dx, ax\n1: hlt\njmp 1b\n"
    "program:\n"
)
WEIGHTS = 0x1000
"""A hypercall: a0 + 10 a1 + 100 a2 + 1000 a3."""
CONSTANTS: dict[str, int] = {
    name: value
    for name, value in globals().items()
    if name.isupper()
    and isinstance(value, int)
    and name not in ("RAM", "P", "W", "U", "A", "D", "G")
}


def fault(vector: int, error: int = 0, address: int | None = None) -> list[int]:
    """What an exception leaves in the log."""
    return [FAULT | vector, error, *([] if address is None else [address])]


@dataclass(frozen=True)
class Case:
    """A program and how it ends.

    Attributes
    ----------
    source : str
        Intel-syntax assembly with the macros above; it ends by running into its end.
    log : list[int]
        The log it leaves.
    needs : tuple[str, ...]
        Features, as ``cpu.cpuid`` names them, without which it makes no sense.
    capability : str
        A `Capabilities` attribute that the engine must have.
    memory : Mapping[int, bytes]
        What is in memory at the end, by physical address.
    registers : Mapping[str, int]
        Registers at the end.
    exits : Mapping[str, int]
        How many exits of a kind there were.
    console : bytes
        What came out of the serial port.
    ending : StopReason
        How the run ended.
    """

    source: str
    log: list[int] = field(default_factory=list)
    needs: tuple[str, ...] = ()
    capability: str = ""
    memory: Mapping[int, bytes] = field(default_factory=dict)
    registers: Mapping[str, int] = field(default_factory=dict)
    exits: Mapping[str, int] = field(default_factory=dict)
    console: bytes = b""
    ending: StopReason = StopReason.POWER_OFF


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    ending: StopReason
    log: list[int]
    registers: dict[str, int]
    exits: dict[str, int]
    console: bytes
    report: str
    memory: bytes


def is_software(engine: str) -> bool:
    """Whether guest code under this engine is at the mercy of a software KVM's emulator."""
    return engine == "kvm" and verdict().kind is Kind.SOFTWARE


@functools.cache
def program(source: str) -> bytes:
    """The machine code of a program, to lie at `CODE`."""
    constants = "".join(f".set {name}, {value}\n" for name, value in CONSTANTS.items())
    text = f".intel_syntax noprefix\n{constants}{MACROS}.text\n{RUNTIME}{source}\njmp finish\n"
    return assemble(text)


def run(
    engine: str, source: str, timeout: float = TIMEOUT, rom: bytes = b"", cpus: int = 1
) -> Outcome:
    """Run a program to its end; after ``timeout`` seconds it is asked to stop.

    ``rom`` lies below 4 GiB; the last 2 MiB there are mapped. Further vCPUs begin at the same place
    and time, with their number in RDI, a stack of their own, and R15 at a log that nobody reads.
    """
    memory = GuestMemory(RAM, rom)
    code = program(source)
    assert len(code) <= LOG - CODE
    memory.write(CODE, code)
    _fill(memory)
    console = bytearray()
    ended: list[StopReason] = []
    machine: list[Engine] = []

    def end(reason: StopReason) -> None:
        ended.append(reason)
        machine[0].request_stop()

    time = Timekeeper(HostClock(), Tsc())
    board = Board(
        clock=time.clock,
        tsc=time.tsc,
        memory_size=RAM,
        cpus=cpus,
        console_sink=console.extend,
        on_power_off=lambda: end(StopReason.POWER_OFF),
        on_reset=lambda: end(StopReason.RESET),
    )
    made = engines.create(engine, memory, board, EngineConfig(cpus=cpus))
    machine.append(made)
    functions = Functions()
    functions.add(WEIGHTS, lambda call: sum(10**n * each for n, each in enumerate(call.arguments)))
    kicks = [vcpu.kick for vcpu in made.vcpus]
    paravirtual = Paravirtual(memory, time, board, kicks, functions)
    for vcpu, offers in zip(made.vcpus, paravirtual.vcpus, strict=True):
        vcpu.attach_msrs(MSRS, offers)
        vcpu.attach_services(offers)
    watchdog = threading.Timer(timeout, lambda: end(StopReason.STOPPED))
    try:
        made.set_boot_state(_boot_state())
        made.set_registers({"r15": LOG})
        for n in range(1, cpus):
            made.vcpus[n].set_boot_state(_boot_state())
            where = {"rdi": n, "rsp": STACKS + n * 2 * PAGE, "r15": STACKS + n * 2 * PAGE}
            made.set_registers(where, n)
        watchdog.start()
        board.timers.start()
        reason = made.run()
        board.timers.stop()
        board.flush()
        registers = made.registers()
        words = (registers["r15"] - LOG) // 8
        log = struct.unpack(f"<{words}Q", memory.read(LOG, words * 8)) if 0 < words < 4096 else ()
        return Outcome(
            ended[0] if ended else reason,
            list(log),
            registers,
            {label: each["count"] for label, each in made.stats()["exits"].items()},
            bytes(console),
            made.crash_dump(),
            memory.read(0, RAM),
        )
    finally:
        watchdog.cancel()
        watchdog.join()
        made.close()
        memory.close()


def _boot_state() -> EntryState:
    return EntryState(
        rip=MAIN, rsp=KSTACK, rsi=0, cr3=PML4, cr0=0x80010033, cr4=0x6A0, efer=0xD01,
        gdt_base=GDT, gdt_limit=0x7F, cs=KCODE, ds=KDATA,
    )  # fmt: skip


def _fill(memory: GuestMemory) -> None:
    """Page tables, descriptor tables, the TSS; the program loads IDTR and TR by `START`."""

    def words(address: int, *values: int) -> None:
        memory.write(address, struct.pack(f"<{len(values)}Q", *values))

    words(PML4, PDPT | P | W | U)
    words(PDPT, PD | P | W | U, 0, 0, HIGH_PD | P | W | U)
    words(PD, PT | P | W | U, WINDOW_PT | P | W | U, P | W | U | PS)
    words(PT, *(n * PAGE | P | W | U for n in range(512)))
    for region in (0xFEC00000, 0xFEE00000, 0xFFE00000):
        words(HIGH_PD + (region >> 21 & 511) * 8, region | P | W | PS)
    user_code, user_data = FLAT_CODE | 3 << 45, FLAT_DATA | 3 << 45
    tss = 103 | (TSS & 0xFFFFFF) << 16 | 0x89 << 40
    words(GDT, 0, 0, FLAT_CODE, FLAT_DATA, user_data, user_code, tss, 0, 0x00CF_9B00_0000_FFFF)
    words(TSS + 4, KSTACK)
    words(TSS + 0x24, IST1)
    memory.write(TSS + 0x66, struct.pack("<H", 104))
    for vector in range(256):
        handler = CODE + 16 * vector
        kind = 0xEE00 if vector in (3, 4, SYSTEM_CALL) else 0x8E00
        gate = handler & 0xFFFF | KCODE << 16 | kind << 32 | (handler >> 16) << 48
        words(IDT + 16 * vector, gate, 0)
    memory.write(START_OPERAND, struct.pack("<HQ", 0xFFF, IDT))


START_OPERAND = 0x7F00
START = f"lidt [{START_OPERAND}]\nmov ax, {TSS_SELECTOR}\nltr ax\n"


@functools.cache
def features(engine: str) -> frozenset[str]:
    """Features that CPUID shows to a program under this engine."""
    bits = {**cpuid.MODELLED, **cpuid.FROM_HOST, "XSAVE": cpuid.XSAVE_BIT}
    leaves = sorted({leaf for leaf, _, _ in bits.values()})
    source = "".join(
        f"mov eax, {leaf}\nxor ecx, ecx\ncpuid\nreport rax\nreport rbx\nreport rcx\nreport rdx\n"
        for leaf in leaves
    )
    log = run(engine, source).log
    assert len(log) == 4 * len(leaves)
    found = {leaf: log[4 * n : 4 * n + 4] for n, leaf in enumerate(leaves)}
    return frozenset(
        name for name, (leaf, register, bit) in bits.items() if found[leaf][register] >> bit & 1
    )


def check(engine: str, name: str, case: Case) -> None:
    """Run a case and compare; what this engine or processor declares that it lacks may fail."""
    if case.capability and not getattr(engines.capabilities(engine), case.capability):
        pytest.xfail(f"engine {engine} offers no {case.capability.replace('_', ' ')}")
    missing = [feature for feature in case.needs if feature not in features(engine)]
    if missing:
        pytest.xfail(f"CPUID shows no {', '.join(missing)} under {engine}")
    software = is_software(engine)
    got = run(engine, START + case.source)
    if software and "can't emulate" in got.report:
        pytest.xfail(f"software KVM: {got.report.splitlines()[0]}")
    found = difference(case, got)
    reason = KNOWN.get("software KVM" if software else engine, {}).get(name)
    if reason is not None:
        assert found, f"{name!r} passes under {engine}: take it off the exclusions"
        pytest.xfail(reason)
    assert not found, f"{found}\n{got.report}"


def difference(case: Case, got: Outcome) -> str:
    """What is not as the case says; empty if all is."""
    lines = []

    def compare(what: str, wanted: object, found: object) -> None:
        if wanted != found:
            lines.append(f"{what}: expected {wanted}, got {found}")

    compare("ending", case.ending.value, got.ending.value)
    compare("log", " ".join(map(hex, case.log)), " ".join(map(hex, got.log)))
    for address, data in case.memory.items():
        found = got.memory[address : address + len(data)]
        compare(f"memory at {address:#x}", data.hex(" "), found.hex(" "))
    for name, value in case.registers.items():
        compare(name, hex(value), hex(got.registers[name]))
    for label, count in case.exits.items():
        compare(f"{label} exits", count, got.exits.get(label, 0))
    compare("console", case.console, got.console)
    return "\n".join(lines)
