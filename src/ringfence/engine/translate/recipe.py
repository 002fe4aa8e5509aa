"""From one guest instruction to the host code that carries it out, by way of iced-x86.

A ``Recipe`` depends on the instruction's bytes and on the mode, not on where it stands, and is
remembered by those bytes: kernels and programs are made of few distinct instructions. Words
that depend on the place are listed as fixes, applied when the recipe is placed in a trace.

Most instructions are *copied*. What changes is named here in one place each: memory operands
(effective address, TLB check, then the access at R9 + R10), registers that have no host register of
their own (guest RSP is in R11; R9-R11 are in the block), control flow, and the sensitive
instructions, which become calls of the effect library.

A recipe has two parts: ``before`` may clobber the host's flags, ``op`` must not, apart from what
the instruction itself does. Between them the trace builder brings the guest's flags back if needed.

Longer than most files here: what can become of an operand is one decision, made in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ringfence.engine.translate import emit
from ringfence.engine.translate.block import (
    MODE_AVX,
    MODE_CPL,
    MODE_NO_FPU,
    MODE_SSE,
    SLOW_READ,
    SLOW_STACK,
    SLOW_WRITE,
    gs,
)
from ringfence.engine.translate.emit import R9, R10, R11
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.x86 import (
    CpuidFeature,
    Decoder,
    Encoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

if TYPE_CHECKING:
    from ringfence.engine.translate.x86 import RegisterType as Reg

# Kinds of recipes, as the trace builder distinguishes them.
PLAIN, JCC, JMP, CALL, INDIRECT, LOOP, EFFECT, STI, DROP = range(9)

# Fixes: what to put at a position.
MISS, VA32, VA64, ESCAPE = range(4)
"""MISS: data = (retry position, write, kind word). VA32/VA64: data = offset from the instruction,
or None for the offset that differs between instructions of the same recipe. ESCAPE: a jump to a
stub that leaves the whole instruction to the recipe's effect."""

HOMELESS = (9, 10, 11)
"""Guest registers that live in the block, unless a trace arranges its registers otherwise."""
CANONICAL = (0, 1, 2, 3, R11, 5, 6, 7, 8, -1, -1, -1, 12, 13, 14, 15)
"""Host register of each guest register between traces; -1 for the block."""
Swap = tuple[int, int]
"""A homeless register, and the one whose host register it gets inside a trace."""
STATUS = (
    RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF
)
_WRITES = {
    OpAccess.WRITE,
    OpAccess.COND_WRITE,
    OpAccess.READ_WRITE,
    OpAccess.READ_COND_WRITE,
}
_READS = {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}

MNEMONIC_NAME = {v: k for k, v in vars(Mnemonic).items() if isinstance(v, int)}
FEATURE_NAME = {v: k for k, v in vars(CpuidFeature).items() if isinstance(v, int)}

_FULL = [
    Register.RAX, Register.RCX, Register.RDX, Register.RBX,
    Register.RSP, Register.RBP, Register.RSI, Register.RDI,
    Register.R8, Register.R9, Register.R10, Register.R11,
    Register.R12, Register.R13, Register.R14, Register.R15,
]  # fmt: skip
_HIGH_BYTES = {Register.AH, Register.CH, Register.DH, Register.BH}
GPR: dict[Reg, tuple[int, int]] = {}
"""iced register -> (guest number, size in bytes), for general registers but AH-BH."""
BY_SIZE: dict[tuple[int, int], Reg] = {}
for _value in (cast("Reg", value) for value in vars(Register).values() if isinstance(value, int)):
    if RegisterExt.is_gpr(_value) and _value not in _HIGH_BYTES:
        GPR[_value] = (_FULL.index(RegisterExt.full_register(_value)), RegisterExt.size(_value))
        BY_SIZE[GPR[_value]] = _value
for _value, _number in zip(
    (Register.AH, Register.CH, Register.DH, Register.BH), range(4), strict=True
):
    GPR[_value] = (_number, 1)
    BY_SIZE.setdefault((_number, 1), _value)
del _value
_SEGMENTS = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip


KNOWN_MAX = 150_000
"""Instructions remembered by all their bytes; what they share is remembered without limit."""


