"""Recipes of the instructions that are not simply copied: stack, control flow, system, strings.

Each function makes the recipe of some mnemonics and registers itself in the table that
``Recipes.build`` consults; one that returns None leaves the instruction to the generic way.
"""

from __future__ import annotations

import struct

from ringfence.cpu.state import FS, GS
from ringfence.engine.translate import emit
from ringfence.engine.translate.block import MODE_TSD, SLOW_READ, SLOW_STACK, SLOW_WRITE, gs
from ringfence.engine.translate.emit import R9, R10, R11
from ringfence.engine.translate.recipe import (
    CALL,
    DROP,
    ESCAPE,
    GPR,
    INDIRECT,
    JCC,
    JMP,
    LOOP,
    PLAIN,
    STATUS,
    STI,
    Piece,
    Recipe,
    Recipes,
    Shared,
    special,
)
from ringfence.engine.translate.x86 import Code, Instruction, MemorySizeExt, OpKind, Register

KEEP = gs("scratch", 2)
"""Where a value waits while a second memory operand is prepared."""
_TRUNCATE = b"\x45\x89\xc9"  # mov r9d, r9d
_STORE_R10 = b"\x4d\x89\x11"  # mov [r9], r10
_SEGMENT = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip


def _operand_size(i: Instruction, raw: bytes) -> int:
    """Operand size of an instruction without operands that show it (8, 4 or 2 bytes)."""
    prefixes = raw[: len(raw) - 1]
    if any(0x48 <= b <= 0x4F for b in prefixes[-2:]):
        return 8
    return 2 if 0x66 in prefixes else 4


def _on_stack(distance: int, size: int, write: bool, address: bytes, base: int = 4) -> Shared:
    """A stack slot at a constant distance from RSP (or RBP)."""
    kind = size | SLOW_STACK | (SLOW_WRITE if write else SLOW_READ)
    return Shared(base, distance, size, write, kind, Piece(address))


def _pushed_slot(size: int = 8) -> Shared:
    return _on_stack(-size, size, True, emit.lea(R9, R11, disp=-size))


def _push(r: Recipes, size: int = 8) -> Piece:
    """R9 + R10 = where a push goes."""
    return Piece(emit.lea(R9, R11, disp=-size)) + r.access(size, True, read=False, stack=True)


def _pushed(r: Recipes, size: int = 8) -> bytes:
    return r.commit() + emit.lea(R11, R11, disp=-size)


def _store_register(register: int, size: int) -> bytes:
    """``mov [r9 + r10], register`` of 2, 4 or 8 bytes."""
    rex = 0x43 | (register >> 3) << 2 | (8 if size == 8 else 0)
    prefix = b"\x66" if size == 2 else b""
    return prefix + bytes((rex, 0x89, 0x04 | (register & 7) << 3, 0x11))


def _load_r9(size: int) -> bytes:
    """``mov r9, [r9 + r10]``, zero-extended from 2, 4 or 8 bytes."""
    return {8: emit.LOAD_R9, 4: b"\x47\x8b\x0c\x11", 2: b"\x47\x0f\xb7\x0c\x11"}[size]


