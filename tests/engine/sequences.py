"""Makes random programs of some dozen instructions with branches, loops, stack and memory use.

Some registers are reserved as pointers, which only move by small constants; no instruction may
write them otherwise, so that memory operands stay in the data buffer (or just beyond its pages'
edges). Flags that an instruction leaves undefined are tracked, and nothing is made that reads them.
"""

from __future__ import annotations

from typing import Any

from iced_x86 import (
    Code,
    FlowControl,
    Instruction,
    MemoryOperand,
    Mnemonic,
    OpAccess,
    OpCodeInfo,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

from engine.forms import (
    BY_BYTES,
    FULL,
    KIND,
    MNEMONIC,
    REGISTER,
    Maker,
    Skip,
    catalogue,
    random_value,
    random_vector,
)
from engine.harness import HARDWARE_BITS
from engine.native import ALIAS, DATA, END_BYTES, PAGE, Case

ALU = (
    "ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP", "TEST", "INC", "DEC", "NEG", "NOT",
    "SHL", "SHR", "SAR", "ROL", "ROR", "RCL", "RCR", "SHLD", "SHRD", "MOV", "MOVZX", "MOVSX",
    "MOVSXD", "LEA", "XCHG", "XADD", "CMPXCHG", "IMUL", "MUL", "BT", "BTS", "BTR", "BTC", "BSWAP",
    "LAHF", "SAHF", "STC", "CLC", "CMC", "CBW", "CWDE", "CDQE", "CWD", "CDQ", "CQO", "POPCNT",
    "LZCNT", "TZCNT", "ADCX", "ADOX", "MOVBE", "ANDN", "BLSR", "SARX", "MULX", "BSF", "BSR",
    "CMPXCHG8B",
)  # fmt: skip
VECTOR = (
    "MOVDQU", "MOVUPS", "MOVD", "MOVQ", "UCOMISS", "COMISD", "PMOVMSKB", "VPADDD", "VPTEST",
    "VMOVDQU", "VPXOR", "VUCOMISD", "CVTSI2SD", "CVTTSD2SI", "PEXTRQ", "PINSRD", "VMOVD",
)  # fmt: skip
CONDITIONS = (
    "O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G",
)  # fmt: skip
_WRITES = (
    OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE,
)  # fmt: skip
_SHIFTS = {
    Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAR, Mnemonic.ROL, Mnemonic.ROR, Mnemonic.RCL,
    Mnemonic.RCR, Mnemonic.SHLD, Mnemonic.SHRD,
}  # fmt: skip
_LOGIC = {Mnemonic.AND, Mnemonic.OR, Mnemonic.XOR, Mnemonic.TEST}


def _pools() -> tuple[list[list[int]], list[int]]:
    """Forms by mnemonic for plain instructions, and the vector forms."""
    by_name: dict[str, list[int]] = {}
    vector = []
    for code in catalogue()[0]:
        info = OpCodeInfo(code)
        name = MNEMONIC[info.mnemonic]
        kinds = [KIND[k] for k in info.op_kinds()]
        if any(k.startswith(("SEG", "MEM_OFFS", "MM_", "BR", "ES_")) for k in kinds):
            continue
        if name in VECTOR:
            vector.append(code)
        elif name in ALU or name[:3] == "SET" or name[:4] == "CMOV":
            short = "SETCC" if name[:3] == "SET" else "CMOVCC" if name[:4] == "CMOV" else name
            by_name.setdefault(short, []).append(code)
    for often in ("ADD", "ADC", "CMP", "INC", "SETCC", "CMOVCC", "MOV", "SUB", "TEST"):
        by_name[often + "+"] = by_name[often]
    return list(by_name.values()), vector


class SequenceMaker(Maker):
    """Makes sequences; see the module's text."""

    def __init__(self, seed: Any) -> None:
        super().__init__(seed)
        self.plain, self.vector = _pools()
        self.pool: list[int] = []
        self.reserved: set[int] = set()
        self.undefined = 0
        self.items: list[Instruction] = []
        self.depth = 0
        self.inside = False

    def registers(self, style: str, count: int) -> list[int]:
        """Operands come from the registers that are free."""
        pool = [n for n in self.pool if n < 4] if style == "legacy" else self.pool
        return [self.random.choice(pool) for _ in range(count)]

    def add(self, i: Instruction) -> Instruction:
        """Append an instruction; its IP is its label."""
        i.ip = 0x1000_0000_0000 + len(self.items)
        self.items.append(i)
        if i.mnemonic == Mnemonic.LEA and i.memory_base == Register.RIP:
            self.leaks = True
        info = i
        if info.mnemonic in _LOGIC:
            self.undefined &= ~info.rflags_modified
        elif info.mnemonic in _SHIFTS and not (
            info.op_count > 1 and info.op_kind(1) == OpKind.IMMEDIATE8 and info.immediate8 & 0x1F
        ):
            self.undefined |= info.rflags_undefined
        else:
            self.undefined = self.undefined & ~info.rflags_modified | info.rflags_undefined
        if info.mnemonic in (Mnemonic.RCL, Mnemonic.RCR):
            self.undefined |= RflagsBits.OF
        return i

    def memory(self, i: Instruction) -> None:
        """Point a memory operand at the data buffer."""
        pick = self.random
        if pick.randrange(10) == 0:
            i.memory_base = pick.choice((Register.RIP, Register.NONE))
            i.memory_displacement = DATA + pick.randrange(2 * PAGE)
            i.memory_displ_size = 8
            return
        # A routine leaves its return address alone.
        choices = self.bases if self.inside else [*self.bases, 4]
        base = pick.choice(choices if pick.randrange(5) else self.bases)
        i.memory_base = REGISTER[FULL[base]]
        displacement = pick.choice((0, 8, 16, pick.randrange(-128, 128), pick.randrange(-900, 900)))
        if pick.randrange(4) == 0:
            i.memory_index = REGISTER[FULL[self.index]]
            i.memory_index_scale = 1 << pick.randrange(4)
        elif base in self.low and pick.randrange(8) == 0:
            i.memory_base = REGISTER[BY_BYTES[4][base]]
        i.memory_displacement = displacement & (1 << 64) - 1
        i.memory_displ_size = 8
        if 4 <= RegisterExt.size(i.memory_base) < 8:
            i.memory_displacement &= 0xFFFFFFFF
            i.memory_displ_size = 4

    def ordinary(self) -> None:
        """One instruction out of the pools."""
        for _ in range(50):
            high = self.random.randrange(8) == 0
            code = self.random.choice(
                self.vector if self.random.randrange(12) == 0 else self.random.choice(self.plain)
            )
            where = "yes" if self.random.randrange(5) < 2 else ""
            try:
                i = self.build(code, "legacy" if high else "any", where, high=high)
            except Skip:
                if not where and KIND[OpCodeInfo(code).op_kind(0)] == "MEM":
                    continue
                continue
            if where:
                self.memory(i)
                if i.mnemonic in (Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC) and (
                    i.op1_kind == OpKind.REGISTER
                ):
                    continue  # its bit may be anywhere
            if self.suits(i):
                lockable = i.op0_kind == OpKind.MEMORY and OpCodeInfo(code).can_use_lock_prefix
                i.has_lock_prefix = lockable and self.random.randrange(3) == 0
                self.add(i)
                return

    def encodes(self, i: Instruction) -> bool:
        """Whether an instruction is valid."""
        try:
            self.encode(i, 0x6100_0000)
        except Skip:
            return False
        return True

    def suits(self, i: Instruction) -> bool:
        """Whether an instruction leaves the reserved registers alone and reads defined flags."""
        if i.rflags_read & self.undefined or not self.encodes(i):
            return False
        for used in self.info.info(i).used_registers():
            full = RegisterExt.full_register(used.register)
            written = RegisterExt.is_gpr(full) and used.access in _WRITES
            if written and RegisterExt.number(full) in self.reserved:
                return False
        return True

    def move_base(self) -> None:
        """Let a pointer move by a constant."""
        base = REGISTER[FULL[self.random.choice(self.bases)]]
        step = self.random.choice((1, 4, 8, 16, -8, -1, 64, -64))
        pick = self.random.randrange(4)
        if pick == 0:
            self.add(Instruction.create_reg_i32(Code.ADD_RM64_IMM8, base, step))
        elif pick == 1:
            self.add(Instruction.create_reg_i32(Code.SUB_RM64_IMM8, base, step))
        elif pick == 2:
            code = self.random.choice((Code.INC_RM64, Code.DEC_RM64))
            self.add(Instruction.create_reg(code, base))
        else:
            memory = MemoryOperand(base, displ=step, displ_size=1)
            self.add(Instruction.create_reg_mem(Code.LEA_R64_M, base, memory))

    def stack(self) -> None:
        """Push and, sometimes with something between, pop."""
        pick = self.random
        source = pick.choice([*self.pool, *self.bases, 4])
        kind = pick.randrange(4)
        if kind == 0:
            self.add(Instruction.create_i32(Code.PUSHQ_IMM32, pick.randrange(-(1 << 31), 1 << 31)))
        elif kind == 1:
            i = Instruction.create_mem(Code.PUSH_RM64, MemoryOperand(Register.RAX))
            self.memory(i)
            if self.encodes(i):
                self.add(i)
            else:
                return
        else:
            self.add(Instruction.create_reg(Code.PUSH_R64, REGISTER[FULL[source]]))
        for _ in range(pick.randrange(3)):
            self.ordinary()
        if pick.randrange(4) == 0:
            i = Instruction.create_mem(Code.POP_RM64, MemoryOperand(Register.RAX))
            self.memory(i)
            if self.encodes(i):
                self.add(i)
                return
        self.add(Instruction.create_reg(Code.POP_R64, REGISTER[FULL[pick.choice(self.pool)]]))

    def branch(self) -> None:
        """A conditional jump, JRCXZ or an indirect jump over a few instructions."""
        pick = self.random
        code = getattr(Code, f"J{pick.choice(CONDITIONS)}_REL32_64")
        if pick.randrange(8) == 0:
            code = pick.choice((Code.JRCXZ_REL8_64, Code.JECXZ_REL8_64))
        probe = Instruction.create_branch(code, 0)
        if probe.rflags_read & self.undefined:
            return
        jump = self.add(probe)
        before = self.undefined
        for _ in range(pick.randrange(1, 5)):
            self.step()
        self.undefined |= before
        self.label(jump)

    def label(self, jump: Instruction) -> None:
        """Make ``jump`` lead to what comes next."""
        jump.near_branch64 = 0x1000_0000_0000 + len(self.items)

    def loop(self) -> None:
        """A counted loop on a register that nothing else touches."""
        if self.depth:
            return
        pick = self.random
        counters = [n for n in self.pool if n != 4]
        counter = 1 if pick.randrange(3) == 0 and 1 in counters else pick.choice(counters)
        pool = self.pool
        if counter < 4 and len([n for n in pool if n < 4 and n != counter]) < 1:
            return
        self.depth += 1
        register = REGISTER[FULL[counter]]
        self.pool = [n for n in pool if n != counter]
        self.reserved.add(counter)
        # Many passes take moving pointers from page to page, and out of the buffer.
        passes = pick.choice((1, 2, 3, 4, 5, 50))
        self.add(Instruction.create_reg_i32(Code.MOV_RM64_IMM32, register, passes))
        # All flags defined, whichever way the head is reached.
        top = self.add(Instruction.create_reg_reg(Code.CMP_R64_RM64, register, register))
        for _ in range(pick.randrange(1, 6)):
            self.step()
        if counter == 1:
            self.add(Instruction.create_branch(Code.LOOP_REL8_64_RCX, top.ip))
        else:
            if pick.randrange(2):
                self.add(Instruction.create_reg(Code.DEC_RM64, register))
            else:
                self.add(Instruction.create_reg_i32(Code.SUB_RM64_IMM8, register, 1))
            self.add(Instruction.create_branch(Code.JNE_REL32_64, top.ip))
        self.reserved.discard(counter)
        self.pool = pool
        self.depth -= 1

    def call(self) -> None:
        """Call a routine that lies in the sequence, jumped over."""
        pick = self.random
        over = self.add(Instruction.create_branch(Code.JMP_REL32_64, 0))
        before = self.undefined
        start = self.items[-1].ip + 1
        self.inside = True
        for _ in range(pick.randrange(1, 4)):
            self.ordinary()
        self.inside = False
        self.add(Instruction.create(Code.RETNQ))
        after = self.undefined
        self.label(over)
        self.undefined = before
        free = list(self.pool)
        if pick.randrange(3) == 0:
            register = REGISTER[FULL[pick.choice(free)]]
            memory = MemoryOperand(Register.RIP, displ=start, displ_size=8)
            self.add(Instruction.create_reg_mem(Code.LEA_R64_M, register, memory))
            self.calls.append(len(self.items) - 1)
            self.add(Instruction.create_reg(Code.CALL_RM64, register))
        else:
            self.add(Instruction.create_branch(Code.CALL_REL32_64, start))
        self.undefined = after | before
        self.leaks = True

    def string(self) -> None:
        """A string instruction with its registers prepared."""
        pick = self.random
        if {1, 6, 7} & self.reserved:
            return
        count = pick.choice((0, 1, 3, 9, 40))
        for register in (Register.RDI, Register.RSI):
            base = REGISTER[FULL[pick.choice(self.bases)]]
            memory = MemoryOperand(base, displ=pick.randrange(-64, 64), displ_size=1)
            self.add(Instruction.create_reg_mem(Code.LEA_R64_M, register, memory))
        self.add(Instruction.create_reg_i32(Code.MOV_RM64_IMM32, Register.RCX, count))
        suffix, size = pick.choice((("B_", "8"), ("W_", "16"), ("D_", "32"), ("Q_", "64")))
        name, operands = pick.choice((
            ("MOVS", f"M{size}_M{size}"), ("STOS", f"M{size}_A"), ("LODS", f"A_M{size}"),
            ("SCAS", f"A_M{size}"), ("CMPS", f"M{size}_M{size}"),
        ))  # fmt: skip
        operands = operands.replace("A", {"8": "AL", "16": "AX", "32": "EAX", "64": "RAX"}[size])
        i = Instruction()
        i.code = getattr(Code, f"{name}{suffix}{operands}")
        for n, kind in enumerate(OpCodeInfo(i.code).op_kinds()):
            if not self.implied(i, n, KIND[kind]):
                i.set_op_register(n, REGISTER[KIND[kind]])
        repeat = pick.randrange(4)
        if pick.randrange(4) == 0:
            self.add(Instruction.create(Code.STD))
        i.has_rep_prefix = repeat == 1 or (repeat == 3)
        i.has_repne_prefix = repeat == 2
        before = self.undefined
        self.add(i)
        self.undefined |= before  # with a count of 0 the flags stay
        self.add(Instruction.create(Code.CLD))

    def step(self) -> None:
        """Something."""
        pick = self.random.randrange(30)
        if pick < 20:
            self.ordinary()
        elif pick < 23:
            self.stack()
        elif pick < 25:
            self.move_base()
        elif pick < 28:
            self.branch()
        elif self.depth == 0 and pick == 28:
            (self.loop if self.random.randrange(2) else self.string)()
        elif self.depth == 0:
            self.call()
        else:
            self.ordinary()

    def sequence(self, place: Any, length: int) -> tuple[Case, int, bool]:
        """A case, the flags that are undefined at its end, and whether it stores code addresses."""
        pick = self.random
        gpr = [random_value(pick) for _ in range(16)]
        gpr[4] = DATA + 2 * PAGE + 0x800 + pick.choice((0, 8, 4, 0x7E8, 0x7F0, 0x7FA))
        candidates = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        *self.bases, self.index = pick.sample(candidates, pick.randrange(2, 5))
        self.low = set()
        for base in self.bases:
            page = pick.choice((DATA, DATA, ALIAS)) + pick.randrange(2) * PAGE
            inside = pick.choice((0x400, 0x800, 0x800, 0xFF8, 0xFF1, 0x1000))
            gpr[base] = page + inside + pick.choice((0, 0, 1, 4))
            if pick.randrange(25) == 0:
                gpr[base] = DATA + 4 * PAGE - pick.randrange(0, 200)
            if gpr[base] < 1 << 32:
                self.low.add(base)
        gpr[self.index] = pick.randrange(-20, 20) & (1 << 64) - 1
        self.reserved = {4, self.index, *self.bases}
        self.pool = [n for n in range(16) if n not in self.reserved]
        self.items, self.calls, self.leaks, self.undefined, self.depth = [], [], False, 0, 0
        while len(self.items) < length:
            self.step()
        # Branches to the end need something there.
        self.add(Instruction.create(Code.NOPD))
        address = place(len(self.items) * 12 + END_BYTES)
        code = self.assemble(address)
        case = Case(address, code, len(code), gpr)
        case.flags = pick.getrandbits(12) & 0x8D5 | 0x202
        case.vector = random_vector(pick, False)
        ignore = sum(bit for name, bit in HARDWARE_BITS.items() if self.undefined & name)
        case.text = f"at {address:#x}: " + "; ".join(str(i) for i in self.items)
        return case, ignore, self.leaks

    def assemble(self, address: int) -> bytes:
        """All instructions at an address, branches resolved."""
        ips: dict[int, int] = {}
        code = b""
        for final in (False, True):
            code = b""
            places = {}
            for n, item in enumerate(self.items):
                i = item.copy()
                here = address + len(code)
                places[item.ip] = here
                if i.flow_control in (
                    FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH,
                    FlowControl.CALL,
                ) and i.op0_kind == OpKind.NEAR_BRANCH64:  # fmt: skip
                    i.near_branch64 = ips.get(i.near_branch64, here)
                elif n in self.calls:
                    i.memory_displacement = ips.get(i.memory_displacement, here)
                try:
                    self.encoder.encode(i, here)
                except ValueError as error:
                    self.encoder.take_buffer()
                    raise Skip(str(error)) from error
                code += self.encoder.take_buffer()
            ips = places
            assert final or ips
        return code
