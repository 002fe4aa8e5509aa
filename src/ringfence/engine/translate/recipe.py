"""What becomes of the sensitive and odd instructions: recipes, written in Python.

Ordinary instructions are copied natively (``copying``). For each of the others a `Recipe` is
written when it is first seen, in the functions of ``special``; native code keeps it
(`tables.RawRecipe`) by the instruction's bytes, the mode, and the registers' arrangement.

A recipe has two main parts: ``before`` may clobber the host's flags, ``op`` must not, apart from
what the instruction itself does. Between them the writer of traces brings the guest's flags back
if needed. The memory operand's address is written natively, between ``lead`` and ``before``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ringfence.engine.translate import emit
from ringfence.engine.translate.block import (
    MODE_CPL,
    MODE_STEP,
    SLOW_READ,
    SLOW_STACK,
    SLOW_WRITE,
    bits_of,
    gs,
)
from ringfence.engine.translate.emit import R9, R10
from ringfence.engine.translate.tables import (
    CANONICAL,
    EFFECT,
    FIX_MISS,
    HOMELESS,
    NO_ADDRESS,
    NONE,
    PLAIN,
)
from ringfence.engine.translate.thunks import THUNK
from ringfence.engine.translate.x86 import (
    CpuidFeature,
    Encoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

if TYPE_CHECKING:
    from ringfence.engine.translate.x86 import RegisterType as Reg

STATUS = (
    RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF
)
WRITES = {
    OpAccess.WRITE,
    OpAccess.COND_WRITE,
    OpAccess.READ_WRITE,
    OpAccess.READ_COND_WRITE,
}
READS = {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}

MNEMONIC_NAME = {v: k for k, v in vars(Mnemonic).items() if isinstance(v, int)}
FEATURE_NAME = {v: k for k, v in vars(CpuidFeature).items() if isinstance(v, int)}

_FULL = [
    Register.RAX, Register.RCX, Register.RDX, Register.RBX,
    Register.RSP, Register.RBP, Register.RSI, Register.RDI,
    Register.R8, Register.R9, Register.R10, Register.R11,
    Register.R12, Register.R13, Register.R14, Register.R15,
]  # fmt: skip
HIGH_BYTES = {Register.AH, Register.CH, Register.DH, Register.BH}
GPR: dict[Reg, tuple[int, int]] = {}
"""iced register -> (guest number, size in bytes), for general registers but AH-BH."""
BY_SIZE: dict[tuple[int, int], Reg] = {}
for _value in (cast("Reg", value) for value in vars(Register).values() if isinstance(value, int)):
    if RegisterExt.is_gpr(_value) and _value not in HIGH_BYTES:
        GPR[_value] = (_FULL.index(RegisterExt.full_register(_value)), RegisterExt.size(_value))
        BY_SIZE[GPR[_value]] = _value
for _value, _number in zip(
    (Register.AH, Register.CH, Register.DH, Register.BH), range(4), strict=True
):
    GPR[_value] = (_number, 1)
    BY_SIZE.setdefault((_number, 1), _value)
del _value
SEGMENTS = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip


@dataclass(slots=True)
class Piece:
    """Host code with the fixes in it: (position, what, retry position, write, kind of access)."""

    code: bytes = b""
    fixes: tuple[tuple[int, int, int, int, int], ...] = ()

    def __add__(self, other: Piece | bytes) -> Piece:
        if isinstance(other, bytes):
            return Piece(self.code + other, self.fixes)
        shift = len(self.code)
        moved = tuple((p + shift, w, r + shift, *rest) for p, w, r, *rest in other.fixes)
        return Piece(self.code + other.code, self.fixes + cast("Any", moved))


@dataclass(slots=True)
class Recipe:
    """How to carry out one instruction; flags are masks of ``RflagsBits``."""

    kind: int
    reads: int = 0
    kills: int = 0
    writes: int = 0
    lead: Piece = field(default_factory=Piece)
    addressing: int = NO_ADDRESS
    before: Piece = field(default_factory=Piece)
    op: Piece = field(default_factory=Piece)
    after: Piece = field(default_factory=Piece)
    clobbers: bool = False
    effect: str = ""
    operands: bytes = b""
    """Code that stores the effect's operands, for recipes that escape to it."""
    written: int = 0
    """Mask of the guest registers written."""
    named: tuple[int, ...] = ()
    """Guest registers that operands name, each as often as it occurs."""
    fixed: int = 0
    """Mask of the guest registers that the instruction uses without naming them, or as AH-BH."""