@dataclass(slots=True)
class Piece:
    """Host code with the fixes in it: (position, what, data)."""

    code: bytes = b""
    fixes: tuple[tuple[int, int, Any], ...] = ()

    def __add__(self, other: Piece | bytes) -> Piece:
        if isinstance(other, bytes):
            return Piece(self.code + other, self.fixes)
        shift = len(self.code)
        moved = tuple(
            (p + shift, w, (d[0] + shift, *d[1:]) if w == MISS else d) for p, w, d in other.fixes
        )
        return Piece(self.code + other.code, self.fixes + moved)


@dataclass(slots=True)
class Shared:
    """A memory operand at a constant distance from a register: its look-up can be shared.

    With R9 = the operand's address (``address`` computes it, leaving the flags alone) and R10 =
    host minus linear address of its page, the recipe's ``op`` works as after its own look-up.
    """

    base: int
    """Guest register number, or ABSOLUTE for an address that the instruction itself gives."""
    displacement: int | None
    """From the base; None for the relative address of ``Recipes.make``."""
    size: int
    write: bool
    kind: int
    """As the miss thunk wants it."""
    address: Piece


ABSOLUTE = 16


@dataclass(slots=True)
class Recipe:
    """How to carry out one instruction; flags are masks of ``RflagsBits``.

    Instructions that differ in a branch target or a RIP-relative displacement only share one.
    """

    length: int
    kind: int
    reads: int = 0
    kills: int = 0
    writes: int = 0
    before: Piece = field(default_factory=Piece)
    op: Piece = field(default_factory=Piece)
    after: Piece = field(default_factory=Piece)
    clobbers: bool = False
    effect: str = ""
    operands: bytes = b""
    """Code that stores the effect's operands, for recipes that escape to it."""
    shared: Shared | None = None
    written: int = 0
    """Mask of the guest registers written."""
    adjusted: int = -1
    """The one register of them that only moves by a constant, ``adjustment``; -1 for none."""
    adjustment: int = 0
    named: tuple[int, ...] = ()
    """Guest registers that operands name, each as often as it occurs."""
    homeless: int = 0
    """How many of them have no host register between traces."""
    fixed: int = 0
    """Mask of the guest registers that the instruction uses without naming them, or as AH-BH."""
    condition: int = 0
    """Second byte of the two-byte ``jcc rel32``."""
    text: str = ""


