"""Instructions that touch memory element by element, carried out in Python on the saved state.

Gathers, scatters, masked moves and byte-mask stores access only the elements that a mask selects,
each with its own page and its own fault; they are rare enough that leaving guest code for each is
no loss. (Other instructions with an opmask go on natively: see ``masking``.)
Sources: Intel SDM vol. 2, VPGATHERDD, VPGATHERQD, VGATHERDPS, VMASKMOV, VPMASKMOV, MASKMOVDQU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringfence.cpu.components import (
    AVX,
    AVX512_STATE,
    EXTENDED,
    HEADER,
    HI16_ZMM,
    OPMASK,
    X87_REGISTERS,
    XMM,
    ZMM_HI256,
)
from ringfence.cpu.reset import FCW_RESET
from ringfence.cpu.state import CS, EXIT, FAULT, FS, GP, GS, OK, SS_FAULT
from ringfence.engine.translate.recipe import SEGMENTS
from ringfence.engine.translate.x86 import (
    Decoder,
    Instruction,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

if TYPE_CHECKING:
    from ringfence.engine.translate.x86 import RegisterType as Reg

_TOP = 0x3800
SSE = 1
"""Number of the component of the XMM registers."""
_GATHERS = {
    Mnemonic.VPGATHERDD: (4, 4), Mnemonic.VPGATHERDQ: (4, 8),
    Mnemonic.VPGATHERQD: (8, 4), Mnemonic.VPGATHERQQ: (8, 8),
    Mnemonic.VGATHERDPS: (4, 4), Mnemonic.VGATHERDPD: (4, 8),
    Mnemonic.VGATHERQPS: (8, 4), Mnemonic.VGATHERQPD: (8, 8),
}  # fmt: skip
"""Bytes of an index and of an element."""
_SCATTERS = {
    Mnemonic.VPSCATTERDD: (4, 4), Mnemonic.VPSCATTERDQ: (4, 8),
    Mnemonic.VPSCATTERQD: (8, 4), Mnemonic.VPSCATTERQQ: (8, 8),
    Mnemonic.VSCATTERDPS: (4, 4), Mnemonic.VSCATTERDPD: (4, 8),
    Mnemonic.VSCATTERQPS: (8, 4), Mnemonic.VSCATTERQPD: (8, 8),
}  # fmt: skip
_MASKED = {
    Mnemonic.VMASKMOVPS: 4, Mnemonic.VMASKMOVPD: 8, Mnemonic.VPMASKMOVD: 4, Mnemonic.VPMASKMOVQ: 8,
}  # fmt: skip
_BYTES = {Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.VMASKMOVDQU}
_M64 = (1 << 64) - 1

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], int]
Probe = Callable[[int], int]


class _Fault(Exception):
    """An access failed; the exception is pending in the CPU's state."""


