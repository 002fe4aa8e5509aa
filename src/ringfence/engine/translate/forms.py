"""What iced-x86 knows of an opcode, as a `Form`; Python's only part in ordinary instructions.

The native decoder asks once for each key (see ``decoding``). The answer must hold for every
instruction with that key: whatever depends on bits that are not in it (which registers, which
prefixes about segments) is either the native side's to see to, or makes the form F_RAW.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.engine.translate.block import (
    MODE_AVX,
    MODE_AVX512,
    MODE_LONG,
    MODE_NO_FPU,
    MODE_SSE,
    MODE_STACK32,
    bits_of,
)
from ringfence.engine.translate.decoding import (
    KEY_EVEX,
    KEY_REG_SHIFT,
    KEY_REGISTERS,
    KEY_VEX,
    no_modrm,
)
from ringfence.engine.translate.masking import masked_fields
from ringfence.engine.translate.recipe import (
    ALWAYS,
    FEATURE_NAME,
    GPR,
    IMMEDIATES,
    MNEMONIC_NAME,
    NEAR_BRANCHES,
    NO_VECTOR_STATE,
    NOTHING,
    PARTIAL_VECTOR,
    READS,
    SPECIAL,
    STATUS,
    WRITES,
)
from ringfence.engine.translate.tables import (
    F_CALL,
    F_CALL_MEMORY,
    F_CALL_REGISTER,
    F_CLI,
    F_COPY,
    F_DIRECTION,
    F_DROP,
    F_GROUP,
    F_INVALID,
    F_JCC,
    F_JMP,
    F_JMP_MEMORY,
    F_JMP_REGISTER,
    F_LEA,
    F_LEAVE,
    F_POP,
    F_PUSH,
    F_PUSH_IMMEDIATE,
    F_PUSH_MEMORY,
    F_RAW,
    F_RET,
    F_STI,
    LOW_INC,
    MOVE_ADD,
    MOVE_DEC,
    MOVE_INC,
    MOVE_SUB,
    ROLE_READ,
    ROLE_SIZE,
    ROLE_WRITE,
)
from ringfence.engine.translate.x86 import (
    Code,
    Decoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MandatoryPrefix,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpCodeOperandKind,
    OpKind,
)

_REG = {
    OpCodeOperandKind.R8_REG, OpCodeOperandKind.R16_REG, OpCodeOperandKind.R32_REG,
    OpCodeOperandKind.R64_REG, OpCodeOperandKind.R16_REG_MEM, OpCodeOperandKind.R32_REG_MEM,
    OpCodeOperandKind.R64_REG_MEM,
}  # fmt: skip
_RM = {
    OpCodeOperandKind.R8_OR_MEM, OpCodeOperandKind.R16_OR_MEM, OpCodeOperandKind.R32_OR_MEM,
    OpCodeOperandKind.R64_OR_MEM, OpCodeOperandKind.R32_OR_MEM_MPX,
    OpCodeOperandKind.R64_OR_MEM_MPX, OpCodeOperandKind.R16_RM, OpCodeOperandKind.R32_RM,
    OpCodeOperandKind.R64_RM,
}  # fmt: skip
_LOW = {
    OpCodeOperandKind.R8_OPCODE, OpCodeOperandKind.R16_OPCODE, OpCodeOperandKind.R32_OPCODE,
    OpCodeOperandKind.R64_OPCODE,
}  # fmt: skip
_VVVV = {OpCodeOperandKind.R32_VVVV, OpCodeOperandKind.R64_VVVV}
_VVVV_VECTOR = {
    OpCodeOperandKind.K_VVVV, OpCodeOperandKind.XMM_VVVV, OpCodeOperandKind.YMM_VVVV,
    OpCodeOperandKind.ZMM_VVVV, OpCodeOperandKind.XMMP3_VVVV, OpCodeOperandKind.ZMMP3_VVVV,
}  # fmt: skip
_IMMEDIATE_BYTES = {
    OpCodeOperandKind.IMM8: 1, OpCodeOperandKind.IMM8SEX16: 1, OpCodeOperandKind.IMM8SEX32: 1,
    OpCodeOperandKind.IMM8SEX64: 1, OpCodeOperandKind.IMM16: 2, OpCodeOperandKind.IMM32: 4,
    OpCodeOperandKind.IMM32SEX64: 4, OpCodeOperandKind.IMM64: 8, OpCodeOperandKind.BR64_1: 1,
    OpCodeOperandKind.BR64_4: 4, OpCodeOperandKind.XBEGIN_2: 2, OpCodeOperandKind.XBEGIN_4: 4,
    OpCodeOperandKind.XMM_IS4: 1, OpCodeOperandKind.YMM_IS4: 1,
    OpCodeOperandKind.BR16_1: 1, OpCodeOperandKind.BR32_1: 1,
    OpCodeOperandKind.BR16_2: 2, OpCodeOperandKind.BR32_4: 4,
    OpCodeOperandKind.FARBR2_2: 4, OpCodeOperandKind.FARBR4_2: 6,
}  # fmt: skip
_SHIFTS = {"SHL", "SHR", "SAR", "SAL", "ROL", "ROR", "RCL", "RCR", "SHLD", "SHRD"}
_MOVES = {
    Mnemonic.ADD: MOVE_ADD, Mnemonic.SUB: MOVE_SUB, Mnemonic.INC: MOVE_INC, Mnemonic.DEC: MOVE_DEC,
}  # fmt: skip
_BRANCHES = {
    FlowControl.CONDITIONAL_BRANCH: F_JCC,
    FlowControl.UNCONDITIONAL_BRANCH: F_JMP,
    FlowControl.CALL: F_CALL,
}
_TRANSFERS = {
    F_CALL, F_JMP, F_JCC, F_RET, F_CALL_REGISTER, F_CALL_MEMORY, F_JMP_REGISTER, F_JMP_MEMORY,
    F_LEAVE,
}  # fmt: skip
_SHORT_INC = {Code.INC_R16, Code.INC_R32, Code.DEC_R16, Code.DEC_R32}
_ODD = {(1, 0x01), (1, 0x1A), (1, 0x1B), (1, 0x1E), (0, 0x8C), (0, 0x8E)} | {
    (1, n) for n in range(0x20, 0x24)
}
"""Opcodes (map, byte) whose meaning hangs on bits that no key has: segments, CR3 and CR1, …"""
_PADDING = bytes((2,)) * 16
"""As an immediate, a count that changes all flags that shifts ever do."""
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")


class Forms:
    """Answers what becomes of an opcode.

    Parameters
    ----------
    offers : callable
        Whether the virtual CPU has a feature, by iced-x86's name.
    """

    def __init__(self, offers: Callable[[str], bool]) -> None:
        self.offers = offers
        self.info = InstructionInfoFactory()

    def describe(self, raw: bytes, key: int, mode: int) -> dict[str, int]:
        """Fields of the `Form` for the key of an instruction that begins with ``raw``."""
        where = (key >> 8 & 3, key & 0xFF)
        odd = where in _ODD and not key & KEY_VEX
        samples = [(self.decode(data, mode), data) for data in _samples(raw, key, mode)]
        valid = [i for i, _ in samples if not i.is_invalid]
        if not valid and not odd:
            return {"kind": F_INVALID}
        group = any(i.op_code().group_index >= 0 for i in valid)
        if group and not key >> KEY_REG_SHIFT & 0xF and not odd:
            return {"kind": F_GROUP}
        found = {"kind": F_RAW, "immediate": max((_immediate(i) for i in valid), default=0)}
        found["memory_size"] = max((MemorySizeExt.size(i.memory_size) for i in valid), default=0)
        if key & KEY_EVEX and not key & KEY_REGISTERS:
            found["scale"] = self.scale(next(data for i, data in samples if not i.is_invalid))
        if odd or any(i.op_code().op_code > 0xFF for i in valid):
            return found
        i = valid[0]
        name = MNEMONIC_NAME[i.mnemonic]
        effect = self.unavailable(i, mode)
        if effect == "fx_ud":
            return {"kind": F_INVALID}
        if effect:
            return found
        kind = self.kind(i, name, mode)
        if kind == F_RAW:
            return found
        found["kind"] = kind
        del found["memory_size"]
        for sample in valid:
            for field, value in self.operands(sample).items():
                found[field] = found.get(field, 0) | value
        if kind in _TRANSFERS:
            found["operand_size"] = i.op_code().operand_size // 8 or bits_of(mode) // 8
        opcode = i.op_code()
        found["prefix66"] = int(
            opcode.mandatory_prefix == MandatoryPrefix.P66 or opcode.operand_size == 16
        )
        if i.code in _SHORT_INC:
            found["low"] = LOW_INC
        return found | self.flags(valid[-1], name)

    @staticmethod
    def decode(data: bytes, mode: int) -> Instruction:
        """The instruction that ``data`` begins with."""
        return Decoder(bits_of(mode), data + _PADDING, ip=0).decode()

    def scale(self, raw: bytes) -> int:
        """log2 of what an EVEX instruction multiplies 8-bit displacements by."""
        at = raw.index(0x62) + 5
        modrm = bytes((0x40 | raw[at] & 0x38 | 4, 0x20, 1))  # [rax + 1], or with a vector as index
        return self.decode(raw[:at] + modrm, MODE_LONG).memory_displacement.bit_length() - 1

    def kind(self, i: Instruction, name: str, mode: int) -> int:
        """Kind of form of a valid instruction."""
        flow = i.flow_control
        first = i.op_kind(0) if i.op_count else None
        if first in NEAR_BRANCHES and name not in SPECIAL:
            return _BRANCHES.get(flow, F_RAW)
        memory = first == OpKind.MEMORY
        if name in ("CALL", "JMP"):
            if first in NEAR_BRANCHES:
                return F_CALL if name == "CALL" else F_JMP
            if memory and (i.is_call_near_indirect or i.is_jmp_near_indirect):
                return F_CALL_MEMORY if name == "CALL" else F_JMP_MEMORY
            if first == OpKind.REGISTER:
                return F_CALL_REGISTER if name == "CALL" else F_JMP_REGISTER
            return F_RAW
        if name == "RET":
            return F_RET
        if name in ("PUSH", "POP"):
            if first == OpKind.REGISTER:
                if i.op0_register not in GPR:
                    return F_RAW
                return F_PUSH if name == "PUSH" else F_POP
            if memory:
                return F_PUSH_MEMORY if name == "PUSH" else F_RAW
            return F_PUSH_IMMEDIATE
        if i.code == Code.LEAVEQ or (i.code == Code.LEAVED and mode & MODE_STACK32):
            return F_LEAVE
        simple = {"CLI": F_CLI, "STI": F_STI, "CLD": F_DIRECTION, "STD": F_DIRECTION}.get(name)
        if simple is not None:
            return simple
        if name in NOTHING:
            return F_DROP
        special = SPECIAL.get(name)
        if special is not None and special.applies(i):
            return F_RAW
        if flow != FlowControl.NEXT or i.is_vsib or name in PARTIAL_VECTOR:
            return F_RAW
        return self.ordinary(i, name)

    def ordinary(self, i: Instruction, name: str) -> int:
        """An instruction without a recipe of its own: copied, unless its operands forbid."""
        info = self.info.info(i)
        memory = -1
        for n in range(i.op_count):
            kind = i.op_kind(n)
            if kind == OpKind.MEMORY:
                memory = n
            elif kind != OpKind.REGISTER and kind not in IMMEDIATES:
                return F_RAW
        if len(info.used_memory()) > (memory >= 0):
            return F_RAW  # memory that no operand shows must not be taken for the host's
        if memory < 0:
            return F_COPY
        if info.op_access(memory) in (OpAccess.NO_MEM_ACCESS, OpAccess.NONE):
            return F_LEA if name == "LEA" else F_DROP
        if MemorySizeExt.size(i.memory_size) == 0:
            return F_RAW
        return F_COPY

    def operands(self, i: Instruction) -> dict[str, int]:
        """What the operand fields are."""
        info = self.info.info(i)
        opcode = i.op_code()
        found = {"operand_size": abs(i.stack_pointer_increment)}
        explicit: set[int] = set()
        for n in range(i.op_count):
            encoding = opcode.op_kind(n)
            kind = i.op_kind(n)
            access = info.op_access(n)
            role = (ROLE_WRITE if access in WRITES else 0) | (ROLE_READ if access in READS else 0)
            if encoding in _VVVV_VECTOR:
                found["vvvv_used"] = 1
            if kind == OpKind.MEMORY:
                if access not in (OpAccess.NO_MEM_ACCESS, OpAccess.NONE):
                    size = MemorySizeExt.size(i.memory_size)
                    role |= ROLE_READ if access == OpAccess.COND_WRITE else 0
                    found |= {"memory_access": role, "memory_size": size}
                    found |= masked_fields(i, n)
                continue
            if kind != OpKind.REGISTER or i.op_register(n) not in GPR:
                continue
            number, size = GPR[i.op_register(n)]
            role |= size * ROLE_SIZE
            if access != OpAccess.WRITE:
                role |= ROLE_READ
            if encoding in _REG:
                found["reg_role"] = role
            elif encoding in _RM:
                found["rm_role"] = role
            elif encoding in _LOW:
                found |= {"rm_role": role, "low": 1}
            elif encoding in _VVVV:
                found |= {"vvvv_role": role, "vvvv_used": 1}
            else:
                continue
            explicit.add(number)
        memory = {r for r in (i.memory_base, i.memory_index) if r in GPR}
        implicit = written = 0
        for entry in info.used_registers():
            if entry.register in GPR and entry.register not in memory:
                number = GPR[entry.register][0]
                if number not in explicit:
                    implicit |= 1 << number
                    written |= (1 << number) if entry.access in WRITES else 0
        return found | {"implicit": implicit, "implicit_written": written}

    def flags(self, i: Instruction, name: str) -> dict[str, int]:
        """What the instruction does to the status flags, and by how much it moves a register."""
        writes = i.rflags_modified & STATUS
        counted = kills = 0
        if name not in _SHIFTS:
            kills = writes
        elif i.op_count > 1 and i.op_kind(1) == OpKind.IMMEDIATE8:
            # A count of zero leaves the flags as they were; shifts by one have no such byte.
            kills = writes
            counted = int(i.op_code().op_kind(1) != OpCodeOperandKind.IMM8_CONST_1)
        found = {
            "reads": i.rflags_read & STATUS,
            "writes": writes,
            "kills": kills,
            "counted": counted,
        }
        move = _MOVES.get(i.mnemonic)
        if move and (move in (MOVE_INC, MOVE_DEC) or i.op_kind(1) in IMMEDIATES):
            found["move"] = move
        return found

    def unavailable(self, i: Instruction, mode: int) -> str:
        """The effect to use instead where mode or CPU model rule the instruction out."""
        name = MNEMONIC_NAME[i.mnemonic]
        features = [FEATURE_NAME[f] for f in i.cpuid_features()]
        if features and not all(self.offers(f) for f in features):
            return "" if name in ALWAYS else "fx_ud"
        vector = any(
            f.startswith(("SSE", "SSSE", "AES", "PCLMUL", "GFNI", "SHA")) for f in features
        )
        avx = any(f.startswith(("AVX", "FMA", "F16C", "VAES", "VPCLMUL")) for f in features)
        avx512 = any(f.startswith("AVX512") for f in features)
        legacy = name == "WAIT" or any(f.startswith(("FPU", "MMX", "FXSR")) for f in features)
        if name in NO_VECTOR_STATE:
            return ""
        if (avx and not mode & MODE_AVX) or (avx512 and not mode & MODE_AVX512):
            return "fx_ud"
        if vector and not avx and not mode & MODE_SSE:
            return "fx_ud"
        if (avx or vector or legacy) and mode & MODE_NO_FPU:
            return "fx_nm"
        return ""


def _immediate(i: Instruction) -> int:
    """Bytes behind opcode, ModRM and displacement."""
    opcode = i.op_code()
    kinds = [opcode.op_kind(n) for n in range(opcode.op_count)]
    if OpCodeOperandKind.MEM_OFFS in kinds:
        return i.memory_displ_size
    return sum(_IMMEDIATE_BYTES.get(kind, 0) for kind in kinds)


def _samples(raw: bytes, key: int, mode: int) -> list[bytes]:
    """Instructions with the same key: as it came, and with other operands.

    One of them is valid if any is, and each implicit operand is one that some sample doesn't name.
    """
    start = 0
    while raw[start] in _PREFIXES or (mode & MODE_LONG and raw[start] & 0xF0 == 0x40):
        start += 1
    made = [raw]
    vex = {0xC4: 3, 0xC5: 2, 0x62: 4}.get(raw[start], 0) if key & KEY_VEX else 0
    if vex == 4:
        opcode = start + 4
        low, high = raw[start + 2], raw[start + 3]
        for vvvv in (0x78, 0x48):  # not used; RSI, XMM6
            made.append(raw[: start + 2] + bytes((low & 0x87 | vvvv, high | 8)) + raw[opcode:])
    elif vex:
        at = start + vex - 1
        made.append(raw[:at] + bytes((raw[at] | 0x78,)) + raw[at + 1 :])  # vvvv not used
        made.append(raw[:at] + bytes((raw[at] & 0x87 | 0x48,)) + raw[at + 1 :])  # RSI, XMM6
        opcode = start + vex
    else:
        opcode = start + (0, 1, 2, 2)[key >> 8 & 3]
    one, two = no_modrm()
    if key >> 8 & 3 in (0, 1) and not vex and (key & 0xFF) in (one, two)[key >> 8 & 3]:
        return made
    registers = 0xC0 if key & KEY_REGISTERS else 0
    group = key >> KEY_REG_SHIFT & 0xF
    memory = (5, 4) if vex and key >> 8 & 3 == 2 else (5,)  # gathers need a SIB byte
    others = []
    for data in made:
        for reg in (group - 1,) if group else range(8):
            for rm in (3, 6) if registers else memory:
                others.append(data[: opcode + 1] + bytes((registers | reg << 3 | rm,)) + _PADDING)
    return made + others
