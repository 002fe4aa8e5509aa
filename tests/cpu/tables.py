"""Descriptor tables, stacks and privilege levels as a 64-bit kernel has them, on flat memory."""

from __future__ import annotations

from typing import Any

from ringfence.cpu.state import (
    CS,
    FAULT,
    RSP,
    SS,
    TR,
)

GDT, IDT, TSS, LDT, TABLE_END = 0x11000, 0x12000, 0x13000, 0x14000, 0x15000
KSTACK, USTACK, IST1, CODE, UCODE, DATA = 0x20000, 0x24000, 0x28000, 0x30000, 0x38000, 0x3C000
KCODE64, KDATA, UDATA, UCODE64 = 0x10, 0x18, 0x2B, 0x33
CODE32, CONFORMING, ABSENT, RODATA, TSS_SEL, LDT_SEL = 0x38, 0x40, 0x48, 0x50, 0x60, 0x70
GATE, GATE_UP, EXEC_ONLY, KCODE64_FRESH, ABSENT_CODE = 0x80, 0x90, 0xA0, 0xA8, 0xB0
NONCANONICAL = 0x8000_0000_0000


def flat_descriptor(access: int, nibble: int) -> int:
    """A descriptor with base 0 and the largest limit."""
    return 0x000F_0000_0000_FFFF | access << 40 | nibble << 52


def system_descriptor(kind: int, base: int, limit: int, present: int = 1) -> tuple[int, int]:
    """The two words of a 16-byte descriptor."""
    low = limit | (base & 0xFFFFFF) << 16 | (kind | present << 7) << 40 | (base >> 24 & 0xFF) << 56
    return low, base >> 32


def gate_descriptor(
    target: int, selector: int, kind: int, dpl: int = 0, ist: int = 0, present: int = 1
) -> tuple[int, int]:
    """The two words of an interrupt, trap or call gate."""
    low = target & 0xFFFF | selector << 16 | ist << 32
    low |= (kind | dpl << 5 | present << 7) << 40 | (target >> 16 & 0xFFFF) << 48
    return low, target >> 32


class Rig:
    """A machine with tables as a 64-bit kernel has them."""

    def __init__(self, machine: Any) -> None:
        self.m = machine
        self.cpu = cpu = machine.cpu
        entries = {
            KCODE64: flat_descriptor(0x9B, 0xA),
            KDATA: flat_descriptor(0x93, 0xC),
            UDATA & ~3: flat_descriptor(0xF3, 0xC),
            UCODE64 & ~3: flat_descriptor(0xFB, 0xA),
            CODE32: flat_descriptor(0x9B, 0xC),
            CONFORMING: flat_descriptor(0x9F, 0xA),
            ABSENT: flat_descriptor(0x13, 0xC),
            RODATA: flat_descriptor(0xF1, 0xC),
            EXEC_ONLY: flat_descriptor(0x99, 0xA),
            KCODE64_FRESH: flat_descriptor(0x9A, 0xA),
            ABSENT_CODE: flat_descriptor(0x1B, 0xA),
        }
        for selector, descriptor in entries.items():
            machine.write(GDT + selector, descriptor)
        self.system(TSS_SEL, *system_descriptor(9, TSS, 0x67))
        self.system(LDT_SEL, *system_descriptor(2, LDT, 0xF))
        self.system(GATE, *gate_descriptor(CODE, KCODE64, 12, dpl=3))
        self.system(GATE_UP, *gate_descriptor(CODE, CONFORMING, 12, dpl=0))
        machine.write(LDT + 8, flat_descriptor(0x93, 0xC))
        cpu.gdtr_base, cpu.gdtr_limit = GDT, 0xB7
        cpu.idtr_base, cpu.idtr_limit = IDT, 0xFFF
        machine.write(TSS + 4, KSTACK)
        machine.write(TSS + 0x24, IST1)
        cpu.seg_selector[TR], cpu.seg_base[TR], cpu.seg_limit[TR] = TSS_SEL, TSS, 0x67
        self.level(0)

    def system(self, selector: int, low: int, high: int) -> None:
        """Put a 16-byte descriptor into the GDT."""
        self.m.write(GDT + selector, low)
        self.m.write(GDT + selector + 8, high)

    def gate(self, vector: int, target: int = CODE, selector: int = KCODE64, **more: int) -> None:
        """Put a gate into the IDT; an interrupt gate unless ``kind`` says otherwise."""
        low, high = gate_descriptor(target, selector, more.pop("kind", 14), **more)
        self.m.write(IDT + vector * 16, low)
        self.m.write(IDT + vector * 16 + 8, high)

    def level(self, level: int) -> None:
        """Run at a privilege level with flat segments."""
        cpu = self.cpu
        cpu.cpl = level
        user = level == 3
        cpu.seg_selector[CS] = UCODE64 if user else KCODE64
        cpu.seg_selector[SS] = UDATA if user else KDATA
        cpu.seg_attr[CS] = 0xAFB if user else 0xA9B
        cpu.seg_attr[SS] = 0xCF3 if user else 0xC93
        cpu.gpr[RSP] = (USTACK if user else KSTACK) - 0x103
        cpu.rip = UCODE if user else CODE

    def raise_(self, vector: int, error: int = 0, address: int = 0) -> int:
        """Make an exception pending and deliver it."""
        self.cpu.exc_vector, self.cpu.exc_error = vector, error
        self.cpu.exc_address = address
        return self.m.run("deliver_exception")

    def frame(self, count: int) -> list[int]:
        """The topmost words of the stack."""
        return [self.m.read(self.cpu.gpr[RSP] + 8 * i) for i in range(count)]

    def push(self, *values: int, size: int = 8) -> int:
        """Push values, last one deepest; returns RSP."""
        for value in reversed(values):
            self.cpu.gpr[RSP] -= size
            self.m.write(self.cpu.gpr[RSP], value, size)
        return int(self.cpu.gpr[RSP])

    def faults(self, name: str, vector: int, error: int, *operands: int) -> None:
        """An effect must fault and leave the state alone."""
        cpu = self.cpu
        cpu.rip, cpu.next_rip = 0x1000, 0x1002
        before = self.m.snapshot()
        assert self.m.effect(name, *operands) == FAULT
        assert self.m.pending == (vector, error)
        assert self.m.snapshot() == before
