"""Recipes of the instructions that are not simply copied: system, strings, far transfers, odd ones.

Each function makes the recipe of some mnemonics and registers itself in the table that
``Recipes.build`` consults; ``applies`` says which of their instructions it is for, if not all.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ringfence.cpu.state import DS, ES, FS, GS, SS
from ringfence.engine.translate import emit
from ringfence.engine.translate.block import MODE_TSD, gs
from ringfence.engine.translate.emit import R9, R10, R11
from ringfence.engine.translate.recipe import (
    GPR,
    NOTHING,
    SEGMENTS,
    STATUS,
    Piece,
    Recipe,
    Recipes,
    special,
)
from ringfence.engine.translate.tables import (
    DROP,
    EFFECTIVE,
    FIX_ESCAPE,
    LINEAR,
    LOOP,
    NO_ADDRESS,
    PLAIN,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.x86 import (
    Code,
    Instruction,
    MemorySizeExt,
    OpKind,
    Register,
    RegisterExt,
)
from ringfence.memory.strings import CHECKED
from ringfence.memory.xstate import XSAVE, XSAVEC, XSAVEOPT

if TYPE_CHECKING:
    from ringfence.engine.translate.x86 import RegisterType as Reg

KEEP = gs("scratch", 2)
"""Where a value waits while a second memory operand is prepared."""
_TRUNCATE = b"\x45\x89\xc9"  # mov r9d, r9d
_TRUNCATE_16 = b"\x45\x0f\xb7\xc9"  # movzx r9d, r9w
_STORE_R10 = b"\x4d\x89\x11"  # mov [r9], r10
_EA = Piece(emit.gs_store(R9, gs("ea")))
"""The memory operand's address for an effect."""


def _operand_size(i: Instruction) -> int:
    """Operand size in bytes, where it is an attribute of the instruction."""
    return i.op_code().operand_size // 8


def _truncate(register: Reg) -> bytes:
    """Cut R9 to the width of an address that this register is part of."""
    return {8: b"", 4: _TRUNCATE, 2: _TRUNCATE_16}[RegisterExt.size(register)]


def _load_r9(size: int) -> bytes:
    """``mov r9, [r9 + r10]``, zero-extended from 2, 4 or 8 bytes."""
    return {8: emit.LOAD_R9, 4: b"\x47\x8b\x0c\x11", 2: b"\x47\x0f\xb7\x0c\x11"}[size]


def _is_segment(i: Instruction) -> bool:
    return i.op0_kind == OpKind.REGISTER and i.op0_register in SEGMENTS


