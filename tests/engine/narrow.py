"""Snippets of 32- and 16-bit code inside 64-bit ones: one instruction in compatibility mode.

The selectors are those of Linux, so the same snippet runs on the host's CPU and on the guest's.
16-bit code has segments with bases and limits, which an LDT describes: code from the start of the
code area, data and stack in the data buffer.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

from iced_x86 import (
    Code,
    Encoder,
    EncodingKind,
    FlowControl,
    Instruction,
    MemoryOperand,
    MemorySizeExt,
    OpCodeInfo,
    OpKind,
    Register,
    RegisterExt,
)

from engine import exclusions
from engine.forms import (
    BY_BYTES,
    FEATURE,
    HIGH_BYTES,
    KIND,
    MNEMONIC,
    NAME,
    REGISTER,
    Maker,
    Skip,
    random_value,
    random_vector,
    rows,
)
from engine.harness import CODE3, CODE32, DATA3
from engine.native import CODE, CODE16, DATA, DATA16, END_BYTES, PAGE, Case
from ringfence.cpu import cpuid

M32 = 0xFFFFFFFF
START = 40
"""Where the 32-bit code begins."""
LEFT_OUT = {
    "VZEROUPPER",
    "VZEROALL",  # clear registers, too, that 32-bit code has no names for
    "LDS",
    "LES",
    "IRET",
    "IRETD",
    "POPFD",
    "PUSHFD",
    "SYSENTER",
    "SYSEXIT",
    "SYSRET",
}
LEFT_OUT_CODES = (
    "CALL_PTR", "JMP_PTR", "CALL_M16", "JMP_M16", "POPW_ES", "POPD_ES", "POPW_SS", "POPD_SS",
    "POPW_DS", "POPD_DS", "POPW_FS", "POPD_FS", "POPW_GS", "POPD_GS", "PUSHW_FS", "PUSHD_FS",
    "PUSHW_GS", "PUSHD_GS",
)  # fmt: skip
SYSTEM_CODES = tuple(
    name for name in exclusions.BY_CODE if name not in ("CALL_RM16", "JMP_RM16", "RETNW")
)
IMPLIED = {
    32: {
        "ES_RDI": OpKind.MEMORY_ESEDI, "SEG_RSI": OpKind.MEMORY_SEG_ESI,
        "SEG_RDI": OpKind.MEMORY_SEG_EDI,
    },
    16: {
        "ES_RDI": OpKind.MEMORY_ESDI, "SEG_RSI": OpKind.MEMORY_SEG_SI,
        "SEG_RDI": OpKind.MEMORY_SEG_DI,
    },
}  # fmt: skip
FLAG_CODES = (
    Code.AND_R32_RM32, Code.ADD_R32_RM32, Code.ADC_R32_RM32, Code.MOV_R32_RM32,
    Code.MOV_RM32_R32, Code.MOV_RM32_R32, Code.CMP_RM32_R32, Code.NOT_RM32, Code.INC_RM32,
    Code.SETE_RM8, Code.SETB_RM8, Code.SETO_RM8,
)  # fmt: skip
READERS = (Code.SETE_RM8, Code.SETB_RM8, Code.SETO_RM8)
PAIRS = ((3, 6), (3, 7), (5, 6), (5, 7), (6, -1), (7, -1), (5, -1), (3, -1), (-1, -1))
"""Registers of a 16-bit address."""


@cache
def narrow_catalogue(bits: int) -> list[int]:
    """Forms of 32- or 16-bit code to compare."""
    chosen = []
    for code, name in NAME.items():
        info = OpCodeInfo(code)
        if not info.is_instruction or not getattr(info, f"mode{bits}") or info.encoding in (
            EncodingKind.MVEX, EncodingKind.XOP, EncodingKind.D3NOW,
        ):  # fmt: skip
            continue
        i = Instruction()
        i.code = code
        features = [FEATURE[f] for f in i.cpuid_features()]
        if not all(cpuid.offers(f, rows()) or f in ("INTEL186", "INTEL386") for f in features):
            continue
        mnemonic = MNEMONIC[info.mnemonic]
        if mnemonic in exclusions.MNEMONICS or mnemonic in LEFT_OUT:
            continue
        if name.startswith((*LEFT_OUT_CODES, *SYSTEM_CODES)) or "RESERVEDNOP" in name:
            continue
        if bits == 32 and (
            name.endswith(("_REL16", "_REL8_16"))
            or "_REL8_16_" in name
            or name.startswith(("RETNW", "CALL_RM16", "JMP_RM16"))
        ):
            continue  # they lead to the first 64 KiB
        if any(KIND[info.op_kind(n)] == "MEM_OFFS" for n in range(info.op_count)):
            continue
        chosen.append(code)
    return chosen


class NarrowMaker(Maker):
    """Makes cases of 32- or 16-bit code."""

    def __init__(self, seed: Any, bits: int) -> None:
        super().__init__(seed)
        self.bits = bits
        self.encoder = Encoder(bits)
        self.base = DATA if bits == 16 else 0
        """Of the data segment."""

    def registers(self, style: str, count: int) -> list[int]:
        """Any of the eight."""
        return [self.random.randrange(8) for _ in range(count)]

    def implied(self, i: Instruction, n: int, kind: str) -> bool:
        """Operands of branches, string instructions and XLAT."""
        if kind.startswith("BR"):
            return True
        if kind == "SEG_RBX_AL":
            i.set_op_kind(n, OpKind.MEMORY)
            i.memory_base = Register.BX if self.bits == 16 else Register.EBX
            i.memory_index = Register.AL
            return True
        if kind in IMPLIED[self.bits]:
            i.set_op_kind(n, IMPLIED[self.bits][kind])
            return True
        return False

    def fold(self, i: Instruction) -> None:
        """Registers that 32-bit code has in place of others."""
        for n in range(i.op_count):
            register = i.op_register(n)
            if i.op_kind(n) != OpKind.REGISTER:
                continue
            number = RegisterExt.number(register)
            if RegisterExt.is_vector_register(register):
                head = {16: "XMM", 32: "YMM", 64: "ZMM"}[RegisterExt.size(register)]
                i.set_op_register(n, REGISTER[f"{head}{number & 7}"])
            elif RegisterExt.is_gpr8(register) and register in (
                Register.SPL, Register.BPL, Register.SIL, Register.DIL,
            ):  # fmt: skip
                i.set_op_register(n, REGISTER[HIGH_BYTES[number & 3]])

    def place_operand(self, i: Instruction, target: int, case: Case) -> None:
        """Give the memory operand an address form that leads to ``target``."""
        pick = self.random
        target -= self.base
        if self.bits == 16 and pick.randrange(4):
            self.place_narrowly(i, target, case)
            return
        vector = i.memory_index and RegisterExt.is_vector_register(i.memory_index)
        if vector:
            raise Skip
        displacement = pick.choice(
            (0, pick.randrange(-128, 128), pick.randrange(-1 << 31, 1 << 31))
        )
        free = [n for n in range(8) if n not in self.fixed]
        left = target - displacement
        style = pick.choice(("base", "base", "index", "both", "absolute", "stack"))
        if style in ("index", "both"):
            scale = 1 << pick.randrange(4)
            index = pick.choice(free)
            value = pick.randrange(-1 << 20, 1 << 20)
            case.gpr[index] = value & M32
            self.fixed.add(index)
            free.remove(index)
            left -= value * scale
            i.memory_index, i.memory_index_scale = REGISTER[BY_BYTES[4][index]], scale
        if style in ("base", "both"):
            base = pick.choice(free)
            case.gpr[base] = left & M32
            self.fixed.add(base)
            i.memory_base = REGISTER[BY_BYTES[4][base]]
        elif style == "stack":
            i.memory_base = Register.ESP
            displacement += left - case.gpr[4]
        else:
            displacement += left
        displacement &= M32
        i.memory_displacement = displacement
        signed = displacement - (1 << 32) if displacement >> 31 else displacement
        short = -128 <= signed < 128 and i.memory_base != Register.NONE
        i.memory_displ_size = 1 if short else 4
        i.segment_prefix = pick.choice(
            (Register.NONE, Register.NONE, Register.DS, Register.ES, Register.SS)
        )

    def place_narrowly(self, i: Instruction, target: int, case: Case) -> None:
        """The same with a 16-bit address; what is above bit 15 of a register does not count."""
        pick = self.random
        base, index = pick.choice(PAIRS)
        displacement = pick.choice((0, pick.randrange(-128, 128), pick.randrange(1 << 16)))
        left = target - displacement
        if index >= 0:
            if index in self.fixed:
                raise Skip
            value = pick.randrange(1 << 16)
            case.gpr[index] = case.gpr[index] & 0xFFFF0000 | value
            self.fixed.add(index)
            left -= value
            i.memory_index, i.memory_index_scale = REGISTER[BY_BYTES[2][index]], 1
        if base >= 0:
            if base in self.fixed:
                raise Skip
            case.gpr[base] = case.gpr[base] & 0xFFFF0000 | left & 0xFFFF
            self.fixed.add(base)
            i.memory_base = REGISTER[BY_BYTES[2][base]]
        else:
            displacement += left
        displacement &= 0xFFFF
        i.memory_displacement = displacement
        i.memory_displ_size = 2
        i.segment_prefix = pick.choice(
            (Register.NONE, Register.NONE, Register.DS, Register.ES, Register.SS)
        )

    def narrow_case(self, code: int, memory: bool, place: Any) -> Case:
        """A whole case; ``place(length)`` gives the code's address. Raises ``Skip``."""
        i = self.build(code, "any", "base" if memory else "", high=bool(self.random.randrange(2)))
        name = MNEMONIC[i.mnemonic]
        gpr = [random_value(self.random) & (M32 if n < 8 else ~0) for n in range(16)]
        gpr[4] = DATA + 2 * PAGE + self.random.randrange(64) * 8 + 0x400 - self.base
        case = Case(0, b"", 0, gpr)
        case.flags = self.random.getrandbits(12) & 0x8D5 | 0x202
        if self.random.randrange(4) == 0:
            case.flags |= 0x400
        features = [FEATURE[f] for f in i.cpuid_features()]
        x87 = any(f.startswith(("FPU", "MMX")) for f in features) or name.startswith("F")
        case.vector = random_vector(self.random, x87)
        self.fixed = {4}
        self.fold(i)
        self.prepare_narrow(i, name, case)
        size = MemorySizeExt.size(i.memory_size) if memory else 0
        target = 0
        if memory:
            target = self.target(size, not size) & (PAGE * 8 - 1) | DATA
            self.place_operand(i, target, case)
            case.patches += self.contents(target, size, i)
        address = place(96 + END_BYTES)
        here = address + START
        wide = self.bits == 32 or "REL32" in NAME[code] or "_32" in NAME[code]
        origin = here - CODE if self.bits == 16 else here
        over = b"\x8d\x7f\x01" if self.bits == 32 else b"\x8d\x7d\x01"  # lea (e)di, [(e)di + 1]
        branches = (
            FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CALL,
        )  # fmt: skip
        if i.flow_control in branches and KIND[OpCodeInfo(code).op0_kind].startswith("BR"):
            i.set_op_kind(0, OpKind.NEAR_BRANCH32 if wide else OpKind.NEAR_BRANCH16)
            field = "near_branch32" if wide else "near_branch16"
            setattr(i, field, origin)
            length = len(self.encode(i, origin))
            setattr(i, field, origin + length + len(over))
            body = self.encode(i, origin) + over
        elif i.flow_control in (
            FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL, FlowControl.RETURN,
        ):  # fmt: skip
            goal = struct.pack("<I", origin + 24)
            if i.flow_control == FlowControl.RETURN:
                case.patches.append((gpr[4] + self.base - DATA, goal))
            elif memory:
                case.patches.append((target - DATA, goal))
            else:
                number = RegisterExt.number(i.op0_register)
                if number == 4:
                    raise Skip
                gpr[number] = origin + 24
            body = self.encode(i, origin).ljust(24, b"\x90") + over
        else:
            body = self.encode(i, origin)
        self.enclose(case, address, body, NAME[code] + f": {i}")
        return case

    def flags_program(self, length: int, place: Any) -> Case:
        """Accesses by base and index, among instructions that set flags and that read them."""
        pick, m = self.random, MemoryOperand
        gpr = [random_value(pick) & (M32 if n < 8 else ~0) for n in range(16)]
        gpr[1], gpr[4] = pick.randrange(64), DATA + 2 * PAGE - self.base
        gpr[6] = DATA + PAGE - self.base
        case = Case(0, b"", 0, gpr)
        case.flags = pick.getrandbits(12) & 0x8D5 | 0x202
        case.vector = random_vector(pick, False)
        results = (Register.EAX, Register.EDX, Register.EBX)
        body = b""
        for _ in range(length):
            code, result = pick.choice(FLAG_CODES), pick.choice(results)
            base = pick.choice((Register.ESI, Register.NONE))
            place_at = 4 * pick.randrange(200) + (0 if base else gpr[6])
            operand = m(base, Register.ECX, 4, place_at, 4)
            if code in READERS:
                i = Instruction.create_reg(code, pick.choice((Register.AL, Register.DL)))
            elif NAME[code].endswith("R32_RM32"):
                i = Instruction.create_reg_mem(code, result, operand)
            elif NAME[code].endswith("RM32_R32"):
                i = Instruction.create_mem_reg(code, operand, result)
            else:
                i = Instruction.create_reg(code, result)
            body += self.encode(i, 0)
        self.enclose(case, place(len(body) + START + 16 + END_BYTES), body, "flags")
        return case

    def enclose(self, case: Case, address: int, body: bytes, text: str) -> None:
        """Put the way into 32- or 16-bit code, and the way back, around the code of a case."""
        here = address + START
        origin = here - CODE if self.bits == 16 else here
        code_selector, data = (CODE16, DATA16) if self.bits == 16 else (CODE32, DATA3)
        loads = (b"\x8e\x1c\x25", b"\x8e\x04\x25", b"\x8e\x14\x25")[: 2 + (self.bits == 16)]
        # mov ds, es and ss, [selector]; jmp far [pointer]
        pointer = address + 7 * len(loads) + 7
        into = b"".join(start + struct.pack("<I", pointer + 6) for start in loads)
        into += b"\xff\x2c\x25" + struct.pack("<IIHH", pointer, origin, code_selector, data)
        back_prefix = b"\x66" if self.bits == 16 else b""
        end = here + len(body) + 7 + len(back_prefix)
        back = back_prefix + b"\xea" + struct.pack("<IH", end, CODE3)
        whole = into.ljust(START, b"\x90") + body + back
        case.address, case.code, case.end = address, whole, len(whole)
        case.text = f"{text} [{body.hex(' ')}]"

    def prepare_narrow(self, i: Instruction, name: str, case: Case) -> None:
        """Registers that an instruction uses without naming them."""
        gpr, pick = case.gpr, self.random

        def pin(number: int, value: int) -> None:
            if self.bits == 16 and value <= 0xFFFF and i.op_code().address_size != 32:
                value |= gpr[number] & 0xFFFF0000
            gpr[number] = value & M32
            self.fixed.add(number)

        def somewhere() -> int:
            return (self.target(8, False) & (PAGE * 8 - 1) | DATA) - self.base

        kinds = [i.op_kind(n) for n in range(i.op_count)]
        targets = (
            OpKind.MEMORY_ESEDI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_ESDI, OpKind.MEMORY_SEG_DI,
        )  # fmt: skip
        if any(kind in targets for kind in kinds):
            pin(7, somewhere())
        if OpKind.MEMORY_SEG_ESI in kinds or OpKind.MEMORY_SEG_SI in kinds:
            pin(6, somewhere())
        if name == "CLZERO":
            pin(0, somewhere())
        elif name == "XLATB":
            pin(3, DATA - self.base + pick.randrange(PAGE))
        elif name in ("DIV", "IDIV"):
            pin(2, pick.choice((0, gpr[2], M32)))
            self.fixed.add(0)
        elif name == "LEAVE":
            pin(5, DATA - self.base + PAGE + pick.randrange(64) * 8)
        elif name == "ENTER":
            pin(5, DATA - self.base + 3 * PAGE - 64)
        elif name in ("LOOP", "LOOPE", "LOOPNE", "JECXZ", "JCXZ"):
            pin(1, pick.choice((0, 1, 2, 1 << 16)))
        if i.is_string_instruction:
            self.repeat(i, name, case)
