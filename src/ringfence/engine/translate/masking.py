"""Which elements of its memory operand a masked EVEX instruction accesses.

With an opmask, most instructions leave the elements alone whose bit is clear: they are neither read
nor written, and a page that holds nothing else can't fault (fault suppression, SDM vol. 2, 2.8 and
the exception classes of table 2-44 and following: those whose names end in NF lack it). What to do
then is the slow path's (``dispatch.slow_access``); here a form learns that it has to be done.
"""

from __future__ import annotations

from ringfence.engine.translate.block import MASK_EACH, MASK_PACKED
from ringfence.engine.translate.recipe import MNEMONIC_NAME
from ringfence.engine.translate.x86 import (
    Instruction,
    MemorySize,
    MemorySizeExt,
    OpKind,
    Register,
    RegisterExt,
)

_ALL_READ = (
    "VPERM", "VPSHUFB", "VPSHUFD", "VPSHUFHW", "VPSHUFLW", "VPUNPCK", "VUNPCK", "VPACK", "VPALIGNR",
    "VALIGN", "VSHUF", "VINSERT", "VEXTRACT", "VMOVDDUP", "VMOVSHDUP", "VMOVSLDUP", "VPCONFLICT",
    "VDBPSADBW", "VMPSADBW", "VPMULTISHIFT", "VGF2P8AFFINE", "VPMADDWD", "VPMADDUBSW",
    "VCVTNE2PS2BF16",
)  # fmt: skip
"""Beginnings of the mnemonics that access all of their operand whatever the mask (E4NF, …)."""
_BY_COUNT = {
    "VPSLLW", "VPSLLD", "VPSLLQ", "VPSRLW", "VPSRLD", "VPSRLQ", "VPSRAW", "VPSRAD", "VPSRAQ",
}  # fmt: skip
"""Shifts: the same where the third operand, the count, is in memory."""
_PACKED = ("VCOMPRESS", "VPCOMPRESS", "VEXPAND", "VPEXPAND")
_GROUPED = {
    "VPDPBUSD": 4, "VPDPBUSDS": 4, "VPDPWSSD": 4, "VPDPWSSDS": 4, "VDPBF16PS": 4, "VFMADDCPH": 4,
    "VFCMADDCPH": 4, "VFMULCPH": 4, "VFCMULCPH": 4, "VPMULDQ": 8, "VPMULUDQ": 8,
}  # fmt: skip
"""Instructions whose mask counts groups of elements: bytes of a group."""
_MEMORY_SIZE_NAME = {v: k for k, v in vars(MemorySize).items() if isinstance(v, int)}


def _reads_all(name: str) -> bool:
    return name.startswith(_ALL_READ) and name != "VPSHUFBITQMB"


def masked_fields(i: Instruction, memory: int) -> dict[str, int]:
    """``masking``, ``element`` and ``elements`` of the `Form`; ``memory``: index of the operand."""
    name = MNEMONIC_NAME[i.mnemonic]
    if i.op_mask == Register.NONE or _reads_all(name):
        return {}
    if name in _BY_COUNT and memory == 2:
        return {}
    size = MemorySizeExt.size(i.memory_size)
    element = _GROUPED.get(name, MemorySizeExt.element_size(i.memory_size))
    masking, elements = MASK_EACH, size // element
    if i.is_broadcast:
        # BROADCAST512_FLOAT32 is one number for 512 / 32 elements.
        bits = int(_MEMORY_SIZE_NAME[i.memory_size].removeprefix("BROADCAST").split("_")[0])
        elements = bits // (8 * element)
    elif "BROADCAST" in name:
        elements = RegisterExt.size(i.op0_register) // element
    elif name.startswith(_PACKED):
        vector = i.op_register(next(n for n in range(2) if i.op_kind(n) == OpKind.REGISTER))
        masking, elements = MASK_PACKED, RegisterExt.size(vector) // element
    return {"masking": masking, "element": element.bit_length() - 1, "elements": elements}
