"""Decoding and encoding of x86 instructions: the one place where iced-x86 is known.

iced-x86 is stable but rarely released, so that everything which depends on it is to be found by
looking at who uses these names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    DecoderError,
    Encoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MandatoryPrefix,
    MemorySize,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpCodeOperandKind,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterType

__all__ = [
    "Code",
    "CpuidFeature",
    "Decoder",
    "DecoderError",
    "Encoder",
    "FlowControl",
    "Instruction",
    "InstructionInfoFactory",
    "MandatoryPrefix",
    "MemorySize",
    "MemorySizeExt",
    "Mnemonic",
    "OpAccess",
    "OpCodeOperandKind",
    "OpKind",
    "Register",
    "RegisterExt",
    "RegisterType",
    "RflagsBits",
]