@special("PUSH", applies=_is_segment)
def _push_segment(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    size = -i.stack_pointer_increment
    return r.effect("fx_push_sreg", op0=SEGMENTS[i.op0_register], op1=size)


@special("POP", applies=lambda i: _is_segment(i) or i.op0_kind == OpKind.MEMORY)
def _pop(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    size = i.stack_pointer_increment
    if i.op0_kind == OpKind.REGISTER:
        return r.effect("fx_pop_sreg", op0=SEGMENTS[i.op0_register], op1=size)
    if r.bits != 64:
        based = i.memory_base == Register.ESP
        return r.effect("fx_pop_memory", _EA, LINEAR, op0=size, op1=int(based))
    load = Piece(emit.mov(R9, R11)) + r.access(size, False, stack=True)
    before = Piece()
    addressing = LINEAR
    if i.memory_base in (Register.RSP, Register.ESP):
        # The address is computed with RSP already incremented (SDM vol. 2, POP).
        addressing = EFFECTIVE
        code = emit.lea(R9, R9, disp=size) + _truncate(i.memory_base)
        before = Piece(code + r.to_linear(i.memory_segment, size))
    store = _STORE_R10 if size == 8 else b"\x66\x45\x89\x11"
    code = emit.COMBINE + emit.gs_load(R10, KEEP) + store + r.commit()
    return Recipe(
        PLAIN,
        lead=load + _load_r9(size) + emit.gs_store(R9, KEEP),
        addressing=addressing,
        before=before + r.access(size, True, read=False, stack=r.on_stack(i)),
        op=Piece(code + emit.lea(R11, R11, disp=size)),
        clobbers=True,
    )


@special("LEAVE")
def _leave(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    """With a 16-bit operand, or a 16-bit stack; the others are written natively."""
    if r.bits != 64:
        return r.effect("fx_leave", op0=_operand_size(i))
    before = Piece(emit.mov(R9, 5)) + r.access(2, False, stack=True)
    code = _load_r9(2) + emit.lea(R11, 5, disp=2) + b"\x66\x44\x89\xcd"  # mov bp, r9w
    return Recipe(PLAIN, before=before, op=Piece(code), clobbers=True)


@special("ENTER")
def _enter(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_enter", op0=_operand_size(i), op1=i.immediate16, op2=i.immediate8_2nd)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


@special("CALL", "JMP")
def _far(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if i.op0_kind in (OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32):
        narrow = i.op0_kind == OpKind.FAR_BRANCH16
        return r.effect(
            f"fx_{name.lower()}_far_direct",
            op0=2 if narrow else 4,
            op1=i.far_branch_selector,
            op2=i.far_branch16 if narrow else _signed32(i.far_branch32),
        )
    if i.op0_kind != OpKind.MEMORY:
        return r.emulate()
    size = MemorySizeExt.size(i.memory_size) - 2
    return r.effect("fx_call_far" if name == "CALL" else "fx_jmp_far", _EA, LINEAR, op0=size)


@special("JRCXZ", "JECXZ", "JCXZ", "LOOP", "LOOPE", "LOOPNE")
def _counted(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if r.bits != 64:
        counter = (2 if r.bits == 16 else 4) ^ (6 if 0x67 in raw[:-2] else 0)
        return r.effect(
            "fx_counted", op0=raw[-2] & 3, op1=counter, op2=raw[-1], op3=_operand_size(i)
        )
    # No other prefix: with 66, AMD's CPUs cut the host's own RIP to 16 bits.
    short = (b"\x67" if 0x67 in raw[:-2] else b"") + raw[-2:-1]
    return Recipe(LOOP, reads=i.rflags_read & STATUS, op=Piece(short))


@special("XLATB")
def _xlat(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    code = b"\x44\x0f\xb6\xc8" + emit.lea(R9, 3, R9)  # movzx r9d, al; lea r9, [rbx + r9]
    code += _truncate(i.memory_base) + r.to_linear(i.memory_segment, 1)
    before = Piece(code) + r.access(1, False)
    return Recipe(PLAIN, before=before, op=Piece(b"\x43\x8a\x04\x11"), clobbers=True)


@special("CLZERO")
def _clzero(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    """Zeroes the cache line that RAX points at (AMD APM vol. 3)."""
    move = emit.mov(R9, 0) + (_TRUNCATE if i.code == Code.CLZEROD else b"")
    if i.code == Code.CLZEROW:
        move += _TRUNCATE_16
    align = b"\x49\x83\xe1\xc0"  # and r9, -64
    segment = i.segment_prefix if i.segment_prefix != Register.NONE else Register.DS
    base = align + r.to_linear(segment, 64, True)
    before = Piece(move + base + align) + r.access(64, True, read=False)
    code = emit.gs_store(0, KEEP) + emit.lea(0, R9, R10) + b"\x0f\x01\xfc"
    code += emit.gs_load(0, KEEP) + r.commit()
    return Recipe(PLAIN, before=before, op=Piece(code), clobbers=True)


def _has_bit_offset(i: Instruction) -> bool:
    return i.op0_kind == OpKind.MEMORY and i.op1_kind == OpKind.REGISTER


@special("BT", "BTS", "BTR", "BTC", applies=_has_bit_offset)
def _bit(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    """With a register offset the bit may lie anywhere around the operand (SDM vol. 2, BT)."""
    number, size = GPR[i.op1_register]
    load, host = r.guest(number, R10)
    shift = {2: 4, 4: 5, 8: 6}[size]
    move = {
        8: emit.mov(R10, host) if host != R10 else b"",
        4: bytes((0x4D if host > 7 else 0x4C, 0x63, 0xD0 | host & 7)),
        2: bytes((0x4D if host > 7 else 0x4C, 0x0F, 0xBF, 0xD0 | host & 7)),
    }[size]
    adjust = load + move + b"\x49\xc1\xfa" + bytes((shift,))  # sar r10, shift
    before = Piece(adjust + emit.lea(R9, R9, R10, size))
    parts = [n for n in (i.memory_base, i.memory_index) if n in GPR]
    if parts:
        before = before + _truncate(parts[0])
    elif i.memory_base == Register.EIP or i.memory_displ_size == 4:
        before = before + (_TRUNCATE if r.bits != 64 or i.memory_base == Register.EIP else b"")
    elif i.memory_displ_size == 2:
        before = before + _TRUNCATE_16
    write = name != "BT"
    before = before + r.to_linear(i.memory_segment, size, write)
    mask = load + (emit.mov(R10, host) if host != R10 else b"")
    mask += b"\x41\x83\xe2" + bytes((size * 8 - 1,))  # and r10d, mask
    before = before + r.access(size, write, stack=r.on_stack(i)) + emit.COMBINE + mask
    out = i.copy()
    out.set_op_register(1, {8: Register.R10, 4: Register.R10D, 2: Register.R10W}[size])
    out.segment_prefix = Register.NONE
    out.memory_base, out.memory_index = Register.R9, Register.NONE
    out.memory_displacement = out.memory_displ_size = 0
    flags = i.rflags_modified & STATUS
    return Recipe(
        PLAIN,
        writes=flags,
        kills=flags,
        addressing=EFFECTIVE,
        before=before,
        op=Piece(r.encode(out)),
        after=Piece(r.commit() if write else b""),
        clobbers=True,
    )


_MOFFS = {
    Code.MOV_AL_MOFFS8: (1, False), Code.MOV_AX_MOFFS16: (2, False),
    Code.MOV_EAX_MOFFS32: (4, False), Code.MOV_RAX_MOFFS64: (8, False),
    Code.MOV_MOFFS8_AL: (1, True), Code.MOV_MOFFS16_AX: (2, True),
    Code.MOV_MOFFS32_EAX: (4, True), Code.MOV_MOFFS64_RAX: (8, True),
}  # fmt: skip
"""MOV between the accumulator and an absolute address: size in bytes, whether it writes."""


def _is_system_mov(i: Instruction) -> bool:
    """MOV from or to anything but general registers and memory, or with an absolute address."""
    if i.code in _MOFFS:
        return True
    kinds = [i.op_register(n) for n in (0, 1) if i.op_kind(n) == OpKind.REGISTER]
    return any(register not in GPR for register in kinds)


@special("MOV", applies=_is_system_mov)
def _mov(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if i.code in _MOFFS:
        return _absolute(r, i)
    target = i.op_kind(0) == OpKind.REGISTER and i.op0_register not in GPR
    register = i.op_register(0 if target else 1)
    if register in SEGMENTS:
        if target:
            return _value(r, i, 1, "fx_mov_to_sreg", 1, op0=SEGMENTS[register])
        return _from_segment(r, i, SEGMENTS[register])
    kind, first = ("cr", Register.CR0) if register < Register.DR0 else ("dr", Register.DR0)
    gpr = GPR[i.op_register(1 if target else 0)][0]
    direction = "to" if target else "from"
    return r.effect(f"fx_mov_{direction}_{kind}", op0=gpr, op1=register - first)


def _absolute(r: Recipes, i: Instruction) -> Recipe:
    size, write = _MOFFS[i.code]
    before = emit.mov_imm64(R9, i.memory_displacement)
    before += r.to_linear(i.memory_segment, size, write)
    prefix = b"\x66" if size == 2 else b""
    opcode = (0x88 if write else 0x8A) + (size > 1)
    return Recipe(
        PLAIN,
        before=Piece(before) + r.access(size, write, read=not write),
        op=Piece(prefix + bytes((0x4B if size == 8 else 0x43, opcode, 0x04, 0x11))),
        after=Piece(r.commit() if write else b""),
        clobbers=True,
    )


def _from_segment(r: Recipes, i: Instruction, segment: int) -> Recipe:
    selector = gs("seg_selector", segment)
    if i.op0_kind == OpKind.MEMORY:
        before = r.access(2, True, read=False, stack=r.on_stack(i)) + emit.COMBINE
        code = emit.gs_load_zx16(R10, selector) + b"\x66\x45\x89\x11" + r.commit()
        return Recipe(PLAIN, addressing=LINEAR, before=before, op=Piece(code), clobbers=True)
    number, size = GPR[i.op0_register]
    code = emit.gs_load_zx16(R9, selector)
    if size == 2:
        load, host = r.guest(number, R10)
        rex = 0x44 | host >> 3
        code = load + code + bytes((0x66, rex, 0x89, 0xC8 | host & 7))
        code += r.set_guest(number, host) if load else b""
    else:
        code += r.set_guest(number, R9)
    return Recipe(PLAIN, op=Piece(code))


def _value(r: Recipes, i: Instruction, operand: int, effect: str, slot: int, **op: int) -> Recipe:
    """An effect that takes a 16-bit register or memory operand's value in ``op[slot]``."""
    addressing = NO_ADDRESS
    if i.op_kind(operand) == OpKind.MEMORY:
        addressing = LINEAR
        piece = r.access(2, False, stack=r.on_stack(i)) + _load_r9(2)
    else:
        load, host = r.guest(GPR[i.op_register(operand)][0], R9)
        rex = 0x45 if host > 7 else 0x44
        piece = Piece(load + bytes((rex, 0x0F, 0xB7, 0xC8 | host & 7)))  # movzx r9d, host16
    return r.effect(effect, piece + emit.gs_store(R9, gs("op", slot)), addressing, **op)


@special("LLDT", "LTR", "VERR", "VERW", "LMSW")
def _selector(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return _value(r, i, 0, f"fx_{name.lower()}", 0)


@special("LAR", "LSL")
def _rights(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    number, size = GPR[i.op0_register]
    return _value(r, i, 1, f"fx_{name.lower()}", 2, op0=number, op1=size)


@special("SMSW", "SLDT", "STR")
def _store_system(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if i.op0_kind == OpKind.MEMORY:
        return r.effect(f"fx_{name.lower()}_mem", _EA, LINEAR)
    number, size = GPR[i.op0_register]
    return r.effect(f"fx_{name.lower()}", op0=number, op1=size)


@special("LGDT", "LIDT", "SGDT", "SIDT", "INVLPG")
def _table(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect(f"fx_{name.lower()}", _EA, LINEAR, op0=_operand_size(i))


@special("INVPCID")
def _invpcid(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_invpcid", _EA, LINEAR, op0=GPR[i.op0_register][0])


@special("LDS", "LES", "LFS", "LGS", "LSS")
def _far_pointer(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    number, size = GPR[i.op0_register]
    segment = {"LDS": DS, "LES": ES, "LSS": SS, "LFS": FS, "LGS": GS}[name]
    return r.effect("fx_load_far_pointer", _EA, LINEAR, op0=segment, op1=number, op2=size)


@special("RDFSBASE", "RDGSBASE", "WRFSBASE", "WRGSBASE")
def _base(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    number, size = GPR[i.op0_register]
    segment = FS if name[2] == "F" else GS
    return r.effect(
        "fx_fsgsbase", op0=number, op1=size, op2=segment, op3=int(name.startswith("WR"))
    )


@special("INT", "INT3", "INT1")
def _interrupt(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if name == "INT1":
        return r.effect("fx_int1")
    if name == "INT3":
        return r.effect("fx_int", op0=3, op1=0)
    return r.effect("fx_int", op0=i.immediate8, op1=1)


@special("IRET", "IRETD", "IRETQ")
def _iret(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_iret", op0={"IRET": 2, "IRETD": 4, "IRETQ": 8}[name])


@special("SYSRET", "SYSRETQ")
def _sysret(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_sysret", op0=int(name == "SYSRETQ"))


@special("RETF")
def _retf(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_ret_far", op0=_operand_size(i), op1=i.immediate16 if i.op_count else 0)


@special("PUSHF", "PUSHFD", "PUSHFQ", "POPF", "POPFD", "POPFQ")
def _flags(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    effect = "fx_pushf" if name.startswith("PUSH") else "fx_popf"
    return r.effect(effect, op0=_operand_size(i))


@special("IN", "OUT")
def _port(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    data, port = (0, 1) if name == "IN" else (1, 0)
    size = GPR[i.op_register(data)][1]
    number = i.immediate8 if i.op_kind(port) == OpKind.IMMEDIATE8 else 0x10000
    return r.effect(f"fx_{name.lower()}", op0=size, op1=number)


_STRING = {"MOVS": 0, "STOS": 1, "LODS": 2, "SCAS": 3, "CMPS": 4}


_NARROW = {
    OpKind.MEMORY_SEG_ESI: 1, OpKind.MEMORY_ESEDI: 1, OpKind.MEMORY_SEG_EDI: 1,
    OpKind.MEMORY_SEG_SI: 2, OpKind.MEMORY_ESDI: 2, OpKind.MEMORY_SEG_DI: 2,
}  # fmt: skip
"""Operands of string instructions with 32-bit and with 16-bit addresses."""
_SOURCES = {OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_SI}


def _string_flags(r: Recipes, i: Instruction) -> int:
    """As ``memory.strings`` wants them."""
    kinds = {i.op_kind(n) for n in range(i.op_count)}
    narrow = max(_NARROW.get(kind, 0) for kind in kinds)
    segment = SEGMENTS[i.memory_segment] if kinds & _SOURCES else 0
    if r.bits != 64:
        return narrow | (segment + 1) << 8 | CHECKED
    return narrow | (segment + 1) << 8 if segment in (FS, GS) else narrow


def _repeat(i: Instruction) -> int:
    return 2 if i.has_repne_prefix else 1 if i.has_rep_prefix else 0


@special(
    *(f"{stem}{suffix}" for stem in _STRING for suffix in "BWDQ"),
    applies=lambda i: i.is_string_instruction,  # MOVSD and CMPSD are vector instructions too
)
def _string(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    size = {"B": 1, "W": 2, "D": 4, "Q": 8}[name[-1]]
    flags = _string_flags(r, i)
    recipe = r.effect("fx_string", op0=size, op1=_STRING[name[:-1]], op2=_repeat(i), op3=flags)
    whole = not (flags or r.slow or r.step)
    if name[:4] in ("MOVS", "STOS") and _repeat(i) and whole:
        return _block(r, recipe, name[:4] == "MOVS", size)
    return recipe


def _block(r: Recipes, whole: Recipe, move: bool, size: int) -> Recipe:
    """REP MOVS and REP STOS that stay in one page a side: the host's own, on host addresses.

    Everything else (DF set, page crossed, TLB miss, nothing to do) escapes to the effect. A
    side is looked up by its last byte; that the first is in the same page follows from the
    offset found, which must be at least the length.
    """
    shift = size.bit_length() - 1
    first, final = gs("scratch", 2), gs("scratch", 3)
    code = Piece(emit.gs_compare_byte(gs("flag_df"), 0) + b"\x0f\x85") + _escape()
    code = code + Piece(b"\x48\x85\xc9\x0f\x84") + _escape()  # test rcx, rcx; jz
    # A count of more than a page would wrap the sums below.
    code = (
        code + Piece(b"\x48\x81\xf9" + struct.pack("<i", 4096 >> shift) + b"\x0f\x87") + _escape()
    )
    sides = ((7, True), (6, False)) if move else ((7, True),)
    for register, write in sides:
        code = code + emit.lea(R9, register, 1, size, -1)
        check, position = emit.tlb_check(1, write, r.user)
        code = code + Piece(check, ((position, FIX_ESCAPE, 0, 0, 0),))
        code = code + (
            b"\x4d\x01\xca"  # add r10, r9: host address of the last byte
            b"\x49\xff\xc1"  # inc r9
            + (b"\x49\xc1\xe9" + bytes((shift,)) if shift else b"")  # shr r9, shift
            + b"\x49\x39\xc9\x0f\x82"  # cmp r9, rcx; jb
        )
        code = code + _escape()
        code = code + (
            emit.mov(R9, 1)
            + (b"\x49\xc1\xe1" + bytes((shift,)) if shift else b"")  # shl r9, shift
            + b"\x4d\x29\xca"  # sub r10, r9
            + b"\x49\xff\xc2"  # inc r10: host address of the first byte
        )
        if write and move:
            code = code + emit.gs_store(R10, first)
    prefix = {1: b"", 2: b"\x66", 4: b"", 8: b""}[size] + b"\xf3" + (b"\x48" if size == 8 else b"")
    if move:
        op = (
            emit.lea(R9, 6, 1, size)
            + emit.gs_store(R9, final)
            + emit.lea(R9, 7, 1, size)
            + emit.mov(6, R10)
            + emit.gs_load(7, first)
            + prefix
            + (b"\xa4" if size == 1 else b"\xa5")
            + emit.mov(7, R9)
            + emit.gs_load(6, final)
        )
    else:
        op = (
            emit.lea(R9, 7, 1, size)
            + emit.mov(7, R10)
            + prefix
            + (b"\xaa" if size == 1 else b"\xab")
            + emit.mov(7, R9)
        )
    return Recipe(
        PLAIN,
        before=code,
        op=Piece(op),
        clobbers=True,
        effect=whole.effect,
        operands=whole.before.code,
    )


def _escape() -> Piece:
    """The 32-bit displacement of a conditional jump to the effect."""
    return Piece(b"\0\0\0\0", ((0, FIX_ESCAPE, 0, 0, 0),))


@special("INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD")
def _port_string(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    size = {"B": 1, "W": 2, "D": 4}[name[-1]]
    return r.effect(
        "fx_port_string",
        op0=size,
        op1=int(name[0] == "O"),
        op2=_repeat(i),
        op3=_string_flags(r, i),
    )


@special("SWAPGS")
def _swapgs(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if r.cpl:
        return r.effect("fx_swapgs")
    return Recipe(PLAIN, op=Piece(emit.swapgs()))


@special("RDTSC", "RDTSCP")
def _rdtsc(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    if r.mode & MODE_TSD:
        return r.effect(f"fx_{name.lower()}")
    code = emit.rdtsc(r.scaled_tsc) if name == "RDTSC" else emit.rdtscp(r.scaled_tsc)
    return Recipe(PLAIN, before=Piece(code), clobbers=True)


_SAVES = {"XSAVE": XSAVE, "XSAVEOPT": XSAVEOPT, "XSAVEC": XSAVEC}


@special("XRSTOR", "XRSTOR64", *_SAVES, *(f"{name}64" for name in _SAVES))
def _xsave(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    # All vector state goes to the block first; the effect moves it to or from guest memory.
    before = _EA + emit.gs_call(THUNK["save_vector"])
    if name.startswith("XRSTOR"):
        return r.effect("fx_xrstor", before, LINEAR)
    return r.effect("fx_xsave", before, LINEAR, op0=_SAVES[name.removesuffix("64")])


@special("PAUSE")
def _pause(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    """Copied; where others may be waited for, it counts, too (see `spinning`)."""
    if r.alone:
        return Recipe(PLAIN, op=Piece(_PAUSE))
    count = emit.gs_decrement(gs("pauses_left"))
    return Recipe(
        PLAIN,
        before=Piece(count + b"\x0f\x88") + _escape(),  # js
        op=Piece(_PAUSE),
        clobbers=True,
        effect="fx_pause",
    )


@special(*NOTHING)
def _nothing(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return Recipe(DROP)


@special("PUSHA", "PUSHAD", "POPA", "POPAD")
def _all_registers(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_pusha" if name.startswith("PUSH") else "fx_popa", op0=_operand_size(i))


@special("DAA", "DAS", "AAA", "AAS")
def _decimal(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect(f"fx_{name[:2].lower()}a", op0=int(name[2] == "S"))


@special("AAM", "AAD")
def _decimal_base(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect(f"fx_{name.lower()}", op0=i.immediate8)


@special("BOUND")
def _bound(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    number, size = GPR[i.op0_register]
    return r.effect("fx_bound", _EA, LINEAR, op0=number, op1=size)


@special("ARPL")
def _arpl(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    number = GPR[i.op1_register][0]
    if i.op0_kind == OpKind.MEMORY:
        return r.effect("fx_arpl", _EA, LINEAR, op0=0, op1=number)
    return r.effect("fx_arpl", op0=GPR[i.op0_register][0] + 1, op1=number)


_PAUSE = b"\xf3\x90"
_PLAIN_EFFECTS = {
    "INTO": "fx_into", "SALC": "fx_salc",
    "SYSCALL": "fx_syscall", "SYSENTER": "fx_sysenter", "SYSEXIT": "fx_sysexit",
    "SYSEXITQ": "fx_sysexit", "RDMSR": "fx_rdmsr", "WRMSR": "fx_wrmsr", "CPUID": "fx_cpuid",
    "HLT": "fx_hlt", "CLTS": "fx_clts", "WBINVD": "fx_wbinvd", "INVD": "fx_wbinvd",
    "WBNOINVD": "fx_wbinvd", "XGETBV": "fx_xgetbv", "XSETBV": "fx_xsetbv",
    "RDPMC": "fx_rdpmc", "UD0": "fx_ud", "UD1": "fx_ud", "UD2": "fx_ud", "RSM": "fx_ud",
    "MONITOR": "fx_ud", "MWAIT": "fx_ud", "CLAC": "fx_ud", "STAC": "fx_ud", "GETSEC": "fx_ud",
}  # fmt: skip


@special(*_PLAIN_EFFECTS)
def _plain_effect(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect(_PLAIN_EFFECTS[name])


@special("VMCALL", "VMMCALL")
def _hypercall(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_vmcall", op0=int(name == "VMMCALL"))


@special("RDPID")
def _rdpid(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe:
    return r.effect("fx_rdpid", op0=GPR[i.op0_register][0])
