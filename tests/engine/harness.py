"""A tiny machine that runs one snippet after the other under the binary-translation engine.

The snippet's linear address space is that of ``native``: the data buffer, its alias, the code. All
else (page tables, descriptor tables, handlers) lies in the top 2 GiB, out of user code's reach.
Every exception vector leads to a handler that tells the board and so ends the run; a snippet that
comes to its end does the same by another port.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from pathlib import Path
from typing import Any

from iced_x86 import Decoder, Mnemonic, RflagsBits

from engine.native import (
    ALIAS,
    CODE,
    CODE_BYTES,
    CODE_PAGES,
    COMPONENTS,
    DATA,
    DATA_BYTES,
    DIRECTION,
    END_BYTES,
    LDT,
    NO_TRAP,
    PAGE,
    PAGES,
    PATTERN,
    RO,
    RW,
    STATUS_FLAGS,
    XSAVE_BYTES,
    Case,
    Outcome,
    initial_vector,
    normal_vector,
)
from ringfence.chipset.board import GatheredPorts
from ringfence.cpu import state
from ringfence.cpu.faults import GeneralProtection
from ringfence.cpu.reset import EntryState
from ringfence.cpu.tsc import Tsc
from ringfence.engine import EngineConfig
from ringfence.engine.translate import natives
from ringfence.engine.translate.engine import TranslateEngine
from ringfence.memory.ram import GuestMemory
from ringfence.memory.registers import RegisterMap
from ringfence.memory.summons import Summons

RAM = 16 << 20
GDT, LDT_AT, IDT, TSS, HANDLERS, STACK_TOP = 0x1000, 0x1800, 0x2000, 0x3000, 0x4000, 0x8000
TABLES = 0x10000
DATA_AT, CODE_AT = 0x100000, 0x200000
"""Guest-physical places."""
HIGH = 0xFFFFFFFF80000000
"""Linear address of guest-physical 0, for supervisors."""
HIGH_CODE = HIGH + CODE_AT
HIGH_DATA = DATA - CODE + HIGH_CODE
"""The data as RIP-relative operands of the alias reach it: outside the top 2 GiB."""
END_PORT, FAULT_PORT = 0xF4, 0xF5
END_GUEST = bytes((0xE6, END_PORT)) + b"\x9f\x0f\x90\xc0\xf4"
"""OUT; what follows is never executed but reads all status flags, so that they count as live."""
assert len(END_GUEST) == END_BYTES
CODE0, DATA0, CODE32, DATA3, CODE3 = 0x08, 0x10, 0x20 | 3, 0x28 | 3, 0x30 | 3
"""Selectors; those of user code are Linux's, as snippets of 32-bit code have them inside."""
P, W, U, G, NX, LARGE, ACCESSED, DIRTY = 1, 2, 4, 0x100, 1 << 63, 0x80, 0x20, 0x40
STEP, INTERRUPT = 1, 0x40
"""Vectors whose handlers just return."""
ERROR_CODES = (8, 10, 11, 12, 13, 14, 17)
TIMEOUT = 5.0


HARDWARE_BITS = {
    RflagsBits.OF: 0x800, RflagsBits.SF: 0x80, RflagsBits.ZF: 0x40, RflagsBits.AF: 0x10,
    RflagsBits.CF: 0x01, RflagsBits.PF: 0x04,
}  # fmt: skip
"""Where the flags that iced-x86 names are in RFLAGS."""


class Stuck(Exception):
    """A snippet did not come to an end."""