@special("PUSH")
def _push_any(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    size = -i.stack_pointer_increment
    recipe = Recipe(i.len, PLAIN, clobbers=True)
    kind = i.op0_kind
    if kind == OpKind.REGISTER:
        if i.op0_register in _SEGMENT:
            return r.effect(i, "fx_push_sreg", op0=_SEGMENT[i.op0_register], op1=size)
        number = GPR[i.op0_register][0]
        recipe.before = _push(r, size)
        recipe.shared = _pushed_slot(size)
        load, host = r.guest(number, R10)
        if load:
            code = emit.COMBINE + load
            code += _STORE_R10 if size == 8 else b"\x66\x45\x89\x11"
        else:
            code = _store_register(host, size)
        recipe.op = Piece(code + _pushed(r, size))
    elif kind == OpKind.MEMORY:
        recipe.before = (
            r.address(i)
            + r.access(size, False, stack=r.on_stack(i))
            + _load_r9(size)
            + emit.gs_store(R9, KEEP)
            + _push(r, size)
        )
        store = _STORE_R10 if size == 8 else b"\x66\x45\x89\x11"
        recipe.op = Piece(emit.COMBINE + emit.gs_load(R10, KEEP) + store + _pushed(r, size))
    else:
        value = i.immediate(0) & (1 << 64) - 1
        recipe.before = _push(r, size)
        recipe.shared = _pushed_slot(size)
        if size == 8:
            store = b"\x4b\xc7\x04\x11" + struct.pack("<I", value & 0xFFFFFFFF)
        else:
            store = b"\x66\x43\xc7\x04\x11" + struct.pack("<H", value & 0xFFFF)
        recipe.op = Piece(store + _pushed(r, size))
    return recipe


@special("POP")
def _pop_any(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    size = i.stack_pointer_increment
    recipe = Recipe(i.len, PLAIN, clobbers=True)
    load = Piece(emit.mov(R9, R11)) + r.access(size, False, stack=True)
    if i.op0_kind == OpKind.REGISTER:
        if i.op0_register in _SEGMENT:
            return r.effect(i, "fx_pop_sreg", op0=_SEGMENT[i.op0_register], op1=size)
        number = GPR[i.op0_register][0]
        recipe.before = load
        recipe.shared = _on_stack(0, size, False, emit.mov(R9, R11))
        up = emit.lea(R11, R11, disp=size)
        host = r.home[number]
        if size == 2 and host < 0:
            at = r.slot(number)
            code = emit.gs_load(R10, at) + b"\x66\x45\x89\xca" + emit.gs_store(R10, at)
            recipe.op = Piece(_load_r9(2) + code + up)  # mov r10w, r9w
        elif size == 2 and number == 4:
            recipe.op = Piece(_load_r9(2) + up + b"\x66\x45\x89\xcb")  # mov r11w, r9w
        elif size == 2:
            rex = 0x43 | (host >> 3) << 2
            recipe.op = Piece(bytes((0x66, rex, 0x8B, 0x04 | (host & 7) << 3, 0x11)) + up)
        elif host < 0:
            recipe.op = Piece(emit.LOAD_R9 + emit.gs_store(R9, r.slot(number)) + up)
        elif number == 4:
            recipe.op = Piece(b"\x4f\x8b\x1c\x11")  # mov r11, [r9 + r10]
        else:
            rex = 0x4B | (host >> 3) << 2
            recipe.op = Piece(bytes((rex, 0x8B, 0x04 | (host & 7) << 3, 0x11)) + up)
        return recipe
    address = r.address(i)
    if i.memory_base in (Register.RSP, Register.ESP):
        # The address is computed with RSP already incremented (SDM vol. 2, POP).
        address = r.address(i, segment=False) + emit.lea(R9, R9, disp=size)
        address = address + (_TRUNCATE if i.memory_base == Register.ESP else b"")
        address = address + r.segment_base(i.memory_segment)
    recipe.before = (
        load
        + _load_r9(size)
        + emit.gs_store(R9, KEEP)
        + address
        + r.access(size, True, read=False, stack=r.on_stack(i))
    )
    store = _STORE_R10 if size == 8 else b"\x66\x45\x89\x11"
    code = emit.COMBINE + emit.gs_load(R10, KEEP) + store + r.commit()
    recipe.op = Piece(code + emit.lea(R11, R11, disp=size))
    return recipe


@special("LEAVE")
def _leave(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if raw[0] == 0x66:
        before = Piece(emit.mov(R9, 5)) + r.access(2, False, stack=True)
        code = _load_r9(2) + emit.lea(R11, 5, disp=2) + b"\x66\x44\x89\xcd"  # mov bp, r9w
        return Recipe(i.len, PLAIN, before=before, op=Piece(code), clobbers=True)
    before = Piece(emit.mov(R9, 5)) + r.access(8, False, stack=True)
    code = emit.LOAD_R9 + emit.lea(R11, 5, disp=8) + emit.mov(5, R9)
    slot = _on_stack(0, 8, False, emit.mov(R9, 5), base=5)
    return Recipe(i.len, PLAIN, before=before, op=Piece(code), clobbers=True, shared=slot)


@special("ENTER")
def _enter(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    size = 2 if raw[0] == 0x66 else 8
    return r.effect(i, "fx_enter", op0=size, op1=i.immediate16, op2=i.immediate8_2nd)


@special("RET")
def _ret(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    up = 8 + (i.immediate16 if i.op_count else 0)
    before = Piece(emit.mov(R9, R11)) + r.access(8, False, stack=True)
    code = emit.LOAD_R9 + emit.lea(R11, R11, disp=up)
    slot = _on_stack(0, 8, False, emit.mov(R9, R11))
    return Recipe(i.len, INDIRECT, before=before, op=Piece(code), clobbers=True, shared=slot)


@special("CALL", "JMP")
def _branch(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    call = name == "CALL"
    if i.op0_kind == OpKind.NEAR_BRANCH64:
        recipe = Recipe(i.len, CALL if call else JMP)
        if call:
            recipe.before = _push(r)
            recipe.op = Piece(emit.COMBINE) + r.constant(R10, i.len) + _STORE_R10 + _pushed(r)
            recipe.clobbers = True
            recipe.shared = _pushed_slot()
        return recipe
    if i.op0_kind == OpKind.MEMORY and MemorySizeExt.size(i.memory_size) != 8:
        size = MemorySizeExt.size(i.memory_size) - 2
        before = r.address(i) + emit.gs_store(R9, gs("ea"))
        return r.effect(i, "fx_call_far" if call else "fx_jmp_far", before, op0=size)
    recipe = Recipe(i.len, INDIRECT, clobbers=call)
    if i.op0_kind == OpKind.MEMORY:
        value = r.address(i) + r.access(8, False, stack=r.on_stack(i)) + emit.LOAD_R9
        recipe.clobbers = True
    elif i.op0_kind == OpKind.REGISTER:
        load, host = r.guest(GPR[i.op0_register][0], R9)
        value = Piece(load if host == R9 else emit.mov(R9, host))
    else:
        return r.emulate(i)
    if call:
        push = Piece(emit.gs_store(R9, KEEP)) + _push(r) + emit.COMBINE
        recipe.before = value + push + r.constant(R10, i.len) + _STORE_R10 + _pushed(r)
        recipe.op = Piece(emit.gs_load(R9, KEEP))
    else:
        recipe.before = value
    return recipe


@special("JO", "JNO", "JB", "JAE", "JE", "JNE", "JBE", "JA", "JS", "JNS", "JP", "JNP", "JL", "JGE",
         "JLE", "JG")  # fmt: skip
def _jcc(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    condition = 0x80 | i.op_code().op_code & 0xF
    return Recipe(i.len, JCC, reads=i.rflags_read & STATUS, condition=condition)


@special("JRCXZ", "JECXZ", "LOOP", "LOOPE", "LOOPNE")
def _counted(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    # No other prefix: with 66, AMD's CPUs cut the host's own RIP to 16 bits.
    short = (b"\x67" if 0x67 in raw[:-2] else b"") + raw[-2:-1]
    return Recipe(i.len, LOOP, reads=i.rflags_read & STATUS, op=Piece(short))


@special("XLATB")
def _xlat(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    code = b"\x44\x0f\xb6\xc8" + emit.lea(R9, 3, R9)  # movzx r9d, al; lea r9, [rbx + r9]
    if i.memory_base == Register.EBX:
        code += _TRUNCATE
    code += r.segment_base(i.memory_segment)
    before = Piece(code) + r.access(1, False)
    return Recipe(i.len, PLAIN, before=before, op=Piece(b"\x43\x8a\x04\x11"), clobbers=True)


@special("CLZERO")
def _clzero(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    """Zeroes the cache line that RAX points at (AMD APM vol. 3)."""
    move = emit.mov(R9, 0) + (_TRUNCATE if i.code == Code.CLZEROD else b"")
    base = r.segment_base(i.segment_prefix)
    before = Piece(move + base + b"\x49\x83\xe1\xc0") + r.access(64, True, read=False)
    code = emit.gs_store(0, KEEP) + emit.lea(0, R9, R10) + b"\x0f\x01\xfc"
    code += emit.gs_load(0, KEEP) + r.commit()
    return Recipe(i.len, PLAIN, before=before, op=Piece(code), clobbers=True)


@special("BT", "BTS", "BTR", "BTC")
def _bit(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    """With a register offset the bit may lie anywhere around the operand (SDM vol. 2, BT)."""
    if i.op0_kind != OpKind.MEMORY or i.op1_kind != OpKind.REGISTER:
        return None
    number, size = GPR[i.op1_register]
    load, host = r.guest(number, R10)
    shift = {2: 4, 4: 5, 8: 6}[size]
    move = {
        8: emit.mov(R10, host) if host != R10 else b"",
        4: bytes((0x4D if host > 7 else 0x4C, 0x63, 0xD0 | host & 7)),
        2: bytes((0x4D if host > 7 else 0x4C, 0x0F, 0xBF, 0xD0 | host & 7)),
    }[size]
    adjust = load + move + b"\x49\xc1\xfa" + bytes((shift,))  # sar r10, shift
    before = r.address(i, segment=False) + (adjust + emit.lea(R9, R9, R10, size))
    parts = [n for n in (i.memory_base, i.memory_index) if n in GPR]
    if any(GPR[n][1] == 4 for n in parts) or i.memory_base == Register.EIP:
        before = before + _TRUNCATE
    before = before + r.segment_base(i.memory_segment)
    write = name != "BT"
    mask = load + (emit.mov(R10, host) if host != R10 else b"")
    mask += b"\x41\x83\xe2" + bytes((size * 8 - 1,))  # and r10d, mask
    before = before + r.access(size, write, stack=r.on_stack(i)) + emit.COMBINE + mask
    out = i.copy()
    out.set_op_register(1, {8: Register.R10, 4: Register.R10D, 2: Register.R10W}[size])
    out.segment_prefix = Register.NONE
    out.memory_base, out.memory_index = Register.R9, Register.NONE
    out.memory_displacement = out.memory_displ_size = 0
    recipe = Recipe(i.len, PLAIN, before=before, op=Piece(r.encode(out)), clobbers=True)
    if write:
        recipe.after = Piece(r.commit())
    return r.flags(i, recipe)


_MOFFS = {
    Code.MOV_AL_MOFFS8: Code.MOV_R8_RM8,
    Code.MOV_AX_MOFFS16: Code.MOV_R16_RM16,
    Code.MOV_EAX_MOFFS32: Code.MOV_R32_RM32,
    Code.MOV_RAX_MOFFS64: Code.MOV_R64_RM64,
    Code.MOV_MOFFS8_AL: Code.MOV_RM8_R8,
    Code.MOV_MOFFS16_AX: Code.MOV_RM16_R16,
    Code.MOV_MOFFS32_EAX: Code.MOV_RM32_R32,
    Code.MOV_MOFFS64_RAX: Code.MOV_RM64_R64,
}


@special("MOV")
def _mov(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if i.code in _MOFFS:
        out = i.copy()
        out.code = _MOFFS[i.code]
        return r.generic(out, name, raw)
    for n in (0, 1):
        if i.op_kind(n) != OpKind.REGISTER:
            continue
        register = i.op_register(n)
        for kind, first in (("cr", Register.CR0), ("dr", Register.DR0)):
            if first <= register < first + 16:
                gpr = GPR[i.op_register(1 - n)][0]
                direction = "to" if n == 0 else "from"
                return r.effect(i, f"fx_mov_{direction}_{kind}", op0=gpr, op1=register - first)
        if register in _SEGMENT:
            if n == 0:
                return r.effect(
                    i, "fx_mov_to_sreg", _value(r, i, 1, gs("op", 1)), op0=_SEGMENT[register]
                )
            return _from_segment(r, i, _SEGMENT[register])
    return None


def _from_segment(r: Recipes, i: Instruction, segment: int) -> Recipe:
    selector = gs("seg_selector", segment)
    if i.op0_kind == OpKind.MEMORY:
        before = r.address(i) + r.access(2, True, read=False, stack=r.on_stack(i)) + emit.COMBINE
        code = emit.gs_load_zx16(R10, selector) + b"\x66\x45\x89\x11" + r.commit()
        return Recipe(i.len, PLAIN, before=before, op=Piece(code), clobbers=True)
    number, size = GPR[i.op0_register]
    code = emit.gs_load_zx16(R9, selector)
    if size == 2:
        load, host = r.guest(number, R10)
        rex = 0x44 | host >> 3
        code = load + code + bytes((0x66, rex, 0x89, 0xC8 | host & 7))
        code += r.set_guest(number, host) if load else b""
    else:
        code += r.set_guest(number, R9)
    return Recipe(i.len, PLAIN, op=Piece(code))


def _value(r: Recipes, i: Instruction, operand: int, displacement: int) -> Piece:
    """A 16-bit register or memory operand's value into the block."""
    if i.op_kind(operand) == OpKind.MEMORY:
        piece = r.address(i) + r.access(2, False, stack=r.on_stack(i)) + _load_r9(2)
    else:
        load, host = r.guest(GPR[i.op_register(operand)][0], R9)
        rex = 0x45 if host > 7 else 0x44
        piece = Piece(load + bytes((rex, 0x0F, 0xB7, 0xC8 | host & 7)))  # movzx r9d, host16
    return piece + emit.gs_store(R9, displacement)


@special("LLDT", "LTR", "VERR", "VERW", "LMSW")
def _selector(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, f"fx_{name.lower()}", _value(r, i, 0, gs("op", 0)))


@special("LAR", "LSL")
def _rights(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    number, size = GPR[i.op0_register]
    value = _value(r, i, 1, gs("op", 2))
    return r.effect(i, f"fx_{name.lower()}", value, op0=number, op1=size)


@special("SMSW", "SLDT", "STR")
def _store_system(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if i.op0_kind == OpKind.MEMORY:
        return r.effect(i, f"fx_{name.lower()}_mem", r.address(i) + emit.gs_store(R9, gs("ea")))
    number, size = GPR[i.op0_register]
    return r.effect(i, f"fx_{name.lower()}", op0=number, op1=size)


@special("LGDT", "LIDT", "SGDT", "SIDT", "INVLPG")
def _table(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, f"fx_{name.lower()}", r.address(i) + emit.gs_store(R9, gs("ea")))


@special("INVPCID")
def _invpcid(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    before = r.address(i) + emit.gs_store(R9, gs("ea"))
    return r.effect(i, "fx_invpcid", before, op0=GPR[i.op0_register][0])


@special("LFS", "LGS", "LSS")
def _far_pointer(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    number, size = GPR[i.op0_register]
    before = r.address(i) + emit.gs_store(R9, gs("ea"))
    segment = {"LSS": 2, "LFS": FS, "LGS": GS}[name]
    return r.effect(i, "fx_load_far_pointer", before, op0=segment, op1=number, op2=size)


@special("RDFSBASE", "RDGSBASE", "WRFSBASE", "WRGSBASE")
def _base(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    number, size = GPR[i.op0_register]
    segment = FS if name[2] == "F" else GS
    return r.effect(
        i, "fx_fsgsbase", op0=number, op1=size, op2=segment, op3=int(name.startswith("WR"))
    )


@special("INT", "INT3", "INT1")
def _interrupt(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if name == "INT1":
        return r.effect(i, "fx_int1")
    return r.effect(i, "fx_int", op0=3 if name == "INT3" else i.immediate8)


@special("IRET", "IRETD", "IRETQ")
def _iret(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, "fx_iret", op0={"IRET": 2, "IRETD": 4, "IRETQ": 8}[name])


@special("SYSRET", "SYSRETQ")
def _sysret(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, "fx_sysret", op0=int(name == "SYSRETQ"))


@special("RETF")
def _retf(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    body = raw if not i.op_count else raw[:-2]
    size = _operand_size(i, body)
    return r.effect(i, "fx_ret_far", op0=size, op1=i.immediate16 if i.op_count else 0)


@special("PUSHF", "PUSHFQ", "POPF", "POPFQ")
def _flags(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, f"fx_{name.lower()[:-1] if name[-1] == 'Q' else name.lower()}",
                    op0=8 if name.endswith("Q") else 2)  # fmt: skip


@special("IN", "OUT")
def _port(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    data, port = (0, 1) if name == "IN" else (1, 0)
    size = GPR[i.op_register(data)][1]
    number = i.immediate8 if i.op_kind(port) == OpKind.IMMEDIATE8 else 0x10000
    return r.effect(i, f"fx_{name.lower()}", op0=size, op1=number)


_STRING = {"MOVS": 0, "STOS": 1, "LODS": 2, "SCAS": 3, "CMPS": 4}


def _string_flags(i: Instruction) -> int:
    narrow = 0
    segment = 0
    for n in range(i.op_count):
        kind = i.op_kind(n)
        if kind in (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_SEG_EDI):
            narrow = 1
        if kind in (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_RSI) and i.memory_segment in (
            Register.FS,
            Register.GS,
        ):
            segment = _SEGMENT[i.memory_segment] + 1
    return narrow | segment << 8


def _repeat(i: Instruction) -> int:
    return 2 if i.has_repne_prefix else 1 if i.has_rep_prefix else 0


@special(*(f"{stem}{suffix}" for stem in _STRING for suffix in "BWDQ"))
def _string(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if not i.is_string_instruction:
        return None  # MOVSD and CMPSD are vector instructions too
    size = {"B": 1, "W": 2, "D": 4, "Q": 8}[name[-1]]
    flags = _string_flags(i)
    recipe = r.effect(i, "fx_string", op0=size, op1=_STRING[name[:-1]], op2=_repeat(i), op3=flags)
    if name[:4] in ("MOVS", "STOS") and _repeat(i) and not flags and not r.slow:
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
        code = code + Piece(check, ((position, ESCAPE, None),))
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
        whole.length,
        PLAIN,
        before=code,
        op=Piece(op),
        clobbers=True,
        effect=whole.effect,
        operands=whole.before.code,
    )


def _escape() -> Piece:
    """The 32-bit displacement of a conditional jump to the effect."""
    return Piece(b"\0\0\0\0", ((0, ESCAPE, None),))


@special("INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD")
def _port_string(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    size = {"B": 1, "W": 2, "D": 4}[name[-1]]
    return r.effect(
        i,
        "fx_port_string",
        op0=size,
        op1=int(name[0] == "O"),
        op2=_repeat(i),
        op3=_string_flags(i),
    )


@special("CLI", "STI")
def _interrupt_flag(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if r.cpl:
        return r.effect(i, f"fx_{name.lower()}")
    if name == "CLI":
        return Recipe(i.len, PLAIN, op=Piece(emit.gs_store_byte(gs("flag_if"), 0)))
    return Recipe(i.len, STI, effect="fx_sti")


@special("CLD", "STD")
def _direction(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return Recipe(i.len, PLAIN, op=Piece(emit.gs_store_byte(gs("flag_df"), int(name == "STD"))))


@special("SWAPGS")
def _swapgs(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if r.cpl:
        return r.effect(i, "fx_swapgs")
    return Recipe(i.len, PLAIN, op=Piece(emit.swapgs()))


@special("RDTSC")
def _rdtsc(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    if r.mode & MODE_TSD:
        return r.effect(i, "fx_rdtsc")
    return Recipe(i.len, PLAIN, before=Piece(emit.rdtsc()), clobbers=True)


@special("XSAVE", "XSAVE64", "XRSTOR", "XRSTOR64")
def _xsave(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    # All vector state goes to the block first; the effect moves it to or from guest memory.
    keep_rax, keep_rdx = gs("scratch", 3), gs("scratch", 4)
    before = r.address(i) + (
        emit.gs_store(R9, gs("ea"))
        + emit.gs_store(0, keep_rax)
        + emit.gs_store(2, keep_rdx)
        + b"\xb8\x07\0\0\0\xba\0\0\0\0"  # mov eax, 7; mov edx, 0
        + b"\x65\x48\x0f\xae\x24\x25" + struct.pack("<i", gs("xsave"))
        + emit.gs_load(0, keep_rax)
        + emit.gs_load(2, keep_rdx)
    )  # fmt: skip
    effect = "fx_xsave" if name.startswith("XSAVE") else "fx_xrstor"
    return r.effect(i, effect, before, op0=int(name.endswith("64")))


@special("NOP", "ENDBR64", "ENDBR32", "RDSSPD", "RDSSPQ", "RESERVEDNOP")
def _nothing(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return Recipe(i.len, DROP)


_PLAIN_EFFECTS = {
    "SYSCALL": "fx_syscall", "SYSENTER": "fx_sysenter", "SYSEXIT": "fx_sysexit",
    "SYSEXITQ": "fx_sysexit", "RDMSR": "fx_rdmsr", "WRMSR": "fx_wrmsr", "CPUID": "fx_cpuid",
    "HLT": "fx_hlt", "CLTS": "fx_clts", "WBINVD": "fx_wbinvd", "INVD": "fx_wbinvd",
    "WBNOINVD": "fx_wbinvd", "XGETBV": "fx_xgetbv", "XSETBV": "fx_xsetbv", "RDTSCP": "fx_rdtscp",
    "RDPMC": "fx_rdpmc", "UD0": "fx_ud", "UD1": "fx_ud", "UD2": "fx_ud", "RSM": "fx_ud",
    "MONITOR": "fx_ud", "MWAIT": "fx_ud", "CLAC": "fx_ud", "STAC": "fx_ud", "GETSEC": "fx_ud",
}  # fmt: skip


@special(*_PLAIN_EFFECTS)
def _plain_effect(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, _PLAIN_EFFECTS[name])


@special("VMCALL", "VMMCALL")
def _hypercall(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, "fx_vmcall", op0=int(name == "VMMCALL"))


@special("RDPID")
def _rdpid(r: Recipes, i: Instruction, name: str, raw: bytes) -> Recipe | None:
    return r.effect(i, "fx_rdpid", op0=GPR[i.op0_register][0])