class Recipes:
    """Makes and remembers recipes for one mode.

    Parameters
    ----------
    mode : int
        Bits of ``block.MODE_*``.
    slow : bool
        Whether memory accesses take the slow path.
    wide : bool
        Whether addresses of code need 64-bit constants (outside the top 2 GiB).
    offers : callable
        Whether the virtual CPU has a feature, by iced-x86's name.
    """

    def __init__(
        self,
        mode: int,
        slow: bool,
        wide: bool,
        offers: Callable[[str], bool],
        swaps: tuple[Swap, ...] = (),
    ) -> None:
        self.mode = mode
        self.cpl = mode & MODE_CPL
        self.user = self.cpl == 3
        self.slow = slow
        self.wide = wide
        self.offers = offers
        self.swaps = swaps
        home = list(CANONICAL)
        for homeless, displaced in swaps:
            home[homeless], home[displaced] = home[displaced], -1
        self.home = tuple(home)
        self.known: dict[bytes, tuple[Recipe, int]] = {}
        self.shared: dict[tuple[int, bytes], Recipe] = {}
        self.ruled_out: dict[int, str] = {}
        self.info = InstructionInfoFactory()
        self.encoder = Encoder(64)

    def make(self, i: Instruction, raw: bytes, source: Decoder) -> tuple[Recipe, int]:
        """The recipe of an instruction just decoded by ``source``, and its relative address.

        The address is that of a branch target or a RIP-relative operand, minus the instruction's.
        """
        value = 0
        key = raw
        flow = i.flow_control
        if flow != FlowControl.NEXT and i.op_count == 1 and i.op0_kind == OpKind.NEAR_BRANCH64:
            value = signed(i.near_branch_target - i.ip)
            at = source.get_constant_offsets(i).immediate_offset
            key = raw[:at]
        if i.is_ip_rel_memory_operand:
            value = signed(i.memory_displacement - i.ip)
            if i.memory_base == Register.EIP:
                value = (value + (1 << 31)) % (1 << 32) - (1 << 31)  # the address is cut to 32 bits
            at = source.get_constant_offsets(i).displacement_offset
            key = raw[:at] + raw[at + 4 :]
        recipe = self.shared.get((len(raw), key))
        if recipe is None:
            recipe = self.build(i, raw)
            self.registers(i, recipe)
            self.shared[(len(raw), key)] = recipe
        if len(self.known) > KNOWN_MAX:
            self.known.clear()
            self.shared.clear()
        self.known[raw] = recipe, value
        return recipe, value

    # --- building blocks --------------------------------------------------------------------

    def access(self, size: int, write: bool, read: bool = True, stack: bool = False) -> Piece:
        """R9 = linear address; then R9 + R10 is where to access ``size`` bytes."""
        kind = size | (SLOW_READ if read else 0) | (SLOW_WRITE if write else 0)
        kind |= SLOW_STACK if stack else 0
        if self.slow:
            return Piece(
                emit.mov_imm32(R10, kind) + emit.gs_call(THUNK["slow"]) + emit.mov_imm32(R10, 0)
            )
        code, position = emit.tlb_check(size, write, self.user)
        return Piece(code, ((position, MISS, (0, write, kind)),))

    def commit(self) -> bytes:
        """After a write in a slow recipe."""
        return emit.gs_call(THUNK["commit"]) if self.slow else b""

    def constant(self, register: int, offset: int | None) -> Piece:
        """``register`` = the instruction's address plus ``offset`` (None: see the fixes)."""
        if self.wide:
            return Piece(emit.mov_imm64(register, 0), ((2, VA64, offset),))
        return Piece(emit.mov_simm32(register, 0), ((3, VA32, offset),))

    def guest(self, number: int, scratch: int) -> tuple[bytes, int]:
        """Code and host register that give a guest register's value."""
        host = self.home[number]
        if host < 0:
            return emit.gs_load(scratch, self.slot(number)), scratch
        return b"", host

    @staticmethod
    def slot(number: int) -> int:
        """Displacement of the block's place for a guest register without a host register."""
        return gs("gpr" if number in HOMELESS else "displaced", number)

    def set_guest(self, number: int, register: int) -> bytes:
        """Copy a host register into a guest register."""
        host = self.home[number]
        if host < 0:
            return emit.gs_store(register, self.slot(number))
        return emit.mov(host, register)

    def address(self, i: Instruction, *, segment: bool = True) -> Piece:
        """R9 = effective linear address of the memory operand; the flags survive."""
        base, index = i.memory_base, i.memory_index
        narrow = False
        if base in (Register.RIP, Register.EIP):
            piece = self.constant(R9, None)
            narrow = base == Register.EIP
            if narrow:
                piece = piece + b"\x45\x89\xc9"
        else:
            disp = i.memory_displacement
            disp = disp - (1 << 64) if disp >> 63 else disp
            code = b""
            base_host = index_host = -1
            if base != Register.NONE:
                number, size = GPR[base]
                narrow = size == 4
                load, base_host = self.guest(number, R9)
                code += load
            if index != Register.NONE:
                number, size = GPR[index]
                narrow = narrow or size == 4
                load, index_host = self.guest(number, R10)
                code += load
            if base_host < 0 and index_host < 0:
                if -(1 << 31) <= disp < 1 << 31:
                    code += emit.mov_simm32(R9, disp)
                else:
                    code += emit.mov_imm64(R9, disp & (1 << 64) - 1)
                narrow = False
            else:
                if narrow and disp >= 1 << 31:
                    disp -= 1 << 32
                if index_host < 0 and disp == 0:
                    step = emit.mov(R9, base_host) if base_host != R9 or narrow else b""
                else:
                    step = emit.lea(R9, base_host, index_host, i.memory_index_scale, disp)
                if narrow:
                    step = bytes((step[0] & ~8,)) + step[1:]
                code += step
            piece = Piece(code)
        return piece + self.segment_base(i.memory_segment) if segment else piece

    @staticmethod
    def segment_base(register: Reg) -> bytes:
        """R9 += the base of a segment register, where it counts."""
        if register not in (Register.FS, Register.GS):
            return b""
        number = _SEGMENTS[register]
        return emit.gs_load(R10, gs("seg_base", number)) + emit.lea(R9, R9, R10)

    @staticmethod
    def on_stack(i: Instruction) -> bool:
        """Whether the operand's default or explicit segment is SS."""
        return bool(i.memory_segment == Register.SS)

    def encode(self, i: Instruction) -> bytes:
        """Bytes of an instruction that was changed."""
        self.encoder.encode(i, 0)
        return self.encoder.take_buffer()

    # --- the generic instruction ---------------------------------------------------------------

    def build(self, i: Instruction, raw: bytes) -> Recipe:
        """Make a recipe; see the class."""
        if i.is_invalid:
            return self.effect(i, "fx_ud")
        name = MNEMONIC_NAME[i.mnemonic]
        unavailable = self.unavailable(i, name)
        if unavailable:
            return self.effect(i, unavailable)
        special = _SPECIAL.get(name)
        if special is not None:
            recipe = special(self, i, name, raw)
            if recipe is not None:
                recipe.text = name
                return recipe
        if i.flow_control != FlowControl.NEXT:
            return self.emulate(i)
        return self.generic(i, name, raw)

    def registers(self, i: Instruction, recipe: Recipe) -> None:
        """Fill in which registers the instruction writes, and which it moves by a constant."""
        named = []
        count = i.op_count
        for n in range(count):
            kind = i.op_kind(n)
            if kind == OpKind.REGISTER:
                register = i.op_register(n)
                if register in _HIGH_BYTES:
                    recipe.fixed |= 1 << GPR[register][0] | 0xE0
                elif register in GPR:
                    named.append(GPR[register][0])
            elif kind == OpKind.MEMORY:
                named += [GPR[r][0] for r in (i.memory_base, i.memory_index) if r in GPR]
        recipe.named = tuple(named)
        recipe.homeless = sum(number in HOMELESS for number in named)
        if recipe.kind == EFFECT:
            return
        written = fixed = 0
        for entry in self.info.info(i).used_registers():
            number = GPR.get(entry.register)
            if number is not None:
                if entry.access in _WRITES:
                    written |= 1 << number[0]
                if number[0] not in named:
                    fixed |= 1 << number[0]
        recipe.written = written
        recipe.fixed |= fixed
        step = i.stack_pointer_increment
        if step:
            pops_rsp = (
                i.op_count and i.op0_kind == OpKind.REGISTER and i.op0_register == Register.RSP
            )
            if not pops_rsp and i.mnemonic not in (Mnemonic.LEAVE, Mnemonic.ENTER):
                recipe.adjusted, recipe.adjustment = 4, step
            return
        if count and i.op0_kind == OpKind.REGISTER:
            number = GPR.get(i.op0_register)
            if number is None or number[1] != 8:
                return
            mnemonic = i.mnemonic
            if mnemonic in (Mnemonic.ADD, Mnemonic.SUB) and i.op_kind(1) in _IMMEDIATES:
                value = signed(i.immediate(1))
                recipe.adjustment = value if mnemonic == Mnemonic.ADD else -value
                recipe.adjusted = number[0]
            elif mnemonic in (Mnemonic.INC, Mnemonic.DEC):
                recipe.adjustment = 1 if mnemonic == Mnemonic.INC else -1
                recipe.adjusted = number[0]
            elif (
                mnemonic == Mnemonic.LEA
                and i.memory_base == i.op0_register
                and i.memory_index == Register.NONE
            ):
                recipe.adjustment = signed(i.memory_displacement)
                recipe.adjusted = number[0]

    def unavailable(self, i: Instruction, name: str) -> str:
        """The effect to use instead where mode or CPU model rule the instruction out."""
        known = self.ruled_out.get(i.code)
        if known is None:
            known = self.ruled_out[i.code] = self.rule(i, name)
        return known

    def rule(self, i: Instruction, name: str) -> str:
        """``unavailable`` for an opcode seen the first time."""
        features = [FEATURE_NAME[f] for f in i.cpuid_features()]
        if features and not all(self.offers(f) for f in features):
            return "" if name in _ALWAYS else "fx_ud"
        vector = any(
            f.startswith(("SSE", "SSSE", "AES", "PCLMUL", "GFNI", "SHA")) for f in features
        )
        avx = any(f.startswith(("AVX", "FMA", "F16C", "VAES", "VPCLMUL")) for f in features)
        legacy = any(f.startswith(("FPU", "MMX")) for f in features)
        if name in _NO_VECTOR_STATE:
            return ""
        if avx and not self.mode & MODE_AVX:
            return "fx_ud"
        if vector and not avx and not self.mode & MODE_SSE:
            return "fx_ud"
        if (avx or vector or legacy) and self.mode & MODE_NO_FPU:
            return "fx_nm"
        return ""

    def flags(self, i: Instruction, recipe: Recipe) -> Recipe:
        """Fill in what the instruction does to the status flags."""
        recipe.reads = i.rflags_read & STATUS
        recipe.writes = i.rflags_modified & STATUS
        recipe.kills = recipe.writes
        if MNEMONIC_NAME[i.mnemonic] in _SHIFTS and not (
            i.op_count > 1 and i.op_kind(1) == OpKind.IMMEDIATE8 and i.immediate8 & 0x1F
        ):
            # A count of zero leaves the flags as they were.
            recipe.kills = 0
        return recipe

    def generic(self, i: Instruction, name: str, raw: bytes) -> Recipe:
        """Copy an instruction, with its memory operand and registers replaced as needed."""
        info = self.info.info(i)
        if i.is_vsib or name in _PARTIAL_VECTOR:
            return self.emulate(i)
        memory = -1
        registers: dict[int, tuple[bool, bool]] = {}
        high = False
        for n in range(i.op_count):
            kind = i.op_kind(n)
            if kind == OpKind.MEMORY:
                memory = n
            elif kind == OpKind.REGISTER:
                register = i.op_register(n)
                if register in _HIGH_BYTES:
                    high = True
                    continue
                if register in GPR:
                    number, size = GPR[register]
                    access = info.op_access(n)
                    write = access in _WRITES
                    read = access != OpAccess.WRITE or size < 4
                    was = registers.get(number, (False, False))
                    registers[number] = (was[0] or read, was[1] or write)
            elif kind not in _IMMEDIATES:
                return self.emulate(i)
        if len(info.used_memory()) > (memory >= 0):
            return self.emulate(i)  # memory that no operand shows must not be taken for the host's
        recipe = self.flags(i, Recipe(len(raw), PLAIN, text=name))
        home = self.home
        homeless = [n for n in registers if home[n] < 0]
        if memory < 0:
            if all(home[n] == n for n in registers):
                recipe.op = Piece(raw)
                return recipe
            if high:
                return self.high_byte_and_stack(i, recipe, registers)
            self.substitute(i, recipe, info, registers, homeless, [R9, R10], b"", -1, False)
            return recipe
        access = info.op_access(memory)
        if access in (OpAccess.NO_MEM_ACCESS, OpAccess.NONE):
            return self.no_access(i, recipe, registers, name)
        size = MemorySizeExt.size(i.memory_size)
        if size == 0:
            return self.emulate(i)
        write = access in _WRITES
        read = access in _READS or access == OpAccess.COND_WRITE
        address = self.address(i)
        recipe.before = address + self.access(size, write, read, self.on_stack(i))
        recipe.clobbers = True
        recipe.shared = self.shareable(i, size, write, read, address)
        self.substitute(i, recipe, info, registers, homeless, [R10], emit.COMBINE, memory, high)
        if write:
            recipe.after = Piece(self.commit())
        return recipe

    def shareable(
        self, i: Instruction, size: int, write: bool, read: bool, address: Piece
    ) -> Shared | None:
        """The operand as one whose look-up can be shared, if it is."""
        base = i.memory_base
        if i.memory_index != Register.NONE or i.memory_segment in (Register.FS, Register.GS):
            return None
        displacement: int | None = signed(i.memory_displacement)
        if base == Register.RIP:
            number, displacement = ABSOLUTE, None
        elif base == Register.NONE or RegisterExt.size(base) != 8:
            return None
        else:
            number = GPR[base][0]
        kind = size | (SLOW_READ if read else 0) | (SLOW_WRITE if write else 0)
        kind |= SLOW_STACK if self.on_stack(i) else 0
        return Shared(number, displacement, size, write, kind, address)

    def substitute(
        self,
        i: Instruction,
        recipe: Recipe,
        info: Any,
        registers: dict[int, tuple[bool, bool]],
        homeless: list[int],
        scratch: list[int],
        combine: bytes,
        memory: int,
        high: bool,
    ) -> None:
        """Fill ``recipe.op``: the instruction with host registers in place of guest ones.

        Scratch registers serve the homeless ones; when they run out, host registers that the
        instruction does not use are borrowed and given back.
        """
        home = self.home
        used = {home[n] for n in registers}
        for entry in info.used_registers():
            if entry.register in GPR:
                used.add(home[GPR[entry.register][0]])
        borrowable = [n for n in (6, 7, 3, 5, 1, 2, 8, 12, 13, 14, 15, 0) if n not in used]
        head = tail = b""
        out = i.copy()
        if (homeless and memory >= 0) or high:
            head += combine
        mapping = {n: home[n] for n in registers if home[n] >= 0 and home[n] != n}
        slots = iter((1, 6, 7))
        for number in homeless:
            if scratch:
                host = scratch.pop(0)
            else:
                host = borrowable.pop(0)
                slot = gs("scratch", next(slots))
                head += emit.gs_store(host, slot)
                tail = emit.gs_load(host, slot) + tail
            mapping[number] = host
            read, write = registers[number]
            if read:
                head += emit.gs_load(host, self.slot(number))
            if write:
                tail = emit.gs_store(host, self.slot(number)) + tail
        for n in range(out.op_count):
            if out.op_kind(n) == OpKind.REGISTER:
                register = out.op_register(n)
                if register in GPR and register not in _HIGH_BYTES:
                    number, size = GPR[register]
                    if number in mapping:
                        out.set_op_register(n, BY_SIZE[(mapping[number], size)])
        if memory >= 0:
            out.segment_prefix = Register.NONE
            out.memory_displacement = 0
            out.memory_displ_size = 0
            out.memory_index_scale = 1
            out.memory_index = Register.NONE
            if high:
                # AH-BH exclude a REX prefix, so the address must be in a legacy register.
                host = next(n for n in borrowable if n < 8)
                slot = gs("scratch", next(slots))
                head += emit.gs_store(host, slot) + emit.mov(host, R9)
                tail = emit.gs_load(host, slot) + tail
                out.memory_base = _FULL[host]
            else:
                out.memory_base = Register.R9
                if not homeless:
                    out.memory_index = Register.R10
        recipe.op = Piece(head + self.encode(out) + tail)

    def high_byte_and_stack(
        self, i: Instruction, recipe: Recipe, registers: dict[int, tuple[bool, bool]]
    ) -> Recipe:
        """AH-BH together with RSP: what stands for RSP must do without a REX prefix, too."""
        # Registers used together with AH-BH stay where they are, so all others may be taken.
        host = next(n for n in (6, 7, 5) if n not in registers)
        out = i.copy()
        for n in range(out.op_count):
            number, size = GPR.get(out.op_register(n), (-1, 0))
            if number == 4:
                out.set_op_register(n, BY_SIZE[(host, size)])
        slot = gs("scratch", 1)
        head = emit.gs_store(host, slot) + emit.mov(host, R11)
        tail = emit.mov(R11, host) + emit.gs_load(host, slot)
        recipe.op = Piece(head + self.encode(out) + tail)
        return recipe

    def no_access(
        self, i: Instruction, recipe: Recipe, registers: dict[int, tuple[bool, bool]], name: str
    ) -> Recipe:
        """LEA, and the hints that only look like accesses."""
        if name != "LEA":
            recipe.kind = DROP
            return recipe
        number, size = GPR[i.op0_register]
        piece = self.address(i, segment=False)
        if size == 2:
            host = self.home[number]
            if host < 0:
                slot = self.slot(number)
                load = emit.gs_load(R10, slot)
                piece = piece + (load + b"\x66\x45\x89\xca" + emit.gs_store(R10, slot))
            else:
                rex = 0x44 | host >> 3
                piece = piece + bytes((0x66, rex, 0x89, 0xC8 | host & 7))
        else:
            if size == 4:
                piece = piece + b"\x45\x89\xc9"
            piece = self.shorten(i, number, size) or piece + self.set_guest(number, R9)
        recipe.op = piece
        return recipe

    def shorten(self, i: Instruction, number: int, size: int) -> Piece | None:
        """LEA straight into its host register, where all its registers have one."""
        host = self.home[number]
        if host < 0 or i.memory_base in (Register.RIP, Register.EIP):
            return None
        mapped = []
        for register in (i.memory_base, i.memory_index):
            if register == Register.NONE:
                mapped.append(-1)
                continue
            guest, width = GPR[register]
            if self.home[guest] < 0 or width != 8:
                return None
            mapped.append(self.home[guest])
        if mapped[0] < 0:
            return None
        disp = i.memory_displacement
        disp = disp - (1 << 64) if disp >> 63 else disp
        code = emit.lea(host, mapped[0], mapped[1], i.memory_index_scale, disp)
        if size == 4:
            code = bytes((code[0] & ~8,)) + code[1:]
        return Piece(code)

    def effect(self, i: Instruction, name: str, before: Piece | None = None, **op: int) -> Recipe:
        """A call of the effect library; ``op0`` … ``op3`` are constant operands."""
        piece = before or Piece()
        for key, value in op.items():
            piece = piece + emit.gs_store_imm(gs("op", int(key[2])), value)
        return Recipe(
            i.len, EFFECT, reads=STATUS, before=piece, clobbers=True, effect=name, text=name
        )

    def emulate(self, i: Instruction) -> Recipe:
        """Left to the VMM, which carries the instruction out on the saved state."""
        return Recipe(i.len, EFFECT, reads=STATUS, clobbers=True, effect="emulate", text="emulate")