class Board:
    """As much of a chipset as the engine asks for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tsc = Tsc()
        self.gathered = GatheredPorts(0x3F8, 0x3FD)
        self.summons = Summons()
        self.engine: TranslateEngine
        self.last = -1
        self.pending: list[int] = []
        self.taken_at = 0
        self.mmio: dict[int, int] = {}
        self.mmio_writes: list[tuple[int, int, int]] = []
        self.registers = RegisterMap()

    def settle(self) -> None:
        """No device has anything left to do."""

    def on_input(self) -> None:
        """Nobody types."""

    def quiet_status(self) -> None:
        """Every access matters here."""

    def idle(self) -> None:
        """Nothing was put off."""

    def await_done(self, door: int) -> bool:
        """Nothing will be."""
        del door
        return False

    def collect(self) -> None:
        """Nothing is done beside the vCPU."""

    def set_wake(self, cpu: int, wake: Any) -> None:
        """Nobody wakes this CPU."""

    def port_read(self, port: int, size: int) -> int:
        """Reads give the port's number back."""
        return port * 0x01010101 & (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        """The two ports that end a run."""
        if port in (END_PORT, FAULT_PORT):
            self.last = port
            self.engine.view.begun_flags = 0  # a program that steps ends without a step behind OUT
            self.engine.request_pause()

    def mmio_read(self, address: int, size: int, cpu: int = 0) -> int:
        """Device memory is a dictionary of bytes."""
        return int.from_bytes(bytes(self.mmio.get(address + n, 0) for n in range(size)), "little")

    def mmio_write(self, address: int, size: int, value: int, cpu: int = 0) -> None:
        """Writes are recorded."""
        self.mmio_writes.append((address, size, value))
        for n in range(size):
            self.mmio[address + n] = value >> 8 * n & 0xFF

    def msr_read(self, cpu: int, index: int) -> int:
        """No register beyond the CPU's own."""
        raise GeneralProtection

    def msr_write(self, cpu: int, index: int, value: int) -> None:
        """No register beyond the CPU's own."""
        raise GeneralProtection

    def interrupt_pending(self, cpu: int) -> bool:
        """Whether a test has queued a vector."""
        return bool(self.pending)

    def next_interrupt(self, cpu: int, *, allowed: bool) -> tuple[int, bool]:
        """The same, and take it."""
        vector = self.acknowledge(cpu) if self.pending and allowed else -1
        return vector, bool(self.pending)

    def acknowledge(self, cpu: int) -> int:
        """Take the queued vector; not twice at one place, or nothing else would ever run."""
        view = self.engine.view
        if view.rip == self.taken_at:
            self.taken_at = 0
            view.interrupt_shadow = 1
            return -1
        self.taken_at = view.rip
        return self.pending.pop()

    def read_cr8(self, cpu: int) -> int:
        """The task priority is always 0."""
        return 0

    def write_cr8(self, cpu: int, value: int) -> None:
        """Ignored."""


class Guest:
    """The machine; ``run`` takes a ``Case`` to its ``Outcome``."""

    def __init__(self, cache: Path | None = None, answers: Path | None = None) -> None:
        """``cache`` is the folder of compiled helpers, ``answers`` that of what is known."""
        self.memory = GuestMemory(RAM)
        self.board = Board()
        self.next_table = TABLES
        self._fill_memory()
        load = natives.load
        natives.load = lambda folder: load(cache)  # the compiled helpers, not translations
        try:
            self.engine = TranslateEngine(self.memory, self.board, EngineConfig(cache_dir=answers))
        finally:
            natives.load = load
        self.board.engine = self.engine
        self.view = self.engine.view
        self.block = self.engine.block
        self.templates = {cpl: self._template(cpl) for cpl in (0, 3)}
        self.data = self.memory.view[DATA_AT : DATA_AT + DATA_BYTES]
        self.next_code = CODE
        self.deadline = 0.0
        self.closed = False
        threading.Thread(target=self._watch, daemon=True).start()

    # --- building the machine ------------------------------------------------------------------

    def _entry(self, address: int, level: int) -> int:
        """Physical place of the entry for an address at a level (1 is the last), tables made."""
        table = TABLES
        for at in (4, 3, 2, 1):
            place = table + (address >> 12 + 9 * (at - 1) & 511) * 8
            if at == level:
                return place
            entry = struct.unpack("<Q", self.memory.read(place, 8))[0]
            if not entry & P:
                self.next_table += PAGE
                entry = self.next_table | P | W | U
                self.memory.write(place, struct.pack("<Q", entry))
            table = entry & 0x000F_FFFF_FFFF_F000
        raise AssertionError

    def map(self, address: int, physical: int, bits: int, level: int = 1) -> None:
        """Set one page table entry (no flush of the TLB)."""
        self.memory.write(self._entry(address, level), struct.pack("<Q", physical | bits))

    def entry(self, address: int, level: int = 1) -> int:
        """A page table entry's value."""
        value: int = struct.unpack("<Q", self.memory.read(self._entry(address, level), 8))[0]
        return value

    def flush(self) -> None:
        """Drop the TLBs after a change to the page tables."""
        self.engine.library.function("tlb_flush_all", 1)(self.block)

    def _fill_memory(self) -> None:
        for n, kind in enumerate(PAGES):
            bits = {RW: P | W | U, RO: P | U}.get(kind, 0)
            for base in (DATA, ALIAS):
                self.map(base + n * PAGE, DATA_AT + n * PAGE, bits | NX if bits else 0)
                self.map(HIGH_DATA + n * PAGE, DATA_AT + n * PAGE, bits & ~U | NX if bits else 0)
        for n in range(CODE_PAGES):
            self.map(CODE + n * PAGE, CODE_AT + n * PAGE, P | W | U)
        for n in range(RAM >> 21):
            self.map(HIGH + (n << 21), n << 21, P | W | LARGE, 2)
        gdt = (
            0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0,
            0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF,
        )  # fmt: skip
        self.memory.write(GDT, struct.pack("<7Q", *gdt))
        for number, (base, limit, access) in enumerate(LDT):
            entry = struct.pack(
                "<HHBBBB", limit, base & 0xFFFF, base >> 16 & 0xFF, access, 0, base >> 24
            )
            self.memory.write(LDT_AT + 8 * number, entry)
        for vector in range(256):
            handler = HIGH + HANDLERS + 16 * vector
            kind = 0xEE00 if vector in (3, 4, 0x80) else 0x8E00
            gate = struct.pack(
                "<HHHHII", handler & 0xFFFF, CODE0, kind | 1, handler >> 16 & 0xFFFF,
                handler >> 32, 0,
            )  # fmt: skip
            self.memory.write(IDT + 16 * vector, gate)
            self.memory.write(HANDLERS + 16 * vector, bytes((0xE6, FAULT_PORT, 0xEB, 0xFC)))
        for vector in (STEP, INTERRUPT):
            self.memory.write(HANDLERS + 16 * vector, b"\x48\xcf")  # iretq
        tss = bytearray(104)
        for at in (4, 0x24):  # RSP0, IST1
            struct.pack_into("<Q", tss, at, HIGH + STACK_TOP)
        self.memory.write(TSS, tss)

    def _template(self, cpl: int) -> bytes:
        """The bytes of ``Cpu`` at the start of a snippet, but for what a case sets."""
        view = self.view
        boot = EntryState(
            rip=CODE, cr0=0x80050033, cr3=TABLES, cr4=0x506A0, efer=0xD01,
            rsp=0, rsi=0, gdt_base=HIGH + GDT, gdt_limit=55, cs=CODE0, ds=DATA0,
        )  # fmt: skip
        self.engine.set_boot_state(boot)
        view.xcr0 = COMPONENTS
        view.idtr_base, view.idtr_limit = HIGH + IDT, 4095
        view.seg_selector[state.TR] = 0x38
        view.seg_base[state.TR] = HIGH + TSS
        view.seg_limit[state.TR] = 103
        view.seg_attr[state.TR] = state.ATTR_P | 0xB
        view.seg_selector[state.LDTR] = 0x48
        view.seg_base[state.LDTR], view.seg_limit[state.LDTR] = HIGH + LDT_AT, 8 * len(LDT) - 1
        view.star = CODE32 << 48 | CODE0 << 32
        view.lstar = HIGH + HANDLERS + 16 * 0xF0
        view.sfmask = 0x47700
        if cpl:
            view.cpl = 3
            for segment in range(6):
                code = segment == state.CS
                view.seg_selector[segment] = CODE3 if code else DATA3
                view.seg_attr[segment] |= 3 << state.ATTR_DPL_SHIFT
        end = type(self).state_end()
        return ctypes.string_at(self.block, end)

    @staticmethod
    def state_end() -> int:
        """Bytes of ``Cpu`` that a case starts afresh."""
        return natives.block.Vcpu.offset_of("exc_vector")

    def _count_as_code(self, lines: int) -> None:
        """Have these lines of all data pages count as translated code; 0 for none."""
        for n in range(len(PAGES)):
            at = ((DATA_AT >> 12) + n) * 8
            ctypes.c_uint64.from_address(self.view.code_lines + at).value = lines
            ctypes.c_uint64.from_address(self.view.page_use + at).value = int(lines != 0)
        self.flush()

    # --- running -------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self.closed:
            time.sleep(0.3)
            if self.deadline and time.monotonic() > self.deadline:
                self.engine.request_pause()

    def place(self, length: int, *, crossing: int = 0, high: bool = False) -> int:
        """A fresh code address; ``crossing`` bytes before the end of a page if not 0."""
        at = self.next_code
        if crossing:
            at = (at + crossing + PAGE - 1) // PAGE * PAGE - crossing
        elif at % PAGE + length > PAGE:
            at = (at + PAGE - 1) // PAGE * PAGE
        if at + length + PAGE > CODE + CODE_BYTES:
            self.forget()
            return self.place(length, crossing=crossing, high=high)
        self.next_code = (at + length + 16) & ~15
        return at

    @staticmethod
    def code_end() -> int:
        """Where the area for code ends."""
        return CODE + CODE_BYTES

    def forget(self) -> None:
        """Drop all translations and hand out code addresses from the start again."""
        self.engine.translator.flush()
        self.view.stale_code = 0
        self.next_code = CODE

    def write_code(self, address: int, data: bytes) -> None:
        """Store code as the guest itself would, so that translations of the place are dropped."""
        write = self.engine._linear_write
        for at in range(0, len(data), 8):
            part = data[at : at + 8]
            status = write(self.block, address + at, len(part), int.from_bytes(part, "little"), 0)
            assert status == 0

    def run(
        self,
        case: Case,
        cpl: int = 3,
        *,
        rewrite: bool = False,
        high: bool = False,
        interrupts: int = 0,
        step: bool = False,
        demand: bool = False,
        slow: bool = False,
    ) -> Outcome:
        """Run one case.

        ``rewrite``: the place may hold translated code. ``high``: run the snippet's alias in the
        top 2 GiB (CPL 0), where code addresses fit 32 bits. ``interrupts``: so many interrupts
        are pending, to be taken wherever they can. ``step``: with TF set, #DB's handler just
        returns. ``demand``: data pages are mapped when they fault. ``slow``: the data pages
        count as translated code, so that writes take the slow path.
        """
        view = self.view
        self.data[:] = PATTERN
        for offset, data in case.patches:
            self.data[offset : offset + len(data)] = data
        start = bytes(self.data)
        ctypes.memmove(self.block, self.templates[cpl], len(self.templates[cpl]))
        code = case.code[: case.end] + END_GUEST + case.code[case.end + END_BYTES :]
        view.exc_vector = view.delivering = state.NO_EXCEPTION
        if rewrite:
            self.write_code(case.address, code)
        else:
            self.memory.write(case.address - CODE + CODE_AT, code)
        gpr_at = self.block + natives.block.Vcpu.offset_of("gpr")
        ctypes.memmove(gpr_at, struct.pack("<16Q", *case.gpr), 128)
        ctypes.memmove(
            self.block + natives.block.Vcpu.offset_of("xsave"),
            case.vector or bytes(initial_vector()),
            XSAVE_BYTES,
        )
        view.status = case.flags & STATUS_FLAGS
        view.flag_df = case.flags >> 10 & 1
        view.flag_if = case.flags >> 9 & 1
        view.other_flags = 0x3000 | case.flags & state.OTHER_FLAGS | (state.FLAG_TF if step else 0)
        view.seg_base[state.FS] = case.fs_base
        view.seg_base[state.GS] = case.gs_base
        self.engine._mode_changed(self.block)
        rip = case.address - CODE + HIGH_CODE if high else case.address
        self.engine.set_registers({"rip": rip})
        self.board.pending[:] = [INTERRUPT] * interrupts
        self.board.taken_at = 0
        if interrupts:
            view.irq_request = view.attention = 1
        if slow:
            self._count_as_code(0xFFFFFFFFFFFFFFFF)
        missing = self._unmap() if demand else {}
        self._go()
        while missing and self.board.last == FAULT_PORT:
            if not self._fetch(missing):
                break
            self._go()
        outcome = self._outcome(case, start, high)
        self.board.pending.clear()
        view.irq_request = 0
        if slow:
            self._count_as_code(0)
        for page, entry in missing.items():
            self.map(page, entry & ~0xFFF, entry & 0xFFF)
        if missing:
            self.flush()
        return outcome

    def _go(self) -> None:
        """Run until the snippet or a handler says so."""
        self.board.last = -1
        self.deadline = time.monotonic() + TIMEOUT
        self.engine.run()
        self.deadline = 0.0

    def _unmap(self) -> dict[int, int]:
        """Take the present data pages away; what their entries were."""
        taken = {}
        for n, kind in enumerate(PAGES):
            for base in (DATA, ALIAS):
                if kind == RW:
                    taken[base + n * PAGE] = self.entry(base + n * PAGE)
                    self.map(base + n * PAGE, 0, 0)
        self.flush()
        return taken

    def _fetch(self, missing: dict[int, int]) -> bool:
        """Map the page that faulted and return from the exception, as an operating system does."""
        view = self.view
        vector = (view.rip - HIGH - HANDLERS) >> 4
        entry = missing.pop(view.cr2 & ~0xFFF, None)
        if vector != state.PF or entry is None:
            return False
        self.map(view.cr2 & ~0xFFF, entry & ~0xFFF, entry & 0xFFF)
        self.flush()
        self.memory.write(HANDLERS + 0xFF0, b"\x48\x83\xc4\x08\x48\xcf")  # add rsp, 8; iretq
        self.engine.set_registers({"rip": HIGH + HANDLERS + 0xFF0})
        return True

    def _outcome(self, case: Case, start: bytes, high: bool) -> Outcome:
        view = self.view
        gpr = list(struct.unpack("<16Q", ctypes.string_at(
            self.block + natives.block.Vcpu.offset_of("gpr"), 128)))  # fmt: skip
        area = ctypes.string_at(self.block + natives.block.Vcpu.offset_of("xsave"), XSAVE_BYTES)
        end = bytes(self.data)
        outcome = Outcome((), 0, normal_vector(area), b"" if end == start else end)
        flags = view.status & STATUS_FLAGS | view.flag_df << 10
        if self.board.last == FAULT_PORT:
            # The OUT at the handler's start has been carried out.
            outcome.trap = (view.rip - HIGH - HANDLERS) >> 4
            size = 48 if outcome.trap in ERROR_CODES else 40
            frame = struct.unpack(f"<{size // 8}Q", self.memory.read(STACK_TOP - size, size))
            if size == 48:
                outcome.error = frame[0]
            outcome.rip, _, flags, gpr[4], _ = frame[-5:]
            if high:
                outcome.rip += CODE - HIGH_CODE
            outcome.address = view.cr2 if outcome.trap == 14 else 0
        elif self.board.last != END_PORT:
            raise Stuck(f"{case.text}: no end, rip={view.rip:#x} crash: {self.engine._crash}")
        outcome.gpr = tuple(gpr)
        outcome.flags = flags & (STATUS_FLAGS | DIRECTION)
        return outcome

    def close(self) -> None:
        """Free the machine."""
        self.closed = True
        self.data.release()
        self.engine.close()
        self.memory.close()


FIELDS = {
    "xcw/xsw/xtw": (5, 5), "mxcsr": (4, 4), "x87": (80, 10), "xmm": (256, 16), "ymm": (256, 16),
    "k": (64, 8), "zmm-high": (512, 32), "zmm16+": (1024, 64),
}  # fmt: skip
"""Parts of ``Outcome.vector``: bytes of all, and of one register."""


def difference(
    want: Outcome, got: Outcome, *, ignore_flags: int = 0, user: bool = True
) -> list[str]:
    """What differs between the oracle's outcome and the engine's, as readable lines."""
    found: list[str] = []
    if want.trap != got.trap:
        name = state.EXCEPTION_NAMES
        a, b = (name.get(t, "none") if t < 20 else str(t) for t in (want.trap, got.trap))
        found.append(f"exception {a} != {b} (error {want.error:#x}, {got.error:#x})")
    elif want.trap != NO_TRAP:
        mask = ~0 if user else ~4
        if want.address >> 63:
            mask &= ~1  # Linux doesn't tell user programs what is present in its half
        if want.error & mask != got.error & mask and want.trap in ERROR_CODES:
            found.append(f"error code {want.error:#x} != {got.error:#x}")
        if want.address != got.address:
            found.append(f"cr2 {want.address:#x} != {got.address:#x}")
        if want.rip != got.rip:
            found.append(f"rip {want.rip:#x} != {got.rip:#x}")
    for n in range(16):
        if want.gpr[n] != got.gpr[n]:
            found.append(f"{state.GPR_NAMES[n]} {want.gpr[n]:#x} != {got.gpr[n]:#x}")
    if (want.flags ^ got.flags) & ~ignore_flags:
        found.append(f"flags {want.flags:#x} != {got.flags:#x}")
    if want.vector != got.vector:
        at = 0
        for name, (size, step) in FIELDS.items():
            a, b = want.vector[at : at + size], got.vector[at : at + size]
            at += size
            if a != b:
                for n in range(0, size, step):
                    if a[n : n + step] != b[n : n + step]:
                        found.append(
                            f"{name}{n // step} {a[n : n + step].hex()} != {b[n : n + step].hex()}"
                        )
    if want.data != got.data:
        a, b = want.data or PATTERN, got.data or PATTERN
        if not want.data or not got.data:
            found.append("memory changed in one only" + (" (engine)" if got.data else ""))
        bad = [n for n in range(DATA_BYTES) if a[n] != b[n]]
        if want.data and got.data:
            found.append(f"memory differs at +{bad[0]:#x} ({len(bad)} bytes)")
    return found


def undefined_flags(case: Case) -> int:
    """Status flags that the case's (first) instruction leaves undefined.

    The translator may have let go of their old values, which processors like to keep.
    """
    i = Decoder(64, case.code, ip=case.address).decode()
    undefined = i.rflags_undefined
    if i.mnemonic in (Mnemonic.RCL, Mnemonic.RCR) and i.op_count == 2:
        undefined |= RflagsBits.OF
    return sum(bit for name, bit in HARDWARE_BITS.items() if undefined & name)


def left_open(case: Case, want: Outcome, got: Outcome) -> bool:
    """What the manual leaves to the processor about page faults.

    Whether and where bytes that MASKMOV's mask excludes fault; how much around its bit BT reads;
    what a gather with an opmask that faults has done to the register beyond its elements.
    """
    if "GATHER" in case.text and "EVEX" in case.text and want.trap == 14:
        return (want.trap, want.address, want.gpr) == (got.trap, got.address, got.gpr)
    if "MASKMOV" in case.text:
        return want.trap == 14 and got.trap in (NO_TRAP, 14)
    return case.text.startswith("BT") and (want.trap, got.trap) == (NO_TRAP, 14)


def misaligned(want: Outcome, got: Outcome) -> bool:
    """A known difference: alignment is checked by the host, after the engine's look-up.

    So an access that is both misaligned and to a missing page is #PF first.
    """
    return want.trap == state.GP and got.trap == state.PF