class Recipes:
    """Writes recipes for one mode and arrangement of registers.

    Parameters
    ----------
    mode : int
        Bits of ``block.MODE_*``.
    slow : bool
        Whether memory accesses take the slow path.
    swaps : int
        See ``tables.TraceRow``.
    scaled_tsc : bool
        Whether the guest's time-stamp counter has another rate than the host's.
    alone : bool
        Whether the vCPU is the machine's only one.
    """

    def __init__(
        self, mode: int, slow: bool, swaps: int, *, scaled_tsc: bool = False, alone: bool = True
    ) -> None:
        self.scaled_tsc = scaled_tsc
        self.alone = alone
        self.mode = mode
        self.cpl = mode & MODE_CPL
        self.bits = bits_of(mode)
        self.user = self.cpl == 3
        self.slow = slow
        self.step = bool(mode & MODE_STEP)
        home = list(CANONICAL)
        while swaps:
            homeless, displaced = swaps & 15, swaps >> 4 & 15
            home[homeless], home[displaced] = home[displaced], NONE
            swaps >>= 8
        self.home = tuple(home)
        self.info = InstructionInfoFactory()
        self.encoder = Encoder(64)

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
        return Piece(code, ((position, FIX_MISS, 0, int(write), kind),))

    def commit(self) -> bytes:
        """After a write in a slow recipe."""
        return emit.gs_call(THUNK["commit"]) if self.slow else b""

    def guest(self, number: int, scratch: int) -> tuple[bytes, int]:
        """Code and host register that give a guest register's value."""
        host = self.home[number]
        if host == NONE:
            return emit.gs_load(scratch, self.slot(number)), scratch
        return b"", host

    @staticmethod
    def slot(number: int) -> int:
        """Displacement of the block's place for a guest register without a host register."""
        return gs("gpr" if number in HOMELESS else "displaced", number)

    def set_guest(self, number: int, register: int) -> bytes:
        """Copy a host register into a guest register."""
        host = self.home[number]
        if host == NONE:
            return emit.gs_store(register, self.slot(number))
        return emit.mov(host, register)

    def to_linear(self, register: Reg, size: int, write: bool = False) -> bytes:
        """R9 = linear address of offset R9 in a segment, for an access of ``size`` bytes."""
        number = SEGMENTS[register]
        if self.bits != 64:
            kind = size | (number | write << 3) << 16
            return emit.mov_imm32(R10, kind) + emit.gs_call(THUNK["segment"])
        if register not in (Register.FS, Register.GS):
            return b""
        return emit.gs_load(R10, gs("seg_base", number)) + emit.lea(R9, R9, R10)

    @staticmethod
    def on_stack(i: Instruction) -> bool:
        """Whether the operand's default or explicit segment is SS."""
        return bool(i.memory_segment == Register.SS)

    def encode(self, i: Instruction) -> bytes:
        """Bytes of an instruction that was changed."""
        self.encoder.encode(i, 0)
        return self.encoder.take_buffer()

    # --- recipes ------------------------------------------------------------------------------

    def build(self, i: Instruction, raw: bytes, unavailable: str = "") -> Recipe:
        """Make a recipe; ``unavailable`` is the effect to use instead, if any."""
        if i.is_invalid:
            return self.effect("fx_ud")
        if unavailable:
            return self.effect(unavailable)
        name = MNEMONIC_NAME[i.mnemonic]
        special = SPECIAL.get(name)
        if special is not None and special.applies(i):
            recipe = special.make(self, i, name, raw)
        elif self.is_plain(i):
            flags = i.rflags_modified & STATUS
            code = raw if self.bits == 64 else self.encode(i)
            recipe = Recipe(
                PLAIN, reads=i.rflags_read & STATUS, writes=flags, kills=flags, op=Piece(code)
            )
        else:
            return self.emulate()
        self.registers(i, recipe)
        return recipe

    def is_plain(self, i: Instruction) -> bool:
        """Whether an instruction may be copied just as it is."""
        registers = [i.op_register(n) for n in range(i.op_count) if i.op_kind(n) == OpKind.REGISTER]
        return (
            i.flow_control == FlowControl.NEXT
            and len(registers) == i.op_count
            and not self.info.info(i).used_memory()
            and all(self.home[GPR[r][0]] == GPR[r][0] for r in registers if r in GPR)
        )

    def registers(self, i: Instruction, recipe: Recipe) -> None:
        """Fill in which registers the instruction names, uses and writes."""
        named = []
        for n in range(i.op_count):
            kind = i.op_kind(n)
            if kind == OpKind.REGISTER:
                register = i.op_register(n)
                if register in HIGH_BYTES:
                    recipe.fixed |= 1 << GPR[register][0] | 0xE0
                elif register in GPR:
                    named.append(GPR[register][0])
            elif kind == OpKind.MEMORY:
                named += [GPR[r][0] for r in (i.memory_base, i.memory_index) if r in GPR]
        recipe.named = tuple(named)
        if recipe.kind == EFFECT:
            return
        for entry in self.info.info(i).used_registers():
            number = GPR.get(entry.register)
            if number is not None:
                if entry.access in WRITES:
                    recipe.written |= 1 << number[0]
                if number[0] not in named:
                    recipe.fixed |= 1 << number[0]

    def effect(
        self, name: str, before: Piece | None = None, addressing: int = NO_ADDRESS, **op: int
    ) -> Recipe:
        """A call of the effect library; ``op0`` … ``op3`` are constant operands."""
        piece = before or Piece()
        for key, value in op.items():
            piece = piece + emit.gs_store_imm(gs("op", int(key[2])), value)
        return Recipe(
            EFFECT, reads=STATUS, addressing=addressing, before=piece, clobbers=True, effect=name
        )

    def emulate(self) -> Recipe:
        """Left to the VMM, which carries the instruction out on the saved state."""
        return Recipe(EFFECT, reads=STATUS, clobbers=True, effect="emulate")


