"""Makes snippets of one instruction each: every form, in many encodings and surroundings."""

from __future__ import annotations

import random
import struct
from functools import cache
from typing import Any

from iced_x86 import (
    Code,
    CpuidFeature,
    Encoder,
    EncodingKind,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
    RegisterExt,
)

from engine import exclusions
from engine.native import (
    ALIAS,
    DATA,
    END_BYTES,
    OPMASK,
    PAGE,
    WIDE,
    Case,
    initial_vector,
    put_vector,
)
from ringfence.cpu import cpuid

NAME = {v: k for k, v in vars(Code).items() if isinstance(v, int)}
MNEMONIC = {v: k for k, v in vars(Mnemonic).items() if isinstance(v, int)}
FEATURE = {v: k for k, v in vars(CpuidFeature).items() if isinstance(v, int)}
KIND = {v: k for k, v in vars(OpCodeOperandKind).items() if isinstance(v, int)}
REGISTER = {k: v for k, v in vars(Register).items() if isinstance(v, int)}
M64 = (1 << 64) - 1
FULL = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16))]
BY_BYTES = {
    1: ["AL", "CL", "DL", "BL", "SPL", "BPL", "SIL", "DIL", *(f"R{n}L" for n in range(8, 16))],
    2: ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI", *(f"R{n}W" for n in range(8, 16))],
    4: ["EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI", *(f"R{n}D" for n in range(8, 16))],
    8: FULL,
}  # fmt: skip
HIGH_BYTES = ["AH", "CH", "DH", "BH"]
IMMEDIATE = {
    "IMM8": (OpKind.IMMEDIATE8, 8), "IMM8_CONST_1": (OpKind.IMMEDIATE8, 0),
    "IMM8SEX16": (OpKind.IMMEDIATE8TO16, 8), "IMM8SEX32": (OpKind.IMMEDIATE8TO32, 8),
    "IMM8SEX64": (OpKind.IMMEDIATE8TO64, 8), "IMM16": (OpKind.IMMEDIATE16, 16),
    "IMM32": (OpKind.IMMEDIATE32, 32), "IMM32SEX64": (OpKind.IMMEDIATE32TO64, 32),
    "IMM64": (OpKind.IMMEDIATE64, 64), "IMM4_M2Z": (OpKind.IMMEDIATE8, 2),
}  # fmt: skip
GPR_STYLES = ("low", "homeless", "stack", "high", "same", "any", "any")
MEM_STYLES = (
    "base", "base8", "base32", "index", "index8", "rip", "stack", "rbp", "r9", "r10", "r11", "r12",
    "r13", "r9r10", "r10r9", "r11r9", "fs", "gs", "short", "shortindex", "absolute", "noindex",
)  # fmt: skip


class Skip(Exception):
    """This style does not fit this form."""


@cache
def rows() -> list[cpuid.Row]:
    """The virtual CPU's feature table on this host."""
    return cpuid.build_cpuid(cpuid.host_cpuid)


@cache
def catalogue() -> tuple[list[int], dict[int, str]]:
    """Forms to compare, and the other ones that the virtual CPU offers, with reasons."""
    chosen, excluded = [], {}
    for code, name in NAME.items():
        info = OpCodeInfo(code)
        if not info.is_instruction or not info.mode64 or info.encoding in (
            EncodingKind.MVEX, EncodingKind.XOP, EncodingKind.D3NOW,
        ):  # fmt: skip
            continue
        i = Instruction()
        i.code = code
        features = [FEATURE[f] for f in i.cpuid_features()]
        if not all(cpuid.offers(f, rows()) for f in features):
            continue
        reason = exclusions.MNEMONICS.get(MNEMONIC[info.mnemonic], "")
        for start, why in exclusions.BY_CODE.items():
            if name.startswith(start):
                reason = why
        if name.endswith(("_REL16", "_REL8_16")) or "_REL8_16_" in name:
            reason = exclusions.SHORT_BRANCH
        if "RESERVEDNOP" in name:
            reason = exclusions.HINT
        if reason:
            excluded[code] = reason
        else:
            chosen.append(code)
    return chosen, excluded