class _Emulation:
    """One instruction on its way; see ``emulate``."""

    def __init__(
        self, view: Any, i: Instruction, bits: int, read: Read, write: Write, probe: Probe
    ) -> None:
        self.view = view
        self.i = i
        self.bits = bits
        self.area = memoryview(view.xsave).cast("B")
        if not self.area[HEADER] & 1:
            struct.pack_into("<H22x", self.area, 0, FCW_RESET)
            self.area[X87_REGISTERS:XMM] = bytes(XMM - X87_REGISTERS)
        self.wide = bool(view.xcr0 & AVX512_STATE)
        self._read, self._write, self._probe = read, write, probe

    def read(self, address: int, size: int) -> bytes:
        """Guest memory."""
        if self._read(address, size) != OK:
            raise _Fault
        return (int(self.view.value) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def vector(self, register: Reg) -> bytes:
        """Content of an XMM, YMM or ZMM register, or of an MMX register."""
        n = RegisterExt.number(register)
        if RegisterExt.is_mm(register):
            at = X87_REGISTERS + 16 * (n - self.top() & 7)
            return bytes(self.area[at : at + 8])
        value = b"".join(self.part(*each) for each in self.parts(n))
        return value[: RegisterExt.size(register)]

    def set_vector(self, register: Reg, value: bytes | bytearray, *, whole: bool = True) -> None:
        """Set a vector register; ``whole``: the rest to zero, as VEX and EVEX instructions do."""
        value = bytes(value)
        if whole:
            value = value.ljust(64 if self.wide else 32, b"\0")
        for component, offset, size in self.parts(RegisterExt.number(register)):
            piece, value = value[:size], value[size:]
            if piece:
                self.use(component)
                self.area[offset : offset + len(piece)] = piece

    @staticmethod
    def parts(n: int) -> list[tuple[int, int, int]]:
        """Where a vector register is, from its low end: component, offset, bytes."""
        if n > 15:
            return [(HI16_ZMM.number, HI16_ZMM.offset + 64 * (n - 16), 64)]
        return [
            (SSE, XMM + 16 * n, 16),
            (AVX.number, AVX.offset + 16 * n, 16),
            (ZMM_HI256.number, ZMM_HI256.offset + 32 * n, 32),
        ]

    def part(self, component: int, offset: int, size: int) -> bytes:
        """Bytes of a component, which are zero where it is in its initial configuration."""
        if not self.area[HEADER] >> component & 1:
            return bytes(size)
        return bytes(self.area[offset : offset + size])

    def use(self, component: int) -> None:
        """Make a component one that is not in its initial configuration."""
        if not self.area[HEADER] >> component & 1:
            at, size = next(
                ((c.offset, c.size) for c in EXTENDED if c.number == component), (XMM, 256)
            )
            self.area[at : at + size] = bytes(size)
            self.area[HEADER] |= 1 << component

    def opmask(self) -> int:
        """The instruction's opmask register."""
        at = OPMASK.offset + 8 * RegisterExt.number(self.i.op_mask)
        return int.from_bytes(self.part(OPMASK.number, at, 8), "little")

    def set_opmask(self, value: int) -> None:
        """The same, changed."""
        at = OPMASK.offset + 8 * RegisterExt.number(self.i.op_mask)
        self.use(OPMASK.number)
        self.area[at : at + 8] = value.to_bytes(8, "little")

    def top(self) -> int:
        """The x87 stack's top."""
        return (int(struct.unpack_from("<H", self.area, 2)[0]) & _TOP) >> 11

    def general(self, register: Reg) -> int:
        """A general register's full content; 0 for none."""
        if register == Register.NONE:
            return 0
        return int(self.view.gpr[RegisterExt.number(RegisterExt.full_register(register))])

    def linear(self, offset: int, size: int, segment: Reg) -> int:
        """Linear address of an effective address of ``size`` bytes."""
        offset &= (1 << 8 * size) - 1
        if self.bits != 64:
            return (offset + int(self.view.seg_base[SEGMENTS[segment]])) & 0xFFFFFFFF
        number = {Register.FS: FS, Register.GS: GS}.get(segment)
        base = int(self.view.seg_base[number]) if number is not None else 0
        return (offset + base) & _M64

    def address(self, index: int = 0) -> int:
        """Linear address of the memory operand, with ``index`` in place of a vector register."""
        i = self.i
        base, register = i.memory_base, i.memory_index
        if base in (Register.RIP, Register.EIP):
            return self.linear(i.memory_displacement, RegisterExt.size(base), i.memory_segment)
        parts = (part for part in (base, register) if RegisterExt.is_gpr(part))
        size = next(map(RegisterExt.size, parts), i.memory_displ_size)
        if not RegisterExt.is_vector_register(register):
            index = self.general(register)
        offset = self.general(base) + index * i.memory_index_scale + i.memory_displacement
        return self.linear(offset, size, i.memory_segment)

    # --- the instructions ----------------------------------------------------------------------

    def gather(self, index_size: int, size: int) -> None:
        """Elements in order; what is done when one faults stays done."""
        i = self.i
        target, mask_register = i.op0_register, i.op2_register
        indices = self.vector(i.memory_index)
        count = min(len(indices) // index_size, RegisterExt.size(target) // size)
        value = bytearray(self.vector(target))
        mask = bytearray(self.vector(mask_register))
        for n in range(count):
            at = n * size
            if mask[at + size - 1] & 0x80:
                raw = indices[n * index_size : (n + 1) * index_size]
                address = self.address(int.from_bytes(raw, "little", signed=True))
                try:
                    value[at : at + size] = self.read(address, size)
                except _Fault:
                    if n:
                        self.set_vector(target, value, whole=False)
                        self.set_vector(mask_register, mask, whole=False)
                    raise
            mask[at : at + size] = bytes(size)
        self.set_vector(target, value[: count * size])
        self.set_vector(mask_register, b"")

    def elements(self, index_size: int, size: int) -> list[tuple[int, int]]:
        """Number and address of each element that an EVEX gather's or scatter's mask selects."""
        i = self.i
        scatter = i.op0_kind == OpKind.MEMORY
        data = RegisterExt.size(i.op1_register if scatter else i.op0_register)
        indices = self.vector(i.memory_index)
        mask = self.opmask()
        chosen = []
        for n in range(min(len(indices) // index_size, data // size)):
            if mask >> n & 1:
                raw = indices[n * index_size : (n + 1) * index_size]
                address = self.address(int.from_bytes(raw, "little", signed=True))
                chosen.append((n, address))
        return chosen

    def evex_gather(self, index_size: int, size: int) -> None:
        """As `gather`, with an opmask, whose bits fall as elements arrive."""
        target, mask = self.i.op0_register, self.opmask()
        value = bytearray(self.vector(target))
        for n, address in self.elements(index_size, size):
            try:
                value[n * size : (n + 1) * size] = self.read(address, size)
            except _Fault:
                if mask != self.opmask():
                    self.set_vector(target, value)
                self.set_opmask(mask)
                raise
            mask &= ~(1 << n)
        count = min(RegisterExt.size(self.i.memory_index) // index_size, len(value) // size)
        self.set_vector(target, value[: count * size])
        self.set_opmask(0)

    def scatter(self, index_size: int, size: int) -> None:
        """Elements in order; what is done when one faults stays done."""
        mask = self.opmask()
        value = self.vector(self.i.op1_register)
        for n, address in self.elements(index_size, size):
            element = int.from_bytes(value[n * size : (n + 1) * size], "little")
            if self._write(address, size, element) != OK:
                self.set_opmask(mask)
                raise _Fault
            mask &= ~(1 << n)
        self.set_opmask(0)

    def masked_load(self, size: int) -> None:
        """Elements that the mask does not select are zero and not accessed."""
        i = self.i
        mask = self.vector(i.op1_register)
        address = self.address()
        value = bytearray(len(mask))
        for at in range(0, len(mask), size):
            if mask[at + size - 1] & 0x80:
                value[at : at + size] = self.read((address + at) & _M64, size)
        self.set_vector(i.op0_register, value)

    def masked_store(self, address: int, mask: bytes, value: bytes, size: int) -> None:
        """All selected elements or, where one of their pages faults, none."""
        chosen = [at for at in range(0, len(mask), size) if mask[at + size - 1] & 0x80]
        pages = set()
        for at in chosen:
            for part in (address + at, address + at + size - 1):
                if part >> 12 not in pages:
                    pages.add(part >> 12)
                    first = max(address + at, part & ~0xFFF)
                    if self._probe(first & _M64) != OK:
                        raise _Fault
        for at in chosen:
            element = int.from_bytes(value[at : at + size], "little")
            if self._write((address + at) & _M64, size, element) != OK:
                raise _Fault

    def byte_mask(self) -> None:
        """MASKMOVQ and MASKMOVDQU: to where RDI points."""
        i = self.i
        size = {OpKind.MEMORY_SEG_EDI: 4, OpKind.MEMORY_SEG_DI: 2}.get(i.op0_kind, 8)
        address = self.linear(int(self.view.gpr[7]), size, i.memory_segment)
        self.masked_store(address, self.vector(i.op2_register), self.vector(i.op1_register), 1)
        if i.mnemonic == Mnemonic.MASKMOVQ:
            self.enter_mmx()

    def enter_mmx(self) -> None:
        """What every MMX instruction does to the x87 state: all valid, the top at 0."""
        area, top = self.area, self.top()
        at = X87_REGISTERS
        old = [bytes(area[at + 16 * n : at + 16 * n + 16]) for n in range(8)]
        for n in range(8):
            area[X87_REGISTERS + 16 * n : X87_REGISTERS + 16 * n + 16] = old[n - top & 7]
        struct.pack_into("<H", area, 2, struct.unpack_from("<H", area, 2)[0] & ~_TOP)
        area[4] = 0xFF
        area[HEADER] |= 1

    def run(self) -> bool:
        """Carry the instruction out; False if it is none of ours."""
        i = self.i
        if i.mnemonic in _GATHERS:
            gather = self.gather if i.op_mask == Register.NONE else self.evex_gather
            gather(*_GATHERS[i.mnemonic])
        elif i.mnemonic in _SCATTERS:
            self.scatter(*_SCATTERS[i.mnemonic])
        elif i.mnemonic in _MASKED:
            size = _MASKED[i.mnemonic]
            if i.op0_kind == OpKind.MEMORY:
                mask, value = self.vector(i.op1_register), self.vector(i.op2_register)
                self.masked_store(self.address(), mask, value, size)
            else:
                self.masked_load(size)
        elif i.mnemonic in _BYTES:
            self.byte_mask()
        else:
            return False
        return True


def emulate(view: Any, bits: int, read: Read, write: Write, probe: Probe) -> int:
    """Carry out the instruction at ``rip`` on the saved state.

    Parameters
    ----------
    view : Cpu
        The state, vector registers in ``xsave``.
    bits : int
        Default size of code: 64, 32 or 16. Segments' limits are not checked here.
    read, write : callable
        ``read(address, size)`` leaves up to 8 bytes in ``view.value``, ``write(address, size,
        value)`` stores them; both return ``OK``, or ``FAULT`` with the exception pending.
    probe : callable
        ``probe(address)`` tells in the same way whether a write would be allowed.

    Returns
    -------
    int
        OK, FAULT with the exception pending, or EXIT for an instruction that is not known here.
    """
    code = b""
    start = view.rip if bits == 64 else view.rip + view.seg_base[CS]
    while len(code) < 15:
        if read((start + len(code)) & (_M64 if bits == 64 else 0xFFFFFFFF), 1) != OK:
            break
        code += bytes((view.value & 0xFF,))
    i = Decoder(bits, code, ip=view.rip).decode()
    view.next_rip = i.next_ip
    try:
        return OK if _Emulation(view, i, bits, read, write, probe).run() else EXIT
    except _Fault:
        if i.memory_segment == Register.SS and view.exc_vector == GP:
            view.exc_vector = SS_FAULT
        return FAULT