def signed(value: int) -> int:
    """A difference of two addresses as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_IMMEDIATES = {
    OpKind.IMMEDIATE8,
    OpKind.IMMEDIATE8_2ND,
    OpKind.IMMEDIATE16,
    OpKind.IMMEDIATE32,
    OpKind.IMMEDIATE64,
    OpKind.IMMEDIATE8TO16,
    OpKind.IMMEDIATE8TO32,
    OpKind.IMMEDIATE8TO64,
    OpKind.IMMEDIATE32TO64,
}
_SHIFTS = {"SHL", "SHR", "SAR", "SAL", "ROL", "ROR", "RCL", "RCR", "SHLD", "SHRD"}
_PARTIAL_VECTOR = {
    "VMASKMOVPS", "VMASKMOVPD", "VPMASKMOVD", "VPMASKMOVQ", "MASKMOVQ", "MASKMOVDQU", "VMASKMOVDQU",
}  # fmt: skip
_ALWAYS = {
    "NOP", "ENDBR64", "ENDBR32", "RDSSPD", "RDSSPQ", "PREFETCHNTA", "PREFETCHT0", "PREFETCHT1",
    "PREFETCHT2", "PREFETCH", "PREFETCHW", "PREFETCHWT1", "RESERVEDNOP", "XEND", "CLDEMOTE",
    "PREFETCHIT0", "PREFETCHIT1",
}  # fmt: skip
_NO_VECTOR_STATE = {
    "LDMXCSR", "STMXCSR", "FXSAVE", "FXSAVE64", "FXRSTOR", "FXRSTOR64", "LFENCE", "SFENCE",
    "MFENCE", "PAUSE", "CLFLUSH", "CRC32", "POPCNT", "MOVNTI", "PREFETCHNTA", "PREFETCHT0",
    "PREFETCHT1", "PREFETCHT2", "FNINIT", "FNSTSW", "FNSTCW", "FNCLEX", "EMMS",
}  # fmt: skip
Maker = Callable[[Recipes, Instruction, str, bytes], Recipe | None]
_SPECIAL: dict[str, Maker] = {}


def special(*names: str) -> Callable[[Maker], Maker]:
    """Register the maker of recipes for some mnemonics."""

    def register(function: Maker) -> Maker:
        for name in names:
            _SPECIAL[name] = function
        return function

    return register


def decoder(data: bytes, offset: int) -> Decoder:
    """A decoder over a code page that stands at ``offset``."""
    made = Decoder(64, data, ip=offset)
    made.position = offset
    return made