NEAR_BRANCHES = {OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64}
IMMEDIATES = {
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
PARTIAL_VECTOR = {
    "VMASKMOVPS", "VMASKMOVPD", "VPMASKMOVD", "VPMASKMOVQ", "MASKMOVQ", "MASKMOVDQU", "VMASKMOVDQU",
}  # fmt: skip
"""Instructions that access only the elements that a mask selects."""
ALWAYS = {
    "NOP", "ENDBR64", "ENDBR32", "RDSSPD", "RDSSPQ", "PREFETCHNTA", "PREFETCHT0", "PREFETCHT1",
    "PREFETCHT2", "PREFETCH", "PREFETCHW", "PREFETCHWT1", "RESERVEDNOP", "XEND", "CLDEMOTE",
    "PREFETCHIT0", "PREFETCHIT1", "VMCALL", "VMMCALL", "TZCNT",
}  # fmt: skip
"""Instructions that a CPU without the feature has, too: they do nothing, ask the hypervisor, or are
another one without their prefix (BSF, for which Linux uses TZCNT where the operand isn't 0).
"""
NO_VECTOR_STATE = {
    "LFENCE", "SFENCE", "MFENCE", "PAUSE", "CLFLUSH", "CRC32", "POPCNT", "MOVNTI", "PREFETCHNTA",
    "PREFETCHT0", "PREFETCHT1", "PREFETCHT2",
}  # fmt: skip
"""Instructions of vector features that don't touch the vector registers."""
NOTHING = {"NOP", "ENDBR64", "ENDBR32", "RDSSPD", "RDSSPQ", "RESERVEDNOP"}
"""Instructions that are left out."""
Maker = Callable[[Recipes, Instruction, str, bytes], Recipe]


@dataclass(frozen=True, slots=True)
class Special:
    """The recipe of some mnemonics, and which of their instructions it is for."""

    make: Maker
    applies: Callable[[Instruction], bool]


SPECIAL: dict[str, Special] = {}


def special(
    *names: str, applies: Callable[[Instruction], bool] = lambda _: True
) -> Callable[[Maker], Maker]:
    """Register the maker of recipes for some mnemonics."""

    def register(function: Maker) -> Maker:
        for name in names:
            SPECIAL[name] = Special(function, applies)
        return function

    return register