def random_value(source: random.Random) -> int:
    """A 64-bit number, often an interesting one."""
    pick = source.randrange(8)
    if pick == 0:
        return source.choice((0, 1, M64, 1 << 63, (1 << 63) - 1, 0x80000000, 0x7FFFFFFF, 0x8000))
    if pick == 1:
        return source.randrange(256)
    if pick == 2:
        return -source.randrange(1, 70000) & M64
    if pick == 3:
        return 1 << source.randrange(64)
    return source.getrandbits(64)


def random_vector(source: random.Random, x87: bool) -> bytes:
    """Vector state: bits, small integers, floats; with ``x87``, eight numbers on its stack."""
    area = initial_vector()
    for n in range(32 if WIDE else 16):
        kind = source.randrange(4)
        size = 64 if WIDE else 32
        if kind == 0:
            data = source.randbytes(size)
        elif kind == 1:
            floats = (source.uniform(-1000, 1000) for _ in range(size // 4))
            data = struct.pack(f"<{size // 4}f", *floats)
        elif kind == 2:
            floats = (source.gauss(0, 10) ** 3 for _ in range(size // 8))
            data = struct.pack(f"<{size // 8}d", *floats)
        else:
            data = bytes(source.choices((0, 1, 0x7F, 0x80, 0xFF, 0x41, 0x42), k=size))
        put_vector(area, n, data)
    for n in range(8 if WIDE else 0):
        bits = source.getrandbits(64)
        mask = source.choice((0, M64, 1, bits, bits & source.getrandbits(64), 1 << bits % 16))
        struct.pack_into("<Q", area, OPMASK + 8 * n, mask)
    if x87:
        top = source.randrange(8)
        codes = source.choice((0, 0x4700, source.randrange(1 << 16) & 0x4700))
        struct.pack_into("<HHB", area, 0, 0x37F, top << 11 | codes, 0xFF & ~source.choice((0, 3)))
        for n in range(8):
            exponent = 16383 + source.randrange(-40, 40) | source.choice((0, 0x8000))
            mantissa = 1 << 63 | source.getrandbits(63)
            struct.pack_into("<QH", area, 32 + 16 * n, mantissa, exponent)
    return bytes(area)


class Maker:
    """Makes cases from forms with one source of randomness."""

    def __init__(self, seed: Any) -> None:
        self.random = random.Random(seed)
        self.encoder = Encoder(64)
        self.info = InstructionInfoFactory()

    def registers(self, style: str, count: int) -> list[int]:
        """Numbers of general registers for the operands of an instruction."""
        pools = {
            "low": [0, 1, 2, 3, 6, 7, 5],
            "homeless": [9, 10, 11],
            "stack": [4, 9, 10, 11, 0, 12],
            "high": [8, 12, 13, 14, 15],
            "any": list(range(16)),
        }
        if style == "same":
            return [self.random.randrange(16)] * count
        pool = pools[style][:]
        self.random.shuffle(pool)
        if style == "stack":
            pool.remove(4)
            pool.insert(self.random.randrange(min(count, 3) or 1), 4)
        return (pool * 4)[:count]

    def build(self, code: int, style: str, memory: str, *, high: bool = False) -> Instruction:
        """The instruction, its memory operand (``memory`` "" for none) still without an address."""
        info = OpCodeInfo(code)
        i = Instruction()
        i.code = code
        chosen = self.registers(style, 5)
        numbers = range(32 if info.encoding == EncodingKind.EVEX else 16)
        vectors = self.random.choices(numbers, k=5)
        if info.requires_unique_reg_nums or info.requires_unique_dest_reg_num:
            vectors = self.random.sample(numbers, 5)
        mmx = [self.random.randrange(8) for _ in range(5)]
        has_memory = False
        for n in range(info.op_count):
            kind = KIND[info.op_kind(n)]
            number = chosen.pop()
            if kind in IMMEDIATE:
                self.immediate(i, n, kind)
                continue
            if kind.endswith("_OR_MEM") or kind.startswith("MEM"):
                if memory and kind != "MEM_OFFS":
                    i.set_op_kind(n, OpKind.MEMORY)
                    has_memory = True
                    if "VSIB" in kind:
                        size = kind[-1] if kind[-1] in "YZ" else "X"
                        i.memory_index = REGISTER[f"{size}MM{vectors.pop()}"]
                    continue
                if kind == "MEM_OFFS":
                    if memory != "absolute":
                        raise Skip
                    i.set_op_kind(n, OpKind.MEMORY)
                    i.memory_displ_size = 8
                    has_memory = True
                    continue
                if not kind.endswith("_OR_MEM"):
                    raise Skip
            register = self.register(kind, number, vectors, mmx, high)
            if register is not None:
                i.set_op_register(n, register)
            elif not self.implied(i, n, kind):
                raise Skip
        if memory and not has_memory:
            raise Skip
        if info.encoding == EncodingKind.EVEX:
            self.decorate(i, info, memory)
        return i

    def decorate(self, i: Instruction, info: OpCodeInfo, memory: str) -> None:
        """What EVEX adds: mask, zeroing, broadcast, rounding."""
        pick = self.random
        if info.can_use_op_mask_register and (info.require_op_mask_register or pick.randrange(4)):
            i.op_mask = REGISTER[f"K{pick.randrange(1, 8)}"]
            if info.can_use_zeroing_masking and i.op0_kind != OpKind.MEMORY:
                i.zeroing_masking = bool(pick.randrange(2))
        if memory:
            i.is_broadcast = info.can_broadcast and bool(pick.randrange(2))
        elif info.can_use_rounding_control:
            i.rounding_control = pick.randrange(5)
        elif info.can_suppress_all_exceptions:
            i.suppress_all_exceptions = bool(pick.randrange(2))

    def immediate(self, i: Instruction, n: int, kind: str) -> None:
        """Set an immediate operand to a random value."""
        what, bits = IMMEDIATE[kind]
        if (
            what == OpKind.IMMEDIATE8
            and n
            and any(i.op_kind(m) == OpKind.IMMEDIATE8 for m in range(n))
        ):
            what = OpKind.IMMEDIATE8_2ND
        if i.mnemonic == Mnemonic.ENTER:
            i.set_op_kind(n, OpKind.IMMEDIATE8_2ND if n else what)
            if n:
                i.immediate8_2nd = self.random.randrange(4)
            else:
                i.immediate16 = self.random.randrange(64) * 8
            return
        value = 1 if not bits else self.random.choice(
            (self.random.getrandbits(bits), self.random.getrandbits(bits), self.random.randrange(4))
        ) & (1 << bits) - 1  # fmt: skip
        i.set_op_kind(n, what)
        if what == OpKind.IMMEDIATE8:
            i.immediate8 = value
        elif what == OpKind.IMMEDIATE8_2ND:
            i.immediate8_2nd = value
        elif what == OpKind.IMMEDIATE16:
            i.immediate16 = value
        elif what == OpKind.IMMEDIATE64:
            i.immediate64 = value
        elif what == OpKind.IMMEDIATE32:
            i.immediate32 = value
        else:
            signed = value - (1 << bits) if value >> bits - 1 else value
            name = {
                OpKind.IMMEDIATE8TO16: "immediate8to16", OpKind.IMMEDIATE8TO32: "immediate8to32",
                OpKind.IMMEDIATE8TO64: "immediate8to64", OpKind.IMMEDIATE32TO64: "immediate32to64",
            }[what]  # fmt: skip
            setattr(i, name, signed)

    def register(
        self, kind: str, number: int, vectors: list[int], mmx: list[int], high: bool
    ) -> int | None:
        """The register for an operand kind, None if the kind is none of registers."""
        head = kind.split("_")[0]
        if head in ("R8", "R16", "R32", "R64") and kind.split("_")[1] in (
            "REG", "OR", "RM", "OPCODE", "VVVV",
        ):  # fmt: skip
            size = int(head[1:]) // 8
            if size == 1 and high:
                return REGISTER[HIGH_BYTES[number & 3]]
            return REGISTER[BY_BYTES[size][number & (7 if high else 15)]]
        if head in ("K", "KP1"):
            return REGISTER[f"K{number & (6 if head == 'KP1' else 7)}"]
        if head in ("XMM", "YMM", "ZMM"):
            return REGISTER[f"{head}{vectors.pop()}"]
        if head == "MM":
            return REGISTER[f"MM{mmx.pop()}"]
        if kind == "STI_OPCODE":
            return REGISTER[f"ST{mmx.pop()}"]
        return REGISTER.get(kind)

    @staticmethod
    def implied(i: Instruction, n: int, kind: str) -> bool:
        """Operands of branches, string instructions and XLAT."""
        if kind.startswith("BR"):
            return True
        what = {
            "ES_RDI": OpKind.MEMORY_ESRDI, "SEG_RSI": OpKind.MEMORY_SEG_RSI,
            "SEG_RDI": OpKind.MEMORY_SEG_RDI, "SEG_RBX_AL": OpKind.MEMORY,
        }.get(kind)  # fmt: skip
        if what is None:
            return False
        i.set_op_kind(n, what)
        if kind == "SEG_RBX_AL":
            i.memory_base, i.memory_index = Register.RBX, Register.AL
        return True

    # --- addresses and surroundings -----------------------------------------------------------

    def target(self, size: int, plain: bool) -> int:
        """Where a memory operand lies: mostly well aligned, sometimes across pages."""
        base = self.random.choice((DATA, ALIAS))
        pick = self.random.randrange(12)
        if pick < 7 or plain:
            align = 64 if size > 8 else 16
            return base + self.random.randrange(2 * PAGE // align) * align
        if pick < 9:
            return base + self.random.randrange(2 * PAGE)
        if pick < 11:
            return base + PAGE - self.random.randrange(1, max(size, 2))
        return base + 3 * PAGE + self.random.randrange(PAGE - 8, PAGE + 8)

    def address(self, i: Instruction, style: str, target: int, case: Case, size: int) -> int:
        """Give the memory operand an address form and set registers so that it leads to ``target``.

        Returns the target, which some forms move into the first 4 GiB.
        """
        pick = self.random
        gpr = case.gpr
        fixed = self.fixed
        base = index = -1
        displacement = 0
        vsib = (
            i.memory_index
            if i.memory_index and RegisterExt.is_vector_register(i.memory_index)
            else 0
        )
        segment = 0
        short = style in ("short", "shortindex")
        low = target - ALIAS + DATA if target >= ALIAS else target
        free = [n for n in range(16) if n != 4 and n not in fixed]
        if style.endswith("8") or style in (
            "fs", "gs", "stack", "r9r10", "r10r9", "r11r9", "shortindex",
        ):  # fmt: skip
            displacement = pick.randrange(-128, 128)
        elif style in ("base32", "rip") or pick.randrange(3) == 0:
            displacement = pick.choice((pick.randrange(-(1 << 31), 1 << 31), 0x1000, -0x1000))
        names = {"rbp": 5, "r9": 9, "r10": 10, "r11": 11, "r12": 12, "r13": 13, "stack": 4}
        if style in names:
            base = names[style]
        elif style in ("r9r10", "r10r9", "r11r9"):
            base, index = (int(part) for part in style[1:].split("r"))
        elif style not in ("rip", "absolute", "noindex"):
            base = pick.choice(free)
        if style in ("index", "index8", "shortindex", "noindex"):
            index = pick.choice([n for n in free if n != base])
        if style in ("fs", "gs"):
            segment = Register.FS if style == "fs" else Register.GS
        scale = 1 << pick.randrange(4) if index >= 0 else 1
        if vsib:
            index = -1
            i.memory_index_scale = 1 << pick.randrange(4)
            if base < 0:
                raise Skip
        if style == "absolute" or short:
            target = low
        if style == "rip":
            i.memory_base = Register.RIP
            i.memory_displacement = low
            i.memory_displ_size = 8
            return low
        if style == "absolute" and i.memory_displ_size != 8:
            i.memory_displacement = target
            i.memory_displ_size = 8
            return target
        if i.memory_displ_size == 8:
            i.memory_displacement = target
            return target
        mask = 0xFFFFFFFF if short else M64
        segment_base = 0
        if segment:
            segment_base = pick.getrandbits(46) & ~0xFFF
            if segment == Register.FS:
                case.fs_base = segment_base
            else:
                case.gs_base = segment_base
        left = target - segment_base - displacement
        if index >= 0:
            if index in fixed:
                raise Skip
            value = pick.randrange(-1 << 20, 1 << 20)
            gpr[index] = value & mask | (pick.getrandbits(32) << 32 if short else 0)
            fixed.add(index)
            left -= value * scale
        if base >= 0:
            if base in fixed and base != 4:
                raise Skip
            value = left & mask
            if base == 4 and style == "stack":
                displacement += left - gpr[4]
                if not -(1 << 31) <= displacement < 1 << 31:
                    # The stack is in the lower mapping.
                    target = low
                    displacement = target - gpr[4]
            else:
                gpr[base] = value | (pick.getrandbits(32) << 32 if short else 0)
                fixed.add(base)
            i.memory_base = REGISTER[BY_BYTES[4 if short else 8][base]]
        else:
            displacement += left & M64
            if displacement >> 63 & 1:
                displacement -= 1 << 64
            if not -(1 << 31) <= displacement < 1 << 31:
                left = low - displacement
                raise Skip
        if index >= 0:
            i.memory_index = REGISTER[BY_BYTES[4 if short else 8][index]]
            i.memory_index_scale = scale
        displacement &= M64
        if short:
            displacement &= 0xFFFFFFFF
        i.memory_displacement = displacement
        signed = displacement - (1 << 64) if displacement >> 63 else displacement
        if short and displacement >> 31:
            signed = displacement - (1 << 32)
        i.memory_displ_size = 0 if not signed else 1 if -128 <= signed < 128 else 4 if short else 8
        if base in (5, 13) and not signed:
            i.memory_displ_size = 1
        i.segment_prefix = segment
        return target

    def case(self, code: int, style: str, memory: str, place: Any, *, high: bool = False) -> Case:
        """A whole case; ``place(length)`` gives the code's address. Raises ``Skip``."""
        i = self.build(code, style, memory, high=high)
        name = MNEMONIC[i.mnemonic]
        gpr = [random_value(self.random) for _ in range(16)]
        gpr[4] = DATA + 2 * PAGE + self.random.randrange(64) * 8 + 0x400
        case = Case(0, b"", 0, gpr)
        case.flags = self.random.getrandbits(12) & 0x8D5 | 0x202
        if self.random.randrange(4) == 0:
            case.flags |= 0x400
        features = [FEATURE[f] for f in i.cpuid_features()]
        x87 = any(f.startswith(("FPU", "MMX")) for f in features) or name.startswith("F")
        if x87 or features != ["INTEL8086"]:
            case.vector = random_vector(self.random, x87)
        self.fixed: set[int] = {4}
        size = MemorySizeExt.size(i.memory_size) if memory else 0
        self.prepare(i, name, case)
        prefix = b""
        if memory:
            target = self.target(size, not size)
            if i.is_vsib:
                target = self.random.choice((DATA, ALIAS)) + PAGE + self.random.randrange(PAGE)
            target = self.address(i, memory, target, case, size)
            if i.is_vsib:
                self.spread(i, case)
            case.patches += self.contents(target, size, i)
        address = place(32 + END_BYTES)
        branch = i.flow_control in (
            FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CALL,
        ) and KIND[OpCodeInfo(code).op0_kind].startswith("BR")  # fmt: skip
        over = b"\x48\x8d\x7f\x01"  # lea rdi, [rdi+1]
        if branch:
            i.set_op_kind(0, OpKind.NEAR_BRANCH64)
            body = self.encode_branch(i, address, len(over)) + over
        elif i.flow_control in (
            FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL, FlowControl.RETURN,
        ):  # fmt: skip
            goal = struct.pack("<Q", address + 24)
            if i.flow_control == FlowControl.RETURN:
                case.patches.append((gpr[4] - DATA, goal))
            elif memory:
                offset = target - ALIAS if target >= ALIAS else target - DATA
                case.patches.append((offset, goal))
            else:
                number = RegisterExt.number(RegisterExt.full_register(i.op0_register))
                if number == 4:
                    raise Skip
                gpr[number] = address + 24
            body = self.encode(i, address).ljust(24, b"\x90") + over
        else:
            body = prefix + self.encode(i, address)
        case.address, case.code, case.end = address, body, len(body)
        case.text = f"{NAME[code]}: {i} [{body.hex(' ')}]"
        return case

    def spread(self, i: Instruction, case: Case) -> None:
        """Give an index vector elements that stay in the data buffer, or just about."""
        area = bytearray(case.vector)
        n = RegisterExt.number(i.memory_index)
        name = MNEMONIC[i.mnemonic]
        size = 8 if "GATHERQ" in name or "SCATTERQ" in name else 4
        limit = self.random.choice((400, 400, 2500)) // i.memory_index_scale * 4
        values = (self.random.randrange(-limit, limit) for _ in range(64 // size))
        put_vector(area, n, b"".join(v.to_bytes(size, "little", signed=True) for v in values))
        case.vector = bytes(area)

    def encode(self, i: Instruction, address: int) -> bytes:
        """The bytes, or Skip where the operands don't go together."""
        try:
            self.encoder.encode(i, address)
        except ValueError as error:
            self.encoder.take_buffer()
            raise Skip(str(error)) from error
        return self.encoder.take_buffer()

    def encode_branch(self, i: Instruction, address: int, over: int) -> bytes:
        """A branch over ``over`` bytes behind itself."""
        i.near_branch64 = address
        length = len(self.encode(i, address))
        i.near_branch64 = address + length + over
        return self.encode(i, address)

    def contents(self, target: int, size: int, i: Instruction) -> list[tuple[int, bytes]]:
        """What to put at a memory operand so that interesting things happen."""
        offset = target - ALIAS if target >= ALIAS else target - DATA
        if size in (4, 8, 10) and MNEMONIC[i.mnemonic].startswith("F"):
            value = self.random.gauss(0, 100)
            data = struct.pack("<d" if size == 8 else "<f", value)
            if size == 10:
                data = struct.pack("<QH", 1 << 63 | self.random.getrandbits(63), 16380)
            return [(offset, data)]
        if size in (1, 2, 4, 8) and self.random.randrange(2):
            value = random_value(self.random) & (1 << 8 * size) - 1
            return [(offset, value.to_bytes(size, "little"))]
        return []

    def prepare(self, i: Instruction, name: str, case: Case) -> None:
        """Registers that an instruction uses without naming them."""
        gpr = case.gpr
        pick = self.random

        def pin(number: int, value: int) -> None:
            gpr[number] = value & M64
            self.fixed.add(number)

        for n in range(i.op_count):
            kind = i.op_kind(n)
            if kind == OpKind.MEMORY_ESRDI:
                pin(7, self.target(8, False))
            elif kind in (OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_RDI):
                number = 6 if kind == OpKind.MEMORY_SEG_RSI else 7
                pin(number, self.target(8, False))
        if name in ("MASKMOVQ", "MASKMOVDQU", "VMASKMOVDQU"):
            pin(7, self.target(16, False))
        elif name == "CLZERO":
            pin(0, self.target(64, False))
        elif name == "XLATB":
            pin(3, DATA + pick.randrange(PAGE))
        elif name in ("DIV", "IDIV"):
            small = pick.randrange(2)
            pin(2, 0 if small else pick.choice((gpr[2], M64)))
            self.fixed.add(0)
        elif name == "LEAVE":
            pin(5, DATA + PAGE + pick.randrange(64) * 8)
        elif name == "ENTER":
            pin(5, DATA + 3 * PAGE - 64)
        elif name in ("LOOP", "LOOPE", "LOOPNE", "JRCXZ", "JECXZ", "JCXZ"):
            pin(1, pick.choice((0, 1, 2, 1 << 32, 1 << 16)))
        if i.is_string_instruction and any(
            i.op_kind(n) in (OpKind.MEMORY_ESRDI, OpKind.MEMORY_SEG_RSI) for n in range(i.op_count)
        ):
            self.repeat(i, name, case)

    def repeat(self, i: Instruction, name: str, case: Case) -> None:
        """Perhaps have a string instruction repeated, so often that it stays where it may go."""
        prefix = self.random.randrange(3)
        if not prefix or name[:4] not in ("MOVS", "STOS", "LODS", "SCAS", "CMPS"):
            return
        i.has_rep_prefix = prefix == 1
        i.has_repne_prefix = prefix == 2
        counts = (0, 1, 2, 3, 17)
        near_an_end = case.flags & 0x400 or case.gpr[7] % PAGE > PAGE - 64
        case.gpr[1] = self.random.choice(counts if near_an_end else (*counts, 600))
        self.fixed.add(1)
