"""Components of the vector state, and where each lies in an XSAVE area.

``Cpu.xsave`` is an area in standard format, laid out as the guest's CPUID says. As in any such area
a component whose bit in XSTATE_BV is clear is in its initial configuration, whatever its bytes are;
only MXCSR always counts.

Standard offsets are each processor's own; these are AMD's. They are also those of the compacted
format with all components, which makes them good on every host: see ``Vcpu.xcomp_bv``.

Sources: Intel SDM vol. 1, 13.1 to 13.5; AMD APM vol. 2, 11.5.
"""

from __future__ import annotations

from typing import NamedTuple

from ringfence.native.dialect import native_inline


class Component(NamedTuple):
    """One of the components behind the header; ``offset`` and ``size`` in bytes."""

    number: int
    offset: int
    size: int


MXCSR, MXCSR_MASK, X87_REGISTERS, XMM, HEADER, XCOMP_BV = 24, 28, 32, 160, 512, 520
LEGACY_BYTES = 576
"""Legacy region and header."""
AVX = Component(2, 576, 256)
OPMASK = Component(5, 832, 64)
ZMM_HI256 = Component(6, 896, 512)
HI16_ZMM = Component(7, 1408, 1024)
EXTENDED = (AVX, OPMASK, ZMM_HI256, HI16_ZMM)

# Bits of XCR0, XSTATE_BV and XCOMP_BV.
X87_STATE, SSE_STATE, AVX_STATE, AVX512_STATE = 0x1, 0x2, 0x4, 0xE0
COMPACTED = 1 << 63
"""In XCOMP_BV: the area is in compacted format."""
LAST = HI16_ZMM.number


@native_inline
def component_size(number: int) -> int:
    """Bytes of a component behind the header, 0 for none."""
    if number == AVX.number:
        return AVX.size
    if number == OPMASK.number:
        return OPMASK.size
    if number == ZMM_HI256.number:
        return ZMM_HI256.size
    if number == HI16_ZMM.number:
        return HI16_ZMM.size
    return 0


@native_inline
def component_offset(number: int) -> int:
    """Where a component lies in standard format."""
    if number == AVX.number:
        return AVX.offset
    if number == OPMASK.number:
        return OPMASK.offset
    if number == ZMM_HI256.number:
        return ZMM_HI256.offset
    return HI16_ZMM.offset


@native_inline
def area_bytes(features: int) -> int:
    """Size of the area for a set of components: header, and up to the last of them."""
    if features & AVX512_STATE:
        return HI16_ZMM.offset + HI16_ZMM.size
    if features & AVX_STATE:
        return AVX.offset + AVX.size
    return LEGACY_BYTES
